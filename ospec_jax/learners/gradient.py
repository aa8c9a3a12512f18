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
    feature_loss,
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
    num_candidates: int = 0,
    unroll_features: Callable | None = None,
    feature_weight: float = 0.0,
) -> Learner:
    """Builds the learner `w <- w - optimizer(grad f(w))`.

    Args:
      unroll: The drafter's training forward pass.
      num_context: Leading pairs of each segment that are only attended to.
      num_steps: Depths to unroll; a draft trained one step deep gets worse at depth.
      loss_fn: One of `learners.losses`.
      decay: Weight of each depth relative to the one before.
      num_candidates: Tokens that an update looks at: those to which the target gives
        most probability in its segments. The loss is then that of a draft with these
        tokens alone, its softmax included: an approximation that leaves the rows of
        all other tokens as they are. 0 looks at the whole draft vocabulary, at twice
        the cost.
      unroll_features: The drafter's, if it predicts the target's final states.
      feature_weight: Of the loss of those predictions, beside the tokens' loss.
    """

    def targets(segments: Segments, shared, token_ids):
        """The target's probabilities, and their weight, after each trained pair."""
        feedback = segments.feedback
        assert feedback.hidden is not None, "features are recorded"
        assert feedback.logsumexp is not None, "features are recorded"
        # Pair i predicts the token after i + 1.
        rows = slice(num_context + 1, None)
        head = dequantized(frozen_head(shared, token_ids))
        hidden = feedback.hidden[:, rows].astype(jnp.float32)
        probs = target_probs(head, hidden, feedback.logsumexp[:, rows])
        return probs, segments.weight[:, rows], hidden

    def forward(unroll, params, segments, shared, token_ids, candidates=None):
        return unroll(
            params, token_ids, shared, segments.feedback, segments.start, num_context,
            num_steps, candidates,
        )  # fmt: skip

    def loss(params, segments: Segments, shared, token_ids):
        probs, weight, hidden = targets(segments, shared, token_ids)
        candidates = None
        if 0 < num_candidates < probs.shape[-1]:
            mass = jnp.einsum("btq,bt->q", probs, weight)
            candidates = jax.lax.top_k(mass, num_candidates)[1]
            probs = probs[..., candidates]
        args = params, segments, shared, token_ids, candidates
        if unroll_features is None or not feature_weight:
            logits = forward(unroll, *args)
            return unrolled_loss(logits, probs, weight, loss_fn, decay)
        logits, features = forward(unroll_features, *args)
        of_tokens, info = unrolled_loss(logits, probs, weight, loss_fn, decay)
        total = feature_loss(features, hidden, weight, decay) * feature_weight
        return of_tokens + total, info

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

        def move(state: LearnerState):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return LearnerState(params, opt_state, state.num_updates + 1)

        new = jax.lax.cond(has_signal, move, lambda state: state, state)
        return new, info._replace(grad_norm=optax.global_norm(grads))

    def evaluate(params, segments, shared, token_ids):
        logits = forward(unroll, params, segments, shared, token_ids)
        scored = logits, *targets(segments, shared, token_ids)[:2]
        return unrolled_loss(*scored, loss_fn, decay)[1], accepted_lengths(*scored)

    return Learner(init=init, update=update, evaluate=evaluate)
