# SPDX-License-Identifier: Apache-2.0
"""A service without a model: it says what its test wants, from its own thread."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator

from ospec_jax.config import ConfigError
from ospec_jax.decoding.request import PromptTooLongError
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.sources import SOURCES, Source
from ospec_jax.models.tokenizer import TextStream, first_stop
from ospec_jax.serving.asks import (
    Ask,
    ChoiceEnd,
    Ended,
    Event,
    Failed,
    OverloadedError,
    Piece,
    Prepared,
    Serves,
    Token,
    Usage,
)
from ospec_jax.serving.http import make_app, make_server
from ospec_jax.serving.settings import HttpConfig
from ospec_jax.testing import byte_tokenizer

ANSWER = "Grüße aus Köln 🚀, liebe Welt."
TOKENS_A_PASS = 3
PROPOSERS = SOURCES[1:]
"""Who proposes what is drafted, pass by pass; the first of all is the target."""


class FakeTicket:
    """A request that was taken."""

    def __init__(self, ask: Ask):
        self.ask = ask
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()


class FakeService:
    """Says its answer to whatever it is asked; see `asks.Serves`.

    Attributes:
      answer: Text of all answers, or a function of the request and the choice.
      may_go: Cleared, answers stop before their next pass.
      error: With which requests are refused as they are submitted.
      failure: Which comes in place of the third pass.
      waits: Set once an action has begun.
      tickets: Of all requests.
    """

    def __init__(self, max_model_len: int = 512):
        self.model = "fake"
        self.max_model_len = max_model_len
        self.tokenizer = byte_tokenizer()
        self.is_ready = True
        self.is_alive = True
        self.version = 3
        self.answer: str | Callable[[Ask, int], str] = ANSWER
        self.may_go = threading.Event()
        self.may_go.set()
        self.error: Exception | None = None
        self.failure: Exception | None = None
        self.preparing_seconds = 0.0
        self.waits = threading.Event()
        self.tickets: list[FakeTicket] = []
        self.actions: list[tuple[str, dict]] = []
        self._encoding = threading.Lock()

    @property
    def asks(self) -> list[Ask]:
        """All that was asked."""
        return [ticket.ask for ticket in self.tickets]

    def prepare(self, ask: Ask) -> Prepared:
        time.sleep(self.preparing_seconds)
        with self._encoding:
            num_prompt = len(ask.prompt_ids or self.tokenizer.encode(ask.prompt.text))
        if "refuse me" in ask.prompt.text:
            raise ConfigError("the model's chat template refuses it")
        if num_prompt + (ask.max_new_tokens or 1) > self.max_model_len:
            raise PromptTooLongError(
                f"the context is {self.max_model_len} tokens, and the prompt has "
                f"{num_prompt} and {ask.max_new_tokens} new ones"
            )

        return Prepared(ask, num_prompt, None)

    def submit(
        self, prepared: Prepared, on_event: Callable[[Event], None]
    ) -> FakeTicket:
        if self.error is not None:
            raise self.error

        ticket = FakeTicket(prepared.ask)
        self.tickets.append(ticket)
        run = functools.partial(self._run, prepared, ticket, on_event)
        threading.Thread(target=run, daemon=True).start()
        return ticket

    def _run(self, prepared: Prepared, ticket: FakeTicket, tell) -> None:
        ask = prepared.ask
        stats = DecodingStats(num_spec_tokens=2)
        count = 0
        # Choices take turns, the last one first, as rows of a batch may.
        answers = [self._answer(ask, choice) for choice in range(ask.num_choices)]
        running = list(reversed(range(ask.num_choices)))
        place = [0] * ask.num_choices
        streams = [
            TextStream(self.tokenizer.decode, ask.stop) for _ in range(ask.num_choices)
        ]
        num_passes = 0

        while running:
            for choice in list(running):
                self.may_go.wait()
                if ticket.is_cancelled.is_set():
                    return
                num_passes += 1
                if self.failure is not None and num_passes == 3:
                    tell(Failed(self.failure))
                    return

                ids, text, reason = answers[choice]
                new = ids[place[choice] : place[choice] + TOKENS_A_PASS]
                place[choice] += len(new)
                count += len(new)
                num_accepted = max(len(new) - 1, 0)
                stats.add_step(TOKENS_A_PASS - 1, num_accepted)
                proposer = PROPOSERS[(num_passes - 1) % len(PROPOSERS)]
                tokens = tuple(
                    _token(id_, proposer if i < num_accepted else "target", ask)
                    for i, id_ in enumerate(new)
                )
                tell(Piece(choice, streams[choice].add(new), tokens))
                if place[choice] >= len(ids):
                    running.remove(choice)
                    rest = streams[choice].finish(text)
                    tell(ChoiceEnd(choice, rest, reason))

        num_prompt = prepared.num_prompt_tokens
        usage = Usage(num_prompt, count, cached=num_prompt // 2)
        if ask.prompt.prediction:
            usage = usage._replace(accepted_prediction=4, rejected_prediction=2)
        tell(Ended(usage, stats, self.version, 0.01, 0.02, 0.05))

    def _answer(self, ask: Ask, choice: int) -> tuple[list[int], str, str]:
        """Tokens, text and the reason of its end."""
        text = self.answer if isinstance(self.answer, str) else self.answer(ask, choice)
        ids = self.tokenizer.encode(text)
        reason = "stop"
        if ask.max_new_tokens is not None and len(ids) > ask.max_new_tokens:
            ids = ids[: ask.max_new_tokens]
            reason = "length"

        text = self.tokenizer.decode(ids)
        found = first_stop(text, ask.stop)
        if found is not None:
            text = text[:found]
            reason = "stop"
            ids = self.tokenizer.encode(text)

        return ids, text, reason

    def status(self) -> dict:
        return {
            "model": self.model,
            "max_model_len": self.max_model_len,
            "is_ready": self.is_ready,
            "uptime_seconds": 12.5,
            "draft": {
                "family": "eagle",
                "version": self.version,
                "acceptance_length": 2.5,
            },
            "learning": {
                "learner": "head",
                "is_on": True,
                "paused_for": None,
                "num_updates": 7,
                "num_answers": 5,
                "seconds": 1.5,
            },
            "queue": {
                "num_waiting": 1,
                "max_waiting": 64,
                "num_running": 2,
                "num_rows": 4,
                "capacity": 512,
            },
            "totals": {
                "num_steps": 40,
                "num_answers": 6,
                "num_tokens": 100,
                "busy_seconds": 3.0,
                "num_drafts": 40,
                "num_draft_tokens": 80,
                "num_accepted_tokens": 60,
                "num_compiles_after_warm_up": 0,
            },
        }

    def administer(self, action: str, **arguments) -> dict:
        self.waits.set()
        self.may_go.wait()
        if self.error is not None:
            raise self.error
        self.actions.append((action, arguments))
        if action == "rollback":
            self.version = arguments.get("version", 1)
        return {"done": action, **arguments}


def _token(token_id: int, source: Source, ask: Ask) -> Token:
    if ask.num_log_probs is None:
        return Token(token_id, source)

    alternatives = [(token_id, -0.25), (token_id ^ 1, -1.75), (token_id ^ 2, -3.5)]
    return Token(token_id, source, -0.25, tuple(alternatives[: ask.num_log_probs]))


@contextlib.contextmanager
def serving(service: Serves, config: HttpConfig | None = None) -> Iterator[str]:
    """The app behind a real server on loopback; gives its address."""
    config = config or HttpConfig(port=0)
    server = make_server(make_app(service, config), config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.01)

    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        if isinstance(service, FakeService):
            service.may_go.set()
        thread.join(10)
        assert not thread.is_alive(), "the server does not end"


def refused() -> OverloadedError:
    """As when the queue is full."""
    return OverloadedError("64 answers wait, and 64 may; ask again later", 7)


def wait_for(is_there):
    """Waits until something is so, for a minute at most."""
    for _ in range(1200):
        if is_there():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")
