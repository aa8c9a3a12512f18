# SPDX-License-Identifier: Apache-2.0
"""A draft that rests while steps are plain, and drafts as if it had not."""

import dataclasses

import jax
import numpy as np
import pytest

from ospec_jax import SamplingConfig, Session, TreeConfig, load_draft
from ospec_jax.control.base import Controller
from ospec_jax.decoding.request import Request
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, pool_draft
from ospec_jax.session import build
from ospec_jax.session.live import Live
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(6)]
NUM_TOKENS = 60
# Longer than what makes a draft rest, then longer than it may be behind by.
PLAIN = (12, 30, 3, 9)
TREE = TreeConfig.auto()


@pytest.fixture(scope="module", name="target")
def _target():
    return tiny_target()


def draft_of(family, target):
    if family == "model":
        small = tiny_target(seed=1, num_layers=1)
        meta = Meta.create(target, None, "model")
        return LoadedDraft(Draft(small.params), meta, model=small)

    config = tiny_draft_config(target.config, target.config.vocab_size, family)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config, family))


def now_and_then(found):
    """Plain steps, so many in a row, and one that drafts between them."""
    order = [k for count in PLAIN for k in (*[0] * count, 2)]

    def rule(actions):
        by_depth = {action.tree.num_steps: action for action in actions}
        steps = iter(order * 20)
        return Controller(
            actions=(by_depth[0], by_depth[2]),
            init=lambda num_rows: None,
            choose=lambda state, rows: by_depth[next(steps)],
            observe=lambda state, action, outcome: found.append(
                (action.tree.num_steps, outcome.num_accepted)
            ),
        )

    return rule


def session_of(target, draft, found, **args):
    return Session(target, draft, tree=TREE, controller=now_and_then(found), **args)


def test_what_is_drafted_after_a_rest_is_what_would_have_been(target, monkeypatch):
    """N-grams that are lent to the draft read the same tokens; rows come and go."""
    draft = draft_of("eagle3", target)
    args = dict(batch_size=2, num_predicted_tokens=0)
    rested, kept_up = [], []
    resting = session_of(target, draft, rested, **args)
    assert resting.engine.num_behind
    answers = [r.token_ids for r in resting.generate(PROMPTS, NUM_TOKENS)]

    monkeypatch.setattr(build, "NUM_BEHIND", 0)
    other = session_of(target, draft, kept_up, **args)
    assert not other.engine.num_behind
    assert [r.token_ids for r in other.generate(PROMPTS, NUM_TOKENS)] == answers

    plain = [r.token_ids for r in Session(target).generate(PROMPTS, NUM_TOKENS)]
    assert sorted(answers) == sorted(plain)
    assert rested == kept_up
    drafted = [accepted for depth, accepted in rested if depth]
    assert len(drafted) > 3
    assert sum(map(sum, drafted)) > 0


@pytest.mark.parametrize(
    "family",
    ["eagle3", pytest.param("hydra", marks=pytest.mark.thorough), "exit", "model"],
)
def test_caches_are_those_of_a_draft_that_kept_up(target, family):
    session = session_of(target, draft_of(family, target), [])
    engine = session.engine
    plain = next(a for a in engine.actions if not a.tree.num_steps)
    request = Request("one", (1, 5, 3, 2), 40)
    states = []

    for is_resting in (True, False):
        state = engine.start(session.served_draft, request, 2, 256)
        for _ in range(11):
            args = plain, "greedy", session.served_draft, state, None, is_resting
            state, _ = engine.step(*args)
        if is_resting:
            assert state.backlog.count.tolist() == [11, 11]
            state = engine.catch_up(session.served_draft, state)
        assert state.backlog.count.tolist() == [0, 0]
        states.append(state)

    length = int(states[0].lengths[0])
    for rested, kept_up in zip(
        *(jax.tree.leaves((s.draft_context, s.draft_cache)) for s in states),
        strict=True,
    ):
        if 256 in rested.shape:  # slots behind the newest token are scratch
            axis = rested.shape.index(256)
            rested, kept_up = (
                np.take(x, range(length - 1), axis) for x in (rested, kept_up)
            )
        np.testing.assert_allclose(rested, kept_up, atol=1e-5)


def answered(live, ids, num_tokens):
    live.join(Request("a", ids, num_tokens, seed=5))
    answers = []
    while not live.is_idle:
        answers += live.turn()

    (done,) = answers
    return done


def test_of_a_row_is_kept_what_its_draft_has_run_over(target):
    """It was behind when the answer ended, and does not catch up for that."""
    found = []
    session = session_of(target, draft_of("eagle3", target), found)
    live = Live(session, (256,), kept_bytes=2**26)
    prompt = tuple(np.random.default_rng(0).integers(3, 250, 90).tolist())
    answer = answered(live, prompt, 30)
    # In the second rest.
    assert [depth for depth, _ in found][-9:] == [0] * 9

    ids = (*prompt, *answer.token_ids)
    kept = session.kept.find(0, (*ids, 5))
    num_behind = len(ids) - 1 - kept.num_tokens
    assert 0 < num_behind <= build.NUM_BEHIND
    # Slot i holds the token behind position i; the newest one was not run.
    history = kept.caches.draft_cache["history"][0]
    length = kept.num_tokens - 1
    assert history[:length].tolist() == list(ids[1 : length + 1])


@pytest.mark.thorough
def test_sampled_answers_depend_on_no_rest(target, monkeypatch):
    draft = draft_of("eagle3", target)
    how = SamplingConfig(temperature=1.0, seed=3)
    answers = []
    for count in (build.NUM_BEHIND, 0):
        monkeypatch.setattr(build, "NUM_BEHIND", count)
        session = session_of(target, draft, [])
        answers.append([r.token_ids for r in session.generate(PROMPTS, 40, how)])
    assert answers[0] == answers[1]


def test_what_would_gain_nothing_does_not_rest(target):
    head = draft_of("eagle3", target)
    ngram = load_draft("ngram", target)
    # It must be known at once that a long match of n-grams is there.
    with_suffix = dataclasses.replace(head, mix="fallback", suggestions="suffix")
    for draft in (ngram, with_suffix, pool_draft([head, ngram], target)):
        assert Session(target, draft, tree=TREE).engine.num_behind == 0
    assert Session(target, head, num_speculative_tokens=2).engine.num_behind == 0
    assert Session(target, head, tree=TREE).engine.num_behind == build.NUM_BEHIND
