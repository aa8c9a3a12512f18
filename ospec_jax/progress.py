# SPDX-License-Identifier: Apache-2.0
"""Progress bars, and interruption that loses nothing."""

import signal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar() -> Progress:
    """A bar on standard error, so that standard output stays data."""
    return Progress(
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
