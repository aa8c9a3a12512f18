# SPDX-License-Identifier: Apache-2.0
"""Requests that are decoded together, as they come and go.

A batch is the one place of decoding that changes. Between two steps requests are
admitted to free rows or cancelled, the draft is swapped, another action is taken; a
row's greedy tokens depend on none of that.
"""

import dataclasses
import itertools
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ospec_jax.config import ConfigError, StepKind
from ospec_jax.control.base import Action, Outcome, Row
from ospec_jax.control.lengths import Windows, join
from ospec_jax.decoding.kept import Found, KeptRows, RowCaches
from ospec_jax.decoding.request import Completion, Emitted, Request, Slot
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.types import DecodeState, Draft, Feedback, StepOutput

PLAIN_IN_A_ROW = 8
"""Plain steps after which a draft rests. To catch up is a pass of its own, which must
be rare beside the steps that it saves: where plain steps and others take turns, none
rests. Chosen, not measured."""


def fetch(output: Any) -> Any:
    """The only place where the host waits for the device while decoding."""
    # Where the device's memory is the host's, arrays are read where they lie: that
    # takes a sixth of the time of `device_get`, which is made for copies.
    if jax.default_backend() == "cpu":
        return jax.tree.map(np.asarray, output)

    return jax.device_get(output)


class Reading(NamedTuple):
    """A request whose prompt is being run, chunk by chunk.

    Attributes:
      state: Of one row.
      position: Prompt tokens that were sent to the device, or more.
      output: Of the newest chunk; of the last one it has the answer's first token.
      is_to_keep: The row shall be kept: its draft runs over all of the prompt, though
        it may look back at the end of it alone.
      only: See `Slot`.
    """

    request: Request
    state: DecodeState
    position: int = 0
    output: StepOutput | None = None
    is_to_keep: bool = False
    only: int | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing of the prompt was sent."""
        return self.output is None

    @property
    def is_done(self) -> bool:
        """Whether all of the prompt was sent."""
        return self.position >= len(self.request.prompt_ids)


class Device(Protocol):
    """What a batch asks of the engine: compiled functions, and what they fit."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def begin(
        self, request: Request, capacity: int, has_prediction: bool, ordinal: int
    ) -> Reading: ...

    def start_of(self, reading: Reading, num_tokens: int) -> int: ...

    def go_on_from(self, reading: Reading, found: Found) -> Reading: ...

    def read_on(self, draft: Draft | None, reading: Reading) -> Reading: ...

    def keep(self, state: DecodeState, slot: int, capacity: int) -> RowCaches: ...

    def grow(self, state: DecodeState, capacity: int) -> DecodeState: ...

    def pick(self, state: DecodeState, numbers: Sequence[int]) -> DecodeState: ...

    @property
    def has_log_probs(self) -> bool: ...

    def step(
        self,
        action: Action,
        kind: StepKind,
        draft: Draft | None,
        state: DecodeState,
        steering: Any = None,
        is_resting: bool = False,
    ) -> tuple[DecodeState, StepOutput]: ...

    def place(
        self,
        state: DecodeState | None,
        row: DecodeState,
        slot: int,
        batch_size: int,
        capacity: int,
    ) -> DecodeState: ...

    def finish(self, state: DecodeState, slot: int) -> DecodeState: ...

    def feedback_of(self, state: DecodeState, slot: int) -> Feedback | None: ...

    def needed_slots(self, request: Request) -> int: ...

    def new_stats(self) -> DecodingStats: ...

    @property
    def num_unjudged(self) -> int: ...

    @property
    def num_behind(self) -> int: ...

    def catch_up(self, draft: Draft | None, state: DecodeState) -> DecodeState: ...

    def judge(
        self, kind: StepKind, draft: Draft | None, state: DecodeState
    ) -> tuple[DecodeState, Any]: ...


def most(kinds: list[StepKind]) -> StepKind:
    """The kind that can do what all of some kinds can."""
    ordered = typing.get_args(StepKind)
    return max(kinds, key=ordered.index)


class Queue:
    """Requests to come; only those are taken from their source that are looked at."""

    def __init__(self, requests: Iterable[Request]):
        self._source = iter(requests)
        self._ahead: deque[Request] = deque()

    def look(self, count: int) -> list[Request]:
        """The next ones, so many at most."""
        missing = max(0, count - len(self._ahead))
        self._ahead.extend(itertools.islice(self._source, missing))
        return list(itertools.islice(self._ahead, count))

    def take(self) -> Request:
        """The next one that was looked at."""
        return self._ahead.popleft()


class _Sent(NamedTuple):
    """A pass that was sent to the device.

    Attributes:
      action: Of a step; None for a prompt, and for a judging.
      rows: For each request, its slot's number, its row in the output, and the slot.
      output: Of a judging, `Judged` of each member of the pool.
      is_timed: Nothing else was sent between it and the step before.
      seconds: It took, if that was looked at.
      num_judgings: That had been sent before it; -1 where nothing of it is judged.
    """

    action: Action | None
    rows: list[tuple[int, int, Slot]]
    output: Any
    is_judging: bool = False
    is_timed: bool = False
    seconds: float | None = None
    num_judgings: int = -1


class _Entering(NamedTuple):
    """A request on its way to its row.

    Attributes:
      number: Of the row that is kept for it.
    """

    number: int
    slot: Slot
    reading: Reading


class Batch:
    """Running requests of one compiled shape.

    Args:
      engine: Compiled functions; see `decoding.engine`.
      batch_size: Rows.
      capacity: Cache slots of each row, one of those that are compiled for.
      has_prediction: Requests may have predictions, which need room.
      on_tokens: Called with what each pass added to a request's answer, as it is read.
      on_step: Called with what each step came to.
      kept: Rows of ended answers, to go on from; None keeps none, and has every request
        run all of its prompt, even if a running one has the same.
      now: A clock, for who wants to hear what steps took.
      rests: Which member of a pool shall read a request alone, of what is known of it
        and its ordinal; None for all of them. By default all do. See `Chooser.rests`.
    """

    def __init__(
        self,
        engine: Device,
        batch_size: int,
        capacity: int,
        has_prediction: bool = False,
        on_tokens: Callable[[Request, Emitted], None] | None = None,
        on_step: Callable[[Action, Outcome], None] | None = None,
        kept: KeptRows | None = None,
        now: Callable[[], float] | None = None,
        rests: Callable[[Row, int], int | None] | None = None,
    ):
        self.capacity = capacity
        self._engine = engine
        self._has_prediction = has_prediction
        self._on_tokens = on_tokens
        self._on_step = on_step
        self._kept = kept
        self._now = now
        self._rests = rests
        # When the newest step was read, if nothing else was done since.
        self._read_at: float | None = None
        self._is_undisturbed = False
        self._slots: list[Slot | None] = [None] * batch_size
        self._entering: deque[_Entering] = deque()
        self._state: DecodeState | None = None
        self._in_flight: deque[_Sent] = deque()
        # Steps that were read and wait to be judged; tokens of a row that wait at most,
        # of steps that were not read all that these may emit; judgings that were sent.
        self._waiting: list[_Sent] = []
        self._num_unjudged = 0
        self._num_judgings = 0
        self._is_waiting_greedy = True
        self._waiting_kind: StepKind = "greedy"
        self._last: tuple[Draft | None, int] = (None, 0)
        # The newest draft; plain steps since the last other one; tokens that the draft
        # is behind by.
        self._draft: Draft | None = None
        self._num_plain = 0
        self._num_behind = 0

    @property
    def size(self) -> int:
        """Rows, free ones among them."""
        return len(self._slots)

    @property
    def num_free(self) -> int:
        """Rows that no request has, nor will have when its prompt has been run."""
        return self._slots.count(None) - len(self._entering)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left and nothing waits to be read."""
        return not self._in_flight and self.num_free == len(self._slots)

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not complete."""
        return bool(self._entering)

    @property
    def has_work(self) -> bool:
        """Whether a further step would find a row that is not at its limit."""
        # Passes that were sent are taken to emit all they can. If that would end every
        # row, the host must read before it knows whether to go on.
        passes = [sent for sent in self._in_flight if not sent.is_judging]
        unread = sum(sent.output.tokens.shape[1] for sent in passes)
        return any(slot.num_remaining > unread for slot in self._running)

    @property
    def rows(self) -> tuple[Row, ...]:
        """What a controller may know of the running requests.

        Nothing where children are drawn and two of them share their random numbers:
        what one of them drafts must not follow from numbers that the other has yet to
        use.
        """
        running = self._running
        requests = [slot.request for slot in running]
        own = [one.own_key for one in requests if one.has_own_numbers]
        if self._engine.is_drawn and len(set(own)) < len(own):
            return ()

        return tuple(slot.as_row() for slot in running)

    @property
    def _running(self) -> list[Slot]:
        return [slot for slot in self._slots if slot is not None]

    def fits(self, request: Request) -> bool:
        """Whether a row of this batch, when free, can hold the request."""
        has_room = self._has_prediction or not request.prediction_ids
        return has_room and self._engine.needed_slots(request) <= self.capacity

    def admit(self, request: Request, draft: Draft | None, ordinal: int = 0) -> None:
        """Runs a request's prompt, after those that entered, and gives it a free row.

        Args:
          ordinal: See `enter`, and for what it raises.
        """
        self.enter(request, ordinal)
        while self._entering:
            self.read_on(draft)

    def enter(self, request: Request, ordinal: int = 0) -> None:
        """Keeps a free row for a request, whose prompt `read_on` will run.

        Args:
          ordinal: Its number among all that were ever admitted; see `Request.key`.

        Raises:
          ConfigError: No row is free, or the request does not fit.
        """
        if not self.num_free:
            raise ConfigError(
                f"request {request.id} comes while all {len(self._slots)} rows are "
                f"taken; admit it when `num_free` is above 0"
            )

        if not self.fits(request):
            num_slots = self._engine.needed_slots(request)
            predicted = " and room for a prediction" if request.prediction_ids else ""
            raise ConfigError(
                f"request {request.id} needs {num_slots} cache slots{predicted}; this "
                f"batch has {self.capacity} a row: begin one that fits"
            )

        # The prompt is run in a state of its own, so the running rows neither wait for
        # a common shape nor see the newcomer before it is complete.
        taken = {entering.number for entering in self._entering}
        number = next(
            i for i, slot in enumerate(self._slots) if slot is None and i not in taken
        )
        has_log_probs = request.num_log_probs is not None or self._engine.has_log_probs
        slot = Slot(request, self._engine.new_stats(), has_log_probs)
        slot.only = self._only_drafter(slot, ordinal)
        reading = self._engine.begin(
            request, self.capacity, self._has_prediction, ordinal
        )._replace(only=slot.only)
        self._entering.append(_Entering(number, slot, reading))

    def _only_drafter(self, slot: Slot, ordinal: int) -> int | None:
        """The member of a pool that alone shall read a request; None for all."""
        # Steps along a prediction are of suggestions alone, and would miss its drafter.
        if self._rests is None or slot.request.prediction_ids:
            return None

        number = self._rests(slot.as_row(), ordinal)
        if self.num_free == len(self._slots):
            return number

        # One drafts for all rows. While there are some that only that one has read, it
        # stays; who wants another one is read by all.
        held = self._held_by
        now = self._last[1] if held is None else held
        return number if number == now else None

    @property
    def _held_by(self) -> int | None:
        """The member of a pool that must draft, since it alone has read some row."""
        slots = [*self._running, *(entering.slot for entering in self._entering)]
        return next((slot.only for slot in slots if slot.only is not None), None)

    def read_on(self, draft: Draft | None) -> None:
        """Runs one chunk of the oldest prompt that is not complete.

        A request whose prompt is complete is in its row, and runs with the next step.
        """
        number, slot, reading = self._entering.popleft()
        self._is_undisturbed = False
        is_asked = not slot.request.is_practice
        if self._kept is not None and is_asked and reading.is_new:
            reading = self._go_on(self._kept, draft, slot, reading)
        reading = self._engine.read_on(draft, reading)
        if not reading.is_done:
            self._entering.appendleft(_Entering(number, slot, reading))
            return

        self._state = self._engine.place(
            self._state, reading.state, number, len(self._slots), self.capacity
        )
        self._slots[number] = slot
        # The first token is read with the steps, in the order in which they were sent.
        self._in_flight.append(_Sent(None, [(number, 0, slot)], reading.output))

    def _go_on(
        self, kept: KeptRows, draft: Draft | None, slot: Slot, reading: Reading
    ) -> Reading:
        """Begins behind what another row has of the prompt, if there is one."""
        slot.draft_number = kept.draft_number(draft)
        reading = reading._replace(is_to_keep=kept.is_keeping)
        found = kept.find(slot.request.scope, slot.request.prompt_ids, slot.only)
        # More than all but the last token cannot be found.
        most = len(slot.request.prompt_ids) - 1
        if found is None or found.num_tokens < most:
            found = self._found_running(slot, reading) or found
        if found is not None:
            reading = self._engine.go_on_from(reading, found)
            slot.num_reused = reading.position
            # What is too short to be worth it was of no use.
            if reading.position:
                kept.use(found)

        return reading

    def _found_running(self, slot: Slot, reading: Reading) -> Found | None:
        """A copy of a running row of the same prompt: one request's answers have one.

        Each runs the last token for itself, since the first one of its answer is drawn
        with numbers of its own, and its draft goes on from there.
        """
        num_tokens = len(slot.request.prompt_ids) - 1
        if not self._engine.start_of(reading, num_tokens):
            return None

        for number, other in enumerate(self._slots):
            if other is not None and _has_same_prompt(other, slot):
                assert self._state is not None, "a batch with rows has a state"
                caches = self._engine.keep(self._state, number, self.capacity)
                return Found(caches, num_tokens)

        return None

    def grow(self, capacity: int) -> None:
        """Moves all that runs to larger caches, between two steps.

        Args:
          capacity: One of those that are compiled for, no less than the present one.
        """
        if capacity <= self.capacity:
            return

        self._is_undisturbed = False
        larger = lambda state: self._engine.grow(state, capacity)
        if self._state is not None:
            self._state = larger(self._state)
        self._entering = deque(
            one._replace(reading=one.reading._replace(state=larger(one.reading.state)))
            for one in self._entering
        )
        self.capacity = capacity

    def settle(self) -> Iterator[Completion]:
        """Reads all that was sent; yields the requests that ended by it."""
        self._judge()
        yield from self.collect()

    def resize(self, batch_size: int) -> None:
        """Moves all that runs to a batch of so many rows; `settle` comes before.

        A step takes the longer the more rows it has, whether they are taken or not.
        """
        assert not self._in_flight, "what was sent names rows by their old numbers"
        taken = [i for i, slot in enumerate(self._slots) if slot is not None]
        count = len(taken) + len(self._entering)
        assert count <= batch_size, f"{count} requests for {batch_size} rows"

        free = [-1] * (batch_size - len(taken))
        if self._state is not None:
            self._state = self._engine.pick(self._state, [*taken, *free])
        self._slots = [*(self._slots[i] for i in taken), *(None for _ in free)]
        self._entering = deque(
            one._replace(number=len(taken) + i) for i, one in enumerate(self._entering)
        )

    def dispatch(
        self, draft: Draft | None, action: Action, steering: Any = None
    ) -> None:
        """Sends one step of all rows to the device, without waiting for it.

        Args:
          steering: What rules within the step are told; None for nothing.
        """
        # A sent pass keeps the slots it was made for: a row may be given to another
        # request before the pass is read.
        rows = [(i, i, slot) for i, slot in enumerate(self._slots) if slot is not None]
        assert self._state is not None, "a batch with rows has a state"
        if self._kept is not None:
            self._kept.draft_number(draft)
        # One sampled row makes the whole step a sampled one, in which greedy rows have
        # one-hot probabilities and so the same tokens; one that asks for more than
        # sampling makes it a full one, which takes nothing off those that do not.
        kind = most([slot.request.kind for *_, slot in rows])
        is_judged = False
        if self._engine.num_unjudged:
            held = self._held_by
            if held is not None:
                action = dataclasses.replace(action, drafter=held)
            judged = [slot for *_, slot in rows if slot.only is None]
            self._make_room(draft, action, judged)
            is_judged = bool(judged)
        self._draft = draft
        is_resting = self._engine.num_behind > 0 and self._may_rest(action)
        self._state, output = self._engine.step(
            action, kind, draft, self._state, steering, is_resting
        )
        self._in_flight.append(
            _Sent(
                action,
                rows,
                output,
                is_timed=self._is_undisturbed,
                num_judgings=self._num_judgings if is_judged else -1,
            )
        )
        self._is_undisturbed = True

    def _may_rest(self, action: Action) -> bool:
        """Whether the draft need not run over a step's token: behind some plain steps
        in a row, when more of them are likely. It catches up before it drafts."""
        self._num_plain = 0 if action.tree.num_steps else self._num_plain + 1
        is_resting = self._num_plain > PLAIN_IN_A_ROW
        if not is_resting or self._num_behind == self._engine.num_behind:
            self._catch_up()

        self._num_behind += is_resting
        return is_resting

    def _catch_up(self) -> None:
        """Has the draft run over all that it is behind by."""
        if not self._num_behind:
            return

        assert self._state is not None, "a draft is behind a state"
        self._is_undisturbed = False
        self._state = self._engine.catch_up(self._draft, self._state)
        self._num_behind = 0

    def _make_room(self, draft, action: Action, slots: list[Slot]) -> None:
        """Judges what waits, if the step's tokens would be too many, or if another
        drafter proposes in it, which then must be up to date.

        Args:
          slots: That are judged.
        """
        num_emitted = action.tree.num_steps + 1 if slots else 0
        is_full = self._num_unjudged + num_emitted > self._engine.num_unjudged
        if is_full or action.drafter != self._last[1]:
            self._judge()

        self._num_unjudged += num_emitted
        sampling = [slot.request.sampling for slot in slots]
        self._is_waiting_greedy &= all(one.temperature == 0 for one in sampling)
        self._waiting_kind = most([self._waiting_kind, *(s.kind for s in sampling)])
        self._last = draft, action.drafter

    def _correct_count(self, sent: _Sent) -> None:
        """Counts what a step emitted, rather than what it might have."""
        if self._num_unjudged and sent.num_judgings == self._num_judgings:
            num_emitted = sent.output.num_emitted
            self._num_unjudged -= sent.output.tokens.shape[1] - int(num_emitted.max())

    def _judge(self) -> None:
        """Sends the judging of all tokens that wait."""
        if not self._num_unjudged:
            return

        assert self._state is not None, "tokens of a state wait"
        self._is_undisturbed = False
        # Greedy tokens are certain, whatever they were adjusted by: where all are, none
        # needs a law to be judged by.
        kind = "greedy" if self._is_waiting_greedy else self._waiting_kind
        self._state, judged = self._engine.judge(kind, self._last[0], self._state)
        self._in_flight.append(_Sent(None, [], judged, is_judging=True))
        self._num_unjudged = 0
        self._num_judgings += 1
        self._is_waiting_greedy = True
        self._waiting_kind = "greedy"

    def collect(self, num_ahead: int = 0) -> Iterator[Completion]:
        """Reads passes, oldest first; yields the requests that they ended.

        Args:
          num_ahead: Newest passes to leave unread: with one, the device computes while
            the host reads and dispatches.
        """
        ended = []
        # An answer is handed out when all that was learned of drafters by it is known.
        while len(self._in_flight) > num_ahead or (ended and self._is_judging):
            sent = self._in_flight.popleft()
            sent = self._timed(sent._replace(output=fetch(sent.output)))
            if sent.is_judging:
                self._report_judged(sent.output)
                continue
            self._correct_count(sent)
            self._hear(sent)
            for number, row, slot in sent.rows:
                if self._read(sent, row, slot):
                    ended.append(self._end(number, slot))
                    self._keep(number, slot)
            if not self._is_judging:
                yield from self._handed_out(ended)
                ended = []

        yield from self._handed_out(ended)

    def _handed_out(self, ended: list[Completion]) -> Iterator[Completion]:
        for completion in ended:
            # Whoever takes it may do something else meanwhile.
            self._read_at = None
            yield completion

    def _timed(self, sent: _Sent) -> _Sent:
        """With the time since the step before was read: what a step takes.

        The device begins a step when the one before has ended, where the next one is
        always sent before the oldest is read.
        """
        if self._now is None:
            return sent

        before = self._read_at
        is_step = sent.action is not None and not sent.is_judging
        self._read_at = self._now() if is_step else None
        if before is None or self._read_at is None or not sent.is_timed:
            return sent

        return sent._replace(seconds=self._read_at - before)

    @property
    def _is_judging(self) -> bool:
        """Whether a judging is on its way."""
        return any(sent.is_judging for sent in self._in_flight)

    def cancel(self, request: Request) -> bool:
        """Gives up a running request; returns whether there was one.

        Its row is free at once. What was sent to the device for it is not read.
        """
        for number, slot in enumerate(self._slots):
            if slot is not None and slot.request is request:
                slot.is_done = True
                self._end(number, slot)
                return True

        for entering in self._entering:
            if entering.slot.request is request:
                self._entering.remove(entering)
                return True

        return False

    def _hear(self, sent: _Sent) -> None:
        """Tells the controller of a step, now or when it has been judged."""
        if sent.action is None or self._on_step is None:
            return

        # Of a row that only one has read nothing is known of the others.
        is_judged = bool(self._engine.num_unjudged) and any(
            slot.only is None for *_, slot in sent.rows
        )
        rows = [
            (number, row, slot)
            for number, row, slot in sent.rows
            if not (slot.is_done or is_judged and slot.only is not None)
            and not slot.request.is_practice
            and slot.request.can_teach(self._engine.is_drawn)
            and slot.request.can_speculate
        ]
        sent = sent._replace(rows=rows)
        if is_judged:
            self._waiting.append(sent)
        else:
            self._report(sent)

    def _report_judged(self, judged: Any) -> None:
        """Tells of all steps that a judging was about, each with its own tokens'."""
        waiting = self._waiting
        self._waiting = []
        offsets = np.zeros(len(self._slots), int)

        for sent in waiting:
            width = sent.output.tokens.shape[1]
            at = offsets[:, None] + np.arange(width)
            # What lies behind a step's own tokens is not looked at.
            take = lambda x, at=at: np.take_along_axis(
                x, np.minimum(at, x.shape[1] - 1)[..., None], axis=1
            )
            own = sent.output.replace(judged=jax.tree.map(take, judged))
            self._report(sent._replace(output=own))
            offsets = offsets + sent.output.num_emitted

    def _report(self, sent: _Sent) -> None:
        """Tells the controller of a step's rows that go on."""
        assert sent.action is not None
        assert self._on_step is not None
        rows = [(row, slot) for _, row, slot in sent.rows]
        # A row's last step is left out, since what it accepted is cut at a stop token
        # or at the limit. One that ends with a stop string is not cut on the device.
        going = [row for row, _ in rows if not sent.output.is_finished[row]]
        accepted = tuple(int(sent.output.num_accepted[row]) for row in going)
        # What was emitted is evidence on every drafter, to the answer's last token.
        windows = [slot.judge(sent.output, row) for row, slot in rows]
        found = join([w for w in windows if w is not None]) if any(windows) else None
        if rows:
            expected = _expected(sent, going)
            evidence = _evidence(sent, going)
            ended = len(rows) - len(going)
            parts = tuple(
                (slot.context, _part(sent, row, own))
                for (row, slot), own in zip(rows, windows, strict=True)
            )
            outcome = Outcome(
                accepted, found, ended, expected, evidence, sent.seconds, parts
            )
            self._on_step(sent.action, outcome)

    def _read(self, sent: _Sent, row: int, slot: Slot) -> bool:
        """Books one pass's tokens of a request; whether they were its last."""
        # It ended in an earlier pass, or was cancelled: this one was sent before the
        # host knew.
        if slot.is_done:
            return False

        emitted = slot.book(sent.output, row, sent.action, self._engine.stop_ids)
        if emitted.token_ids and self._on_tokens is not None:
            self._on_tokens(slot.request, emitted)

        return slot.is_done

    def _end(self, number: int, slot: Slot) -> Completion:
        """Frees a row; returns its answer."""
        assert self._state is not None, "a batch with rows has a state"
        # What waits of this row is lost with it.
        self._judge()
        # Steps that are under way may still write into the row, but behind its length:
        # what was recorded stays as it is.
        self._state = self._engine.finish(self._state, number)
        self._is_undisturbed = False
        self._slots[number] = None
        feedback = self._engine.feedback_of(self._state, number)
        return slot.completion(feedback, self.capacity)

    def _keep(self, number: int, slot: Slot) -> None:
        """Keeps the caches of a row whose answer has just ended."""
        # Nobody goes on from what nobody asked for.
        if self._kept is None or not self._kept.is_keeping or slot.request.is_practice:
            return

        state = self._state
        assert state is not None, "a batch with rows has a state"
        # A row that ended with a stop string may have gone on on the device. What lies
        # behind the answer is not looked at. Nor is what the draft has not run over:
        # to catch up, for all rows, takes more than to run these tokens once more.
        ids = (*slot.request.prompt_ids, *slot.token_ids)
        ids = ids[: max(len(ids) - self._num_behind, 0)]
        if not ids:
            return

        copy = lambda capacity: self._engine.keep(state, number, capacity)
        scope = slot.request.scope
        self._kept.add(scope, ids, slot.draft_number, copy, slot.only)


def _has_same_prompt(running: Slot, new: Slot) -> bool:
    """Whether a running row has what a new one needs of its prompt."""
    one = running.request
    other = new.request
    # Of the same scope: from how soon an answer comes one could tell what another asks.
    return (
        running.draft_number == new.draft_number
        and running.only in (None, new.only)
        and one.scope == other.scope
        and one.prompt_ids == other.prompt_ids
        and not one.is_practice
    )


def _part(sent: _Sent, row: int, windows: Windows | None) -> Outcome:
    """What a step came to in one row; see `Batch._report`."""
    if sent.output.is_finished[row]:
        return Outcome((), windows, num_ended=1)

    accepted = int(sent.output.num_accepted[row])
    return Outcome((accepted,), windows, expected=_expected(sent, [row]))


def _evidence(sent: _Sent, rows: list[int]) -> np.ndarray | None:
    """What the trees of some rows say of the draft; None for none."""
    found = sent.output.evidence
    return found[rows] if found is not None and rows else None


def _expected(sent: _Sent, rows: list[int]) -> tuple[tuple[float, ...], ...]:
    """How the drafter of a step was judged, as deep as its draft got in each row."""
    if sent.output.judged is None or sent.action is None or sent.action.drafter < 0:
        return ()

    chances = sent.output.judged.items[sent.action.drafter].chances
    # The draft's last token is that which was not accepted, if there was one left.
    deepest = min(sent.action.tree.num_steps, chances.shape[-1])
    count = lambda row: min(int(sent.output.num_accepted[row]) + 1, deepest)
    return tuple(
        tuple(float(chances[row, depth, depth]) for depth in range(count(row)))
        for row in rows
    )
