# SPDX-License-Identifier: Apache-2.0
"""Gradient learning: it learns, it rests without signal, it never sees the target."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import random_params

from ospec_jax.config import TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.base import dequantized, frozen_head
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.base import Segments
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.losses import LOSSES, feature_loss, target_probs
from ospec_jax.learners.objective import build_objective
from ospec_jax.models.quantization import cast_params
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config
from ospec_jax.types import Feedback

VOCAB, CONTEXT, WINDOW, STEPS, ROWS = 32, 6, 10, 3, 4
LENGTH = CONTEXT + WINDOW + STEPS


def make_draft(family, draft_vocab_size=12):
    config = tiny_draft_config(tiny_model_config(VOCAB), draft_vocab_size, family)
    drafter = build_drafter(family, config, TreeConfig("chain", STEPS))
    return drafter, tiny_draft(drafter, config)


@pytest.fixture(scope="module", params=[12, 0], ids=["reduced", "full"])
def drafted(request):
    return make_draft("eagle3", request.param)


@pytest.fixture(scope="module")
def shared():
    return shared_tables(random_params(tiny_model_config(VOCAB)))


@pytest.fixture(scope="module")
def segments(shared):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, 32)), jnp.float32)
    return Segments(
        feedback=Feedback(
            tokens=jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32),
            taps=jnp.asarray(rng.normal(size=(ROWS, LENGTH, 64)), jnp.float16),
            hidden=hidden,
            logsumexp=jax.nn.logsumexp(hidden @ shared.head["kernel"].T, axis=-1),
        ),
        start=jnp.asarray([0, 5, -3, 100], jnp.int32),
        weight=jnp.ones((ROWS, LENGTH)),
    )


def built(drafter, optimizer, loss="forward_kl", num_candidates=0):
    objective = build_objective(
        drafter.unroll, CONTEXT, STEPS, LOSSES[loss], num_candidates=num_candidates
    )
    learner = gradient(objective, optimizer)
    return learner._replace(
        update=jax.jit(learner.update), evaluate=jax.jit(learner.evaluate)
    )


@pytest.fixture(scope="module")
def learner(drafted):
    # Momentum and weight decay, so that an update without signal would show.
    return built(drafted[0], optax.adamw(3e-3, weight_decay=1e-2))


def trained(learner, draft, segments, shared, count):
    state, losses = learner.init(draft.params), []
    for _ in range(count):
        state, info = learner.update(state, segments, shared, draft.token_ids)
        losses.append(float(info.loss))
    return state, losses, info


def test_loss_falls_on_a_fixed_segment(learner, drafted, segments, shared):
    state, losses, info = trained(learner, drafted[1], segments, shared, 40)
    assert losses[-1] < losses[0] - 0.3
    assert int(state.num_updates) == 40
    assert info.agreement.shape == info.acceptance.shape == (STEPS,)
    assert float(info.grad_norm) > 0
    first = learner.evaluate(
        drafted[1].params, segments, shared, drafted[1].token_ids
    )[0]  # fmt: skip
    after = learner.evaluate(state.params, segments, shared, drafted[1].token_ids)[0]
    assert float(first.loss) == pytest.approx(losses[0], rel=1e-5)
    assert np.all(after.acceptance > first.acceptance)


# `test_conformance.py` holds both of each family; what decays rests in the last test.
@pytest.mark.thorough
@pytest.mark.parametrize("family", ["eagle1", "hydra", "dflash", "peagle"])
def test_other_families_learn_and_rest_without_signal(family, segments, shared):
    drafter, draft = make_draft(family)
    learner = built(drafter, optax.adamw(3e-3, weight_decay=1e-2))
    state, losses, info = trained(learner, draft, segments, shared, 40)
    assert losses[-1] < losses[0] - 0.3
    assert info.agreement.shape == (STEPS,)
    silent = segments.replace(weight=jnp.zeros_like(segments.weight))
    after, _ = learner.update(state, silent, shared, draft.token_ids)
    assert same_bits(after, state)


def test_predicted_states_come_closer_to_the_targets(segments, shared):
    """The loss on states is the formula's, and training on it lowers it."""
    drafter, draft = make_draft("eagle1")
    assert make_draft("hydra")[0].unroll_outputs is None

    run = jax.jit(drafter.unroll_outputs, static_argnames=("num_context", "num_steps"))

    def gap(params):
        args = draft.token_ids, shared, segments.feedback, segments.start
        states = run(params, *args, num_context=CONTEXT, num_steps=STEPS)[1]
        hidden = segments.feedback.hidden[:, CONTEXT + 1 :]
        found = feature_loss(states, hidden, segments.weight[:, CONTEXT + 1 :])
        return float(found), states, hidden

    before, states, hidden = gap(draft.params)
    by_depth = []
    for depth, predicted in enumerate(states):
        x = np.abs(np.asarray(predicted - hidden[:, depth : depth + WINDOW]))
        by_depth.append(np.where(x < 1, x**2 / 2, x - 0.5).mean())
    weights = 0.8 ** np.arange(STEPS)
    assert before == pytest.approx(np.average(by_depth, weights=weights), rel=1e-5)
    after = {}
    for feature_weight in (0.0, 10.0):
        objective = build_objective(
            drafter.unroll, CONTEXT, STEPS,
            unroll_features=drafter.unroll_outputs, feature_weight=feature_weight,
        )  # fmt: skip
        learner = gradient(objective, optax.adam(3e-3))
        learner = learner._replace(update=jax.jit(learner.update))
        state, _, _ = trained(learner, draft, segments, shared, 40)
        after[feature_weight] = gap(state.params)[0]
    assert after[10.0] < 0.8 * before
    assert after[10.0] < after[0.0]


def test_total_variation_falls_too(drafted, segments, shared):
    learner = built(drafted[0], optax.adam(3e-3), "total_variation")
    _, losses, _ = trained(learner, drafted[1], segments, shared, 40)
    assert losses[-1] < losses[0] - 0.02


def test_candidates_are_the_likeliest_tokens(drafted, segments, shared):
    """Looking at the six likeliest tokens only, an update still learns all of them."""
    drafter, draft = drafted
    num_ids = VOCAB if draft.token_ids is None else len(draft.token_ids)
    whole = built(drafter, optax.sgd(0.1))
    few = built(drafter, optax.sgd(0.1), num_candidates=6)
    all_of_them = built(drafter, optax.sgd(0.1), num_candidates=num_ids)
    step = lambda learner: (
        learner.update(learner.init(draft.params), segments, shared, draft.token_ids)[
            0
        ].params
    )
    assert same_bits(step(all_of_them), step(whole))

    ids = np.arange(VOCAB) if draft.token_ids is None else np.asarray(draft.token_ids)
    feedback = segments.feedback
    logits = feedback.hidden[:, CONTEXT + 1 :] @ shared.head["kernel"][ids].T
    probs = np.exp(logits - feedback.logsumexp[:, CONTEXT + 1 :, None])
    likeliest = np.argsort(-probs.sum((0, 1)))[:6]
    if draft.token_ids is not None:
        moved = np.any(
            step(few)["lm_head"]["kernel"] != draft.params["lm_head"]["kernel"], 1
        )
        assert set(np.flatnonzero(moved)) == set(likeliest)
    score = lambda params: whole.evaluate(params, segments, shared, draft.token_ids)[0]
    state, _, _ = trained(
        built(drafter, optax.adam(3e-3), num_candidates=6), draft, segments, shared, 40
    )  # fmt: skip
    assert score(state.params).acceptance[0] > score(draft.params).acceptance[0]


def same_bits(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_segments_without_weight_change_nothing(learner, drafted, segments, shared):
    state, _, _ = trained(learner, drafted[1], segments, shared, 3)
    silent = segments.replace(weight=jnp.zeros_like(segments.weight))
    after, info = learner.update(state, silent, shared, drafted[1].token_ids)
    assert same_bits(after, state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(info))
    again, _ = learner.update(after, segments, shared, drafted[1].token_ids)
    assert not same_bits(again.params, state.params)


def test_what_weighs_nothing_does_not_matter(learner, drafted, segments, shared):
    """Half of the rows masked: their features may hold anything finite."""
    half = segments.replace(weight=segments.weight.at[2:].set(0.0))
    feedback = half.feedback
    junk = half.replace(
        feedback=feedback.replace(
            tokens=feedback.tokens.at[2:].set(1),
            taps=feedback.taps.at[2:].mul(-3),
            hidden=feedback.hidden.at[2:].set(2.0),
        )
    )
    state = learner.init(drafted[1].params)
    first, info = learner.update(state, half, shared, drafted[1].token_ids)
    second, other = learner.update(state, junk, shared, drafted[1].token_ids)
    assert float(info.loss) == pytest.approx(float(other.loss), rel=1e-6)
    for x, y in zip(
        jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_update_sees_only_the_targets_tables(drafted, segments, shared):
    """It is traced from the embedding and the head alone, and closes over nothing."""
    drafter, draft = drafted
    objective = build_objective(drafter.unroll, CONTEXT, STEPS)
    learner = gradient(objective, optax.adam(1e-3))
    names = list(inspect.signature(learner.update).parameters)
    assert names == ["state", "segments", "shared", "token_ids"]
    args = learner.init(draft.params), segments, shared, draft.token_ids
    traced = jax.make_jaxpr(learner.update)(*args)
    assert len(traced.jaxpr.invars) == len(jax.tree.leaves(args))
    assert len(jax.tree.leaves(shared)) == 2
    largest = max((np.size(const) for const in traced.consts), default=0)
    assert largest <= 16, "update closes over an array"


def test_only_draft_parameters_change(learner, drafted, segments, shared):
    draft, before = drafted[1], jax.tree.map(np.array, shared)
    state, _, _ = trained(learner, draft, segments, shared, 1)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state.params) == shapes(draft.params)
    assert same_bits(before, shared)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_target_probs_are_the_targets_softmax(drafted, precision):
    """On the draft vocabulary; the rest of the mass is left out, not renormalised."""
    params = cast_params(random_params(tiny_model_config(VOCAB)), precision)
    shared, ids = shared_tables(params), drafted[1].token_ids
    head = dequantized(shared.head)
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    expected = jax.nn.softmax(logits, axis=-1)
    if ids is not None:
        expected = expected[..., ids]
        assert float(jnp.min(jnp.sum(expected, axis=-1))) < 0.9
    found = target_probs(
        dequantized(frozen_head(shared, ids)), hidden,
        jax.nn.logsumexp(logits, axis=-1),
    )  # fmt: skip
    # Logits of a few units are sums whose order differs: so do probabilities.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
