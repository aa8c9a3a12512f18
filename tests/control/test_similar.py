# SPDX-License-Identifier: Apache-2.0
"""A request begins with a vote of those whose prompts were alike."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from ospec_jax import TreeConfig
from ospec_jax.control.base import Action, Chooser, Context, Outcome, Row
from ospec_jax.control.lengths import Windows
from ospec_jax.control.selection import select
from ospec_jax.control.selectors import JUDGING, build_selector
from ospec_jax.control.similar import by_similarity, embedding_of, similarities
from ospec_jax.control.weighting import fixed_hedge

DEPTH = 3
ACTIONS = tuple(Action(TreeConfig(num_steps=DEPTH), i) for i in range(2))
RNG = np.random.default_rng(0)
COMMON = 5 * RNG.normal(size=16)
TOPICS = RNG.normal(size=(2, 16))


def context(topic, scope=0):
    """Of a prompt of a topic; all prompts have most of their direction in common."""
    states = COMMON + TOPICS[topic] + 0.2 * RNG.normal(size=16)
    return Context(scope, embedding=embedding_of(7 * states))


def hear(chooser, one, best, count=20):
    for _ in range(count):
        chances = np.ones((1, DEPTH, 2)) * (np.arange(2) == best)
        part = Outcome((0,), Windows(chances, chances))
        action = chooser.choose([Row(False, 8, 8, one)])
        chooser.observe(action, part._replace(parts=((one, part),)))


def chosen(chooser, one):
    return chooser.choose([Row(False, 8, 8, one)]).drafter


def taught(name, num=6):
    """Of two topics in turns, each with a draft that is best for it."""
    chooser = Chooser.start(build_selector(name, ACTIONS), 1)
    for _ in range(num):
        for topic in (0, 1, 1):
            hear(chooser, context(topic), topic)
    return chooser


@pytest.mark.parametrize("name", JUDGING)
def test_a_new_request_has_the_drafter_of_those_that_are_alike(name):
    chooser = taught(f"{name}:similar")
    assert chooser.controller.reads_prompts
    for _ in range(4):
        for topic in (0, 1):
            one = context(topic)
            assert chosen(chooser, one) == topic
            # A vote is worth no more than some windows: evidence of its own counts.
            hear(chooser, one, 1 - topic, 20)
            assert chosen(chooser, one) == 1 - topic
            hear(chooser, context(topic), topic)
    # Who says nothing of itself has what all have taught; all begin so.
    plain = Chooser.start(build_selector(name, ACTIONS), 1)
    fresh = Chooser.start(build_selector(f"{name}:similar", ACTIONS), 1)
    for _ in range(30):
        hear(plain, Context(), 1)
        hear(fresh, Context(), 1)
    assert fresh.state.keys == ()
    assert chosen(fresh, context(0)) == chosen(plain, Context()) == 1
    json.dumps(chooser.report())


def test_similarity_is_that_beside_what_all_prompts_share():
    keys = [f"similar 0 {context(topic).embedding}" for topic in (0, 0, 1, 1)]
    found = similarities(keys, f"similar 3 {context(1).embedding}")
    assert np.all(found[2:] > 0.5)
    assert np.all(found[:2] < 0)
    # Of another target's prompts nothing follows.
    other = f"similar 0 {embedding_of(np.ones(8))}"
    assert similarities([*keys, other], keys[3])[2] > 0.5


def test_an_embedding_is_a_direction():
    states = COMMON + TOPICS[0]
    assert embedding_of(states) == embedding_of(3 * states)
    vector = np.frombuffer(bytes.fromhex(embedding_of(states)), "<f2")
    assert_allclose(vector, states / np.linalg.norm(states), atol=1e-3)
    for nothing in (np.zeros(4), np.full(4, np.nan)):
        assert embedding_of(nothing) == ""


def test_the_ring_is_bounded_and_the_oldest_goes():
    rule = by_similarity(select(ACTIONS, fixed_hedge(0.5)), max_kept=3)
    chooser = Chooser.start(rule, 1)
    asked = [context(i % 2) for i in range(5)]
    for one in asked:
        hear(chooser, one, 0, 1)
    kept = [key.rpartition(" ")[2] for key in chooser.state.keys]
    assert kept == [one.embedding for one in asked[2:]]


def test_a_checkpoint_keeps_it_and_a_scopes_prompts_go_with_it():
    chooser = taught("normalhedge:similar", 2)
    for scope in (1, 12):
        hear(chooser, context(0, scope), 0)
    saved = json.loads(json.dumps(chooser.to_json()))
    other = Chooser.start(build_selector("normalhedge:similar", ACTIONS), 1)
    other.resume(saved)
    assert other.state == chooser.state
    assert chosen(other, context(0)) == 0

    count = len(other.state.keys)
    assert not other.forget([7])
    assert other.forget([1])
    assert len(other.state.keys) == len(other.state.own) == count - 1
    assert any(key.startswith("similar 12 ") for key in other.state.keys)
    assert other.forget(None)
    assert other.state.keys == other.state.own == ()
    assert other.state.shared == chooser.state.shared
