# SPDX-License-Identifier: Apache-2.0
"""Laws that every update rule obeys, whatever it is called and wherever it is from."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import TreeConfig
from ospec_jax.control.weighting import hedge
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.base import Segments, restarted
from ospec_jax.learners.ensemble import ensemble, step_grid
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.objective import build_objective
from ospec_jax.learners.optimistic import optimistic
from ospec_jax.learners.optimizers import make_optimizer
from ospec_jax.learners.osd import osd
from ospec_jax.learners.registry import LEARNER_NAMES
from ospec_jax.learners.shared_ensemble import shared_ensemble
from ospec_jax.loading import freely_placed
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config
from ospec_jax.types import Draft, Feedback

VOCAB, CONTEXT, WINDOW, STEPS, ROWS = 32, 64, 8, 2, 2
LENGTH = CONTEXT + WINDOW + STEPS
GRID = step_grid(3e-3, 2.0, 3)
SKELETON = Path(__file__).parents[2] / "docs" / "skeletons" / "learner.py"


def adam(rate=3e-3):
    return make_optimizer("adam", rate)


def weights():
    return hedge(1.0, 1.0, (1.0,) * (1 + len(GRID)))


LEARNERS = [
    ("gradient", lambda objective: gradient(objective, adam())),
    (
        "momentum",
        lambda objective: gradient(
            objective, make_optimizer("sgd", 0.05, momentum=0.9)
        ),
    ),
    (
        "optimistic",
        lambda objective: optimistic(objective, make_optimizer("sgd", 0.3)),
    ),
    ("ensemble", lambda objective: ensemble(objective, adam(1.0), GRID, weights())),
    (
        "shared_ensemble",
        lambda objective: shared_ensemble(objective, adam(1.0), GRID, weights()),
    ),
    ("osd", lambda objective: osd(objective, adam(), interval=2)),
    (
        "sign_sgd",
        functools.partial(runpy.run_path(str(SKELETON))["sign_sgd"], step=1e-3),
    ),
]
"""Rules as functions from an objective to a learner: another one is another line."""


def test_every_rule_by_name_is_held_to_the_laws():
    trained = {*LEARNER_NAMES} - {"head", "preference", "memory", "auto"}
    assert trained <= {name for name, _ in LEARNERS}


class Case:
    """A learner, what it trains, and what it learns from."""

    def __init__(self, family, make):
        architecture = tiny_draft_config(tiny_model_config(VOCAB), 12, family)
        drafter = build_drafter(family, architecture, TreeConfig("chain", STEPS))
        self.learner = make(objective_of(family))
        self.draft = tiny_draft(drafter, architecture)
        self.meta = Meta.create(None, architecture, family)
        self.shared = shared_tables(random_params(tiny_model_config(VOCAB)))
        self.segments = make_segments(self.shared)
        self.num_traces = 0

        def update(opt_state, state, *data):
            self.num_traces += 1
            return self.learner.update(state.replace(opt_state=opt_state), *data)

        # As it is compiled for use: all but the parameters is overwritten.
        self._update = jax.jit(update, donate_argnums=0)

    def start(self):
        return owned(self.learner.init(self.draft.params))

    def update(self, state, segments=None):
        segments = self.segments if segments is None else segments
        copy = owned(state)
        return self._update(
            copy.opt_state, copy.replace(opt_state=()), segments, self.shared,
            self.draft.token_ids,
        )  # fmt: skip

    def score(self, params, segments=None):
        segments = self.segments if segments is None else segments
        return compiled(self.learner.evaluate)(
            params, segments, self.shared, self.draft.token_ids
        )


@functools.cache
def objective_of(family):
    """One for all learners of a family, so that its score is compiled once."""
    architecture = tiny_draft_config(tiny_model_config(VOCAB), 12, family)
    drafter = build_drafter(family, architecture, TreeConfig("chain", STEPS))
    return build_objective(drafter.unroll, CONTEXT, STEPS)


@functools.cache
def compiled(function):
    return jax.jit(function)


def owned(state):
    return state.replace(opt_state=jax.tree.map(jnp.copy, state.opt_state))


def make_segments(shared) -> Segments:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, 32)), jnp.float32)
    return Segments(
        feedback=Feedback(
            tokens=jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32),
            taps=jnp.asarray(rng.normal(size=(ROWS, LENGTH, 64)), jnp.float16),
            hidden=hidden,
            logsumexp=jax.nn.logsumexp(hidden @ shared.head["kernel"].T, axis=-1),
        ),
        start=jnp.asarray([0, -3], jnp.int32),
        weight=jnp.ones((ROWS, LENGTH)),
    )


# Learners see a draft's parameters and its `unroll` alone, so that two of them tell
# whether the other families fit.
CASES = [("eagle3", name, make) for name, make in LEARNERS]
CASES += [
    (family, name, make)
    for family in ("eagle1", "hydra", "dflash", "peagle")
    for name, make in LEARNERS
    if name in ("gradient", "ensemble")
]
# `make test` sees the other families with the one that compiles least.
CASES = [
    pytest.param(
        case,
        marks=[pytest.mark.thorough] * (case[0] != "eagle3" and case[1] == "ensemble"),
    )
    for case in CASES
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    family, _, make = request.param
    return Case(family, make)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_finite(tree):
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_it_learns_purely_and_in_one_trace(case):
    before = jax.tree.map(np.array, (case.draft, case.segments, case.shared))
    state = case.start()
    assert_same(state.params, case.draft.params)
    first = case.update(state)
    assert_same(case.update(state), first)
    assert shapes(first[0]) == shapes(state)
    told = shapes(first[1])
    for _ in range(30):
        state, info = case.update(case.learner.begin(state))
        assert shapes(info) == told
    loss = lambda params: float(case.score(params)[0].loss)
    assert loss(state.params) < loss(case.draft.params) - 0.03
    assert_finite((state, info))
    assert int(state.num_updates) == 30
    assert case.num_traces == 1
    # Nor has it overwritten what it does not own.
    assert_same((case.draft, case.segments, case.shared), before)


def test_without_a_signal_nothing_moves(case):
    state = case.update(case.start())[0]
    state = case.update(state)[0]
    silent = case.segments.replace(weight=jnp.zeros_like(case.segments.weight))
    after, info = case.update(state, silent)
    assert_same(after, state)
    assert_finite(info)


def test_a_window_is_scored_by_itself(case):
    both = case.score(case.draft.params)[1]
    other = case.segments.feedback.tokens.at[1].add(1) % VOCAB
    changed = case.segments.replace(
        feedback=case.segments.feedback.replace(tokens=other)
    )
    assert both[0] == case.score(case.draft.params, changed)[1][0]


def test_it_begins_anew_where_it_is_told_to(case):
    state = case.start()
    for _ in range(3):
        state = case.update(state)[0]
    again = owned(restarted(case.learner, state, case.draft.params))
    assert shapes(again) == shapes(state)
    assert_same(again.params, case.draft.params)
    assert int(again.num_updates) == 3
    # Nothing of what it had learned is left.
    fresh = case.start().replace(num_updates=again.num_updates)
    assert_same(case.update(again), case.update(fresh))


def test_a_checkpoint_brings_it_back_bitwise(case, tmp_path):
    state = case.start()
    for _ in range(3):
        state = case.update(state)[0]
    draft = Draft(state.params, case.draft.token_ids)
    checkpoint.save(tmp_path, 3, case.meta, draft, learner=state)
    like = lambda meta, draft: jax.eval_shape(case.learner.init, draft.params)
    found = checkpoint.load(tmp_path, learner_like=like)
    learner = freely_placed(found.learner, None)  # as sessions resume it
    assert_same(learner, state)
    np.testing.assert_array_equal(found.draft.token_ids, case.draft.token_ids)
    assert found.draft.token_ids.dtype == case.draft.token_ids.dtype
    assert_same(case.update(learner), case.update(state))
