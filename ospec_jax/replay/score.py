# SPDX-License-Identifier: Apache-2.0
"""Scoring a draft on a recorded answer: what every step of the engine would accept.

The pass itself is that of `online.redrafting`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.online.redrafting import steps
from ospec_jax.replay.store import Recording
from ospec_jax.types import Feedback


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
    fields: Any = {}

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
