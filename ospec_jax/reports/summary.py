# SPDX-License-Identifier: Apache-2.0
"""What a run of learning came to, in a few lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MIN_ANSWERS = 8
"""Fewer have no beginning and end that could be compared."""


def summarize_learning(results: Sequence[Any], seconds: float) -> str:
    """Speed of a run, and acceptance where it began and where it ended.

    What learning gained over the draft as it was is not told: prompts differ from the
    beginning of a stream to its end, so that only a run beside it without learning
    could tell.

    Args:
      results: `session.Result`s, in the order of completion.
      seconds: Wall-clock time of all of them, learning included.
    """
    num_tokens = sum(len(result.token_ids) for result in results)
    learning = sum(result.learning_seconds for result in results)
    share = learning / max(seconds, 1e-9)
    lines = [
        f"{len(results)} answers, {num_tokens} tokens in {seconds:.1f} s: "
        f"{num_tokens / max(seconds, 1e-9):.1f} tokens/s, learning included "
        f"({share:.1%} of the time)"
    ]

    if len(results) >= _MIN_ANSWERS:
        count = len(results) // 4
        first = _mean_length(results[:count])
        last = _mean_length(results[-count:])
        lines.append(
            f"acceptance length {first:.2f} over the first {count} answers, {last:.2f} "
            f"over the last {count}"
        )
    elif results:
        lines.append(f"acceptance length {_mean_length(results):.2f}")

    lines.append(
        "what learning gained is measured by `ospec bench --modes ngrams,learned` on "
        "the same prompts, its time counted"
    )
    return "\n".join(lines)


def describe_use(folder: Path, beside: str = "") -> str:
    """How to go on with what was saved.

    Args:
      beside: What stood in front of the draft's name, as `longer:ngram,`.
    """
    return (
        f"serve it with --draft {beside}{folder}; go on learning with --checkpoint "
        f"{folder} --resume"
    )


def _mean_length(results: Sequence[Any]) -> float:
    stats = sum((r.stats for r in results[1:]), results[0].stats)
    return stats.mean_acceptance_length


def running_length(
    num_passes: Sequence[int], num_accepted: Sequence[int], window: int
) -> np.ndarray:
    """Mean acceptance length over the last `window` answers, after each of them."""
    sums = []
    for counts in (num_passes, num_accepted):
        # Differences of running sums: `total[i]` is that of the first i answers.
        total = np.cumsum([0, *counts])
        last = np.arange(1, len(total))
        sums.append(total[last] - total[np.maximum(last - window, 0)])

    return 1 + sums[1] / np.maximum(sums[0], 1)
