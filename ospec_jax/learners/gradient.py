# SPDX-License-Identifier: Apache-2.0
"""Online gradient descent with any optax optimizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ospec_jax.drafters.base import dequantized, frozen_head
from ospec_jax.learners.base import Learner, LearnerState, Segments
from ospec_jax.learners.losses import (
    accepted_lengths,
    forward_kl,
    target_probs,
    unrolled_loss,
)


def gradient(
    unroll: Callable,
    optimizer: optax.GradientTransformation,
    num_context: int,
    num_steps: int = 3,
    loss_fn: Callable = forward_kl,
    decay: float = 0.8,
) -> Learner:
    """Builds the learner `w <- w - optimizer(grad f(w))`.

    Args:
      unroll: The drafter's training forward pass.
      num_context: Leading pairs of each segment that are only attended to.
      num_steps: Depths to unroll; a draft trained one step deep gets worse at depth.
      loss_fn: One of `learners.losses`.
      decay: Weight of each depth relative to the one before.
    """

    def forward(params, segments: Segments, shared, token_ids):
        feedback = segments.feedback
        logits = unroll(
            params, token_ids, shared, feedback, segments.start, num_context, num_steps
        )
        # Pair i predicts the token after i + 1.
        rows = slice(num_context + 1, None)
        head = dequantized(frozen_head(shared, token_ids))
        hidden = feedback.hidden[:, rows].astype(jnp.float32)
        probs = target_probs(head, hidden, feedback.logsumexp[:, rows])
        return logits, probs, segments.weight[:, rows]

    def loss(params, segments: Segments, shared, token_ids):
        scored = forward(params, segments, shared, token_ids)
        return unrolled_loss(*scored, loss_fn, decay)

    def init(params):
        return LearnerState(
            params=params,
            opt_state=optimizer.init(params),
            num_updates=jnp.zeros((), jnp.int32),
        )

    def update(state: LearnerState, segments, shared, token_ids):
        grads, info = jax.grad(loss, has_aux=True)(
            state.params, segments, shared, token_ids
        )
        # Without any verified token there is nothing to learn, and an optimizer with
        # momentum or weight decay must not move either.
        has_signal = jnp.sum(segments.weight) > 0
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(has_signal, new, old)
        new = LearnerState(
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            num_updates=state.num_updates + has_signal,
        )
        return new, info._replace(grad_norm=optax.global_norm(grads))

    def evaluate(params, segments, shared, token_ids):
        scored = forward(params, segments, shared, token_ids)
        return unrolled_loss(*scored, loss_fn, decay)[1], accepted_lengths(*scored)

    return Learner(init=init, update=update, evaluate=evaluate)
