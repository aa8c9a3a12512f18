# SPDX-License-Identifier: Apache-2.0
"""A conversation's next turn goes on from the caches of the one before."""

import dataclasses

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import SamplingConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.request import Request
from ospec_jax.session.live import Live
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

MIB = 2**20
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=1.0)


@pytest.fixture(scope="module", params=["float32", "int8"])
def any_target(request):
    return tiny_target(precision=request.param)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def draft_for(target):
    # It looks back no farther than at the last 24 tokens.
    return random_head(target, sliding_window=24)


def live_of(target, kept_bytes=MIB * 64, batch_size=1, **options):
    how = dict(tree=TreeConfig(num_steps=2), batch_size=batch_size) | options
    session = Session(target, draft_for(target), **how)
    return Live(session, (256, 512), kept_bytes=kept_bytes), session


def text(seed, length):
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(3, 250, length).tolist())


def answer(live, ids, sampling=GREEDY, num_tokens=30, **options):
    request = Request("a", ids, num_tokens, sampling, seed=5, **options)
    live.join(request)
    answers = []
    # The step that was sent ahead is waited for, too.
    while not live.is_idle:
        answers += live.turn()

    (done,) = answers
    return done


def converse(live, sampling, num_turns=3):
    """Answers, turn by turn, and how much of each prompt was not run."""
    ids = text(0, 90)
    answers = []
    reused = []
    for turn in range(num_turns):
        done = answer(live, ids, sampling)
        answers.append(done.token_ids)
        reused.append(done.num_reused)
        ids = (*ids, *done.token_ids, *text(turn, 100))

    return answers, reused


@pytest.mark.parametrize(
    "any_target",
    ["float32", pytest.param("int8", marks=pytest.mark.thorough)],
    indirect=True,
)
def test_turns_are_answered_as_if_nothing_were_kept(any_target):
    live, session = live_of(any_target)
    fresh, _ = live_of(any_target, kept_bytes=0)
    for sampling in (GREEDY, SAMPLED):
        answers, reused = converse(live, sampling)
        expected, not_reused = converse(fresh, sampling)
        assert answers == expected
        assert not_reused == [0, 0, 0]
        # The third turn outgrows the cache that the second one was kept in.
        lengths = np.cumsum([90 + len(a) for a in answers[:2]])
        lengths[1] += 10
        assert reused[1:] == [lengths[0] - 1, lengths[1] - 1]
        session.forget_traffic()
        assert live.kept_status() == {"num_rows": 0, "num_bytes": 0}


@pytest.mark.parametrize(
    "any_target",
    ["float32", pytest.param("int8", marks=pytest.mark.thorough)],
    indirect=True,
)
def test_what_is_kept_has_the_bits_of_a_prompt_that_was_run(any_target):
    learner = LearnerConfig("gradient", update_every_prompts=100)
    live, session = live_of(any_target, learner=learner)
    ids = text(1, 150)
    first = answer(live, ids)
    ids = (*ids, *first.token_ids, *text(2, 20))
    done = answer(live, ids)
    assert done.num_reused > 128

    ids = (*ids, *done.token_ids)
    assert session.kept is not None
    found = session.kept.find(0, (*ids, 7))
    assert found is not None
    assert found.num_tokens == len(ids) - 1
    # The draft runs over all of it, whatever its window, as over a row that is kept.
    reading = session.engine.begin(Request("b", ids), 256, False, 0)
    reading = reading._replace(is_to_keep=True)
    while not reading.is_done:
        reading = session.engine.read_on(session.served_draft, reading)

    run = reading.state
    kept = found.caches
    length = found.num_tokens
    for name in ("keys", "values"):
        for pair in zip(
            jax.tree.leaves(getattr(kept.cache, name)),
            jax.tree.leaves(getattr(run.cache, name)),
            strict=True,
        ):
            own, other = (np.moveaxis(x, 3 if name == "keys" else 2, 0) for x in pair)
            np.testing.assert_array_equal(own[:length], other[:length])

    inner = kept.draft_cache["drafter"], run.draft_cache["drafter"]
    own, other = (np.asarray(cache.values[0])[:, :, :length] for cache in inner)
    np.testing.assert_array_equal(own, other)
    for name in ("tokens", "taps", "hidden"):
        own, other = (getattr(x.feedback, name)[0, :length] for x in (kept, run))
        np.testing.assert_array_equal(own, other)


def test_a_turn_that_was_edited_goes_on_from_what_is_left(target):
    live, _ = live_of(target)
    fresh, _ = live_of(target, kept_bytes=0)
    first = answer(live, text(3, 180))
    assert first.num_reused == 0
    # The draft looks back into what lies before the place of the edit.
    edited = (*text(3, 180)[:100], *text(4, 60))
    done = answer(live, edited, SAMPLED)
    assert done.num_reused == 99
    assert done.token_ids == answer(fresh, edited, SAMPLED).token_ids
    # In a longer row than it was kept in, and in a shorter one.
    long = answer(live, (*edited, *text(5, 200)))
    assert long.num_reused == 159
    assert long.capacity == 512
    again = answer(live, (*edited, 7))
    assert again.num_reused == 159
    assert again.capacity == 256
    assert again.token_ids == answer(fresh, (*edited, 7)).token_ids


def test_the_padding_of_a_last_chunk_moves_nothing(target):
    live, session = live_of(target)
    ids = text(6, 215)
    room = 512 - session.engine.num_extra_slots
    answer(live, ids, num_tokens=5)
    # From 219 on a whole number of chunks ends behind the last slot.
    ids = (*ids, *text(7, room - 2 - len(ids)))
    done = answer(live, ids, num_tokens=2)
    assert done.num_reused == 192
    fresh, _ = live_of(target, kept_bytes=0)
    assert done.token_ids == answer(fresh, ids, num_tokens=2).token_ids


def test_neighbours_go_on_each_from_their_own(target):
    live, session = live_of(target, batch_size=3)
    fresh, _ = live_of(target, kept_bytes=0)
    prompts = [text(10 + i, 100) for i in range(3)]
    for num_more in (0, 40):
        prompts = [(*ids, *text(20, num_more)) for ids in prompts]
        requests = [Request(str(i), ids, 24) for i, ids in enumerate(prompts)]
        for request in requests:
            live.join(request)
        found = {}
        while len(found) < 3:
            found |= {done.request.id: done for done in live.turn()}
        answers = [found[str(i)].token_ids for i in range(3)]
        assert answers == [
            answer(fresh, ids, num_tokens=24).token_ids for ids in prompts
        ]
        assert [found[str(i)].num_reused for i in range(3)] == [99 * (num_more > 0)] * 3


def test_scopes_find_their_own_and_who_left_leaves_nothing(target):
    live, session = live_of(target)
    ids = text(30, 150)
    answer(live, ids, scope=1)
    assert answer(live, (*ids, 7), scope=2).num_reused == 0
    assert answer(live, (*ids, 7), scope=1).num_reused == 149
    # Numbers of scopes are given to others, who must not find what was the first's.
    session.drop_text([1])
    assert answer(live, (*ids, 7), scope=1).num_reused == 0
    assert answer(live, (*ids, 7, 8), scope=2).num_reused == 150

    session.forget_traffic()
    gone = Request("gone", ids, 30)
    live.join(gone)
    for _ in range(4):
        live.turn()
    assert live.leave(gone)
    live.turn()
    assert answer(live, (*ids, 7)).num_reused == 0


def learn(session, done):
    session.take_in(parse_prompt({"prompt": "a"}, "a"), done, session.text_of(done))


def test_learning_the_projection_keeps_rows_and_anything_else_drops_them(target):
    for learner, is_kept in (
        (LearnerConfig("head"), True),
        (LearnerConfig("gradient", update_every_prompts=1, window=16), False),
    ):
        live, session = live_of(target, learner=learner)
        ids = text(40, 150)
        learn(session, answer(live, ids))
        assert session.version > 0
        assert (answer(live, (*ids, 7)).num_reused > 0) == is_kept

    # So does going back to an earlier draft, for it is read anew.
    live, session = live_of(target, learner=LearnerConfig("head"))
    answer(live, ids)
    assert session.draft is not None
    session.begin_again(jax.tree.map(lambda x: x + 0, session.draft))
    assert answer(live, (*ids, 7)).num_reused == 0


@pytest.mark.parametrize(
    "name", [pytest.param("gradient", marks=pytest.mark.thorough), "head"]
)
def test_the_same_is_learned_from_what_was_not_run(target, name):
    learner = LearnerConfig(name)
    if name == "gradient":
        learner = dataclasses.replace(learner, update_every_prompts=3)
    states = []
    for kept_bytes in (0, MIB * 64):
        live, session = live_of(target, kept_bytes, learner=learner)
        ids = text(50, 150)
        for turn in range(3):
            done = answer(live, ids)
            assert (done.num_reused > 0) == (kept_bytes > 0 and turn > 0)
            learn(session, done)
            ids = (*ids, *done.token_ids, *text(51, 10))
        states.append((session.draft, session.memory))

    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
