# SPDX-License-Identifier: Apache-2.0
"""The one thread that decodes and learns, and the queue in front of it."""

import copy
import dataclasses
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from ospec_jax.config import ConfigError, InputError
from ospec_jax.control.base import SUGGESTIONS
from ospec_jax.data.prompts import encode_prediction
from ospec_jax.data.templates import encode
from ospec_jax.decoding.engine import CAPACITIES, KINDS
from ospec_jax.decoding.request import (
    Completion,
    Emitted,
    PromptTooLongError,
    Request,
)
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.models.tokenizer import TextStream
from ospec_jax.online.scopes import is_within
from ospec_jax.serving.asks import (
    Ask,
    Event,
    Failed,
    OverloadedError,
    Prepared,
)
from ospec_jax.serving.jobs import Choice, Job
from ospec_jax.serving.learning import Learning
from ospec_jax.serving.settings import ServiceConfig
from ospec_jax.session.arguments import as_stop
from ospec_jax.session.live import Live
from ospec_jax.session.requests import find_stop
from ospec_jax.session.session import Session

_LOG = logging.getLogger(__name__)
_MAX_FAILURES = 3
"""Steps that may fail in a row before the service gives up."""
_CAPACITIES = (512, 2048, 8192)
"""Cache slots of a row, below those that the longest request needs."""
_MAX_LESSONS = 8
"""Answers that may wait to be learned from while others are being answered."""
_LONGEST_STEP = 60.0
"""Seconds that a step, an update of the draft or a checkpoint may take at the end."""


class _Lesson(NamedTuple):
    """An answer to learn from."""

    job: Job
    completion: Completion
    text: str


@dataclasses.dataclass
class _Totals:
    """What has been counted since the start."""

    num_steps: int = 0
    num_answers: int = 0
    num_tokens: int = 0
    busy_seconds: float = 0.0
    stats: DecodingStats = dataclasses.field(default_factory=DecodingStats)


class Service:
    """Serves one session; see `asks.Serves`.

    Args:
      session: Nobody else may use it as long as the service runs.
    """

    def __init__(self, session: Session, config: ServiceConfig):
        self.config = config
        self.model = config.model
        # Tokenizers are not to be used by two threads at once: the thread that decodes
        # has the session's, whoever prepares requests has one, and callers another.
        self._encoder = copy.deepcopy(session.target.tokenizer)
        self._encoding = threading.Lock()
        self.tokenizer = copy.deepcopy(session.target.tokenizer)
        self._session = session
        actions = session.engine.actions
        self._is_pool = any(action.drafter > 0 for action in actions)
        extra = session.engine.num_extra_slots
        largest = min(session.target.config.max_position, CAPACITIES[-1] - extra)
        self.max_model_len = min(largest, config.max_model_len or largest)

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[tuple[Job, Choice]] = deque()
        self._cancelled: list[Job] = []
        self._commands: deque[tuple[Callable[[], Any], Future]] = deque()
        self._stops_at: float | None = None

        # Of the thread that decodes alone.
        self._running: dict[int, tuple[Job, Choice]] = {}
        self._lessons: deque[_Lesson] = deque()
        self._exercise: Request | None = None
        self._capacities = _capacities_for(session, self.max_model_len)
        self._live = self._new_live()
        self._totals = _Totals()
        self._learning = Learning(session, config)
        self._compiles: CompileCounter | None = None
        self._started = time.monotonic()
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    # What others ask, from their own threads.

    @property
    def is_ready(self) -> bool:
        """Whether everything is compiled."""
        return self._ready.is_set() and self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether the thread that decodes is running."""
        return self._thread.is_alive()

    @property
    def version(self) -> int:
        """Of the served draft."""
        return self._learning.version

    def start(self) -> None:
        """Begins to compile, and then to serve."""
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Returns when everything is compiled.

        Raises:
          RuntimeError: It never will be; its cause is the error that was met.
        """
        while not self._ready.wait(timeout=0.1):
            if not self.is_alive:
                raise RuntimeError("the service could not start") from self._failure

    def stop(self, grace: float = 10.0) -> None:
        """Ends the service: what runs may end within the grace, the rest is dropped.

        What was learned is written to the checkpoint.

        Args:
          grace: Seconds.
        """
        with self._changed:
            self._stops_at = time.monotonic() + grace
            self._changed.notify_all()

        # A step that never ends keeps nobody from leaving: the thread is a daemon.
        if self.is_alive:
            self._thread.join(grace + _LONGEST_STEP)
        if self.is_alive:
            _LOG.error("the thread that decodes does not end; nothing more is saved")

    def prepare(self, ask: Ask) -> Prepared:
        """Applies the template and counts tokens; may take a while.

        Raises:
          ConfigError: The template refuses the prompt, or an argument means nothing.
          PromptTooLongError: Prompt and answer do not fit the context.
        """
        stop = as_stop(ask.stop)
        with self._encoding:
            ids = ask.prompt_ids or encode(ask.prompt, self._encoder, ask.is_raw)
            predicted = ()
            if self._session.is_drafting:
                predicted = encode_prediction(ask.prompt, self._encoder)

        num_prompt = len(ids)
        room = self.max_model_len - num_prompt
        wanted = room if ask.max_new_tokens is None else ask.max_new_tokens
        if room < 1 or wanted > room:
            asked = "" if ask.max_new_tokens is None else f" and {wanted} new ones"
            raise PromptTooLongError(
                f"the context is {self.max_model_len} tokens, and the prompt has "
                f"{num_prompt}{asked}; shorten the prompt or ask for fewer new tokens"
            )

        decode = self._session.target.tokenizer.decode
        find = functools.partial(find_stop, decode, stop) if stop else None
        choices = []
        for number in range(ask.num_choices):
            request = Request(
                id=ask.prompt.id,
                prompt_ids=ids,
                max_new_tokens=wanted,
                sampling=ask.sampling,
                find_stop=find,
                prediction_ids=predicted,
                prediction_confidence=ask.prompt.prediction_confidence,
                seed=ask.prompt.seed,
                choice=number,
                num_log_probs=ask.num_log_probs,
                can_speculate=ask.can_speculate,
                is_left_out=not ask.informs,
            )
            stream = TextStream(self._session.decode, stop)
            choices.append(Choice(number, request, stream))

        self._session.engine.capacity_for([choices[0].request])
        return Prepared(ask, num_prompt, choices)

    def submit(self, prepared: Prepared, on_event: Callable[[Event], None]) -> Job:
        """Queues a request.

        Args:
          on_event: Called from the thread that decodes; must not wait.

        Raises:
          OverloadedError: The queue is full.
        """
        job = Job(prepared, on_event, self.cancel)
        with self._changed:
            if self._stops_at is not None or not self.is_alive:
                raise OverloadedError("the server is about to end", retry_after=10)

            num_waiting = len(self._waiting)
            if num_waiting + len(job.choices) > self.config.max_waiting:
                raise OverloadedError(
                    f"{num_waiting} answers wait, and {self.config.max_waiting} may; "
                    f"ask again later"
                )

            self._waiting.extend((job, choice) for choice in job.choices)
            self._changed.notify_all()

        return job

    def cancel(self, job: Job) -> None:
        """Gives a request up."""
        with self._changed:
            job.is_cancelled = True
            self._cancelled.append(job)
            self._changed.notify_all()

    def administer(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Runs an action between two steps, and waits for it; see `asks.Serves`.

        Raises:
          ConfigError: There is no such action, or it cannot be done.
          OverloadedError: The service is about to end.
        """
        learning = self._learning
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "checkpoint": learning.checkpoint,
            "pause": learning.pause,
            "resume": learning.resume,
            "pin": functools.partial(learning.pause, reason="pinned"),
            "unpin": learning.resume,
            "promote": learning.promote,
            "rollback": learning.roll_back,
            "load": learning.load,
            "forget": self._forget,
        }
        if action not in actions:
            raise ConfigError(f"no action {action!r}; use {', '.join(actions)}")

        return self.call(functools.partial(actions[action], **arguments))

    def status(self) -> dict[str, Any]:
        """What is going on, as JSON; a second old at most while something runs."""
        with self._lock:
            num_waiting = len(self._waiting)

        totals = self._totals
        stats = totals.stats
        return {
            "model": self.model,
            "max_model_len": self.max_model_len,
            "is_ready": self.is_ready,
            "uptime_seconds": time.monotonic() - self._started,
            "draft": self._learning.draft_status,
            "learning": self._learning.status(),
            "queue": {
                "num_waiting": num_waiting,
                "max_waiting": self.config.max_waiting,
                "num_running": len(self._running),
                "num_rows": self._live.num_rows,
                "capacity": self._live.capacity,
            },
            "kept": self._live.kept_status(),
            "totals": {
                "num_steps": totals.num_steps,
                "num_answers": totals.num_answers,
                "num_tokens": totals.num_tokens,
                "busy_seconds": totals.busy_seconds,
                "num_drafts": stats.num_drafts,
                "num_draft_tokens": stats.num_draft_tokens,
                "num_accepted_tokens": stats.num_accepted_tokens,
                "num_compiles_after_warm_up": self._num_compiles,
            },
        }

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function between two steps, and waits for its result.

        Raises:
          OverloadedError: The service is about to end.
          Exception: Whatever the function raises.
        """
        future: Future = Future()
        with self._changed:
            if self._stops_at is not None or not self.is_alive:
                raise OverloadedError("the server is about to end", retry_after=10)
            self._commands.append((function, future))
            self._changed.notify_all()

        return future.result()

    @property
    def _num_compiles(self) -> int:
        return 0 if self._compiles is None else self._compiles.count

    # The thread that decodes.

    def _run(self) -> None:
        try:
            if self._warm_up():
                self._ready.set()
                self._serve()
        except Exception as error:
            _LOG.exception("the service has failed")
            self._failure = error
        finally:
            self._end()

    def _serve(self) -> None:
        """Turns until the service is stopped."""
        num_failures = 0
        while not self._is_over():
            self._obey()
            try:
                self._let_in()
                # Whoever is being answered would wait for it.
                if self._live.is_idle or len(self._lessons) > _MAX_LESSONS:
                    self._learn()
                if self._live.is_idle and not self._practise():
                    self._rest()
                    continue
                self._turn()
                num_failures = 0
            except Exception as error:
                # A step that failed may have used its state up: nobody can go on.
                num_failures += 1
                _LOG.exception("a step has failed")
                self._drop_all(error)
                if num_failures == _MAX_FAILURES:
                    raise

    def _is_over(self) -> bool:
        with self._lock:
            if self._stops_at is None:
                return False
            is_late = time.monotonic() >= self._stops_at
            return is_late or not (self._running or self._waiting)

    def _obey(self) -> None:
        """Runs what was asked for between two steps, and drops who has gone."""
        with self._lock:
            commands = list(self._commands)
            cancelled = list(self._cancelled)
            self._commands.clear()
            self._cancelled.clear()
            if cancelled:
                stay = [pair for pair in self._waiting if not pair[0].is_cancelled]
                self._waiting = deque(stay)

        for job in cancelled:
            for choice in job.choices:
                if self._running.pop(id(choice.request), None):
                    self._live.leave(choice.request)

        # Whoever asks for something means what all answers so far have come to.
        while commands and self._has_lessons:
            self._learn()
        for function, future in commands:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        if self._learning.seconds_until_due <= 0:
            self._learning.try_to_save()

    def _let_in(self) -> None:
        """Gives free rows to those who wait, first come first served."""
        self._make_way()
        while self._live.num_free:
            with self._lock:
                if not self._waiting:
                    return
                job, choice = self._waiting.popleft()
            job.begun = job.begun or time.monotonic()
            try:
                # Known by its number from here on: as long as it runs, nobody else
                # gets that.
                number = self._enroll(job.ask.scope)
                choice.request = dataclasses.replace(choice.request, scope=number)
                self._live.join(choice.request)
            except InputError as error:
                job.tell(Failed(error))
                job.cancel()
                continue
            self._running[id(choice.request)] = job, choice

    def _enroll(self, scope: str) -> int:
        """The number of a scope, which had another one's text forgotten if need be."""
        # A new scope may get the number of one whose answers wait to be learned from,
        # and they would be kept as its own.
        is_new = scope and self._session.scopes.find(scope) is None
        while self._lessons and is_new:
            self._learn()

        busy = {choice.request.scope for _, choice in self._running.values()}
        return self._session.enroll(scope, busy).number

    def _rest(self) -> None:
        """Waits until there is something to do."""
        due = self._learning.seconds_until_due
        with self._changed:
            if self._waiting or self._commands or self._cancelled:
                return
            if self._has_lessons:
                return
            if self._stops_at is None:
                self._changed.wait(timeout=max(due, 0.01))

    def _practise(self) -> bool:
        """Begins what the target is to write for itself, if it may and there is any."""
        if self._has_lessons or self._stops_at is not None:
            return False

        self._exercise = self._learning.next_exercise()
        if self._exercise is None:
            return False

        self._live.join(self._exercise)
        return True

    def _make_way(self) -> None:
        """Gives up an exercise for those who wait; it is begun again some time."""
        with self._lock:
            is_wanted = bool(self._waiting) or self._stops_at is not None
        if self._exercise is not None and is_wanted:
            self._live.leave(self._exercise)
            self._exercise = None

    def _turn(self) -> None:
        start = time.perf_counter()
        completions = self._live.turn()
        # What nobody asked for is no work.
        if self._exercise is None:
            self._totals.busy_seconds += time.perf_counter() - start
            self._totals.num_steps += 1
        for completion in completions:
            if completion.request is self._exercise:
                self._exercise = None
                self._learning.practise(completion)
                continue
            found = self._running.pop(id(completion.request), None)
            if found is not None:
                self._finish(*found, completion)

    def _on_tokens(self, request: Request, emitted: Emitted) -> None:
        found = self._running.get(id(request))
        if found is not None:
            job, choice = found
            drafter = emitted.drafter
            is_member = self._is_pool and drafter not in (None, SUGGESTIONS)
            job.tell_tokens(choice, emitted, drafter if is_member else None)

    def _finish(self, job: Job, choice: Choice, completion: Completion) -> None:
        """Ends an answer; it is learned from when there is time."""
        text = self._session.text_of(completion)
        self._learning.count(completion.stats)
        ends = self._session.target.stop_ids
        job.tell_end(choice, completion, text, self.version, ends)
        self._lessons.append(_Lesson(job, completion, text))
        totals = self._totals
        totals.num_answers += 1
        totals.num_tokens += len(completion.token_ids)
        totals.stats = totals.stats + completion.stats

    @property
    def _has_lessons(self) -> bool:
        """Whether there is anything left to learn."""
        return bool(self._lessons) or self._learning.is_updating

    def _learn(self) -> None:
        """Goes on with the update under way by a slice.

        If there is none, takes in the answer that has waited for longest, which may
        begin one.
        """
        if self._learning.is_updating:
            self._learning.go_on()
        elif self._lessons:
            job, completion, text = self._lessons.popleft()
            self._learning.take_in(
                job.ask.prompt, completion, text, job.can_teach, job.ask.is_shared
            )

    def _forget(
        self, scope: str | None = None, is_draft_too: bool = False
    ) -> dict[str, Any]:
        """See `Learning.forget`."""
        said = self._learning.forget(scope, is_draft_too)
        # Of what was forgotten nothing more is written.
        if self._exercise is not None and not self._session.is_practising(
            self._exercise
        ):
            self._live.leave(self._exercise)
            self._exercise = None
        # What is being answered was said before this: it is not learned from, either.
        with self._lock:
            jobs = [job for job, _ in (*self._running.values(), *self._waiting)]
        for job in jobs:
            job.is_forgotten |= scope is None or is_within(job.ask.scope, scope)

        return said

    def _new_live(self) -> Live:
        """One in which nothing runs, and nothing is kept."""
        kept_bytes = self.config.kept_mib * 2**20
        return Live(self._session, self._capacities, self._on_tokens, kept_bytes)

    def _drop_all(self, error: Exception) -> None:
        """Ends all that runs with an error; the next request begins a new batch."""
        for job in {id(job): job for job, _ in self._running.values()}.values():
            job.tell(Failed(error))
            job.is_cancelled = True

        self._running.clear()
        self._exercise = None
        self._live = self._new_live()

    def _end(self) -> None:
        """Tells everybody that there is nothing more to come, and saves."""
        error = OverloadedError("the server has ended", retry_after=10)
        with self._lock:
            self._stops_at = self._stops_at or time.monotonic()
            waiting = {id(job): job for job, _ in self._waiting}
            commands = list(self._commands)
            self._waiting.clear()
            self._commands.clear()

        self._drop_all(error)
        for job in waiting.values():
            job.tell(Failed(error))
        for _, future in commands:
            future.set_exception(error)

        if self._failure is None:
            while self._has_lessons:
                self._learn()
            self._learning.try_to_save()

    def _warm_up(self) -> bool:
        """Compiles all that a request may need; returns whether it came to its end."""
        start = time.perf_counter()
        is_stopped = lambda: self._stops_at is not None
        if not self._live.warm_up(KINDS, is_stopped):
            return False

        # So that a scope is dropped for a new one without a program to wait for.
        self._session.drop_text([])
        self._learning.start()
        _LOG.info(f"ready after {time.perf_counter() - start:.0f} s")
        self._compiles = CompileCounter()
        return True


def _capacities_for(session: Session, max_model_len: int) -> tuple[int, ...]:
    """Cache sizes that rows move through: few, since each is compiled for."""
    longest = Request("longest", (0,), max_model_len - 1)
    needed = session.engine.needed_slots(longest)
    largest = session.engine.capacity_for([longest], needed)
    # A last one that is hardly larger would not be worth its programs.
    return (*(size for size in _CAPACITIES if 2 * size <= largest), largest)


class CompileCounter:
    """Counts the programs that are compiled from now on, in any thread."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count += 1
