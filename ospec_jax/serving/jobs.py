# SPDX-License-Identifier: Apache-2.0
"""Requests on their way through the thread that decodes."""

import logging
import time
from collections.abc import Callable, Sequence

from ospec_jax.decoding.request import Completion, Emitted, Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.models.tokenizer import TextStream
from ospec_jax.serving.asks import (
    ChoiceEnd,
    Ended,
    Event,
    Piece,
    Prepared,
    Token,
    Usage,
)

_LOG = logging.getLogger(__name__)


class Choice:
    """One of a request's answers, on its way."""

    def __init__(self, number: int, request: Request, stream: TextStream):
        self.number = number
        self.request = request
        self.stream = stream


class Job:
    """A request that was taken; also its ticket.

    Args:
      on_event: Called from the thread that decodes; must not wait.
      on_cancel: Called when the request is given up, from any thread.
    """

    def __init__(
        self,
        prepared: Prepared,
        on_event: Callable[[Event], None],
        on_cancel: Callable[["Job"], None],
    ):
        self.ask = prepared.ask
        self.choices: list[Choice] = prepared.requests
        self.is_cancelled = False
        self.is_forgotten = False
        self.begun = 0.0
        self._num_prompt_tokens = prepared.num_prompt_tokens
        self._num_missing = len(self.choices)
        self._num_tokens = 0
        self._num_cached = prepared.num_prompt_tokens
        self._num_came_true = 0
        self._num_missed = 0
        self._stats = DecodingStats()
        self._asked = time.monotonic()
        self._first_token = 0.0
        self._on_event = on_event
        self._on_cancel = on_cancel

    @property
    def can_teach(self) -> bool:
        """Whether anything may be learned from it."""
        # Nothing is learned from what a client gave up: it may ask again.
        return self.ask.can_teach and not (self.is_cancelled or self.is_forgotten)

    def tell(self, event: Event) -> None:
        """Hands on an event, unless nobody listens any more."""
        if self.is_cancelled:
            return

        # A listener that fails, fails for itself: the others go on.
        try:
            self._on_event(event)
        except Exception:
            _LOG.exception("an event could not be handed on")
            self.cancel()

    def cancel(self) -> None:
        """Gives it up: its rows are free at the next step, and it hears no more."""
        self._on_cancel(self)

    def tell_tokens(
        self, choice: Choice, emitted: Emitted, drafter: int | None = None
    ) -> None:
        """Tells what one pass added to an answer.

        Args:
          drafter: See `Piece`.
        """
        self._first_token = self._first_token or time.monotonic()
        text = choice.stream.add(emitted.token_ids)
        self.tell(Piece(choice.number, text, _tokens_of(emitted), drafter))

    def tell_end(
        self,
        choice: Choice,
        completion: Completion,
        text: str,
        version: int,
        stop_ids: Sequence[int],
    ) -> None:
        """Tells that an answer has ended, and of the last one that all have.

        Args:
          text: Of the answer.
          version: Of the draft that it was answered with.
          stop_ids: Tokens that end answers.
        """
        rest = choice.stream.finish(text)
        self.tell(ChoiceEnd(choice.number, rest, completion.finish_reason))
        self._num_missing -= 1
        self._num_tokens += len(completion.token_ids)
        self._num_cached = min(self._num_cached, completion.num_reused)
        if completion.followed is not None:
            # The end was added to the prediction: it is none of the client's tokens.
            self._num_came_true += completion.followed.num_accepted(stop_ids)
            self._num_missed += completion.followed.num_missing(stop_ids)
        self._stats = self._stats + completion.stats
        if self._num_missing:
            return

        usage = Usage(
            self._num_prompt_tokens,
            self._num_tokens,
            self._num_came_true,
            self._num_missed,
            self._num_cached,
        )
        self.tell(
            Ended(
                usage,
                self._stats,
                version,
                queue_seconds=self.begun - self._asked,
                first_token_seconds=self._first_token - self._asked,
                seconds=time.monotonic() - self._asked,
            )
        )


def _tokens_of(emitted: Emitted) -> tuple[Token, ...]:
    """Tokens one by one, with what is known of each."""
    count = len(emitted.token_ids)
    return tuple(
        Token(*facts)
        for facts in zip(
            emitted.token_ids,
            emitted.sources,
            emitted.log_probs or [None] * count,
            emitted.alternatives or [()] * count,
            strict=True,
        )
    )
