# SPDX-License-Identifier: Apache-2.0
"""Selections on each domain alone, and on mixtures of them in several orders."""

import json

import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.replay import mixtures
from ospec_jax.replay.mixtures import (
    BLOCKS,
    SHUFFLED,
    compare_mixtures,
    markdown_table,
    streams_of,
)
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.router import Routes
from ospec_jax.replay.selection import BEST, BEST_EACH

DEPTH = 2
META = PoolMeta("t", "f", "float32", ("code", "math"), DEPTH, 21)
RATES = {"code": (0.8, 0.3), "math": (0.3, 0.8)}


def made_up(num_each=30, num_tokens=20):
    rng = np.random.default_rng(0)
    answers = []
    for domain, rates in RATES.items():
        for i in range(num_each):
            hits = (rng.uniform(size=(num_tokens, 2)) < rates).astype(np.int8)
            places = range(num_tokens)
            runs = [np.cumprod(hits[t : t + DEPTH], axis=0).sum(0) for t in places]
            name = f"{domain}-{i}"
            answers.append(PoolAnswer(name, domain, name, hits, np.array(runs)))
    return answers


def test_streams_hold_the_same_answers_in_other_orders():
    answers = made_up()
    found, other = streams_of(answers, 0), streams_of(answers, 1)
    assert list(found) == ["code", "math", BLOCKS, SHUFFLED]
    names = lambda stream: [one.id for one in stream]
    assert sorted(names(found[SHUFFLED])) == sorted(names(answers))
    assert sorted(names(found[BLOCKS])) == sorted(names(answers))
    domains = [one.domain for one in found[BLOCKS]]
    assert sum(a != b for a, b in zip(domains, domains[1:], strict=False)) == 1
    assert {one.domain for one in found["math"]} == {"math"}
    assert names(found[SHUFFLED]) != names(other[SHUFFLED])
    assert names(streams_of(answers, 0)[BLOCKS]) == names(found[BLOCKS])
    with pytest.raises(ConfigError, match="of the domain 'math' alone"):
        streams_of(found["math"], 0)


def test_every_row_has_every_stream(monkeypatch):
    monkeypatch.setattr(mixtures, "NUM_FIRST", 45)
    answers = made_up()
    right = {one.content: int(one.domain == "math") for one in answers}
    routes = Routes(right, 1.0, {})
    names = ["normalhedge", "normalhedge:domain", "ucb:request"]
    done = []
    rows = compare_mixtures(META, answers, names, (0, 1), routes, done.append)
    assert done == [1, 2]
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == ["code", "math", BEST, BEST_EACH, "router", *names]
    first = f"first 45 of {SHUFFLED}"
    for row in rows:
        assert list(row["streams"]) == ["code", "math", BLOCKS, SHUFFLED, first]
        assert {len(values) for values in row["streams"].values()} == {2}
    mean = lambda name, stream: np.mean(by_name[name]["streams"][stream])
    # Alone each domain has its expert; of a mixture neither is best everywhere.
    for domain in RATES:
        assert mean(BEST, domain) == mean(domain, domain) == mean("router", domain)
        assert mean("normalhedge", domain) > 0.95 * mean(BEST, domain)
    for stream in (BLOCKS, SHUFFLED, first):
        assert by_name[BEST]["regret"][stream] == [0, 0]
        assert mean("normalhedge:domain", stream) > 1.2 * mean("code", stream)
        assert mean("ucb:request", stream) < mean("normalhedge:domain", stream)
    assert np.ptp(by_name["router"]["streams"][SHUFFLED]) == 0
    assert np.ptp(by_name["normalhedge"]["streams"][SHUFFLED]) > 0

    json.dumps(rows)
    table = markdown_table(rows).split("\n")
    assert len(table) == 2 + len(rows)
    assert "±" not in table[2].rsplit("|", 2)[0]
    assert "±" in table[7]
