# SPDX-License-Identifier: Apache-2.0
"""What a token costs: plainly, by drafting in turns, and by drafting in parallel.

All formulas take each drafted token for accepted with the same chance, the *acceptance
rate* a, whatever stands before it. Times are in seconds, or in any other unit: ratios
are what matters.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from ospec_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class SideTimes:
    """What each side takes by itself.

    Attributes:
      rows: Of a pass of the target, ascending from 1 on, that were measured.
      verifying: What a pass over so many takes.
      drafting: What the draft takes for one token.
      hand_over: What a round takes beside the longer side: sending drafted tokens,
        judging them, and telling the host. Drafting in turns on one device has none.
    """

    rows: tuple[int, ...]
    verifying: tuple[float, ...]
    drafting: float
    hand_over: float = 0.0

    def __post_init__(self):
        rows = list(self.rows)
        if not rows or rows != sorted(set(rows)) or rows[0] != 1:
            raise ConfigError(
                f"times of passes are of ascending numbers of rows from 1 on, not of "
                f"{self.rows}"
            )
        values = (*self.verifying, self.drafting, self.hand_over)
        if len(self.verifying) != len(rows) or not all(
            math.isfinite(x) and x >= 0 for x in values
        ):
            raise ConfigError(
                f"there is a time of 0 or more for each of the rows {self.rows}, for "
                f"drafting and for handing over, not {values}"
            )

    def verify(self, num_rows: int) -> float:
        """A pass over some rows; on the line of the last two beyond those measured."""
        if num_rows <= self.rows[-1] or len(self.rows) == 1:
            return float(np.interp(num_rows, self.rows, self.verifying))

        run = self.rows[-1] - self.rows[-2]
        slope = (self.verifying[-1] - self.verifying[-2]) / run
        return self.verifying[-1] + max(slope, 0.0) * (num_rows - self.rows[-1])

    def scaled(self, verifying: float = 1.0, drafting: float = 1.0) -> "SideTimes":
        """As if each side took so many times as long."""
        return dataclasses.replace(
            self,
            verifying=tuple(verifying * x for x in self.verifying),
            drafting=drafting * self.drafting,
        )


Cost = Callable[[SideTimes, int, float], float]
"""`(times, num_speculative_tokens, acceptance_rate) -> seconds a token`."""


def plain_cost(times: SideTimes) -> float:
    """A token of plain decoding."""
    return times.verify(1)


def expected_run(acceptance_rate: float, most: int) -> float:
    """Tokens up to the first that is rejected, itself included, but no more than so
    many: 1 + a + ... + a^(most - 1).
    """
    return sum(acceptance_rate**i for i in range(most))


def serial_cost(times: SideTimes, num_tokens: int, acceptance_rate: float) -> float:
    """A token of speculation in turns (arXiv 2211.17192), its bonus included."""
    seconds = num_tokens * times.drafting + times.verify(num_tokens + 1)
    return seconds / expected_run(acceptance_rate, num_tokens + 1)


def pearl_cost(times: SideTimes, num_tokens: int, acceptance_rate: float) -> float:
    """A token of PEARL, in the long run of its two regimes.

    Pre-verify emits one token, and ends with chance a; post-verify emits up to K, and
    ends unless all K are accepted. So of all rounds a share of (1 - a^K) / (1 - a^K +
    a) are pre-verify. Either takes as long as the longer side.
    """
    a = acceptance_rate
    writing = num_tokens * times.drafting
    pre = max(writing, times.verify(1)) + times.hand_over
    post = max(writing, times.verify(num_tokens)) + times.hand_over

    # How often either regime is left; nothing ever leaves a regime in which all is
    # certain.
    leaves_pre = a
    leaves_post = 1 - a**num_tokens
    total = leaves_pre + leaves_post
    share_pre = leaves_post / total
    share_post = leaves_pre / total
    emitted = share_pre + share_post * expected_run(a, num_tokens)

    return (share_pre * pre + share_post * post) / emitted


def presuming_cost(
    times: SideTimes,
    num_tokens: int,
    acceptance_rate: float,
    hit_rate: float,
    slowdown: float = 1.0,
) -> float:
    """A token of Saguaro (arXiv 2603.03251), which is not built here.

    While a block is verified the draft writes a chunk behind each of the likeliest
    outcomes. Where the outcome is none of these it drafts then, in turns.

    Args:
      hit_rate: Share of outcomes that were thought of.
      slowdown: Of the draft for writing all of these chunks at once.
    """
    writing = num_tokens * times.drafting
    seconds = max(slowdown * writing, times.verify(num_tokens + 1)) + times.hand_over
    seconds += (1 - hit_rate) * writing
    return seconds / expected_run(acceptance_rate, num_tokens + 1)


def best_length(
    cost: Cost,
    times: SideTimes,
    acceptance_rate: float,
    lengths: Iterable[int] = range(1, 17),
) -> tuple[int, float]:
    """The draft length of the cheapest token, and what that costs."""
    costs = {k: cost(times, k, acceptance_rate) for k in lengths}
    best = min(costs, key=costs.__getitem__)
    return best, costs[best]


def balanced_length(times: SideTimes, most: int = 16) -> int:
    """How many tokens the draft writes while the target passes over one: PEARL's rule.

    Rounded, at least 1.
    """
    if times.drafting == 0:
        return most

    return int(np.clip(round(times.verify(1) / times.drafting), 1, most))
