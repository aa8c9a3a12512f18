# SPDX-License-Identifier: Apache-2.0
"""What a draft is trained to do, from verification's own numbers.

Verification recorded the target's final hidden state and the logsumexp of its logits at
every position. The frozen head's rows of the draft vocabulary times that hidden state,
less that logsumexp, are the target's exact log-probabilities there: they need not sum
to one, what is missing belongs to tokens that cannot be drafted.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.learners.base import LearnerInfo
from ospec_jax.typing import typed


@typed
def target_probs(
    head: Float[Array, "q d"],
    hidden: Float[Array, "b t d"],
    logsumexp: Float[Array, "b t"],
) -> Float[Array, "b t q"]:
    """The target's probabilities of the draft vocabulary."""
    logits = jnp.einsum("btd,qd->btq", hidden, head)
    return jnp.exp(jnp.minimum(logits - logsumexp[..., None], 0.0))


@typed
def forward_kl(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """Cross-entropy to the target's distribution: KL(p || q) up to p's entropy."""
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(probs, axis=-1) * total - jnp.sum(probs * logits, axis=-1)


@typed
def total_variation(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """1 - sum(min(p, q)): the probability that a sampled draft token is rejected."""
    return 1.0 - jnp.sum(jnp.minimum(probs, jax.nn.softmax(logits, axis=-1)), axis=-1)


LOSSES = {"forward_kl": forward_kl, "total_variation": total_variation}
"""Losses by the name that configurations use."""


def unrolled_loss(
    logits: list[Float[Array, "b l q"]],
    probs: Float[Array, "b t q"],
    weight: Float[Array, "b t"],
    loss_fn=forward_kl,
    decay: float = 0.8,
) -> tuple[Float[Array, ""], LearnerInfo]:
    """Mean over depths, weighted by `decay**depth`, of the mean loss (EAGLE-3).

    Args:
      logits: By depth; row i predicts the token after target row i + depth.
      probs: The target's, for rows 0 to l + depths - 1.
      weight: Of the same rows.
    """
    length = logits[0].shape[1]
    total, scale = jnp.float32(0.0), 0.0
    agreement, acceptance = [], []
    for depth, depth_logits in enumerate(logits):
        rows = slice(depth, depth + length)
        p, w = probs[:, rows], weight[:, rows]
        mean = lambda x, w=w: jnp.sum(x * w) / jnp.maximum(jnp.sum(w), 1e-6)
        total += decay**depth * mean(loss_fn(p, depth_logits))
        scale += decay**depth
        agreement.append(mean(is_agreed(p, depth_logits)))
        acceptance.append(1.0 - mean(total_variation(p, depth_logits)))
    return total / scale, LearnerInfo(
        loss=jax.lax.stop_gradient(total / scale),
        agreement=jax.lax.stop_gradient(jnp.stack(agreement)),
        acceptance=jax.lax.stop_gradient(jnp.stack(acceptance)),
        grad_norm=jnp.float32(0.0),
    )


@typed
def feature_loss(
    features: list[Float[Array, "b l d"]],
    hidden: Float[Array, "b t d"],
    weight: Float[Array, "b t"],
    decay: float = 0.8,
) -> Float[Array, ""]:
    """Smooth L1 between predicted and true final states (EAGLE-1, section 4.2).

    Args:
      features: By depth; row i predicts the target's state at row i + depth.
    """
    length = features[0].shape[1]
    total, scale = jnp.float32(0.0), 0.0
    for depth, predicted in enumerate(features):
        rows = slice(depth, depth + length)
        gap = jnp.abs(predicted - hidden[:, rows])
        by_row = jnp.mean(jnp.where(gap < 1, 0.5 * gap**2, gap - 0.5), axis=-1)
        w = weight[:, rows]
        total += decay**depth * jnp.sum(by_row * w) / jnp.maximum(jnp.sum(w), 1e-6)
        scale += decay**depth
    return total / scale


@typed
def is_agreed(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """1 where the draft's best token is the target's, else 0.

    The target's best token may lie outside the draft vocabulary: surely it does not
    when no single outside token could hold more mass than the best inside one.
    """
    best = jnp.max(probs, axis=-1)
    is_inside = best >= 1.0 - jnp.sum(probs, axis=-1)
    is_same = jnp.argmax(logits, axis=-1) == jnp.argmax(probs, axis=-1)
    return (is_same & is_inside).astype(jnp.float32)


def accepted_lengths(
    logits: list[Float[Array, "b l q"]],
    probs: Float[Array, "b t q"],
    weight: Float[Array, "b t"],
) -> Float[Array, " b"]:
    """Draft tokens that greedy verification would accept, by window; teacher-forced."""
    length = logits[0].shape[1]
    survival, total = 1.0, 0.0
    for depth, depth_logits in enumerate(logits):
        rows = slice(depth, depth + length)
        survival = survival * is_agreed(probs[:, rows], depth_logits) * weight[:, rows]
        total = total + survival
    first = weight[:, :length]
    return jnp.sum(total, axis=-1) / jnp.maximum(jnp.sum(first, axis=-1), 1e-6)
