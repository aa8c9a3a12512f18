# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API in front of a service.

The loop here forwards and never computes: templates and tokenizers run in threads of
their own, and what decodes in another, so that no request waits for one that is slow to
read.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import socket
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import ospec_jax
from ospec_jax.config import ConfigError, InputError
from ospec_jax.decoding.request import PromptTooLongError
from ospec_jax.serving.admin import PATHS, Administration
from ospec_jax.serving.answers import (
    KEEP_ALIVE,
    Source,
    Teller,
    as_event,
)
from ospec_jax.serving.asks import (
    ChoiceEnd,
    Ended,
    Failed,
    OverloadedError,
    Piece,
    Prepared,
    Serves,
)
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.gate import Gate, caller_of, error_response, request_id_of
from ospec_jax.serving.history import SECONDS, History
from ospec_jax.serving.keys import Caller, Keys
from ospec_jax.serving.metrics import Metrics
from ospec_jax.serving.prompting import Server
from ospec_jax.serving.relay import Gone, Relay
from ospec_jax.serving.responses import ResponseTeller, read_response
from ospec_jax.serving.schema import Wanted, read_wanted
from ospec_jax.serving.settings import HttpConfig
from ospec_jax.serving.streams import EventStream, wait_for_leaving
from ospec_jax.serving.token_texts import TokenTexts
from ospec_jax.serving.values import parse_body

__all__ = [
    "HttpConfig",
    "check_address",
    "make_app",
    "make_server",
    "uvicorn_config",
]

_LOG = logging.getLogger(__name__)
_STATIC = Path(__file__).parent / "static"
_JSON = "application/json"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_NUM_WORKERS = 4
_NUM_WATCHERS = 32
"""Dashboards that may look on at the same time."""
_NOT_READY = 5
"""Seconds after which to ask again while programs are compiled."""
_GONE = 499
"""nginx's word for a client that left; nobody hears it."""

_Route = Literal["chat", "completion", "response"]
_Tells = Teller | ResponseTeller
_PREFIXES = {"chat": "chatcmpl-", "completion": "cmpl-", "response": "resp_"}
_PROMPTS = {"chat": "messages", "completion": "prompt", "response": "input"}
"""What a prompt is called in each of the APIs."""

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Serves, config: HttpConfig) -> Starlette:
    """The app that answers for a service.

    Raises:
      FileNotFoundError: There is no such key file.
      ConfigError: A key file is malformed.
    """
    keys = Keys.read(config)
    api = _Api(service, config, keys)
    actions = [
        Route(path, api.administer(action), methods=["POST"])
        for path, action in PATHS.items()
    ]
    app = Starlette(
        routes=[
            Route("/v1/models", api.list_models),
            Route("/v1/models/{model:path}", api.show_model),
            Route("/v1/chat/completions", api.answer("chat"), methods=["POST"]),
            Route("/v1/completions", api.answer("completion"), methods=["POST"]),
            Route("/v1/responses", api.answer("response"), methods=["POST"]),
            Route("/health", api.show_health),
            Route("/ready", api.show_ready),
            Route("/version", api.show_version),
            Route("/metrics", api.show_metrics),
            Route("/status", api.show_status),
            Route("/status/stream", api.stream_status),
            Route("/admin/draft", api.show_draft),
            *actions,
            Route("/", _show_page),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ],
        middleware=[Middleware(Gate, config=config, keys=keys)],
        exception_handlers={
            HTTPException: _answer_http_error,
            Exception: _answer_error,
        },
        lifespan=api.live,
    )
    # A redirect would go to wherever the Host header says.
    app.router.redirect_slashes = False

    return app


def check_address(config: HttpConfig) -> None:
    """Refuses to listen where strangers are without asking for a key.

    Raises:
      ConfigError: It would.
    """
    if config.is_loopback or config.api_key_file or config.allow_no_key:
        return

    raise ConfigError(
        f"host is {config.host!r}, which others can reach, and there is no API key; "
        f"give a file of keys, listen on 127.0.0.1, or allow requests without a key"
    )


class _HttpServer(uvicorn.Server):
    """uvicorn, which tells dashboards to leave when it ends: they stay for ever."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends it, when answers have ended or their grace has."""
        self.config.app.state.is_ending = True
        await super().shutdown(sockets)


def make_server(
    app: Starlette, config: HttpConfig, grace: int = 15, **options: Any
) -> uvicorn.Server:
    """Serves the app with uvicorn; see `uvicorn_config`.

    Its `run` returns after SIGINT or SIGTERM, or once `should_exit` is set.
    """
    return _HttpServer(uvicorn_config(app, config, grace, **options))


def uvicorn_config(
    app: Starlette, config: HttpConfig, grace: int = 15, **options: Any
) -> uvicorn.Config:
    """How uvicorn serves the app, within the limits of the configuration.

    Args:
      grace: Seconds that streams may go on when the server is told to end.
      options: More of uvicorn's, such as certificates.

    Raises:
      ConfigError: The address is open to strangers, and no key is asked for.
    """
    check_address(config)
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        access_log=False,
        http="h11",
        h11_max_incomplete_event_size=config.max_header_bytes + 2**10,
        lifespan="on",
        limit_concurrency=config.max_connections,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=grace,
        ws="none",
        **options,
    )


class _Api:
    """The routes, and what they share."""

    def __init__(self, service: Serves, config: HttpConfig, keys: Keys):
        self._service = service
        self._config = config
        self._texts = TokenTexts(service.tokenizer)
        self._metrics = Metrics(service.model, service.max_model_len, service.status)
        self._history = History(service.status, self._metrics.recent)
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, "preparing")
        self._admin_worker = ThreadPoolExecutor(1, "administering")
        self._administration = Administration(
            service, self._history, self._admin_worker
        )
        self._num_preparing = 0
        self._num_watchers = 0
        self._started = int(time.time())
        mode = config.learn
        if mode == "auto":
            mode = "opt-in" if keys.num_clients > 1 else "opt-out"
        self._server = Server(
            config=config,
            model=service.model,
            vocab_size=len(service.tokenizer),
            teaches=mode == "opt-out",
            can_teach=mode != "off",
        )

    @contextlib.asynccontextmanager
    async def live(self, app: Starlette) -> AsyncGenerator[None]:
        """As long as the server runs, the service is looked at each second."""
        sampling = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            sampling.cancel()
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._admin_worker.shutdown(wait=False, cancel_futures=True)

    async def _sample(self) -> None:
        while True:
            try:
                self._history.sample()
            except Exception as error:
                _log_failure(error)
            await asyncio.sleep(SECONDS)

    # Answers.

    def answer(self, kind: _Route) -> Endpoint:
        """The route that answers requests of a kind."""

        async def answer(request: Request) -> Response:
            try:
                return await self._answer(request, kind)
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception as error:
                refusal = _as_request_error(error)
                self._metrics.refuse(refusal.code or f"http_{refusal.status}")
                return error_response(refusal)

        return answer

    async def _answer(self, request: Request, kind: _Route) -> Response:
        if not self._service.is_alive:
            raise OverloadedError("the server is about to end", retry_after=10)
        if not self._service.is_ready:
            raise OverloadedError("the server is not ready yet", _NOT_READY)

        content = await self._read(request)
        answer_id = _PREFIXES[kind] + uuid.uuid4().hex
        caller = caller_of(request.scope)
        asked = time.monotonic()
        body, wanted, prepared = await self._prepare(content, kind, answer_id, caller)
        if wanted.ignored:
            request_id = request_id_of(request.scope)
            _LOG.debug(f"{request_id}: {len(wanted.ignored)} keys were passed over")

        num_prompt_tokens = sum(one.num_prompt_tokens for one in prepared)
        source = Source(
            answer_id,
            self._service.model,
            self._texts,
            self._fingerprint,
            self._config.tell_acceptance,
        )
        if kind == "response":
            teller = ResponseTeller(wanted, source, body)
        else:
            teller = Teller(wanted, source, num_prompt_tokens)
        relay = Relay()
        relay.submit(self._service, prepared)
        relay.watch(self._metrics.begin(wanted, num_prompt_tokens, asked))
        leaving = asyncio.create_task(_tell_of_leaving(request, relay))

        def close() -> None:
            leaving.cancel()
            relay.close()

        try:
            if not wanted.is_stream:
                return await self._answer_whole(teller, relay, close)
            return await self._answer_stream(teller, relay, close)
        except BaseException:
            close()
            raise

    async def _answer_whole(
        self, teller: _Tells, relay: Relay, close: Callable[[], None]
    ) -> Response:
        told: list[Piece | ChoiceEnd] = []
        while True:
            for event in await relay.receive():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Gone):
                    close()
                    return Response(status_code=_GONE)
                if isinstance(event, Ended):
                    close()
                    return JSONResponse(teller.tell_whole(told, event))
                told.append(event)

    async def _answer_stream(
        self, teller: _Tells, relay: Relay, close: Callable[[], None]
    ) -> Response:
        # As long as nothing has come, an error still has a status of its own.
        first = await relay.receive(self._config.keep_alive)
        if first and isinstance(first[0], Failed):
            raise first[0].error

        lines = self._guarded(teller, self._lines(teller, relay, first))
        return EventStream(lines, close, self._config.send_seconds)

    async def _lines(
        self, teller: _Tells, relay: Relay, first: list
    ) -> AsyncGenerator[bytes, None]:
        """The stream: chunks, comments while nothing comes, and its end."""
        join = lambda chunks: b"".join(map(teller.encode, chunks))
        opening = join(teller.open())
        if opening:
            yield opening
        events = first

        while True:
            last = events[-1] if events else None
            told = [e for e in events if isinstance(e, Piece | ChoiceEnd | Ended)]
            # A pass is a chunk, unless chunks are to hide how much a pass brings.
            is_gathered = self._config.stream_interval > 0
            groups = [told] if is_gathered else [[event] for event in told]
            chunks = [chunk for group in groups for chunk in teller.add(group)]
            content = join(chunks)
            if isinstance(last, Failed):
                content += join(teller.fail(_as_request_error(last.error)))
            if isinstance(last, Failed | Ended):
                yield content + teller.last
                return
            if isinstance(last, Gone):
                return
            if content:
                yield content
                await asyncio.sleep(self._config.stream_interval)
            elif not events:
                yield KEEP_ALIVE
            events = await relay.receive(self._config.keep_alive)

    async def _guarded(
        self, teller: _Tells, lines: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """The stream, which says so if telling it has failed."""
        async with contextlib.aclosing(lines):
            try:
                async for line in lines:
                    yield line
            except Exception as error:
                said = map(teller.encode, teller.fail(_as_request_error(error)))
                yield b"".join(said) + teller.last

    async def _prepare(
        self, content: bytes, kind: _Route, answer_id: str, caller: Caller
    ) -> tuple[dict[str, Any], Wanted, list[Prepared]]:
        """Reads a body, applies the template and counts tokens, in a worker."""
        if self._num_preparing >= self._config.max_preparing:
            raise OverloadedError(
                f"{self._num_preparing} prompts are being read; ask again later"
            )

        def prepare() -> tuple[dict[str, Any], Wanted, list[Prepared]]:
            body = parse_body(content)
            if kind == "response":
                wanted = read_response(body, answer_id, self._server, caller.name)
            else:
                wanted = read_wanted(body, kind, answer_id, self._server, caller.name)
            # What all are served with is taught by those alone who agreed to share.
            share = functools.partial(dataclasses.replace, is_shared=caller.is_sharing)
            try:
                prepared = [self._service.prepare(share(ask)) for ask in wanted.asks]
            except PromptTooLongError as error:
                code = "context_length_exceeded"
                raise RequestError(str(error), _PROMPTS[kind], code) from error

            return body, wanted, prepared

        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._workers, prepare)
        self._num_preparing += 1
        # A thread cannot be ended: it counts until it ends by itself.
        future.add_done_callback(self._end_preparing)
        try:
            async with asyncio.timeout(self._config.prepare_seconds):
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise RequestError(
                f"the prompt could not be read in {self._config.prepare_seconds:g} s; "
                f"shorten it, or ask again later",
                status=503,
                code="prepare_timeout",
                retry_after=10,
            ) from error

    def _end_preparing(self, future: asyncio.Future) -> None:
        self._num_preparing -= 1
        if not future.cancelled():
            # What nobody waits for any more is not reported as forgotten either.
            future.exception()

    async def _read(self, request: Request) -> bytes:
        """A JSON body, within its limits.

        Another type of content would let any page in a browser send one: JSON alone is
        first asked for, and refused, since no other origins are allowed.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != _JSON:
            raise RequestError(f"the Content-Type must be {_JSON}", status=415)

        most = self._config.max_body_bytes
        too_large = RequestError(
            f"the body has more than {most} bytes", code="too_large", status=413
        )
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:18]) > most:
            raise too_large

        content = bytearray()
        try:
            async with asyncio.timeout(self._config.body_seconds):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise too_large
        except TimeoutError as error:
            raise RequestError(
                f"the body did not arrive in {self._config.body_seconds:g} s",
                status=408,
            ) from error

        return bytes(content)

    def _fingerprint(self, version: int | None = None) -> str:
        """The draft that served. Answers depend on it only where it draws children."""
        version = self._service.version if version is None else version
        return f"ospec-{ospec_jax.__version__}-draft-{version}"

    # What else there is to see.

    async def list_models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def show_model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["model"]
        if name != self._service.model:
            message = f"there is no model {name[:60]!r}; use {self._service.model!r}"
            error = RequestError(message, "model", "model_not_found", status=404)
            return error_response(error)

        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        draft = self._service.status().get("draft") or {}
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._started,
            "owned_by": "ospec-jax",
            "root": self._service.model,
            "parent": None,
            "max_model_len": self._service.max_model_len,
            "draft": draft.get("family"),
            "draft_version": self._service.version,
        }

    async def show_health(self, request: Request) -> Response:
        """Whether the thread that decodes is running."""
        is_good = self._service.is_alive
        return JSONResponse({"status": "ok" if is_good else "down"}, _status(is_good))

    async def show_ready(self, request: Request) -> Response:
        """Whether everything is compiled."""
        is_good = self._service.is_alive and self._service.is_ready
        status = "ready" if is_good else "not ready"
        return JSONResponse({"status": status}, _status(is_good))

    async def show_version(self, request: Request) -> Response:
        """The package's version."""
        return JSONResponse({"version": ospec_jax.__version__})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus's text."""
        return Response(self._metrics.render(), media_type=_PROMETHEUS)

    async def show_status(self, request: Request) -> Response:
        """What is going on, and what was a little earlier."""
        return JSONResponse(self._status())

    async def stream_status(self, request: Request) -> Response:
        """What is going on, each second."""
        if self._num_watchers >= _NUM_WATCHERS:
            message = f"{self._num_watchers} dashboards are open; close one"
            return error_response(RequestError(message, status=503, retry_after=10))

        gone = asyncio.create_task(wait_for_leaving(request))
        is_ending = lambda: getattr(request.app.state, "is_ending", False)
        self._num_watchers += 1

        async def lines() -> AsyncGenerator[bytes, None]:
            since = 0.0
            while not gone.done() and not is_ending():
                yield as_event(self._status(since))
                since = self._history.newest
                await asyncio.wait([gone], timeout=SECONDS)

        def close() -> None:
            gone.cancel()
            self._num_watchers -= 1

        return EventStream(lines(), close, self._config.send_seconds)

    def _status(self, since: float = 0.0) -> dict[str, Any]:
        return {
            "status": self._service.status(),
            "history": self._history.to_json(since),
        }

    # The administration.

    async def show_draft(self, request: Request) -> Response:
        """The served draft, and how learning goes."""
        status = self._service.status()
        return JSONResponse({k: status.get(k) for k in ("draft", "learning")})

    def administer(self, action: str) -> Endpoint:
        """The route of an action."""

        async def administer(request: Request) -> Response:
            try:
                # The gate has looked already; nobody shall get here by another way.
                if caller_of(request.scope).bearer != "admin":
                    raise RequestError("this is for the administration", status=403)
                body = {}
                is_announced = request.headers.get("content-length", "0") != "0"
                if is_announced or "transfer-encoding" in request.headers:
                    body = parse_body(await self._read(request))
                return JSONResponse(await self._administration.run(action, body))
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception as error:
                return error_response(_as_request_error(error))

        return administer


async def _tell_of_leaving(request: Request, relay: Relay) -> None:
    await wait_for_leaving(request)
    relay.leave()


async def _show_page(request: Request) -> Response:
    return FileResponse(_STATIC / "index.html")


def _status(is_good: bool) -> int:
    return 200 if is_good else 503


def _as_request_error(error: Exception) -> RequestError:
    """The error as a client may know it: nothing of the inside is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, OverloadedError):
        return RequestError(
            str(error), code="overloaded", status=503, retry_after=error.retry_after
        )
    if isinstance(error, InputError):
        return RequestError(str(error))
    if isinstance(error, FileNotFoundError):
        return RequestError("there is no such file", status=404)

    _log_failure(error)
    return RequestError("the server has failed; its log says how", status=500)


def _log_failure(error: BaseException) -> None:
    """Logs where an error was raised, and not what it says: that may be a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error(f"{type(error).__name__}\n{where}")


async def _answer_http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    said = {
        404: f"there is no {request.url.path[:60]!r}",
        405: f"{request.method} is not possible here",
    }
    message = said.get(status, str(getattr(error, "detail", "it failed")))
    response = error_response(RequestError(message, status=status))
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value

    return response


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(_as_request_error(error))
