# SPDX-License-Identifier: Apache-2.0
"""Streams: their schedules, their seeds, and what they refuse."""

from collections import Counter

import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt, read_prompts, write_prompts
from ospec_jax.data.streams import KINDS, build_stream


def rows(name, count):
    row = lambda i: {"prompt": f"{name} question {i}", "id": f"{name}-{i}"}
    return [parse_prompt(row(i), "unnamed") for i in range(count)]


DOMAINS = {name: rows(name, 300) for name in ("math", "sql", "code")}
ONE = {"math": DOMAINS["math"]}


def stream(kind, num_prompts=240, **changes):
    domains = ONE if kind == "single" else DOMAINS
    return build_stream(domains, kind, num_prompts, **changes)


def of(prompts):
    return [prompt.domain for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_is_used_once_and_the_seed_decides(kind):
    first, again, other = stream(kind), stream(kind), stream(kind, seed=1)
    assert first == again
    assert first != other
    assert len({prompt.id for prompt in first}) == len(first) == 240
    for prompt in first:
        assert prompt.id.startswith(prompt.domain)


def test_shifts_are_whole_blocks():
    assert of(stream("shifts")) == ["math"] * 80 + ["sql"] * 80 + ["code"] * 80
    assert set(Counter(of(stream("shifts", 100))).values()) == {33, 34}


def test_alternating_comes_back():
    domains = of(stream("alternating", block=20))
    assert domains[:60] == ["math"] * 20 + ["sql"] * 20 + ["code"] * 20
    assert domains[:60] == domains[60:120]


def test_gradual_mixing_moves_its_odds():
    domains = np.array(of(stream("gradual", 300)))
    share = lambda name, part: np.mean(domains[part] == name)
    assert share("math", slice(0, 30)) > 0.8 > share("math", slice(60, 90))
    assert share("sql", slice(135, 165)) > 0.8
    assert share("code", slice(270, 300)) > 0.8
    assert share("code", slice(0, 150)) == 0


def test_fast_changes_with_every_prompt_and_evenly():
    domains = of(stream("fast", 300))
    assert all(a != b for a, b in zip(domains, domains[1:], strict=False))
    # Which of the two others follows is a fair coin.
    step = {"math": "sql", "sql": "code", "code": "math"}
    pairs = list(zip(domains, domains[1:], strict=False))
    assert 0.4 < np.mean([step[a] == b for a, b in pairs]) < 0.6


@pytest.mark.parametrize(("domains", "kind", "num_prompts", "message"), [
    ({"math": rows("math", 10)}, "single", 11, "has 10 prompts"),
    (DOMAINS, "shifts", 1000, "needs 333 of them"),
    (DOMAINS, "single", 10, "leave out the others"),
    (DOMAINS, "sideways", 10, "unknown stream 'sideways'"),
    (ONE, "fast", 10, "'math' is alone"),
    (DOMAINS, "shifts", 0, "num_prompts 0"),
    ({"a": rows("x", 3), "b": rows("x", 3)}, "shifts", 2, "have the id 'x-"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_refused(domains, kind, num_prompts, message):
    with pytest.raises(ConfigError, match=message):
        build_stream(domains, kind, num_prompts)


def test_prompts_survive_their_file(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}]
    turns += [{"role": "user", "content": "Why é?"}]
    chat = parse_prompt({"messages": turns, "id": "chat", "domain": "x"}, "")
    edit = parse_prompt({"prompt": "Fix it", "id": "e", "prediction": "It works"}, "")
    prompts = [*stream("fast", 5), chat, edit]
    write_prompts(tmp_path / "new" / "stream.jsonl", prompts)
    assert read_prompts(tmp_path / "new" / "stream.jsonl") == prompts
