# SPDX-License-Identifier: Apache-2.0
"""The last quarter of an hour, second by second, for the dashboard."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ospec_jax.serving.metrics import Recent

SECONDS = 1.0
"""Between two samples."""
_NUM_SAMPLES = 900
_NUM_MARKS = 100


class Sample(NamedTuple):
    """One moment.

    Attributes:
      time: Seconds since 1970.
      tokens_per_second: Since the sample before.
      tokens_per_pass: Likewise; None if there was no pass.
      learning_share: Of the time, that learning took.
    """

    time: float
    tokens_per_second: float
    tokens_per_pass: float | None
    learning_share: float
    num_running: int
    num_waiting: int
    first_token_p50: float | None
    between_tokens_p50: float | None
    between_tokens_p99: float | None
    version: int


class History:
    """Samples of a service, and marks where its draft changed.

    Args:
      status: Of the service.
      clock: Seconds since 1970.
    """

    def __init__(
        self,
        status: Callable[[], dict[str, Any]],
        recent: Recent,
        clock: Callable[[], float] = time.time,
    ):
        self._status = status
        self._recent = recent
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=_NUM_SAMPLES)
        self._marks: deque[dict[str, Any]] = deque(maxlen=_NUM_MARKS)
        self._before: tuple[float, int, int, float] | None = None
        self._version: int | None = None

    def mark(self, kind: str, version: int) -> None:
        """Notes that the draft changed.

        Args:
          kind: `promotion`, `rollback` or `load`.
        """
        mark = {"time": self._clock(), "kind": kind, "version": version}
        self._marks.append(mark)
        self._version = version

    def sample(self) -> None:
        """Looks at the service."""
        status = self._status()
        version = (status.get("draft") or {}).get("version") or 0
        if self._version is None:
            self._version = version
        elif version != self._version:
            self.mark("promotion", version)

        queue = status.get("queue") or {}
        learning = (status.get("learning") or {}).get("seconds") or 0.0
        recent = self._recent
        now = self._clock()
        newest = (now, recent.num_tokens, recent.num_passes, learning)
        # What was before the first look is of no second.
        then, num_tokens, num_passes, learned = self._before or newest
        self._before = newest
        span = max(now - then, 1e-3)
        passes = recent.num_passes - num_passes
        tokens = recent.num_tokens - num_tokens
        percentiles = recent.percentiles()

        self._samples.append(
            Sample(
                time=now,
                tokens_per_second=tokens / span,
                tokens_per_pass=tokens / passes if passes else None,
                learning_share=min(max((learning - learned) / span, 0.0), 1.0),
                num_running=queue.get("num_running") or 0,
                num_waiting=queue.get("num_waiting") or 0,
                first_token_p50=percentiles["first_token"]["p50"],
                between_tokens_p50=percentiles["between_tokens"]["p50"],
                between_tokens_p99=percentiles["between_tokens"]["p99"],
                version=version,
            )
        )

    def to_json(self, since: float = 0.0) -> dict[str, Any]:
        """Samples and marks after a time, newest last."""
        return {
            "fields": Sample._fields,
            "samples": [list(s) for s in self._samples if s.time > since],
            "marks": [m for m in self._marks if m["time"] > since],
            "latency": self._recent.percentiles(),
        }

    @property
    def newest(self) -> float:
        """Time of the last sample."""
        return self._samples[-1].time if self._samples else 0.0
