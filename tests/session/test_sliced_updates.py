# SPDX-License-Identifier: Apache-2.0
"""An update in slices is finished or dropped whole, whatever comes in between."""

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session
from ospec_jax.config import SamplingConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.online.trainer import learn_from
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

WINDOWS = LearnerConfig(
    "gradient", update_interval=8, batch_size=2, window=32, num_steps=2,
    optimizer="sgd", learning_rate=0.05,
)  # fmt: skip
LEARNERS = {"gradient": WINDOWS, "head": LearnerConfig("head")}
LONG = 150
"""Tokens of an answer of several parts."""


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(params=LEARNERS)
def learner(request):
    return LEARNERS[request.param]


def open_session(target, draft, learner=WINDOWS, **given):
    return Session(target, draft, learner=learner, num_predicted_tokens=0, **given)


def answer(session, text="Add 1 to 1.", count=LONG):
    """One as it is decoded, which nothing was learned from yet."""
    prompt = parse_prompt({"prompt": text}, "a")
    pairs = session.requests([prompt], count, SamplingConfig())
    (request,) = [pair[1] for pair in pairs]
    served = session.served_draft
    (completion,) = session.engine.serve([request], lambda: served, 1)
    return prompt, completion, session.text_of(completion)


def begin(session, **named):
    """Takes an answer in, and some slices of its update."""
    found = answer(session)
    session.take_in(*found, in_slices=True, **named)
    assert session.is_updating
    session.go_on()
    session.go_on()
    assert session.is_updating
    return found


def host(tree):
    return jax.tree.map(np.array, tree)


def learned(session):
    state = session.state
    return host((state.learned.params, state.trainer, session.served_draft.params))


def assert_same(left, right):
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(left, right):
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_what_comes_of_it_is_what_the_update_at_once_gives(target, draft, learner):
    whole = open_session(target, draft, learner)
    sliced = open_session(target, draft, learner)
    before = learned(whole)
    found = answer(whole)
    whole.take_in(*found)
    assert begin(sliced)[1].token_ids == found[1].token_ids
    assert_same(learned(sliced)[0], before[0])
    assert_same(learned(sliced)[2], before[2])
    assert (sliced.version, sliced.reports) == (0, [])
    sliced.finish_update()
    assert (sliced.version, len(sliced.reports)) == (1, 1)
    assert_close(learned(sliced), learned(whole))
    with pytest.raises(AssertionError):
        assert_close(learned(sliced), before)


def test_one_that_is_dropped_has_never_been(target, draft, learner):
    session = open_session(target, draft, learner)
    other = open_session(target, draft, learner)
    begin(session)
    state = learned(session)
    session.drop_update()
    assert not session.is_updating
    assert session.version == 0
    assert session.go_on() == 0.0
    assert_same(learned(session), state)
    # What it was given is whole, and can be learned from.
    if learner is WINDOWS:
        begin(other)
        other.finish_update()
        wanted = learned(other)
        now = session._learned()
        trainer = session.trainer
        assert trainer.is_due(now.state)
        updated = trainer.update(*now[:4], answer(session)[1])
        assert_close(updated[0].learner.params, wanted[1].learner.params)


ENDS = {
    "forgotten scope": lambda session: session.drop_text([1]),
    "all forgotten": lambda session: session.forget_traffic(),
    "another draft": lambda session: session.begin_again(session.draft),
}


@pytest.mark.parametrize("how", ENDS)
def test_it_is_dropped_whole_where_its_ground_is_taken_away(
    target, draft, learner, how
):
    session = open_session(target, draft, learner)
    before = learned(session)
    begin(session)
    ENDS[how](session)
    assert not session.is_updating
    after = learned(session)
    assert_same(after[0], before[0])
    assert_same(after[2], before[2])
    assert session.reports == []


def test_a_forgotten_scopes_text_is_not_learned_from_afterwards(target, draft):
    session = open_session(target, draft)
    begin(session)
    session.forget_traffic()
    assert float(np.sum(session.state.traffic.ring.segments.weight)) == 0.0


def test_who_has_nothing_forgotten_does_not_disturb_it(target, draft):
    session = open_session(target, draft)
    begin(session)
    session.enroll("alice")
    assert session.is_updating


def test_another_answer_is_learned_behind_it(target, draft, learner):
    session = open_session(target, draft, learner)
    begin(session)
    session.take_in(*answer(session, "Name a colour."))
    assert (session.is_updating, session.version) == (False, 2)


def test_a_checkpoint_meanwhile_is_that_of_before(target, draft, learner, tmp_path):
    session = open_session(target, draft, learner)
    begin(session)
    session.save(tmp_path)
    before = learned(session)
    session.finish_update()
    other = open_session(target, draft, learner)
    other.resume(tmp_path)
    assert_same(learned(other), before)
    # And the end is saved, though nothing was answered since.
    session.save(tmp_path)
    other.resume(tmp_path)
    assert other.version == session.version == 1
    assert_same(learned(other)[0], learned(session)[0])


def test_it_waits_to_be_promoted_like_any_other(target, draft, learner):
    session = open_session(target, draft, learner, promote="manual")
    session.take_in(*answer(session))
    assert session.num_waiting == 1
    begin(session)
    served = host(session.state.waiting.params)
    session.promote()
    assert session.is_updating
    assert session.num_waiting == 0
    session.finish_update()
    assert session.num_waiting == 1
    # What was promoted is served on, and no later update wrote into it.
    assert_same(session.draft.params, served)


def test_one_that_fails_is_dropped(target, draft, monkeypatch):
    session = open_session(target, draft)
    begin(session)
    state = learned(session)

    def fail():
        yield
        raise MemoryError("no room")

    slices = fail()
    next(slices)
    session._update.slices = slices
    with pytest.raises(MemoryError):
        session.go_on()
    assert not session.is_updating
    assert_same(learned(session), state)


def test_without_slices_nothing_else_happens(target, draft, learner):
    """What a session that does not serve learns is what its trainer gives at once."""
    session = open_session(target, draft, learner)
    now = session._learned()
    now = jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, now)
    found = answer(session)
    wanted = host(learn_from(session.trainer, now, found[1])[:1])
    session.take_in(*found)
    assert not session.is_updating
    assert_same(session.state.trainer, wanted[0])
