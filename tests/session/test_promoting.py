# SPDX-License-Identifier: Apache-2.0
"""Where promotion is by hand, the served draft stays until somebody says so."""

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.loading import load_draft
from ospec_jax.online.scopes import nobody
from ospec_jax.session.arguments import as_prompts
from ospec_jax.session.live import Live
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"Add {i} to {i * i}." for i in range(8)]
HEAD = LearnerConfig("head")
GRADIENT = LearnerConfig("gradient", update_every_prompts=1, window=16)
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in Session(target).generate(PROMPTS, NEW_TOKENS)]


def session_of(target, draft, learner=HEAD, promote="manual", **options):
    tree = TreeConfig(num_steps=2)
    return Session(
        target, draft, tree=tree, learner=learner, promote=promote, **options
    )


def answer(session, prompts):
    return [r.token_ids for r in session.generate(prompts, NEW_TOKENS)]


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_same(one, other):
    for own, their in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(own, their)


def differs(one, other):
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return any(np.any(np.asarray(own) != np.asarray(their)) for own, their in pairs)


def weights(session):
    """What is served: in float32, and as it decodes."""
    return copied((session.draft.params, session.served_draft.params))


@pytest.mark.parametrize("learner", [HEAD, GRADIENT], ids=lambda one: one.name)
def test_what_is_served_stays_until_somebody_says_so(target, draft, plain, learner):
    session = session_of(target, draft, learner)
    assert answer(session, PROMPTS[:1]) == plain[:1]
    before = weights(session)
    assert answer(session, PROMPTS[1:4]) == plain[1:4]
    assert_same(weights(session), before)
    assert session.version == 0
    assert session.num_waiting == 4
    # n-grams are served at once.
    assert_same(session.memory, session.state.traffic.memory)
    assert int(session.memory.counts.sum()) > 0

    assert session.promote() == session.version == 4
    assert session.num_waiting == 0
    promoted = weights(session)
    assert differs(promoted, before)
    assert_same(session.draft.params, session.state.waiting.params)
    # The projection is learned on, in place: not in what is served.
    assert answer(session, PROMPTS[4:]) == plain[4:]
    assert_same(weights(session), promoted)
    assert session.version == 4
    assert session.num_waiting == 4
    assert differs(session.draft.params, session.state.waiting.params)


def test_as_much_is_learned_as_where_it_is_served_at_once(target, draft):
    # What windows are made of does not depend on the draft, so neither does this.
    by_hand = session_of(target, draft, GRADIENT)
    at_once = session_of(target, draft, GRADIENT, "automatic")
    for session in (by_hand, at_once):
        answer(session, PROMPTS[:4])
    assert differs(by_hand.draft.params, at_once.draft.params)
    by_hand.promote()
    assert_same(by_hand.draft.params, at_once.draft.params)
    assert_same(by_hand.served_draft.params, at_once.served_draft.params)
    assert by_hand.version == at_once.version == 4


@pytest.mark.parametrize("learner", [HEAD, GRADIENT], ids=lambda one: one.name)
def test_a_resumed_session_serves_the_same_and_what_waits_waits_on(
    target, draft, tmp_path, learner
):
    session = session_of(target, draft, learner)
    answer(session, PROMPTS[:2])
    session.promote()
    answer(session, PROMPTS[2:4])
    session.save(tmp_path)
    # Whoever takes the draft takes the one that is served.
    assert_same(load_draft(tmp_path, target).draft.params, session.draft.params)

    resumed = session_of(target, draft, learner)
    resumed.resume(tmp_path)
    assert (resumed.version, resumed.num_waiting) == (2, 2)
    assert_same(weights(resumed), weights(session))
    assert answer(resumed, PROMPTS[4:]) == answer(session, PROMPTS[4:])
    assert resumed.promote() == session.promote() == 8
    assert_same(weights(resumed), weights(session))

    # Once more, where the step that is there is of what was served before.
    session.save(tmp_path)
    again = session_of(target, draft, learner)
    again.resume(tmp_path)
    assert (again.version, again.num_waiting) == (8, 0)
    assert_same(weights(again), weights(session))


def test_between_by_hand_and_at_once_a_run_may_change(target, draft, tmp_path):
    session = session_of(target, draft)
    answer(session, PROMPTS[:3])
    waiting = copied(session.state.waiting.params)
    session.save(tmp_path)
    stored = load_draft(tmp_path, target).meta
    assert (stored.draft_version, stored.num_waiting) == (0, 3)

    # What waited is served now: nobody has to say so.
    at_once = session_of(target, draft, promote="automatic")
    at_once.resume(tmp_path)
    assert (at_once.version, at_once.num_waiting) == (3, 0)
    assert_same(at_once.draft.params, waiting)
    answer(at_once, PROMPTS[3:5])
    at_once.save(tmp_path)
    stored = load_draft(tmp_path, target).meta
    assert (stored.draft_version, stored.num_waiting) == (5, 0)

    by_hand = session_of(target, draft)
    by_hand.resume(tmp_path)
    assert (by_hand.version, by_hand.num_waiting) == (5, 0)
    before = weights(by_hand)
    answer(by_hand, PROMPTS[5:])
    assert_same(weights(by_hand), before)
    assert by_hand.num_waiting == 3


def test_another_draft_is_served_at_once_and_what_waited_is_gone(target, draft, plain):
    session = session_of(target, draft)
    start = copied(session.draft)
    answer(session, PROMPTS[:2])
    session.promote()
    answer(session, PROMPTS[2:4])
    session.begin_again(start)
    assert (session.version, session.num_waiting) == (5, 0)
    assert_same(session.draft.params, start.params)
    assert_same(session.state.waiting.params, start.params)
    assert answer(session, PROMPTS[4:]) == plain[4:]
    assert_same(session.draft.params, start.params)


def test_forgotten_traffic_leaves_what_waits(target, draft):
    session = session_of(target, draft, GRADIENT)
    answer(session, PROMPTS[:2])
    before = weights(session)
    waiting = copied(session.state.waiting.params)
    for forget in (session.forget_traffic, lambda: session.drop_text([nobody().scope])):
        forget()
        assert int(session.memory.counts.sum()) == 0
        assert_same(weights(session), before)
        assert_same(session.state.waiting.params, waiting)
        assert (session.version, session.num_waiting) == (0, 2)


@pytest.mark.parametrize("learner", [HEAD, GRADIENT], ids=lambda one: one.name)
def test_a_promotion_comes_between_two_steps(target, draft, plain, learner):
    session = session_of(target, draft, learner, batch_size=2)
    live = Live(session, (256,), kept_bytes=2**26)
    pairs = list(session.requests(as_prompts(PROMPTS), NEW_TOKENS, SamplingConfig()))
    waiting = list(pairs)
    prompt_of = {id(request): prompt for prompt, request in pairs}
    answers = {}
    promoted = []
    while len(answers) < len(pairs):
        while live.num_free and waiting:
            live.join(waiting.pop(0)[1])
        for done in live.turn():
            prompt = prompt_of[id(done.request)]
            session.take_in(prompt, done, session.text_of(done))
            answers[prompt.id] = done.token_ids
        if session.num_waiting >= 3:
            promoted.append((session.promote(), live.is_idle))

    assert [answers[prompt.id] for prompt, _ in pairs] == plain
    # Others were being answered meanwhile.
    assert promoted == [(3, False), (6, False)]


def test_rows_are_kept_where_the_projection_alone_is_promoted():
    # Whose weights are not served as they are learned.
    target = tiny_target(precision="int8")
    session = session_of(target, random_head(target))
    live = Live(session, (256,), kept_bytes=2**26)
    long = ["Say it again: " + "one, two, " * 12]
    pairs = session.requests(as_prompts(long), NEW_TOKENS, SamplingConfig())
    ((prompt, request),) = pairs
    reused = []
    for _ in range(3):
        live.join(request)
        while not live.is_idle:
            for done in live.turn():
                session.take_in(prompt, done, session.text_of(done))
                reused.append(done.num_reused)
        session.promote()

    assert reused == [0] + [len(request.prompt_ids) - 1] * 2
    assert session.version == 3


def test_what_cannot_be_promoted_says_why(target, draft):
    with pytest.raises(ConfigError, match="promote is 'often'; use 'automatic' or"):
        session_of(target, draft, promote="often")
    with pytest.raises(ConfigError, match="nothing learns; give a learner"):
        session_of(target, draft, None)
    with pytest.raises(ConfigError, match="'memory' changes no draft"):
        session_of(target, draft, LearnerConfig("memory"))
    with pytest.raises(ConfigError, match="served at once here"):
        session_of(target, draft, promote="automatic").promote()
    session = session_of(target, draft)
    with pytest.raises(ConfigError, match="nothing waits: version 0"):
        session.promote()
