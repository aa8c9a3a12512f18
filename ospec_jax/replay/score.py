# SPDX-License-Identifier: Apache-2.0
"""Scoring a draft on a recorded answer: what every step of the engine would accept.

Teacher-forced through the drafter's `unroll`, the recorded tokens are those that the
draft itself would have proposed up to the first mismatch; so one pass tells, for every
position, how many of K drafted tokens the target would accept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.decoding.step import narrow
from ospec_jax.drafters.base import frozen_head
from ospec_jax.learners.losses import forward_kl
from ospec_jax.models.layers import linear
from ospec_jax.replay.store import Recording
from ospec_jax.sampling import argmax
from ospec_jax.types import Feedback


def build_score(
    drafter,
    numerics,
    num_context: int,
    num_steps: int,
    decay: float,
    has_states: bool = False,
):
    """Builds the pass that scores whole answers.

    It maps `(params, token_ids, shared, feedback, start, following, weight)` to the
    accepted draft tokens `[b, a]` of a proposal at each root, the losses `[b]`, the
    states `[b, a, num_steps, d]` that each proposal's tokens were predicted from, and
    these tokens `[b, a, num_steps]`; None for both unless `has_states`.
    Feedback has `num_context` context tokens, then the `a` tokens before the roots,
    then `num_steps` more; `following[b, a + num_steps]` are the tokens after the first
    root, negative where there are none; `weight[b, a]` is None for no losses.
    """

    def score(params, token_ids, shared, feedback, start, following, weight):
        args = params, token_ids, shared, feedback, start
        sizes = {"num_context": num_context, "num_steps": num_steps}
        states = choices = None
        if has_states:
            logits, outputs = drafter.unroll_outputs(*args, **sizes)
            # Rounded as they are when decoding records them.
            states = jnp.stack([narrow(of_depth) for of_depth in outputs], axis=2)
        else:
            logits = drafter.unroll(*args, **sizes)

        # A token counts as accepted if all drafted before it were: `is_same` is the
        # chain's survival, `accepted` its sum.
        length = logits[0].shape[1]
        is_same = True
        accepted = 0
        drafted = []

        for depth, of_depth in enumerate(logits):
            best = argmax(of_depth)
            best = best if token_ids is None else token_ids[best]
            drafted.append(best)
            is_same &= best == following[:, depth : depth + length]
            accepted += is_same.astype(jnp.int32)

        if has_states:
            choices = jnp.stack(drafted, axis=2)
        if weight is None:
            return accepted, None, states, choices

        found = losses(logits, token_ids, shared, feedback, weight)
        return accepted, found, states, choices

    def losses(logits, token_ids, shared, feedback, weight):
        # The pair at the root's predecessor predicts the token after the root, so the
        # target's rows begin one behind the context.
        hidden = feedback.hidden[:, num_context + 1 :].astype(jnp.float32)
        target = linear(hidden, frozen_head(shared, token_ids), numerics)
        total = feedback.logsumexp[:, num_context + 1 :, None]
        probs = jnp.exp(jnp.minimum(target - total, 0.0))
        length = weight.shape[1]
        found = 0.0
        scale = 0.0

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
    stats = DecodingStats(num_spec_tokens=num_steps)
    for _, count in steps(accepted, num_tokens):
        stats.add_step(num_steps, count)

    return stats


def steps(
    accepted: Sequence[int] | np.ndarray, num_tokens: int
) -> Iterator[tuple[int, int]]:
    """Each step's root, as a token of the answer, and what it gets accepted."""
    root = 0
    # A step emits what it accepts and one token more, the next root.
    while root < num_tokens - 1:
        count = int(accepted[root])
        yield root, count
        root += count + 1


def drafting_states(
    accepted: np.ndarray, states: np.ndarray, choices: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The states from which the engine's steps would have drafted an answer.

    Args:
      states: `[a, num_steps, d]` of all proposals, as `build_score` gives them.
      choices: `[a, num_steps]` what was drafted from these.

    Returns:
      `[num_tokens - 1, d]` by the token that came before the predicted one, where there
      are any, since nothing is drafted behind a chain that was accepted whole, and what
      was drafted from them, -1 elsewhere.
    """
    kept = np.zeros((num_tokens - 1, states.shape[-1]), states.dtype)
    has_state = np.zeros(num_tokens - 1, bool)
    chosen = np.full(num_tokens - 1, -1, np.int32)

    for root, count in steps(accepted, num_tokens):
        # States up to the first rejected token: behind it the engine would have begun
        # anew. The answer may end within a chain.
        size = min(count + 1, states.shape[1], num_tokens - 1 - root)
        kept[root : root + size] = states[root, :size]
        chosen[root : root + size] = choices[root, :size]
        has_state[root : root + size] = True

    return kept, has_state, chosen


def whole_answer(found: Recording) -> list[int]:
    """Token ids of an answer, its last one included."""
    kept = found.arrays["tokens"][found.num_prompt :]
    return [*kept.tolist(), found.last_token]


def answer_window(
    found: Recording,
    num_context: int,
    num_roots: int,
    num_steps: int,
    has_losses: bool,
    is_tapped: bool,
):
    """One answer as `build_score`'s pass takes it, without the batch axis.

    Args:
      num_context: Tokens before the prompt's last one, padded in front.
      num_roots: Answer tokens, padded behind.
      has_losses: Also read what losses need.
      is_tapped: The draft reads taps, not final states.

    Returns:
      Feedback, its first position, the tokens after the first root, and weights.
    """
    # A window has one shape, and lies partly outside the recording: what is outside is
    # zero, and its positions are negative or carry no weight.
    start = found.num_prompt - 1 - num_context
    size = num_context + num_roots + num_steps
    low = max(start, 0)
    high = min(start + size, len(found.arrays["tokens"]))
    inside = slice(low - start, high - start)
    # Only what is needed is read from disk; other fields are there for the shape.
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
    # Nothing was verified after the last token.
    weight = np.arange(num_roots) < len(answer) - 1
    feedback: Any = Feedback(**fields)

    return feedback, np.int32(start), following, weight.astype(np.float32)
