# SPDX-License-Identifier: Apache-2.0
"""A session's requests as they come: they join and leave one batch between steps."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

from ospec_jax._platform import release_memory
from ospec_jax.config import SamplingConfig, StepKind
from ospec_jax.control.base import SUGGESTIONS, Row
from ospec_jax.decoding.batch import PLAIN_IN_A_ROW, Batch
from ospec_jax.decoding.engine import CAPACITIES
from ospec_jax.decoding.kept import Found, KeptRows
from ospec_jax.decoding.request import (
    Completion,
    Emitted,
    PromptTooLongError,
    Request,
)
from ospec_jax.session.session import Session
from ospec_jax.session.warm_up import costs_of_steps, read_alone

_LOG = logging.getLogger(__name__)
_PATIENCE = 8
"""Steps with rows to spare, before the batch gets smaller."""


_LAWS = (
    SamplingConfig(0.7),
    SamplingConfig(0.7, top_p=0.9),
    SamplingConfig(0.7, min_p=0.05),
)
"""Of each kind of law with a program of its own for learning one, whatever its figures
are. Greedy answers and those of temperature 1 share theirs."""


def _as_if(answer: Completion, sampling: SamplingConfig) -> Completion:
    """An answer as if it had been drawn by another law, to rehearse learning with."""
    request = dataclasses.replace(answer.request, sampling=sampling)
    return dataclasses.replace(answer, request=request)


def _rows_of(batch: Batch) -> tuple[Row, ...]:
    """What a controller may know of the rows.

    Long steps along a prediction are for a row by itself: in a larger batch all rows
    would have to be sure of theirs at once, which is not worth a program of each size.
    """
    rows = batch.rows
    if batch.size == 1:
        return rows

    return tuple(row._replace(is_sure=False) for row in rows)


def _kept_sizes(capacities: Sequence[int]) -> tuple[int, ...]:
    """Cache slots of kept rows: more sizes than running rows have, to waste less."""
    between = [size for size in CAPACITIES if 2 * size <= capacities[-1]]
    return tuple(sorted({*capacities, *between}))


class Live:
    """A batch that never has to end.

    It has as many rows as there are requests, or the next power of two: a step takes
    the longer the more rows it has, whether they are taken or not.

    Prompts are run in chunks, one between two steps, so running rows wait for no more
    than a chunk. A request that needs larger caches has those of all rows grow; once
    nobody is left, the next batch begins with small ones.

    Caches of answered requests are kept. A prompt that begins as one of them did, as a
    conversation's next turn does, is run from there on alone. So is the last token of a
    prompt that a running row has, too: several answers of one request read it once.

    Args:
      session: Decodes and learns; nobody else may move it on meanwhile.
      capacities: Cache slots that rows may have, ascending, of those that are compiled
        for. A step takes a little longer with larger ones.
      on_tokens: Called with each request's new tokens as they are read.
      kept_bytes: That caches of answered requests may take; 0 keeps none.
    """

    def __init__(
        self,
        session: Session,
        capacities: Sequence[int] = CAPACITIES,
        on_tokens: Callable[[Request, Emitted], None] = lambda request, emitted: None,
        kept_bytes: int = 0,
    ):
        self._capacities = tuple(capacities)
        self._session = session
        self._on_tokens = on_tokens
        self._kept = KeptRows(kept_bytes, _kept_sizes(self._capacities))
        # Whoever has the session forget its traffic means this, too.
        session.kept = self._kept
        self._ordinals = session.ordinals()
        self._batch: Batch | None = None
        self._ended: list[Completion] = []
        self._num_spare = 0
        # A place for predictions is another program: here all rows have one, so that
        # there are no two of each.
        tree = session.engine.config.tree
        self._has_prediction = session.is_drafting and tree.children == "topk"

    @property
    def num_free(self) -> int:
        """Requests that may join now."""
        batch = self._batch
        num_taken = 0 if batch is None else batch.size - batch.num_free
        return self._session.batch_size - num_taken

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows that the batch may have."""
        largest = self._session.batch_size
        # Rows of a mesh are split over its devices, so their number stays.
        if self._session.target.mesh is not None:
            return (largest,)

        powers = (2**i for i in range(largest.bit_length()))
        return (*(size for size in powers if size < largest), largest)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is left."""
        return self._batch is None

    @property
    def num_rows(self) -> int:
        """Rows of a step at present, free ones among them; 0 without any."""
        return 0 if self._batch is None else self._batch.size

    @property
    def capacity(self) -> int:
        """Cache slots of a row at present; 0 without any."""
        return 0 if self._batch is None else self._batch.capacity

    def kept_status(self) -> dict[str, int]:
        """How many rows are kept for later requests, and their size."""
        return {"num_rows": len(self._kept), "num_bytes": self._kept.num_bytes}

    def join(self, request: Request) -> None:
        """Takes in a request; `num_free` must be above 0.

        Raises:
          PromptTooLongError: It does not fit the largest cache.
        """
        needed = self._session.engine.needed_slots(request)
        if needed > self._capacities[-1]:
            raise PromptTooLongError(
                f"request {request.id} needs {needed} cache slots, and there are "
                f"{self._capacities[-1]}; shorten the prompt or ask for fewer tokens"
            )

        if self._batch is None:
            capacity = next(size for size in self._capacities if size >= needed)
            self._batch = self._new_batch(self.sizes[0], capacity)

        # One by one, so that there is a program for each.
        for capacity in self._capacities:
            if self._batch.capacity < needed:
                self._batch.grow(capacity)
        if not self._batch.num_free:
            self._resize(self._batch, self._batch.size + 1)
        ordinal = 0 if request.is_practice else next(self._ordinals)
        self._batch.enter(request, ordinal)

    def _new_batch(self, size: int, capacity: int) -> Batch:
        engine = self._session.engine
        self._session.chooser.weigh(size)
        return Batch(
            engine,
            size,
            capacity,
            self._has_prediction,
            self._on_tokens,
            self._session.chooser.observe,
            self._kept,
            self._session.chooser.now,
            self._session.chooser.rests,
        )

    def _resize(self, batch: Batch, num_rows: int) -> None:
        """Goes on with the smallest batch of so many rows, or of more."""
        size = next(size for size in self.sizes if size >= num_rows)
        if size == batch.size:
            return

        self._ended += batch.settle()
        # Whoever ended just now has made room.
        batch.resize(size)
        self._session.chooser.weigh(size)
        self._num_spare = 0

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
            rows = _rows_of(batch)
            action = session.chooser.choose(rows)
            steering = session.chooser.steer(action, rows)
            batch.dispatch(session.served_draft, action, steering)
            num_ahead = 1

        self._ended += batch.collect(num_ahead)
        self._shrink(batch)
        if batch.is_idle:
            self._batch = None

        completions = self._ended
        self._ended = []

        return completions

    def _shrink(self, batch: Batch) -> None:
        """Goes on with fewer rows, once some have been free for a while."""
        num_taken = batch.size - batch.num_free
        smaller = [size for size in self.sizes if num_taken <= size < batch.size]
        self._num_spare = self._num_spare + 1 if smaller else 0
        # Requests that come and go would else have it move at each step.
        if self._num_spare >= _PATIENCE and num_taken:
            self._resize(batch, smaller[-1])

    def warm_up(
        self, kinds: Iterable[StepKind], should_stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Compiles what decoding and learning need, at every size and capacity.

        Nothing is learned, but a learning budget becomes an interval, and steps of each
        number of rows are timed for a controller that weighs time.

        Args:
          kinds: Of requests that are to come.
          should_stop: Asked now and then; once it says so, nothing more is compiled.

        Returns:
          Whether everything was.
        """
        # Told here with all that is to come, which the engine does not know.
        with self._session.engine.silent():
            rounds = list(itertools.product(kinds, self._capacities))
            for number, (kind, capacity) in enumerate(rounds, start=1):
                if should_stop():
                    return False
                _LOG.info(
                    f"compiling {number} of {len(rounds)}: {kind} steps of "
                    f"{', '.join(map(str, self.sizes))} rows of {capacity} slots"
                )
                self._try_sizes(self._probe(kind), capacity)

            self._try_moves()
            self._try_keeping()
            self._measure_costs()
            # Of each capacity twice: the last is at full speed.
            greedy = self._probe("greedy")
            answers = [
                self._answer(greedy, capacity)
                for capacity in self._capacities
                for _ in range(2)
            ]
            timed = answers[1::2]
            # Those that are timed come last.
            drawn = [_as_if(answer, law) for answer in timed for law in _LAWS]
            self._session.warm_up_learning([*drawn, *timed], self.sizes[0])
            self._session.rehearse_slices(timed[-1])

        self._ended = []
        release_memory()
        return True

    def _measure_costs(self) -> None:
        """Times steps of each number of rows, for a controller that weighs time."""
        engine = self._session.engine
        chooser = self._session.chooser
        if chooser.controller.set_costs is None:
            return

        _LOG.info("timing steps")
        served = self._session.served_draft
        probe = dataclasses.replace(self._probe("greedy"), max_new_tokens=48)
        for size in self.sizes:
            state = engine.start(
                served, probe, size, self._capacities[0], self._has_prediction
            )
            costs = costs_of_steps(engine, chooser, served, probe.kind, state)
            chooser.costs[size] = costs

        chooser.weigh(self.sizes[0])

    def _probe(self, kind: StepKind) -> Request:
        sampling = SamplingConfig(temperature=0.0 if kind == "greedy" else 1.0)
        request = self._session.probe_request(24, sampling)
        ids = request.prompt_ids if self._has_prediction else ()
        wanted = 0 if kind == "full" else None
        return dataclasses.replace(request, prediction_ids=ids, num_log_probs=wanted)

    def _begin(self, request: Request, size: int, capacity: int) -> Batch:
        """A batch whose steps no controller hears of: they are no traffic."""
        engine = self._session.engine
        batch = Batch(engine, size, capacity, self._has_prediction)
        batch.admit(request, self._session.served_draft)
        return batch

    def _try_sizes(self, request: Request, capacity: int) -> None:
        """Takes each of the steps that may come, at each size, and between sizes."""
        served = self._session.served_draft
        if self._session.chooser.controller.rests is not None:
            args = self._session.engine, served, request, capacity
            read_alone(*args, self._has_prediction)
        for number, size in enumerate(self.sizes):
            batch = self._begin(request, size, capacity)
            # Before anything is read: the request might end, and nobody be left.
            for action in self._session.engine.actions:
                if size == 1 or action.drafter != SUGGESTIONS:
                    steering = self._session.chooser.steer(action, ())
                    batch.dispatch(served, action, steering)
            self._try_resting(batch)
            list(batch.settle())
            # Someone who comes and leaves.
            if batch.num_free:
                passenger = dataclasses.replace(request, id="passenger")
                batch.admit(passenger, served)
                batch.cancel(passenger)
                list(batch.settle())
            for other in self.sizes[max(number - 1, 0) : number + 2]:
                batch.resize(other)
                batch.resize(size)
            # Compiling leaves many times what decoding takes.
            release_memory()

    def _try_resting(self, batch: Batch) -> None:
        """Has the draft rest, and catch up, where it may."""
        engine = self._session.engine
        if not engine.num_behind:
            return

        served = self._session.served_draft
        plain = next(a for a in engine.actions if not a.tree.num_steps)
        drafting = next(a for a in engine.actions if a.tree.num_steps)
        for action in (*[plain] * (PLAIN_IN_A_ROW + 1), drafting):
            batch.dispatch(served, action)

    def _try_moves(self) -> None:
        """Has rows grow, and someone who asks for more join those who do not."""
        for size in self.sizes:
            batch = self._begin(self._probe("greedy"), size, self._capacities[0])
            if batch.num_free:
                batch.admit(self._probe("full"), self._session.served_draft)
            for capacity in self._capacities:
                batch.grow(capacity)

    def _try_keeping(self) -> None:
        """Keeps rows of each size, and goes on from them in rows of each size.

        Where none is kept, one goes on from running rows alone, whose size is its own.
        """
        can_be = lambda size, capacity: self._kept.is_keeping or size == capacity
        engine = self._session.engine
        served = self._session.served_draft
        request = self._probe("greedy")
        kept = {}
        for size, capacity in itertools.product(self.sizes, self._capacities):
            row, _ = engine.prefill(served, request, capacity, self._has_prediction)
            state = engine.place(None, row, 0, size, capacity)
            for smaller in _kept_sizes(self._capacities):
                if smaller <= capacity and can_be(smaller, capacity):
                    kept[smaller] = engine.keep(state, 0, smaller)

        pairs = itertools.product(kept.items(), self._capacities)
        for (kept_size, caches), capacity in pairs:
            if not can_be(kept_size, capacity):
                continue
            # So long that a chunk less is run.
            ids = request.prompt_ids * (-(-capacity // len(request.prompt_ids)))
            long = dataclasses.replace(request, prompt_ids=ids[: capacity // 2])
            reading = engine.begin(long, capacity, self._has_prediction, 0)
            engine.go_on_from(reading, Found(caches, len(long.prompt_ids) - 1))

    def _answer(self, request: Request, capacity: int) -> Completion:
        """Answers a request alone."""
        batch = self._begin(request, self.sizes[0], capacity)
        action = self._session.engine.action
        steering = self._session.chooser.steer(action, ())
        while True:
            num_ahead = 0
            if batch.has_work:
                batch.dispatch(self._session.served_draft, action, steering)
                num_ahead = 1
            for completion in batch.collect(num_ahead):
                return completion
