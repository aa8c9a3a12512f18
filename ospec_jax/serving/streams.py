# SPDX-License-Identifier: Apache-2.0
"""Responses that go on: lines of server-sent events, to clients that may be slow."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class EventStream(Response):
    """Sends what an iterator gives, for as long as the client takes it.

    Args:
      lines: Whole events.
      on_end: Called when it is over, in whatever way.
      send_seconds: For the client to take one of them; one that does not is left.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: AsyncGenerator[bytes, None],
        on_end: Callable[[], None],
        send_seconds: float,
    ):
        super().__init__(
            # nginx else gathers chunks before it sends them on.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._lines = lines
        self._on_end = on_end
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            async with contextlib.aclosing(self._lines) as lines:
                async for line in lines:
                    async with asyncio.timeout(self._send_seconds):
                        await send(_body(line, has_more=True))
            await send(_body(b"", has_more=False))
        except (TimeoutError, OSError):
            # The server closes a connection whose answer is not finished, so that no
            # half answer passes for a whole one.
            return
        finally:
            self._on_end()


def _body(content: bytes, has_more: bool) -> dict:
    return {"type": "http.response.body", "body": content, "more_body": has_more}


async def wait_for_leaving(request: Request) -> None:
    """Returns when the client has gone."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
