# SPDX-License-Identifier: Apache-2.0
"""What steps take, as the machine becomes busier or quieter than when it was measured.

Steps of each kind are timed before serving. While serving every step is timed by
itself, which costs nothing: it is the time between two reads. What it took, relative to
what it was to take, moves two running means of logarithms: one of all steps, which
other work on the machine slows down alike, and one of its kind beside that. What a kind
has shown fades, so that one which is no longer run is believed in again some day.

Times are hints: whatever they are, only the speed depends on what is chosen by them.
"""

import dataclasses
import math
from collections.abc import Sequence

_COMMON = 1 / 16
"""Weight of a step in the running mean of all: soon told, and an odd step is little."""
_OWN = 1 / 64
"""Likewise in that of its kind: smaller, so that what slows down all steps is not taken
for a fault of the one that is run most."""
_FADED = 1 / 1024
"""What each step takes off all kinds' own factors."""
_LARGEST = 1.0
"""A step counts as e times slower or faster than it was thought to be, at most: pauses
are no steps."""
_WORTH_TELLING = 0.05
"""Change of kinds' factors beside each other that a controller is told of. What slows
down all of them alike changes no choice."""
_PATIENCE = 32
"""Steps between two tellings: a table of costs takes milliseconds to make."""
_BOUNDS = 20.0, 3.0
"""Of logs, common and own: far beyond what any machine does."""


@dataclasses.dataclass(frozen=True)
class Drift:
    """How much slower steps are than they were measured.

    Attributes:
      seconds: Of each kind of step, as measured.
      common: Log of the factor that all kinds share.
      own: Log of each kind's factor beside that.
      told: Log of each kind's factor that the controller goes by.
      num_untold: Steps since it was told.
    """

    seconds: tuple[float, ...]
    common: float
    own: tuple[float, ...]
    told: tuple[float, ...]
    num_untold: int = 0

    @classmethod
    def start(cls, seconds: Sequence[float]) -> "Drift":
        """Steps take what was measured."""
        nothing = (0.0,) * len(seconds)
        return cls(tuple(seconds), 0.0, nothing, nothing)

    @property
    def logs(self) -> tuple[float, ...]:
        """Log of each kind's factor."""
        return tuple(self.common + own for own in self.own)

    @property
    def now(self) -> tuple[float, ...]:
        """What a step of each kind takes by now."""
        pairs = zip(self.seconds, self.logs, strict=True)
        return tuple(seconds * math.exp(log) for seconds, log in pairs)

    @property
    def is_news(self) -> bool:
        """Whether choices may change by what the controller was not told yet."""
        changes = [log - told for log, told in zip(self.logs, self.told, strict=True)]
        is_much = max(changes) - min(changes) > _WORTH_TELLING
        return is_much and self.num_untold >= _PATIENCE

    def observe(self, kind: int, factor: float) -> "Drift":
        """Books a step.

        Args:
          kind: Its number.
          factor: Seconds it took, in those that it was measured to take.
        """
        if not 0 < factor < math.inf:
            return self

        surprise = math.log(factor) - self.logs[kind]
        surprise = _within(surprise, _LARGEST)
        own = [(1 - _FADED) * x for x in self.own]
        own[kind] = _within(own[kind] + _OWN * surprise, _BOUNDS[1])

        return dataclasses.replace(
            self,
            common=_within(self.common + _COMMON * surprise, _BOUNDS[0]),
            own=tuple(own),
            num_untold=self.num_untold + 1,
        )

    def tell(self) -> "Drift":
        """As it is once the controller has been told of it."""
        return dataclasses.replace(self, told=self.logs, num_untold=0)


def _within(log: float, bound: float) -> float:
    return min(max(log, -bound), bound)
