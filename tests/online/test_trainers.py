# SPDX-License-Identifier: Apache-2.0
"""Laws that every trainer obeys: what learns from answers, and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import LearnerConfig, Session
from ospec_jax.config import TreeConfig
from ospec_jax.decoding.request import Request
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, freely_placed
from ospec_jax.models import finite
from ospec_jax.online.trainer import go_on_from, learn_from
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

WINDOWS = LearnerConfig(
    update_interval=50, batch_size=2, window=32, ring_capacity=8, num_steps=2,
    learning_rate=3e-3,
)  # fmt: skip
TRAINERS = [
    ("windows", WINDOWS),
    (
        "windows-guarded-pays",
        dataclasses.replace(
            WINDOWS,
            update_interval=0,
            update_every_prompts=2,
            promotion="guarded",
            pace="pays",
        ),
    ),  # fmt: skip
    ("last-layer", LearnerConfig(name="head")),
    ("last-layer-pays", LearnerConfig(name="head", pace="pays", budget=0.4)),
    ("preference", LearnerConfig("preference", reference_answers=2, softmax_every=3)),
    ("memory", LearnerConfig(name="memory")),
]


class Case:
    """A trainer, its draft, and answers as the engine records them."""

    def __init__(self, config):
        target = tiny_target()
        architecture = tiny_draft_config(target.config, 200)
        drafter = build_drafter("eagle3", architecture, TreeConfig(num_steps=1))
        self.meta = Meta.create(target, architecture)
        loaded = LoadedDraft(tiny_draft(drafter, architecture), self.meta)
        session = Session(target, loaded, learner=config)
        self.trainer, self.draft = session.trainer, loaded.draft
        rng = np.random.default_rng(0)
        requests = [
            Request(f"{i}", tuple(rng.integers(3, 250, 9).tolist()), 30)
            for i in range(4)
        ]
        served = session.served_draft
        self.answers = list(session.engine.serve(requests, lambda: served, 1))

    def start(self):
        return go_on_from(self.trainer, *self.trainer.init(self.draft), self.draft)

    def learn(self, now, answers):
        for answer in answers:
            now = learn_from(self.trainer, now, answer)
        return now


@pytest.fixture(scope="module", params=TRAINERS, ids=lambda trainer: trainer[0])
def case(request):
    return Case(request.param[1])


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_it_counts_learns_and_keeps_its_structure(case):
    now, before = case.start(), host(case.draft)
    structure = shapes(now[:4])
    versions = []
    for i, answer in enumerate(case.answers):
        served = host(now.served.params)
        now = case.learn(now, [answer])
        versions.append(int(now.state.version))
        assert int(now.state.num_prompts) == i + 1
        assert shapes(now[:4]) == structure
        # The version tells whether what is served is another draft now.
        is_changed = [
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(served), jax.tree.leaves(now.served.params), strict=True
            )
        ]
        assert any(is_changed) == (versions[-1] > (versions[-2] if i else 0))
        if now.report is not None:
            assert (now.report.decision == "promote") == any(is_changed)
    assert versions[-1] <= len(versions)
    assert not finite.find_not_finite((now.state, now.draft.params))
    assert_same(case.draft, before)


def test_what_is_served_is_the_draft_that_is_kept(case):
    now = case.learn(case.start(), case.answers)
    assert_same(now.served.params, case.trainer.serve(now.draft).params)


def test_it_says_when_it_will_be_due(case):
    """Whatever paces it; a replay scores so many answers at once."""
    state, traffic, draft, _, _ = case.start()
    num_tokens = [len(answer.token_ids) for answer in case.answers]
    expected = case.trainer.answers_until_due(state, num_tokens)
    is_due = []
    for answer in case.answers:
        state, traffic = case.trainer.observe(state, traffic, draft, answer)
        is_due.append(case.trainer.is_due(state))
    assert expected == ((*is_due, True).index(True) + 1 if any(is_due) else 4)
    stopped = state.replace(is_stopped=jnp.ones((), bool))
    assert not case.trainer.is_due(stopped)
    assert case.trainer.answers_until_due(stopped, [9] * 7) == 7


def test_warming_up_teaches_nothing(case):
    now = case.start()
    before = host(now[:4])
    state = case.trainer.warm_up(*now[:4], case.answers[0], None)
    assert_same(state, before[0])
    assert_same(now[1:4], before[1:])


def test_an_answer_without_drafted_tokens_moves_no_draft(case):
    """Of one token, which came from prefill: nothing was verified."""
    now = case.learn(case.start(), case.answers[:2])
    prompt = len(case.answers[0].request.prompt_ids)
    silent = dataclasses.replace(
        case.answers[0], token_ids=case.answers[0].token_ids[:1], num_recorded=prompt
    )
    while now.report is None and int(now.state.num_prompts) < 6:
        now = case.learn(now, [case.answers[2]])  # so that nothing else waits
    before = host((now.draft.params, now.served.params))
    now = case.learn(now, [silent] * 60)  # through an interval, too
    assert_same((now.draft.params, now.served.params), before)


def test_it_goes_on_from_a_checkpoint_bitwise(case, tmp_path):
    now = case.learn(case.start(), case.answers[:2])
    draft = now.draft.replace(memory=None)
    checkpoint.save(tmp_path, 2, case.meta, draft, now.state, now.traffic)
    fresh = case.start()
    found = checkpoint.load(
        tmp_path,
        learner_like=lambda meta, draft: jax.eval_shape(case.trainer.init, draft)[0],
        feedback_like=fresh.traffic,
    )
    # As sessions resume it: what lies elsewhere would be compiled for anew.
    kept = freely_placed((found.learner, found.feedback, found.draft), None)
    resumed = go_on_from(case.trainer, *kept)
    assert_same(resumed[:4], (*now[:2], draft, now.served))
    straight = case.learn(now, case.answers[2:])
    again = case.learn(resumed, case.answers[2:])
    assert_same(again[:4], straight[:4])
