# SPDX-License-Identifier: Apache-2.0
"""A session's requests as they come: they join and leave one batch between steps."""

from collections.abc import Callable

from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.request import Completion, Emitted, Request
from ospec_jax.session.session import Session


class Live:
    """A batch that never has to end.

    Prompts are run in chunks, one between two steps, so running rows wait for no more
    than a chunk. A request that needs larger caches has those of all rows grow; once
    nobody is left, the next batch begins with small ones.

    Args:
      session: Decodes and learns; nobody else may move it on meanwhile.
      on_tokens: Called with each request's new tokens as they are read.
    """

    def __init__(self, session: Session, on_tokens: Callable[[Request, Emitted], None]):
        self._session = session
        self._on_tokens = on_tokens
        self._ordinals = session.ordinals()
        self._batch: Batch | None = None
        # A place for predictions is another program: here all rows have one, so that
        # there are no two of each.
        tree = session.engine.config.tree
        self._has_prediction = session.is_drafting and tree.children == "topk"

    @property
    def num_free(self) -> int:
        """Requests that may join now."""
        batch = self._batch
        return self._session.batch_size if batch is None else batch.num_free

    @property
    def is_idle(self) -> bool:
        """Whether nobody is left."""
        return self._batch is None

    @property
    def capacity(self) -> int:
        """Cache slots of a row at present; 0 without any."""
        return 0 if self._batch is None else self._batch.capacity

    def join(self, request: Request) -> None:
        """Takes in a request; `num_free` must be above 0.

        Raises:
          PromptTooLongError: It does not fit the largest cache.
        """
        session = self._session
        capacity = session.engine.capacity_for([request])
        if self._batch is None:
            self._batch = Batch(
                session.engine,
                session.batch_size,
                capacity,
                self._has_prediction,
                self._on_tokens,
                session.chooser.observe,
            )

        self._batch.grow(capacity)
        self._batch.enter(request, next(self._ordinals))

    def leave(self, request: Request) -> bool:
        """Gives a request up; returns whether it was there. Its row is free at once."""
        return self._batch is not None and self._batch.cancel(request)

    def turn(self) -> list[Completion]:
        """A chunk of a prompt, if one is not complete, and a step of all rows.

        Returns:
          The answers that are complete.
        """
        batch = self._batch
        if batch is None:
            return []

        session = self._session
        if batch.is_reading:
            batch.read_on(session.served_draft)

        # The next step is sent before the oldest is read, so that the device does not
        # wait for the host.
        num_ahead = 0
        if batch.has_work:
            action = session.chooser.choose(batch.rows)
            batch.dispatch(session.served_draft, action)
            num_ahead = 1

        completions = list(batch.collect(num_ahead))
        if batch.is_idle:
            self._batch = None

        return completions
