# SPDX-License-Identifier: Apache-2.0
"""Answers of both models at work are plain decoding's, whatever the draft is.

Both sides are on one device here, which changes no token; `on_devices.py` has them on
several.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import PromptTooLongError, Request, StopPoint
from ospec_jax.decoding.step import StepConfig
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.parallel.pearl import Parallel
from ospec_jax.parallel.places import Place, Places, find_places
from ospec_jax.parallel.rounds import Chunk
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_target
from ospec_jax.types import Draft

VOCAB = 24
LENGTH = 3
PROMPTS = [(1, 2, 3), (7,), tuple(map(int, np.arange(70) % VOCAB))]
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.95, seed=5)


def here():
    place = Place(jax.devices()[0])
    return Places(place, place)


@functools.cache
def target():
    return tiny_target(VOCAB, num_layers=1)


@functools.cache
def draft(kind):
    """The target itself, something like it, or another model altogether."""
    share = {"twin": 0.0, "relative": 0.1, "stranger": 1.0}[kind]
    other = tiny_target(VOCAB, seed=3, num_layers=1)
    blend = lambda a, b: (1 - share) * a + share * b
    params = jax.tree.map(blend, target().params, other.params)
    model = dataclasses.replace(other, params=params)
    meta = Meta.create(target(), None, "model", card={"model": kind})
    return LoadedDraft(Draft(params), meta, model)


@functools.cache
def pair(kind="relative", length=LENGTH, children="topk"):
    return Parallel(target(), draft(kind), here(), length, children)


def requests(sampling=SamplingConfig()):
    return [Request(str(i), ids, 30, sampling) for i, ids in enumerate(PROMPTS)]


@functools.cache
def plain(sampling=SamplingConfig()):
    """What plain decoding says, and why it ended."""
    config = StepConfig(
        target().config,
        target().numerics,
        TreeConfig(num_steps=0),
        stop_ids=target().stop_ids,
    )
    done = Engine(config, target().params).serve(requests(sampling))
    return [(tuple(one.token_ids), one.finish_reason) for one in done]


def answers(pair, sampling=SamplingConfig()):
    done = [pair.answer(one, i) for i, one in enumerate(requests(sampling))]
    return done, [(one.token_ids, one.finish_reason) for one in done]


@pytest.mark.parametrize(
    ("kind", "length"),
    [("twin", 3), ("relative", 3), ("stranger", 3), ("relative", 1)],
)
def test_greedy_answers_are_plain_decodings(kind, length):
    done, found = answers(pair(kind, length))
    assert found == plain()
    rounds = [round for one in done for round in one.rounds]
    # What is rejected is what the next round has nothing pending for.
    for one in done:
        judged = [round.num_judged for round in one.rounds]
        kept = [round.is_kept for round in one.rounds]
        assert judged == [1, *(length if x else 1 for x in kept[:-1])]
    if kind == "twin":
        assert all(round.is_kept for round in rounds)
        assert max(round.num_emitted for round in rounds) == length
    else:
        assert any(not round.is_kept for round in rounds)


def test_sampled_answers_are_plain_decodings_of_the_same_seed():
    done, found = answers(pair(), SAMPLED)
    assert found == plain(SAMPLED)
    rounds = [round for one in done for round in one.rounds]
    assert {round.num_judged for round in rounds} == {1, LENGTH}
    assert sum(round.num_accepted for round in rounds) > 5


def test_each_side_has_one_program_for_each_kind_of_block():
    own = pair()
    answers(own)
    drafting = own.drafting._programs
    programs = [drafting.draft_chunk, drafting.read]
    programs += [x for key, y in own.target._programs.items() for x in y if key]
    # Other pairs share those of the target: one for each structure of the arguments.
    assert max(program._cache_size() for program in programs) <= 2


def test_an_answer_of_one_token_takes_no_round():
    answer = pair().answer(Request("short", (1, 2, 3), 1))
    assert answer.token_ids == plain()[0][0][:1]
    assert not answer.rounds
    assert answer.tokens_per_round == answer.acceptance_rate == 0


class Script:
    """Drafts what it is told to, and remembers the order of what happens."""

    def __init__(self, tokens, log):
        self.tokens = tokens
        self.log = log

    def begin(self, request, ordinal, capacity):
        self.log.append("begin")

    def ask(self, newest, position):
        self.log.append("ask")
        assert newest == tuple(self.tokens[position - 1 : position + 1])
        self.place = position + 1

    def take(self):
        self.log.append("take")
        chunk = self.tokens[self.place : self.place + LENGTH]
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(chunk)] = chunk
        return Chunk(padded)


def test_both_sides_are_asked_before_either_is_waited_for(monkeypatch):
    tokens = [*PROMPTS[0], *plain()[0][0]]
    log = []
    own = Parallel(target(), None, here(), LENGTH, drafting=Script(tokens, log))
    score = own.target.score

    def logged(previous):
        log.append("score")
        score(previous)

    monkeypatch.setattr(own.target, "score", logged)
    answer = own.answer(requests()[0])
    assert answer.token_ids == plain()[0][0]
    assert log == ["begin", *["ask", "score", "take"] * len(answer.rounds)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sampling=SamplingConfig(presence_penalty=1.0)), "penalties"),
        (dict(num_log_probs=0), "log-probabilities"),
        (dict(find_stop=lambda ids: StopPoint(1)), "stop strings"),
        (dict(prediction_ids=(1,)), "a prediction"),
    ],
)
def test_requests_that_rounds_cannot_answer_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        pair().answer(dataclasses.replace(requests()[0], **changes))


def test_a_request_that_does_not_fit_is_refused():
    with pytest.raises(PromptTooLongError, match="shorten the prompt"):
        pair().answer(Request("long", (1,) * 500, 100))


def test_drafts_that_read_the_target_are_refused():
    of_target = load_draft("ngram", target())
    with pytest.raises(ConfigError, match="'ngram' cannot go on behind"):
        Parallel(target(), of_target, here())
    with pytest.raises(ConfigError, match="nobody drafts"):
        Parallel(target(), None, here())
    with pytest.raises(ConfigError, match="children is 'hub'"):
        Parallel(target(), draft("twin"), here(), children="hub")
    with pytest.raises(ConfigError, match="num_speculative_tokens is 0"):
        Parallel(target(), draft("twin"), here(), 0)


def test_one_device_for_both_is_refused_with_what_to_do():
    count = jax.device_count()
    with pytest.raises(ConfigError, match="JAX_NUM_CPU_DEVICES=2"):
        find_places(f"data={count}")
    if count == 1:
        with pytest.raises(ConfigError, match="jax has 1"):
            find_places()


def test_places_that_overlap_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: ["a", "b", "c"])
    assert [str(place) for place in find_places()] == ["a", "c"]
    assert [str(place) for place in find_places(draft_device=1)] == ["a", "b"]
    with pytest.raises(ConfigError, match="so use 1 to 2"):
        find_places(draft_device=0)
    with pytest.raises(ConfigError, match="leave one of the two out"):
        find_places(draft_mesh="model=2", draft_device=1)
    with pytest.raises(ConfigError, match="takes 2 and the draft 2"):
        find_places("model=2", "model=2")
