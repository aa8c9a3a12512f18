# SPDX-License-Identifier: Apache-2.0
"""Laws that every learner by name obeys, on every trained family of drafts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.base import Learner, Segments
from ospec_jax.learners.config import LEARNER_NAMES, LearnerConfig, build_learner
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config
from ospec_jax.types import Draft, Feedback

VOCAB, CONTEXT, WINDOW, STEPS, ROWS = 32, 64, 8, 2, 2
LENGTH = CONTEXT + WINDOW + STEPS
TRAINING = [name for name in LEARNER_NAMES if name not in ("head", "memory", "auto")]
SGD = {"momentum": 0.05, "optimistic": 0.3}
"""Rates of the rules that were published with it."""
EXTRA = {
    "gradient": {"step_norm"},
    "momentum": {"step_norm"},
    "optimistic": {"step_norm", "path_length", "hint_error"},
    "ensemble": {"step_norm", "path_length", "expert_weights", "expert_losses"},
    "shared_ensemble": {"step_norm", "path_length", "expert_weights", "expert_losses"},
    "osd": {"step_norm", "buffered"},
}


@dataclasses.dataclass
class Case:
    """A learner, what it trains, and what it learns from."""

    name: str
    family: str
    learner: Learner
    draft: Draft
    meta: Meta
    segments: Segments
    shared: object
    num_traces: int = 0

    def __post_init__(self):
        def update(*args):
            self.num_traces += 1
            return self.learner.update(*args)

        self._update = jax.jit(update)

    def start(self):
        return self.learner.init(self.draft.params)

    def update(self, state, segments=None):
        segments = self.segments if segments is None else segments
        return self._update(state, segments, self.shared, self.draft.token_ids)


def make_segments(shared) -> Segments:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, 32)), jnp.float32)
    return Segments(
        feedback=Feedback(
            tokens=jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32),
            taps=jnp.asarray(rng.normal(size=(ROWS, LENGTH, 96)), jnp.float16),
            hidden=hidden,
            logsumexp=jax.nn.logsumexp(hidden @ shared.head["kernel"].T, axis=-1),
        ),
        start=jnp.asarray([0, -3], jnp.int32),
        weight=jnp.ones((ROWS, LENGTH)),
    )


# Learners see a draft's parameters and its `unroll` alone, so that two of them tell
# whether the other families fit.
CASES = [("eagle3", name) for name in TRAINING]
CASES += [(f, name) for f in ("eagle1", "hydra") for name in ("gradient", "ensemble")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    family, name = request.param
    drafter, architecture = make_drafter(family)
    shared = shared_tables(random_params(tiny_model_config(VOCAB)))
    return Case(
        name, family, make_learner(name, drafter), tiny_draft(drafter, architecture),
        Meta.create(None, architecture, family), make_segments(shared), shared,
    )  # fmt: skip


def make_drafter(family):
    architecture = tiny_draft_config(tiny_model_config(VOCAB), 12, family)
    drafter = build_drafter(family, architecture, TreeConfig("chain", STEPS))
    return drafter, architecture


def make_learner(name, drafter) -> Learner:
    config = LearnerConfig(
        name=name, num_steps=STEPS, num_context=CONTEXT, window=WINDOW,
        batch_size=ROWS, num_candidates=0,
        buffer_requests=2 if name == "osd" else None,
        optimizer="sgd" if name in SGD else "adam",
        learning_rate=SGD.get(name, 3e-3),
    )  # fmt: skip
    learner = build_learner(config, drafter.unroll)
    assert learner is not None
    return learner


@functools.cache
def scorer(family):
    """All learners of a family score parameters alike: they are compiled once."""
    return jax.jit(make_learner("gradient", make_drafter(family)[0]).evaluate)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_it_learns_purely_and_in_one_trace(case):
    before = jax.tree.map(np.array, (case.draft, case.segments, case.shared))
    state = case.start()
    assert_same(state.params, case.draft.params)
    first = case.update(state)
    assert_same(case.update(state), first)
    assert shapes(first[0]) == shapes(state)
    losses = []
    for _ in range(30):
        state, info = case.update(case.learner.begin(state))
        losses.append(float(info.loss))
        assert set(info.extra) == EXTRA[case.name]
    score = lambda params: scorer(case.family)(
        params, case.segments, case.shared, case.draft.token_ids
    )[0]
    if case.name != "osd":  # whose loss is that of ever fewer, ever harder positions
        assert losses[-1] < losses[0] - 0.03
    assert float(score(state.params).loss) < float(score(case.draft.params).loss) - 0.03
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, info)))
    assert int(state.num_updates) == 30
    assert case.num_traces == 1
    assert_same((case.draft, case.segments, case.shared), before)


def test_without_a_signal_nothing_moves(case):
    state = case.update(case.start())[0]
    state = case.update(state)[0]
    silent = case.segments.replace(weight=jnp.zeros_like(case.segments.weight))
    after, info = case.update(state, silent)
    assert_same(after, state)
    assert float(info.extra["step_norm"]) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(info))


def test_a_checkpoint_brings_it_back_bitwise(case, tmp_path):
    state = case.start()
    for _ in range(3):
        state = case.update(state)[0]
    draft = Draft(state.params, case.draft.token_ids)
    checkpoint.save(tmp_path, 3, case.meta, draft, learner=state)
    like = lambda meta, draft: jax.eval_shape(case.learner.init, draft.params)
    found = checkpoint.load(tmp_path, learner_like=like)
    assert_same(found.learner, state)
    np.testing.assert_array_equal(found.draft.token_ids, case.draft.token_ids)
    assert found.draft.token_ids.dtype == case.draft.token_ids.dtype
    assert_same(case.update(found.learner), case.update(state))


def unroll(*_):
    raise AssertionError("nothing is trained here")


def test_memory_has_no_learner():
    assert build_learner(LearnerConfig(name="memory"), unroll) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "unknown learner 'adam'; use one of gradient, momentum"),
        ({"loss": "kl"}, "unknown loss 'kl'"),
        ({"optimizer": "addam"}, "optax has no optimizer 'addam'"),
        ({"name": "momentum", "optimizer": "adam"}, "SGD with momentum, not 'adam'"),
        ({"name": "ensemble", "optimizer": "dog"}, "'dog' finds its own step size"),
        ({"name": "shared_ensemble", "expert_pull": 0.0}, "would lie on one line"),
        ({"name": "shared_ensemble", "reset_experts": True}, "use the learner `ens"),
        ({"name": "ensemble", "num_experts": 1}, "num_experts is 1; use 2"),
        (
            {"name": "ensemble", "meta": "exp3"},
            "meta is 'exp3'; use hedge",
        ),
        ({"positions": "wrong"}, "positions is 'wrong'; use all or rejected"),
        ({"token_share": 0.0}, "token_share is 0.0; use above 0, and at most 1"),
        (
            {"name": "shared_ensemble", "num_scored": 5},
            "num_scored 5 exceeds",
        ),
        ({"update_every_prompts": -1}, "update_every_prompts is -1; use 0 (off)"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_learner(LearnerConfig(**changes), unroll)


@pytest.mark.parametrize("name", SGD)
def test_a_rate_says_whose_it_is_where_the_rule_was_published_with_sgd(name):
    cause = (
        f"'{name}' was published with 'sgd' at a rate of 0.1, and learning_rate 0.001"
    )
    with pytest.raises(ConfigError, match=cause) as refused:
        LearnerConfig(name=name, learning_rate=1e-3)
    assert "set optimizer 'sgd' (--optimizer sgd)" in str(refused.value)
    # Momentum is a rule of SGD alone.
    assert ("--optimizer adam" in str(refused.value)) == (name == "optimistic")

    published = LearnerConfig(name=name)
    stated = LearnerConfig(name=name, optimizer="sgd", learning_rate=1e-3)
    assert dataclasses.replace(published, learning_rate=1e-3) == stated
    assert dataclasses.replace(stated, num_epochs=2).learning_rate == 1e-3
    if name == "optimistic":
        adam = LearnerConfig(name=name, optimizer="adam", learning_rate=1e-3)
        assert adam.optimizer == "adam"


def test_defaults_are_the_learners_own():
    found = {name: LearnerConfig(name=name) for name in TRAINING}
    rates = {name: (c.optimizer, c.learning_rate) for name, c in found.items()}
    assert rates["gradient"] == rates["ensemble"] == ("adam", 3e-4)
    assert rates["optimistic"] == rates["momentum"] == ("sgd", 0.1)
    assert rates["osd"] == ("adam", 1e-4)
    assert LearnerConfig(name="osd", learning_rate=0.5).learning_rate == 0.5
    assert found["osd"].update_every_prompts == 1
    assert found["ensemble"].meta_discount == 1.0
