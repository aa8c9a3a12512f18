# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go while others run: each is answered as it would be alone."""

import queue

import pytest

from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.control.base import Action, Row
from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.testing import tiny_target
from ospec_jax.types import Draft

CAPACITY = 256
DRAFT = Draft({})


@pytest.fixture(scope="module")
def engine():
    target = tiny_target(32)
    tree = TreeConfig(num_steps=2)
    plain = Action(TreeConfig(num_steps=0))
    drafter = build_drafter("prediction", None, tree, target.numerics)
    config = StepConfig(target.config, target.numerics, tree)
    return Engine(config, target.params, drafter, menu={plain: drafter})


def request(number, num_tokens=12, **values):
    return Request(str(number), (1, 2, 3 + number), num_tokens, **values)


@pytest.fixture(scope="module")
def alone(engine):
    def answer(asked):
        return next(engine.serve([asked], lambda: DRAFT)).token_ids

    return answer


def finish(batch, action):
    """Runs until nobody is left; the answers by id."""
    answers = {}
    while not batch.is_idle:
        num_ahead = 0
        if batch.has_work:
            batch.dispatch(DRAFT, action)
            num_ahead = 1
        answers |= {done.request.id: done for done in batch.collect(num_ahead)}
    return answers


def test_requests_arrive_while_others_run(engine, alone):
    asked = [request(i, 8 + 3 * i) for i in range(5)]
    arriving = queue.SimpleQueue()
    batch = Batch(engine, 3, CAPACITY)
    batch.admit(asked[0], DRAFT)
    answers = {}
    for number in range(60):
        if number % 3 == 0 and number // 3 + 1 < len(asked):
            arriving.put(asked[number // 3 + 1])
        # An empty queue does not keep the others from running.
        while batch.num_free and not arriving.empty():
            batch.admit(arriving.get_nowait(), DRAFT)
        if batch.has_work:
            batch.dispatch(DRAFT, engine.actions[number % 2])
        answers |= {done.request.id: done for done in batch.collect()}

    assert batch.is_idle
    assert {id: done.token_ids for id, done in answers.items()} == {
        r.id: alone(r) for r in asked
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_cancelled_row_is_free_at_once_and_disturbs_nobody(engine, alone, batch_size):
    asked = [request(i, 30) for i in range(batch_size)]
    batch = Batch(engine, batch_size, CAPACITY)
    for one in asked:
        batch.admit(one, DRAFT)
    for _ in range(2):
        batch.dispatch(DRAFT, engine.action)

    assert batch.cancel(asked[0])
    assert batch.num_free == 1
    assert not batch.cancel(asked[0])
    later = request(7, 10)
    batch.admit(later, DRAFT)
    answers = finish(batch, engine.action)
    assert {id: done.token_ids for id, done in answers.items()} == {
        r.id: alone(r) for r in [*asked[1:], later]
    }


def test_what_does_not_fit_is_refused_and_loses_nothing(engine, alone):
    batch = Batch(engine, 1, CAPACITY)
    long = request(0, CAPACITY)
    predicted = request(1, prediction_ids=(5, 6))
    assert not batch.fits(long)
    with pytest.raises(ConfigError, match="begin one that fits"):
        batch.admit(long, DRAFT)
    with pytest.raises(ConfigError, match="room for a prediction"):
        batch.admit(predicted, DRAFT)

    batch.admit(request(2), DRAFT)
    with pytest.raises(ConfigError, match="all 1 rows are taken"):
        batch.admit(request(3), DRAFT)
    answers = finish(batch, engine.action)
    assert answers["2"].token_ids == alone(request(2))


def test_an_action_that_was_not_compiled_is_refused(engine):
    batch = Batch(engine, 1, CAPACITY)
    batch.admit(request(0), DRAFT)
    with pytest.raises(ConfigError, match="not on this engine's menu"):
        batch.dispatch(DRAFT, Action(TreeConfig(num_steps=9)))
    assert finish(batch, engine.action)["0"].token_ids


def test_controllers_know_rows_unless_two_share_their_numbers(engine, monkeypatch):
    """Which matters where children are drawn."""
    hot = SamplingConfig(1.0)
    batch = Batch(engine, 3, CAPACITY)
    batch.admit(request(0), DRAFT)
    batch.admit(request(1, sampling=hot, seed=5), DRAFT)
    list(batch.collect())
    contexts = [row.context for row in batch.rows]
    assert batch.rows == tuple(Row(False, 4, 11, context) for context in contexts)
    assert {context.domain for context in contexts} == {""}
    assert all(context.opening for context in contexts)
    batch.admit(request(2, sampling=hot, seed=5), DRAFT)
    assert len(batch.rows) == 3
    monkeypatch.setattr(type(engine), "is_drawn", True)
    assert batch.rows == ()


def test_a_long_prompt_is_read_between_the_steps_of_others(engine, alone):
    long = Request("long", tuple(range(1, 31)) * 5, 12)
    batch = Batch(engine, 2, CAPACITY)
    batch.admit(request(0, 40), DRAFT)
    batch.enter(long)
    # Its row is kept for it, and it has none yet.
    assert batch.num_free == 0
    assert len(batch.rows) == 1
    num_chunks = 0
    while batch.is_reading:
        batch.read_on(DRAFT)
        batch.dispatch(DRAFT, engine.action)
        list(batch.collect())
        num_chunks += 1

    assert num_chunks == 3
    assert len(batch.rows) == 2
    answers = finish(batch, engine.action)
    assert answers["long"].token_ids == alone(long)
    assert answers["0"].token_ids == alone(request(0, 40))


def test_who_leaves_while_the_prompt_is_read_leaves_nothing(engine, alone):
    long = Request("long", tuple(range(1, 31)) * 5, 12)
    batch = Batch(engine, 1, CAPACITY)
    batch.enter(long)
    batch.read_on(DRAFT)
    assert batch.cancel(long)
    assert batch.is_idle
    assert not batch.is_reading
    batch.admit(request(1), DRAFT)
    assert finish(batch, engine.action)["1"].token_ids == alone(request(1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_caches_grow_under_running_rows(engine, alone, batch_size):
    asked = [request(i, 40) for i in range(batch_size)]
    long = Request("long", tuple(range(1, 31)) * 10, 12)
    batch = Batch(engine, batch_size, CAPACITY)
    for one in asked[1:]:
        batch.admit(one, DRAFT)
    # This one has read a part of its prompt, and others have steps under way.
    batch.enter(asked[0])
    for _ in range(2):
        if batch.has_work:
            batch.dispatch(DRAFT, engine.action)

    assert not batch.fits(long)
    batch.grow(512)
    assert batch.fits(long)
    batch.grow(CAPACITY)
    assert batch.capacity == 512
    while batch.is_reading:
        batch.read_on(DRAFT)
    answers = finish(batch, engine.action)
    batch.admit(long, DRAFT)
    answers |= finish(batch, engine.action)
    assert {id: done.token_ids for id, done in answers.items()} == {
        r.id: alone(r) for r in [*asked, long]
    }


@pytest.mark.parametrize("who", ["all", "one"])
def test_controllers_hear_nothing_of_who_is_left_out(engine, alone, who):
    told = []
    hear = lambda action, outcome: told.append(outcome)
    batch = Batch(engine, 3, CAPACITY, on_step=hear)
    asked = [request(i, 20, is_left_out=who == "all" or i == 1) for i in range(3)]
    for one in asked:
        batch.admit(one, DRAFT)
    answers = finish(batch, engine.action)
    assert {id: done.token_ids for id, done in answers.items()} == {
        one.id: alone(one) for one in asked
    }
    if who == "all":
        assert not told
    else:
        # The others are heard of, to the end of their answers.
        assert {len(outcome.num_accepted) for outcome in told} <= {0, 1, 2}
        assert sum(outcome.num_ended for outcome in told) == 2
