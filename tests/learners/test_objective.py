# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch count, and how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.learners.base import Segments
from ospec_jax.learners.objective import build_objective
from ospec_jax.types import Feedback, SharedTables

CONTEXT, WINDOW, STEPS, ROWS, WIDTH, VOCAB = 1, 40, 2, 3, 4, 6
LENGTH = CONTEXT + WINDOW + STEPS
ids = jnp.arange(VOCAB)


def unroll(
    params, token_ids, shared, feedback, start, num_context, num_steps, candidates=None
):
    """A draft whose logits are its parameters, at every position."""
    logits = params["bias"] + jnp.zeros((ROWS, WINDOW, VOCAB))
    return [logits if candidates is None else logits[..., candidates]] * num_steps


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    feedback = Feedback(
        tokens=jnp.asarray(rng.integers(0, 9, (ROWS, LENGTH)), jnp.int32),
        taps=hidden,
        hidden=hidden,
        logsumexp=jax.nn.logsumexp(hidden @ head.T, axis=-1),
    )
    weight = jnp.ones((ROWS, LENGTH))
    segments = Segments(feedback, jnp.zeros(ROWS, jnp.int32), weight)
    return segments, SharedTables(embedding={}, head={"kernel": head})


def found(batch, **kwargs):
    objective = build_objective(unroll, CONTEXT, STEPS, **kwargs)
    params = {"bias": jnp.linspace(-1, 1, VOCAB)}
    loss, info = jax.jit(objective.loss)(params, *batch, ids)
    return float(loss), info, jax.jit(objective.score)(params, *batch, ids)[0]


def test_positions_may_count_more_or_less(batch):
    segments, shared = batch
    half = segments.replace(weight=segments.weight.at[:, CONTEXT + 1 + 20 :].set(0.0))
    early, _, _ = found((half, shared))
    falling, info, plain = found(batch, position_decay=0.5)
    first, _, _ = found(
        (segments.replace(weight=0.5 ** jnp.arange(LENGTH) * segments.weight), shared)
    )
    assert falling == pytest.approx(first, rel=1e-5)
    assert falling != pytest.approx(early, rel=1e-3)
    # What is reported is that of all positions, whatever the loss counts.
    everything, same, _ = found(batch)
    np.testing.assert_allclose(info.agreement, same.agreement)
    assert float(plain.loss) == pytest.approx(everything, rel=1e-5)


def test_a_share_of_tokens_is_drawn_from_the_batch(batch):
    segments, shared = batch
    _, whole, _ = found(batch)
    _, part, _ = found(batch, token_share=0.25)
    assert 0.1 < float(part.weight / whole.weight) < 0.4
    assert found(batch, token_share=0.25)[0] == found(batch, token_share=0.25)[0]
    tokens = segments.feedback.tokens + 1
    other = segments.replace(feedback=segments.feedback.replace(tokens=tokens))
    assert found((other, shared), token_share=0.25)[0] != found(
        batch, token_share=0.25
    )[0]  # fmt: skip


def test_rejected_positions_alone_make_the_loss(batch):
    _, whole, _ = found(batch)
    _, some, score = found(batch, positions="rejected")
    assert 0 < float(some.weight) < float(whole.weight)
    np.testing.assert_allclose(some.agreement, whole.agreement)
    assert float(score.weight) == pytest.approx(float(whole.weight))


def test_candidates_alone_do_not_tell_of_the_whole_draft(batch):
    """A draft that is sure of a token outside of them is never right."""
    segments, shared = batch
    # The target never says the last token: its states all point away from that.
    hidden = segments.feedback.hidden.at[..., 0].set(1.0)
    head = shared.head["kernel"].at[-1].set(jnp.array([-50.0, 0, 0, 0]))
    feedback = segments.feedback.replace(
        hidden=hidden, logsumexp=jax.nn.logsumexp(hidden @ head.T, axis=-1)
    )
    data = segments.replace(feedback=feedback), shared.replace(head={"kernel": head})
    params = {"bias": jnp.zeros(VOCAB).at[-1].set(50.0)}
    loss = lambda count: build_objective(
        unroll, CONTEXT, STEPS, num_candidates=count
    ).loss(params, *data, ids)[1]

    whole = loss(0)
    np.testing.assert_allclose(whole.agreement, 0.0, atol=1e-6)
    np.testing.assert_allclose(whole.acceptance, 0.0, atol=1e-6)
    assert whole.candidate_agreement is whole.candidate_acceptance is None

    some = loss(4)
    assert some.agreement is some.acceptance is None
    assert np.all(some.candidate_agreement > 0.1)
    assert np.all(some.candidate_acceptance > 0.1)
    # As many candidates as tokens are no approximation.
    np.testing.assert_array_equal(loss(VOCAB).agreement, whole.agreement)
