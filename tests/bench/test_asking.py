# SPDX-License-Identifier: Apache-2.0
"""Conversations in a benchmark, and prompts that do not fit, on a tiny target."""

import dataclasses

import pytest

from ospec_jax import Session, load_draft
from ospec_jax.bench import asking
from ospec_jax.bench.asking import num_turns
from ospec_jax.bench.harness import run_bench
from ospec_jax.bench.peers import Peer
from ospec_jax.bench.rows import to_rows
from ospec_jax.bench.runs import BenchConfig, Contender
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.data.conversations import Conversation
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.testing import tiny_target

CONFIG = BenchConfig(modes=("autoregressive", "static"), max_new_tokens=8)
ITEMS = [
    Conversation("talk", ("One?", "Two?"), "multi-turn conversation"),
    Conversation("ask", ("Three?",), "qa"),
]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return load_draft("ngram", target)


def test_turns_follow_each_other_with_the_answers_between(target, draft):
    asked = []

    def generate(prompt_ids, max_new_tokens, stop_ids):
        asked.append(target.tokenizer.decode(list(prompt_ids)))
        return 1

    begun = []
    on_result = lambda number, name, _: begun.append((number, name))
    peers = [Peer("other", generate)]
    run = run_bench(target, draft, ITEMS, CONFIG, on_result, peers=peers)

    assert [p.id for p in run.prompts] == ["talk", "talk-turn-2", "ask"]
    assert run.conversations == ["talk", "talk", "ask"]
    assert run.is_complete
    assert not run.left_out
    assert num_turns(ITEMS) == 3

    # All of them get the same second turn, which holds plain decoding's first answer.
    plain = run.modes["autoregressive"].results
    content = [message["content"] for message in run.prompts[1].messages]
    assert content == ["One?", plain[0].text.strip(), "Two?"]
    assert plain[0].text.strip()
    for mode in run.modes.values():
        assert [result.prompt for result in mode.results] == run.prompts
    assert asked[0] == asked[1]  # the first one warms up
    assert plain[0].text.strip() in asked[2]
    assert [row.get("num_mismatched_outputs") for row in to_rows(run)] == [0, 0, None]

    # Each turn is a round, in rotating order.
    assert begun == [
        (1, "autoregressive"),
        (1, "static"),
        (1, "other"),
        (2, "static"),
        (2, "other"),
        (2, "autoregressive"),
        (3, "other"),
        (3, "autoregressive"),
        (3, "static"),
    ]
    ids = target.tokenizer.encode("One?", add_special_tokens=False)
    assert run.prompt_lengths[0] > len(ids)
    assert run.prompt_lengths[1] > run.prompt_lengths[0]


def test_what_does_not_fit_is_left_out_by_name(target, draft):
    # With the longest answer that may come between, the second turn does not fit.
    items = [*ITEMS, Conversation("long", ("x" * 390, "y" * 60), "rag")]
    items += [parse_prompt({"prompt": "z" * 600}, "longer")]
    with pytest.warns(UserWarning, match="2 of 4 do not fit .*: long, longer"):
        run = run_bench(target, draft, items, CONFIG)
    assert run.left_out == ["long", "longer"]
    assert len(run.prompts) == 3
    assert to_rows(run)[0]["left_out"] == ["long", "longer"]
    with pytest.raises(ConfigError, match="1 of 1 do not fit .* shorten"):
        run_bench(target, draft, items[-1:], CONFIG)


def test_conversations_are_asked_one_at_a_time(target, draft):
    config = dataclasses.replace(CONFIG, batch_size=2)
    with pytest.raises(ConfigError, match="batch size of 1"):
        run_bench(target, draft, ITEMS, config)


def test_turns_need_a_template(target, draft):
    config = dataclasses.replace(CONFIG, is_raw=True)
    with pytest.raises(ConfigError, match="'talk-turn-2' has 3 turns, but .* raw"):
        run_bench(target, draft, ITEMS, config)


def test_caches_of_all_sizes_between_are_compiled_before(target, draft, monkeypatch):
    """The second turn needs 256 slots or 512, as long as the answer before is."""
    warm_up = Session.warm_up
    compiled = []

    def spy(session, capacities, *args):
        compiled.append(capacities)
        return warm_up(session, capacities, *args)

    monkeypatch.setattr(Session, "warm_up", spy)
    items = [Conversation("talk", ("x" * 60, "y" * 40), "qa")]
    config = dataclasses.replace(CONFIG, max_new_tokens=64)
    run = run_bench(target, draft, items, config)
    assert compiled == [[256, 512]] * 2
    assert len(run.prompts) == 2


def test_a_turn_that_grew_too_long_is_left_out(target, draft, monkeypatch):
    """Text that is no language may take more tokens than those it came from."""
    monkeypatch.setattr(asking, "_SLACK", -CONFIG.max_new_tokens)
    # With an empty answer between, the second turn would just fit.
    talk = lambda length: Conversation("long", ("x" * length, "y"), "rag")
    shortest = len(encode(talk(1).ask([""]), target.tokenizer))
    room = target.config.max_position - CONFIG.max_new_tokens - shortest
    items = [talk(1 + room), ITEMS[1]]
    with pytest.warns(UserWarning, match="long-turn-2 is left out: too long"):
        run = run_bench(target, draft, items, CONFIG)
    assert run.left_out == ["long-turn-2"]
    assert [p.id for p in run.prompts] == ["long", "ask"]
    assert run.is_complete


def test_an_early_end_keeps_the_turns_that_all_have_answered(target, draft):
    count = iter(range(99))
    run = run_bench(target, draft, ITEMS, CONFIG, should_stop=lambda: next(count) == 1)
    assert [p.id for p in run.prompts] == ["talk"]
    assert not run.is_complete
    assert to_rows(run)[0]["spec_bench"]["by_task"]["overall"]["num_questions"] == 1


def test_drafts_are_compared_on_conversations(target, draft):
    config = dataclasses.replace(CONFIG, modes=("autoregressive",))
    contenders = {"ngram": Contender(draft, TreeConfig(num_steps=2))}
    run = run_bench(target, None, ITEMS, config, contenders=contenders)
    assert [len(mode.results) for mode in run.modes.values()] == [3, 3]
