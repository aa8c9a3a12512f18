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


def unroll(params, token_ids, shared, feedback, start, num_context, num_steps, _):
    """A draft whose logits are its parameters, at every position."""
    logits = params["bias"] + jnp.zeros((ROWS, WINDOW, VOCAB))
    return [logits] * num_steps


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
    loss, info = objective.loss(params, *batch, ids)
    return float(loss), info, objective.score(params, *batch, ids)[0]


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
