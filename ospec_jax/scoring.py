# SPDX-License-Identifier: Apache-2.0
"""Scoring a draft on a recorded answer: what every step of the engine would accept.

Teacher-forced through the drafter's `unroll`, the recorded tokens are those that the
draft itself would have proposed up to the first mismatch; so one pass tells, for every
position, how many of K drafted tokens the target would accept.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ospec_jax.distill.store import Recording
from ospec_jax.drafters.base import frozen_head
from ospec_jax.learners.losses import forward_kl
from ospec_jax.metrics import DecodingStats
from ospec_jax.models.layers import linear
from ospec_jax.sampling import argmax
from ospec_jax.types import Feedback


def build_score(drafter, numerics, num_context: int, num_steps: int, decay: float):
    """Builds the pass that scores whole answers.

    It maps `(params, token_ids, shared, feedback, start, following, weight)` to the
    accepted draft tokens `[b, a]` of a proposal at each root, and the losses `[b]`.
    Feedback has `num_context` context tokens, then the `a` tokens before the roots,
    then `num_steps` more; `following[b, a + num_steps]` are the tokens after the first
    root, negative where there are none; `weight[b, a]` is None for no losses.
    """

    def score(params, token_ids, shared, feedback, start, following, weight):
        logits = drafter.unroll(
            params, token_ids, shared, feedback, start, num_context, num_steps
        )
        length = logits[0].shape[1]
        is_same, accepted = True, 0
        for depth, of_depth in enumerate(logits):
            best = argmax(of_depth)
            best = best if token_ids is None else token_ids[best]
            is_same &= best == following[:, depth : depth + length]
            accepted += is_same.astype(jnp.int32)
        if weight is None:
            return accepted, None
        return accepted, losses(logits, token_ids, shared, feedback, weight)

    def losses(logits, token_ids, shared, feedback, weight):
        hidden = feedback.hidden[:, num_context + 1 :].astype(jnp.float32)
        target = linear(hidden, frozen_head(shared, token_ids), numerics)
        total = feedback.logsumexp[:, num_context + 1 :, None]
        probs = jnp.exp(jnp.minimum(target - total, 0.0))
        length, found, scale = weight.shape[1], 0.0, 0.0
        for depth, of_depth in enumerate(logits):
            rows = slice(depth, depth + length)
            # The target's word after token i + depth counts where that was verified.
            count = jnp.pad(weight[:, depth:], ((0, 0), (0, depth)))
            mean = jnp.sum(forward_kl(probs[:, rows], of_depth) * count, axis=1)
            found += decay**depth * mean / jnp.maximum(jnp.sum(count, axis=1), 1.0)
            scale += decay**depth
        return found / scale

    return score


def walk(
    accepted: Sequence[int] | np.ndarray, num_tokens: int, num_steps: int
) -> DecodingStats:
    """The engine's steps over an answer.

    Args:
      accepted: Draft tokens that a proposal at each answer token would get accepted.
      num_tokens: Of the answer; its first one comes from the prompt's pass.
    """
    stats, root = DecodingStats(num_spec_tokens=num_steps), 0
    while root < num_tokens - 1:
        count = int(accepted[root])
        stats.add_step(num_steps, count)
        root += min(count + 1, num_tokens - 1 - root)
    return stats


def whole_answer(found: Recording) -> list[int]:
    """Token ids of an answer, its last one included."""
    kept = found.arrays["tokens"][found.num_prompt :]
    return [*kept.tolist(), found.last_token]


def answer_window(
    found: Recording, num_context: int, num_roots: int, num_steps: int,
    has_losses: bool, is_tapped: bool,
):  # fmt: skip
    """One answer as `build_score`'s pass takes it, without the batch axis.

    Args:
      num_context: Tokens before the prompt's last one, padded in front.
      num_roots: Answer tokens, padded behind.
      has_losses: Also read what losses need.
      is_tapped: The draft reads taps, not final states.

    Returns:
      Feedback, its first position, the tokens after the first root, and weights.
    """
    start = found.num_prompt - 1 - num_context
    size = num_context + num_roots + num_steps
    low, high = max(start, 0), min(start + size, len(found.arrays["tokens"]))
    inside = slice(low - start, high - start)
    read = {"tokens", "taps" if is_tapped else "hidden"}
    read |= {"hidden", "logsumexp"} if has_losses else set()
    fields = {}
    for name, source in found.arrays.items():
        fields[name] = np.zeros((size, *source.shape[1:]), source.dtype)
        if name in read:
            fields[name][inside] = source[low:high]
    following = np.full(num_roots + num_steps, -1, np.int32)
    answer = whole_answer(found)
    following[: len(answer) - 1] = answer[1:]
    weight = np.arange(num_roots) < len(answer) - 1
    feedback: Any = Feedback(**fields)
    return feedback, np.int32(start), following, weight.astype(np.float32)
