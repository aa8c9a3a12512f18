# SPDX-License-Identifier: Apache-2.0
"""What steps take, as the machine becomes busier or quieter than when it was measured.

Steps of each kind are timed before serving. While serving every step is timed by
itself, which costs nothing: it is the time between two reads. But a step that takes
longer than it should does not tell whether the others would, too. So once steps have
become slower or faster, and from time to time in any case, all kinds are run by turns
and measured again, each by the least of a few steps. These steps answer requests like
all others.

Times are hints: whatever they are, only the speed depends on what is chosen by them.
"""

import dataclasses
import math
from collections.abc import Sequence

_WEIGHT = 1 / 16
"""Of a step in the running mean: soon told, and an odd step is little."""
_LARGEST = 1.0
"""A step counts as e times slower or faster than it was thought to be, at most: pauses
are no steps."""
_STALE = 0.15
"""Change of the running mean's logarithm that has all kinds measured again."""
_LEAST_STEPS = 64
"""Between two measurings, whatever happens."""
_MOST_STEPS = 2048
"""Between two measurings if nothing happens: what slowed down a kind that is no longer
run may be gone."""
_NUM_ROUNDS = 3
_IN_FLIGHT = 2
"""Steps that are heard of after others were chosen."""
_WORTH_TELLING = 0.05
"""Change of kinds' factors beside each other that a controller is told of. What slows
down all of them alike changes no choice."""
_BOUND = 10.0
"""Of logarithms: far beyond what any machine does."""


@dataclasses.dataclass(frozen=True)
class Drift:
    """How much slower steps are than they were measured.

    Attributes:
      seconds: Of each kind of step, as measured before serving.
      logs: Log of the factor of each kind.
      told: Likewise those that the controller goes by.
      moved: What the running mean has moved by since kinds were measured.
      num_steps: Since then.
      pending: Kinds that are to be run, while they are measured again.
      heard: What they took, `(kind, factor)`.
      num_awaited: Steps until measuring is over; 0 while nothing is measured.
    """

    seconds: tuple[float, ...]
    logs: tuple[float, ...]
    told: tuple[float, ...]
    moved: float = 0.0
    num_steps: int = 0
    pending: tuple[int, ...] = ()
    heard: tuple[tuple[int, float], ...] = ()
    num_awaited: int = 0

    @classmethod
    def start(cls, seconds: Sequence[float]) -> "Drift":
        """Steps take what was measured."""
        nothing = (0.0,) * len(seconds)
        return cls(tuple(seconds), nothing, nothing)

    @property
    def now(self) -> tuple[float, ...]:
        """What a step of each kind takes by now."""
        pairs = zip(self.seconds, self.logs, strict=True)
        return tuple(seconds * math.exp(log) for seconds, log in pairs)

    @property
    def is_news(self) -> bool:
        """Whether choices may change by what the controller was not told yet."""
        changes = [log - told for log, told in zip(self.logs, self.told, strict=True)]
        return max(changes) - min(changes) > _WORTH_TELLING

    def choose(self) -> tuple[int | None, "Drift"]:
        """The kind of the next step, if it is to be measured."""
        drift = self
        is_moved = abs(self.moved) > _STALE and self.num_steps >= _LEAST_STEPS
        if not self.num_awaited and (is_moved or self.num_steps >= _MOST_STEPS):
            kinds = tuple(range(len(self.seconds))) * _NUM_ROUNDS
            awaited = len(kinds) + _IN_FLIGHT
            drift = dataclasses.replace(self, pending=kinds, num_awaited=awaited)
        if not drift.pending:
            return None, drift

        first, *rest = drift.pending
        return first, dataclasses.replace(drift, pending=tuple(rest))

    def observe(self, kind: int, factor: float) -> "Drift":
        """Books a step.

        Args:
          kind: Its number.
          factor: Seconds it took, in those that it was measured to take.
        """
        if not 0 < factor < math.inf:
            return self
        if self.num_awaited:
            heard = (*self.heard, (kind, factor))
            drift = dataclasses.replace(
                self, heard=heard, num_awaited=self.num_awaited - 1
            )
            return drift if drift.num_awaited else drift._settled()

        # Until they are measured again all kinds are believed to move alike.
        surprise = math.log(factor) - self.logs[kind]
        step = _WEIGHT * _within(surprise, _LARGEST)
        return dataclasses.replace(
            self,
            logs=tuple(_within(log + step, _BOUND) for log in self.logs),
            moved=self.moved + step,
            num_steps=self.num_steps + 1,
        )

    def _settled(self) -> "Drift":
        """What was measured again, each kind by its least."""
        logs = list(self.logs)
        for kind in range(len(logs)):
            found = [factor for number, factor in self.heard if number == kind]
            if found:
                logs[kind] = _within(math.log(min(found)), _BOUND)

        return Drift(self.seconds, tuple(logs), self.told)

    def tell(self) -> "Drift":
        """As it is once the controller has been told of it."""
        return dataclasses.replace(self, told=self.logs)


def _within(log: float, bound: float) -> float:
    return min(max(log, -bound), bound)
