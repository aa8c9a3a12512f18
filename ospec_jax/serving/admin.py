# SPDX-License-Identifier: Apache-2.0
"""What an administrator may ask for."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from ospec_jax.serving.asks import Serves
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.history import History
from ospec_jax.serving.values import Values


class _Argument(NamedTuple):
    """An argument of an action.

    Attributes:
      read: Its value in a body.
      is_needed: It has no default.
    """

    read: Callable[[Values, str], Any]
    is_needed: bool = False


def _text(values: Values, name: str) -> str | None:
    return values.text(name)


def _number(values: Values, name: str) -> int | None:
    return values.whole(name, None, 0, 2**31 - 1)


def _flag(values: Values, name: str) -> bool | None:
    return values.flag(name, False) if name in values else None


_ARGUMENTS: dict[str, dict[str, _Argument]] = {
    "checkpoint": {},
    "forget": {"scope": _Argument(_text), "is_draft_too": _Argument(_flag)},
    "load": {"name": _Argument(_text, is_needed=True)},
    "pause": {},
    "pin": {},
    "promote": {},
    "resume": {},
    "rollback": {"version": _Argument(_number)},
    "unpin": {},
}
PATHS = {
    "/admin/checkpoint": "checkpoint",
    "/admin/draft/load": "load",
    "/admin/draft/pin": "pin",
    "/admin/draft/promote": "promote",
    "/admin/draft/rollback": "rollback",
    "/admin/draft/unpin": "unpin",
    "/admin/forget": "forget",
    "/admin/learning/pause": "pause",
    "/admin/learning/resume": "resume",
}
"""Routes, each an action of the service's; all of them are POST."""
_MARKS = {"load": "load", "promote": "promotion", "rollback": "rollback"}
"""Actions after which another draft is served."""


class Administration:
    """Runs actions, one at a time.

    Args:
      executor: Where an action waits for its turn between two steps.
    """

    def __init__(self, service: Serves, history: History, executor: Executor):
        self._service = service
        self._history = history
        self._executor = executor
        self._running: str | None = None

    async def run(self, action: str, body: dict[str, Any]) -> dict[str, Any]:
        """Runs an action.

        Raises:
          RequestError: An argument means nothing, or another action is running.
          Exception: As the service raises it.
        """
        arguments = _read_arguments(action, body)
        if self._running is not None:
            raise RequestError(
                f"{self._running} is running; ask for {action} when it has ended",
                status=409,
            )

        self._running = action
        run = functools.partial(self._service.administer, action, **arguments)
        future = asyncio.get_running_loop().run_in_executor(self._executor, run)
        # A client that leaves takes nothing with it: the action goes on.
        future.add_done_callback(functools.partial(self._end, action))

        return await asyncio.shield(future)

    def _end(self, action: str, future: asyncio.Future) -> None:
        self._running = None
        has_failed = future.cancelled() or future.exception() is not None
        if action in _MARKS and not has_failed:
            self._history.mark(_MARKS[action], self._service.version)


def _read_arguments(action: str, body: dict[str, Any]) -> dict[str, Any]:
    known = _ARGUMENTS[action]
    for name in body:
        if name not in known:
            names = ", ".join(known) or "no arguments"
            raise RequestError(
                f"{name:.60} is not known; {action} has {names}",
                name[:60],
                "unknown_parameter",
            )

    values = Values(body)
    arguments = {}
    for name, argument in known.items():
        value = argument.read(values, name)
        if value is None and argument.is_needed:
            raise RequestError(f"{name} is missing", name)
        if value is not None:
            arguments[name] = value

    return arguments
