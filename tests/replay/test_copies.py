# SPDX-License-Identifier: Apache-2.0
"""Copies that lose tokens fill a pool up, and the best drafter stays the best."""

import dataclasses

import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.replay.copies import (
    as_experts,
    markdown_table,
    plot,
    regret_by_size,
    spread_of,
    with_copies,
)
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.selection import replay

DEPTH = 3
META = PoolMeta("t", "f", "float32", ("b", "a"), DEPTH, 41)


def chains_of(hits):
    """What chains have accepted whose tokens are right where these are."""
    places = range(len(hits))
    return np.array([np.cumprod(hits[t : t + DEPTH], axis=0).sum(0) for t in places])


def made_up(num_answers=30, num_tokens=40):
    rng = np.random.default_rng(0)
    answers = []
    for i in range(num_answers):
        hits = (rng.uniform(size=(num_tokens, 2)) < [0.5, 0.8]).astype(np.int8)
        answers.append(PoolAnswer(str(i), "", str(i), hits, chains_of(hits)))
    return answers


def test_copies_lose_tokens_wherever_a_chain_began():
    answers = made_up()
    meta, found = with_copies(META, answers, 6)
    assert meta.drafters == (
        "a",
        "b",
        "a, copy 1",
        "b, copy 1",
        "a, copy 2",
        "b, copy 2",
    )
    for one, before in zip(found, answers, strict=True):
        # The first are the members themselves, the best of them first.
        np.testing.assert_array_equal(one.hits[:, :2], before.hits[:, ::-1])
        np.testing.assert_array_equal(one.accepted[:, :2], before.accepted[:, ::-1])
        assert (one.hits[:, 2] <= one.hits[:, 0]).all()
        # A token that a copy has wrong ends every chain that comes to it.
        np.testing.assert_array_equal(one.accepted, chains_of(one.hits))
    hits = np.concatenate([one.hits for one in found])
    kept = hits.sum(axis=0) / hits[:, [0, 1, 0, 1, 0, 1]].sum(axis=0)
    np.testing.assert_allclose(kept, (1, 1, 0.7, 0.7, 0.7, 0.7), atol=0.05)
    assert not np.array_equal(hits[:, 2], hits[:, 4])


def test_a_pool_is_the_beginning_of_larger_ones():
    answers = made_up()
    _, small = with_copies(META, answers, 4, seed=3)
    _, large = with_copies(META, answers, 7, seed=3)
    _, other = with_copies(META, answers, 4, seed=4)
    for one, more, different in zip(small, large, other, strict=True):
        np.testing.assert_array_equal(one.accepted, more.accepted[:, :4])
        assert not np.array_equal(one.accepted, different.accepted)


def test_regret_is_against_the_best_which_stays_the_best(tmp_path):
    answers = made_up()
    rows = regret_by_size(META, answers, ["hedge", "ucb"], [2, 8], seeds=(0, 1))
    assert [(row["name"], row["num_drafters"]) for row in rows] == [
        ("hedge", 2),
        ("ucb", 2),
        ("hedge", 8),
        ("ucb", 8),
    ]
    best = replay(META, answers, "fixed:1").steps.sum()
    assert {steps for row in rows for steps in row["best_steps"]} == {best}
    regret = {
        (row["name"], row["num_drafters"]): np.mean(row["regret"]) for row in rows
    }
    # Judging hardly minds how many there are, and trying does.
    assert regret["ucb", 8] > regret["ucb", 2] + 50
    assert regret["hedge", 8] < regret["ucb", 8] / 3
    table = markdown_table(rows).split("\n")
    assert table[0] == "| selector | N = 2 | N = 8 |"
    assert len(table) == 4
    assert plot(rows, tmp_path / "sizes.png").stat().st_size
    assert spread_of([1.0, 3.0], digits=1) == "2.0 ± 1.4"
    assert spread_of([1.0], digits=1) == "1.0"


def test_made_up_experts_are_at_home_in_one_domain():
    answers = [
        dataclasses.replace(one, domain="xy"[i % 2]) for i, one in enumerate(made_up())
    ]
    meta, found = as_experts(META, answers)
    assert meta.drafters == ("made up, at home in x", "made up, at home in y")
    for i, (one, before) in enumerate(zip(found, answers, strict=True)):
        home = i % 2
        np.testing.assert_array_equal(one.hits[:, home], before.hits[:, 1])
        np.testing.assert_array_equal(one.accepted[:, home], before.accepted[:, 1])
        assert one.hits[:, 1 - home].sum() < 0.9 * before.hits[:, 1].sum()
        np.testing.assert_array_equal(one.accepted, chains_of(one.hits))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ((1,), "leaves nothing to select"),
        ((4, 0.0), "use one in"),
        ((4, 1.5), "use one in"),
    ],
)
def test_pools_that_cannot_be_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        with_copies(META, made_up(2), *how)
