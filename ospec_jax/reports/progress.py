# SPDX-License-Identifier: Apache-2.0
"""Progress bars, and interruption that loses nothing."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Generator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.text import Text

LOG_SECONDS = 20.0
GRACE_SECONDS = 5.0
"""In which an answer may still be finished behind a signal; those who stop services
wait for 10 seconds or more."""

console = Console(stderr=True, markup=False, highlight=False)
"""Standard error, so that standard output stays data.

Square brackets are what they are: in paths and messages they are no markup.
"""


def say(text: object, style: str | None = None) -> None:
    """A line for the user; a long one, like a path, is not broken."""
    console.print(text, style=style, soft_wrap=True)


class _Teller(logging.Handler):
    """Shows what the package logs, with the seconds since it began."""

    def __init__(self):
        super().__init__()
        self._start = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{time.monotonic() - self._start:5.1f} s  {record.getMessage()}", "dim")


@contextlib.contextmanager
def told() -> Generator[None]:
    """Within, what takes its time says so: loading, measuring, compiling."""
    log = logging.getLogger("ospec_jax")
    teller = _Teller()
    before = log.level, log.propagate
    log.addHandler(teller)
    log.setLevel(logging.INFO)
    # Else whoever has set up the root logger would show it once more.
    log.propagate = False

    try:
        yield
    finally:
        log.removeHandler(teller)
        log.setLevel(before[0])
        log.propagate = before[1]


def busy(text: str) -> Status:
    """A sign of work of unknown length, to be entered."""
    return console.status(Text(text))


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
        )


def progress_bar() -> Progress:
    """Progress on standard error, so that standard output stays data."""
    return _Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class Interrupted(KeyboardInterrupt):
    """What could be was saved, but a signal left work undone.

    Attributes:
      number: Of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells tell of a process that a signal ended."""
        return 128 + self.number


class Interrupt:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a flag, the second into an end.

    A signal that is ignored from the start stays so, as under `nohup`. Of two that are
    entered one in the other, the outer one knows what the inner one caught.

    >>> with Interrupt() as interrupt:
    ...     bool(interrupt)
    False

    Attributes:
      number: Of the first signal; 0 before it.
      grace: Seconds in which what is on its way may still be finished.
    """

    def __init__(self, grace: float = GRACE_SECONDS):
        self.number = 0
        self.grace = grace
        self._since = 0.0
        self._is_held = False
        self._before: dict = {}
        self._terminals: list[int] = []

    def __bool__(self) -> bool:
        return self.number != 0

    def is_over(self) -> bool:
        """Whether there was a signal, and its grace is over: for what takes long."""
        return bool(self) and time.monotonic() - self._since >= self.grace

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Within, no signal ends anything: for what must be written as a whole."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def raise_if_set(self) -> None:
        """For the end of what a signal cut short, once the results are saved.

        Raises:
          Interrupted: There was a signal.
        """
        if self:
            raise Interrupted(self.number)

    def _handle(self, number, frame):
        # The terminal is gone, and with it what standard output leads to.
        if number == signal.SIGHUP:
            self._leave_terminals()

        if not self:
            self._note(number)
        elif not self._is_held:
            # A second signal ends the program as if nobody had caught the first.
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def _note(self, number) -> None:
        self.number = number
        self._since = time.monotonic()
        # Two that are entered one in the other: the handler before ours is the outer
        # one's.
        outer = getattr(self._before.get(number), "__self__", None)
        if isinstance(outer, Interrupt) and not outer:
            outer._note(number)

    def _leave_terminals(self) -> None:
        """Lets output go nowhere: writing to a terminal that is gone would fail, and
        with it what is to be saved."""
        for descriptor in self._terminals:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)

        self._terminals = []

    def __enter__(self) -> "Interrupt":
        # Only terminals vanish with their session; files and pipes stay.
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # None is a handler that was not installed from Python.
            if signal.getsignal(number) in (signal.SIG_IGN, None):
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: no signals arrive here
                break

        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def live(result, results) -> str:
    """Progress of a stream: speed and acceptance over the last ten prompts."""
    recent = results[-10:]
    tokens = sum(len(r.token_ids) for r in recent)
    seconds = sum(r.seconds + r.learning_seconds for r in recent)
    drafts = sum(r.stats.num_drafts for r in recent)
    accepted = sum(r.stats.num_accepted_tokens for r in recent)

    return (
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s, acceptance length "
        f"{1 + accepted / max(drafts, 1):.2f}, draft v{result.version}"
    )
