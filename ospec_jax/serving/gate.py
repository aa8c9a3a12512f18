# SPDX-License-Identifier: Apache-2.0
"""The gate in front of all routes: who may come in, and what every answer carries."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.keys import Caller, Keys
from ospec_jax.serving.settings import HttpConfig

_LOG = logging.getLogger(__name__)
_PUBLIC = frozenset({"/", "/health", "/ready", "/version"})
_STATIC = "/static/"
_INSIGHTS = frozenset({"/metrics", "/status", "/status/stream"})
"""What tells of the acceptance of all clients together."""
_ADMIN = "/admin"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def error_response(error: RequestError) -> Response:
    """An error in OpenAI's form."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    elif error.status >= 500:
        # Clients else ask twice more, for what fails each time.
        headers["X-Should-Retry"] = "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"

    return JSONResponse(error.to_json(), error.status, headers)


class Gate:
    """Lets in who may come in; all others, and all other paths, it keeps out.

    What decides is `scope["path"]`, the path that routes see. One put together from
    headers has let strangers in elsewhere.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig, keys: Keys):
        self._app = app
        self._config = config
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # There are no web sockets.
            await send({"type": "websocket.close", "code": 1008})
            return

        start = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id_of(headers)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found = MutableHeaders(scope=message)
                found["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    found.setdefault(name, value)
                found.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            caller = self._admit(scope, headers)
        except RequestError as error:
            await error_response(error)(scope, receive, send_with_headers)
        else:
            scope["ospec"] = {"caller": caller, "request_id": request_id}
            await self._app(scope, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - start
            # Neither headers nor bodies: prompts are nobody's business.
            method = scope["method"]
            # Who only looks does so all the time.
            level = logging.DEBUG if method in ("GET", "HEAD") else logging.INFO
            line = f"{request_id} {method} {_path(scope)} {status} {seconds:.3f} s"
            _LOG.log(level, line)

    def _admit(self, scope: Scope, headers: Headers) -> Caller:
        """Who comes in.

        Raises:
          RequestError: The caller may not.
        """
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._config.max_header_bytes:
            raise RequestError(
                f"the headers have {size} bytes; {self._config.max_header_bytes} are "
                f"possible",
                status=431,
            )

        path = scope["path"]
        caller = self._keys.identify(headers.get("authorization", ""))
        if path == _ADMIN or path.startswith(_ADMIN + "/"):
            self._check_admin(caller)
            return caller

        if path in _PUBLIC or path.startswith(_STATIC):
            return caller
        if path == "/metrics" and self._config.open_metrics:
            return caller

        if self._keys.num_clients == 0:
            self._check_host(headers)
            return caller
        if caller.bearer == "admin" and not path.startswith("/v1/"):
            return caller
        if caller.bearer != "client":
            raise RequestError(
                "the API key is missing or not known; send it as `Authorization: "
                "Bearer KEY`",
                code="invalid_api_key",
                status=401,
            )

        if path in _INSIGHTS and not self._config.tell_acceptance:
            raise RequestError(
                "this is for the administration: it tells of all clients together",
                status=403,
            )

        return caller

    def _check_admin(self, caller: Caller) -> None:
        if not self._keys.has_admin:
            raise RequestError(
                "there is no administration: the server was started without a key for "
                "it",
                status=403,
            )
        if caller.bearer == "client":
            raise RequestError("a client's key is not the administration's", status=403)
        if caller.bearer != "admin":
            raise RequestError(
                "the administration's key is missing or wrong; send it as "
                "`Authorization: Bearer KEY`",
                code="invalid_api_key",
                status=401,
            )

    def _check_host(self, headers: Headers) -> None:
        """Refuses names that are not this server's.

        Where there is no key, a page of somebody else's could have its own name lead
        to this machine, and then ask as if it were ours.
        """
        if self._config.allow_no_key and not self._config.is_loopback:
            return

        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in self._config.known_hosts:
            raise RequestError(
                "the Host header is not a name of this server; ask for localhost, or "
                "start the server with this name among its allowed hosts",
                status=403,
            )


def caller_of(scope: Scope) -> Caller:
    """Who sent a request that came through the gate."""
    return scope["ospec"]["caller"]


def request_id_of(scope: Scope) -> str:
    """The id of a request that came through the gate."""
    return scope["ospec"]["request_id"]


def _request_id_of(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _path(scope: Scope) -> str:
    """The path, on one line."""
    return scope["path"][:100].encode("unicode_escape").decode("ascii")
