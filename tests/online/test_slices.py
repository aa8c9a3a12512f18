# SPDX-License-Identifier: Apache-2.0
"""An update in slices is the update that the same windows give at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import TreeConfig
from ospec_jax.control.weighting import hedge
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.base import Segments
from ospec_jax.learners.config import LearnerConfig, build_learner
from ospec_jax.learners.ensemble import ensemble, step_grid
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.losses import LOSSES
from ospec_jax.learners.objective import build_objective
from ospec_jax.learners.optimistic import optimistic
from ospec_jax.learners.optimizers import make_optimizer
from ospec_jax.learners.osd import osd
from ospec_jax.learners.shared_ensemble import shared_ensemble
from ospec_jax.online import slices
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config
from ospec_jax.types import Feedback

VOCAB, TOKENS, CONTEXT, WINDOW, STEPS, ROWS = 64, 40, 64, 20, 2, 3
LENGTH = CONTEXT + WINDOW + STEPS
GRID = step_grid(3e-2, 2.0, 2)


def sgd(rate=0.3, **options):
    # Of a rate that shows a gradient as it is: Adam would turn what is lost in rounding
    # into a step.
    return make_optimizer("sgd", rate, **options)


def weights():
    return hedge(1.0, 1.0, (1.0,) * (1 + len(GRID)))


RULES = {
    "gradient": lambda objective: gradient(objective, sgd()),
    "momentum": lambda objective: gradient(objective, sgd(momentum=0.9)),
    "optimistic": lambda objective: optimistic(objective, sgd(), radius=0.5),
    "ensemble": lambda objective: ensemble(objective, sgd(1.0), GRID, weights()),
    "shared_ensemble": lambda objective: shared_ensemble(
        objective, sgd(1.0), GRID, weights(), round_length=2
    ),
    "osd": lambda objective: osd(objective, sgd(), interval=2),
}
LOSS_CASES = {
    "rejected": {"positions": "rejected", "num_candidates": 8},
    "all-tokens": {"num_candidates": 0},
    "compound": {"loss": LOSSES["acceptance_length"], "num_candidates": 8},
    "share-and-decay": {
        "token_share": 0.5,
        "position_decay": 0.9,
        "num_candidates": 8,
    },
}
# Each would show in what they come to together, as well.
LOSS_CASES["all-but-tokens"] = {
    name: value
    for case in ("rejected", "compound", "share-and-decay")
    for name, value in LOSS_CASES[case].items()
}
IN_FEWER_LOSSES = [
    name
    if name in ("all-tokens", "all-but-tokens")
    else pytest.param(name, marks=pytest.mark.thorough)
    for name in LOSS_CASES
]


@functools.cache
def objective_of(family, *loss):
    """One for all rules, whose slices of it are compiled once, and its draft."""
    architecture = tiny_draft_config(tiny_model_config(VOCAB), TOKENS, family)
    drafter = build_drafter(family, architecture, TreeConfig("chain", STEPS))
    loss = {"num_candidates": 8} | dict(loss)
    objective = build_objective(drafter.unroll, CONTEXT, STEPS, **loss)
    return objective, tiny_draft(drafter, architecture)


def make_batch(shared) -> Segments:
    """Windows that are whole, verified in part, and empty."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    hidden = jnp.asarray(rng.normal(size=(*shape, 32)), jnp.float32)
    weight = np.ones(shape, np.float32)
    weight[1, CONTEXT + 6 :] = 0.0
    weight[2] = 0.0
    return Segments(
        feedback=Feedback(
            tokens=jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
            taps=jnp.asarray(rng.normal(size=(*shape, 64)), jnp.float16),
            hidden=hidden,
            logsumexp=jax.nn.logsumexp(hidden @ shared.head["kernel"].T, axis=-1),
        ),
        start=jnp.asarray([0, -3, 0], jnp.int32),
        weight=jnp.asarray(weight),
        is_fresh=jnp.asarray([True, False, True]),
    )


class Case:
    """A learner, its draft and a batch."""

    def __init__(self, rule, family="eagle3", **loss):
        objective, self.draft = objective_of(family, *loss.items())
        self.learner = RULES[rule](objective)
        self.shared = shared_tables(random_params(tiny_model_config(VOCAB)))
        self.batch = make_batch(self.shared)
        self.data = (self.shared, self.draft.token_ids)
        self.state = self.learner.init(self.draft.params)
        self.at_once = jax.jit(self.learner.update)

    def in_slices(self, state, batch=None):
        batch = self.batch if batch is None else batch
        return slices.update_in_slices(self.learner, state, batch, *self.data)


@functools.cache
def case_of(rule):
    """One for all tests of a rule, whose programs are compiled once."""
    return Case(rule)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    # So that arrays of a tiny draft are split, too, and small ones moved together.
    monkeypatch.setattr(slices, "_NUM_MOVED", 4000)
    # A window's first pairs, and the fewer that are left.
    monkeypatch.setattr(slices, "PAIRS", 12)


def assert_close(left, right, rtol=2e-4, atol=2e-6):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol, atol)


def assert_is_the_same_update(case):
    state = case.state
    is_moved = False
    # Twice, so that momentum, hints and buffers are there.
    for _ in range(2):
        wanted, info = case.at_once(state, case.batch, *case.data)
        found = slices.run(case.in_slices(state))
        assert_close(found.state, wanted)
        assert_close(found.info, info)
        assert bool(found.is_finite)
        moved = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b))), wanted.params, state.params
        )
        is_moved |= max(jax.tree.leaves(moved)) > 1e-4
        state = wanted
    assert is_moved


@pytest.mark.parametrize(
    "rule",
    # The tests below have gradient descent with other losses, drafts and optimizers.
    [
        pytest.param(rule, marks=pytest.mark.thorough)
        if rule in ("gradient", "momentum")
        else rule
        for rule in RULES
    ],
)
def test_it_is_the_update_of_the_same_windows_at_once(rule, monkeypatch):
    # An array is moved in parts below, whatever the rule: here several are together.
    monkeypatch.setattr(slices, "_NUM_MOVED", 12_000)
    assert_is_the_same_update(case_of(rule))


@pytest.mark.parametrize("loss", IN_FEWER_LOSSES)
def test_whatever_counts_in_the_loss(loss):
    assert_is_the_same_update(Case("gradient", **LOSS_CASES[loss]))


@pytest.mark.parametrize(
    "family",
    # One that drafts in one pass; above is one with a cache. Where nothing is attended
    # to, parts of a window are as much as windows.
    [
        pytest.param("eagle1", marks=pytest.mark.thorough),
        pytest.param("hydra", marks=pytest.mark.thorough),
        "dflash",
        pytest.param("peagle", marks=pytest.mark.thorough),
    ],
)
def test_whatever_drafts(family):
    assert_is_the_same_update(Case("gradient", family))


def test_adam_gets_the_same_gradients():
    """Its state tells them; its step on a gradient of nothing but rounding differs."""
    case = case_of("momentum")
    config = LearnerConfig("gradient", window=WINDOW, num_steps=STEPS, num_candidates=8)
    architecture = tiny_draft_config(tiny_model_config(VOCAB), TOKENS)
    drafter = build_drafter("eagle3", architecture, TreeConfig("chain", STEPS))
    learner = build_learner(config, drafter.unroll)
    state = learner.init(case.draft.params)
    data = (case.batch, *case.data)
    wanted, _ = jax.jit(learner.update)(state, *data)
    found = slices.run(slices.update_in_slices(learner, state, *data)).state
    assert_close(found.opt_state, wanted.opt_state)


def test_there_are_many_slices_and_nothing_is_overwritten():
    case = case_of("momentum")
    before = jax.tree.map(np.array, (case.state, case.batch))
    count = sum(1 for _ in case.in_slices(case.state))
    # Of two windows, one of which is verified for a few pairs alone.
    assert count > 2 + 1 + 2
    for x, y in zip(
        jax.tree.leaves(before),
        jax.tree.leaves((case.state, case.batch)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, np.asarray(y))


def test_what_weighs_nothing_takes_no_slice():
    case = case_of("momentum")
    count = sum(1 for _ in case.in_slices(case.state))
    full = case.batch.replace(weight=jnp.ones_like(case.batch.weight))
    assert sum(1 for _ in case.in_slices(case.state, full)) == count + 1 + 2


def test_numbers_that_are_none_are_told_of():
    case = case_of("momentum")
    batch = case.batch.replace(
        feedback=case.batch.feedback.replace(
            hidden=case.batch.feedback.hidden.at[0, CONTEXT + 5].set(jnp.nan)
        )
    )
    assert not bool(slices.run(case.in_slices(case.state, batch)).is_finite)


def test_a_rule_of_ones_own_is_not_run_in_anothers_slices():
    def rule(objective):
        learner = gradient(objective, sgd())
        return learner._replace(
            update=lambda state, *data: learner.update(state, *data)
        )

    drafter = build_drafter(
        "eagle3",
        tiny_draft_config(tiny_model_config(VOCAB), TOKENS),
        TreeConfig("chain", STEPS),
    )
    assert build_learner(LearnerConfig(rule=rule), drafter.unroll).given is None
    assert build_learner(LearnerConfig("gradient"), drafter.unroll).given is not None
