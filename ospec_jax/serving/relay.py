# SPDX-License-Identifier: Apache-2.0
"""Events on their way from the thread that decodes to the loop that answers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ospec_jax.serving.answers import merge_ends
from ospec_jax.serving.asks import (
    ChoiceEnd,
    Ended,
    Event,
    Failed,
    Piece,
    Prepared,
    Serves,
    Ticket,
)
from ospec_jax.serving.metrics import Watch


class Gone(NamedTuple):
    """The client has left."""


class _Heard(NamedTuple):
    """An event of one of a request's tickets, and when it came."""

    ticket: int
    event: Event | Gone
    time: float


class Relay:
    """One request's events; its prompts' answers are numbered through.

    Made and used in the loop.
    """

    def __init__(self):
        self._watch: Watch | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Heard] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._offsets: list[int] = []
        self._ends: dict[int, Ended] = {}
        self._is_over = False

    def submit(self, service: Serves, prepared: Sequence[Prepared]) -> None:
        """Queues all of it, or nothing.

        Raises:
          OverloadedError: The queue is full.
        """
        offset = 0
        try:
            for number, one in enumerate(prepared):
                self._offsets.append(offset)
                offset += one.ask.num_choices
                self._tickets.append(service.submit(one, self._listener(number)))
        except BaseException:
            self._cancel()
            raise

    def watch(self, watch: Watch) -> None:
        """Has metrics hear what comes; said before the first event is taken."""
        self._watch = watch

    def leave(self) -> None:
        """Says that the client has gone."""
        self._queue.put_nowait(_Heard(0, Gone(), time.monotonic()))

    def close(self) -> None:
        """Gives up what has not ended."""
        if not self._is_over:
            self._cancel()
        if self._watch is not None:
            self._watch.close()

    async def receive(self, timeout: float | None = None) -> list[Event | Gone]:
        """All that has come; waits for something, and gives nothing after a while.

        The last of the events of a request is one `Ended` of all, `Failed` or `Gone`.
        """
        try:
            async with asyncio.timeout(timeout):
                heard = [await self._queue.get()]
        except TimeoutError:
            return []

        while not self._queue.empty():
            heard.append(self._queue.get_nowait())

        events = []
        for item in heard:
            event = self._merge(item)
            if event is not None and not self._is_over:
                self._is_over = isinstance(event, Ended)
                events.append(event)
            if isinstance(event, Failed | Gone):
                break

        return events

    def _listener(self, number: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            heard = _Heard(number, event, time.monotonic())
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, heard)
            except RuntimeError:
                # The loop has ended, and with it whoever would listen.
                return

        return on_event

    def _merge(self, heard: _Heard) -> Event | Gone | None:
        """The event as one of the whole request; None for the end of a part."""
        event = heard.event
        if isinstance(event, Gone):
            return event
        if isinstance(event, Ended):
            self._ends[heard.ticket] = event
            if len(self._ends) < len(self._tickets):
                return None
            event = merge_ends([self._ends[i] for i in range(len(self._tickets))])
        elif isinstance(event, Piece | ChoiceEnd):
            event = event._replace(choice=self._offsets[heard.ticket] + event.choice)

        if self._watch is not None:
            self._watch.hear(event, heard.time)
        return event

    def _cancel(self) -> None:
        self._is_over = True
        for ticket in self._tickets:
            ticket.cancel()
