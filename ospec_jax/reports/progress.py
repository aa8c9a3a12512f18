# SPDX-License-Identifier: Apache-2.0
"""Progress bars, and interruption that loses nothing."""

import signal
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 20.0


class _Progress(Progress):
    """A bar on a terminal; elsewhere, such as in a log file, now and then a line."""

    _last_line = -LOG_SECONDS

    def update(self, task_id, **changes) -> None:
        super().update(task_id, **changes)
        now = time.monotonic()
        if self.console.is_terminal or now - self._last_line < LOG_SECONDS:
            return
        self._last_line = now
        task = next(task for task in self.tasks if task.id == task_id)
        self.console.print(
            f"{task.completed:.0f}/{task.total or 0:.0f} {task.description}",
            markup=False, highlight=False,
        )  # fmt: skip


def progress_bar() -> Progress:
    """Progress on standard error, so that standard output stays data."""
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class Interrupt:
    """Turns the first Ctrl-C or termination signal into a flag, the second into an end.

    >>> with Interrupt() as interrupt:
    ...     bool(interrupt)
    False
    """

    def __init__(self):
        self._is_set = False
        self._before: dict = {}

    def __bool__(self) -> bool:
        return self._is_set

    def _handle(self, number, frame):
        self._is_set = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: no signals arrive here
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
