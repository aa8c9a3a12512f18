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
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ospec_jax.config import ConfigError, InputError, whole_number
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
from ospec_jax.loading import load_draft
from ospec_jax.models.tokenizer import TextStream
from ospec_jax.online.scopes import is_within
from ospec_jax.serving.asks import (
    Ask,
    ChoiceEnd,
    Ended,
    Event,
    Failed,
    OverloadedError,
    Piece,
    Prepared,
    Token,
    Usage,
)
from ospec_jax.session.arguments import as_stop
from ospec_jax.session.live import Live
from ospec_jax.session.requests import find_stop
from ospec_jax.session.session import Session
from ospec_jax.storage.checkpoint import unreadable_steps
from ospec_jax.types import Draft

_LOG = logging.getLogger(__name__)
_MAX_FAILURES = 3
"""Steps that may fail in a row before the service gives up."""
_CAPACITIES = (512, 2048, 8192)
"""Cache slots of a row, below those that the longest request needs."""
_NUM_KEPT = 4
"""Versions of the draft to go back to, that of the start among them."""
_LONGEST_STEP = 60.0
"""Seconds that a step, an update of the draft or a checkpoint may take at the end."""


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
    """How requests are taken.

    Attributes:
      model: The model's name, as clients say it.
      max_model_len: Tokens of prompt and answer together; None for all that fit.
      max_waiting: Answers that may wait for a row.
      checkpoint: Folder for what is learned; None keeps nothing.
      checkpoint_seconds: Between two checkpoints.
      drafts: Folder of drafts that an administrator may have loaded.
      keeps_traffic: Checkpoints hold recent traffic, from which prompts can be read.
      kept_mib: Memory for caches of answered requests, so that a conversation's next
        turn need not run what was said before; 0 keeps none.
    """

    model: str
    max_model_len: int | None = None
    max_waiting: int = 64
    checkpoint: Path | None = None
    checkpoint_seconds: float = 300.0
    drafts: Path | None = None
    keeps_traffic: bool = False
    kept_mib: int = 512

    def __post_init__(self):
        whole_number("max_waiting", self.max_waiting, least=1)
        whole_number("kept_mib", self.kept_mib, least=0)
        if self.max_model_len is not None:
            whole_number("max_model_len", self.max_model_len, least=2)
        if not self.checkpoint_seconds > 0:
            raise ConfigError(
                f"checkpoint_seconds is {self.checkpoint_seconds}; use more than 0"
            )


class _Choice:
    """One of a request's answers, on its way."""

    def __init__(self, number: int, request: Request, stream: TextStream):
        self.number = number
        self.request = request
        self.stream = stream


class _Job:
    """A request that was taken; also its ticket."""

    def __init__(
        self,
        service: "Service",
        prepared: Prepared,
        on_event: Callable[[Event], None],
    ):
        self.ask = prepared.ask
        self.num_prompt_tokens = prepared.num_prompt_tokens
        self.choices: list[_Choice] = prepared.requests
        self.is_cancelled = False
        self.is_forgotten = False
        self.num_missing = len(self.choices)
        self.num_tokens = 0
        self.num_cached = prepared.num_prompt_tokens
        self.num_came_true = 0
        self.num_missed = 0
        self.stats = DecodingStats()
        self.asked = time.monotonic()
        self.begun = 0.0
        self.first_token = 0.0
        self._service = service
        self._on_event = on_event

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
        self._service.cancel(self)


class _Kept(NamedTuple):
    """A version to go back to; its arrays are the host's."""

    version: int
    draft: Draft


@dataclasses.dataclass
class _Totals:
    """What has been counted since the start."""

    num_steps: int = 0
    num_answers: int = 0
    num_taught: int = 0
    num_updates: int = 0
    num_tokens: int = 0
    busy_seconds: float = 0.0
    learning_seconds: float = 0.0
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
        extra = session.engine.num_extra_slots
        largest = min(session.target.config.max_position, CAPACITIES[-1] - extra)
        self.max_model_len = min(largest, config.max_model_len or largest)

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[tuple[_Job, _Choice]] = deque()
        self._cancelled: list[_Job] = []
        self._commands: deque[tuple[Callable[[], Any], Future]] = deque()
        self._stops_at: float | None = None

        # Of the thread that decodes alone.
        self._running: dict[int, tuple[_Job, _Choice]] = {}
        self._capacities = _capacities_for(session, self.max_model_len)
        self._live = self._new_live()
        self._totals = _Totals()
        self._paused_for: str | None = None
        self._version = session.version
        self._since_swap = DecodingStats()
        self._kept: deque[_Kept] = deque()
        self._compiles: _Compiles | None = None
        self._draft_status: dict[str, Any] = {}
        self._save_error: str | None = None
        self._started = time.monotonic()
        self._saved_at = time.monotonic()
        self._saved_answers = 0
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
        return self._version

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
            )
            stream = TextStream(self._session.decode, stop)
            choices.append(_Choice(number, request, stream))

        self._session.engine.capacity_for([choices[0].request])
        return Prepared(ask, num_prompt, choices)

    def submit(self, prepared: Prepared, on_event: Callable[[Event], None]) -> _Job:
        """Queues a request.

        Args:
          on_event: Called from the thread that decodes; must not wait.

        Raises:
          OverloadedError: The queue is full.
        """
        job = _Job(self, prepared, on_event)
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

    def cancel(self, job: _Job) -> None:
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
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "checkpoint": self._checkpoint,
            "pause": self._pause,
            "resume": self._resume,
            "pin": functools.partial(self._pause, reason="pinned"),
            "unpin": self._resume,
            "rollback": self._roll_back,
            "load": self._load,
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
            "draft": self._draft_status,
            "learning": {
                "learner": self._session.learner and self._session.learner.name,
                "is_on": self._paused_for is None,
                "paused_for": self._paused_for,
                "num_updates": totals.num_updates,
                "num_answers": totals.num_taught,
                "seconds": totals.learning_seconds,
                "save_error": self._save_error,
            },
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
                if self._live.is_idle:
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

        for function, future in commands:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        if time.monotonic() - self._saved_at >= self.config.checkpoint_seconds:
            self._try_to_save()

    def _let_in(self) -> None:
        """Gives free rows to those who wait, first come first served."""
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
        busy = {choice.request.scope for _, choice in self._running.values()}
        return self._session.enroll(scope, busy).number

    def _rest(self) -> None:
        """Waits until there is something to do."""
        due = self._saved_at + self.config.checkpoint_seconds - time.monotonic()
        with self._changed:
            if self._waiting or self._commands or self._cancelled:
                return
            if self._stops_at is None:
                self._changed.wait(timeout=max(due, 0.01))

    def _turn(self) -> None:
        start = time.perf_counter()
        completions = self._live.turn()
        self._totals.busy_seconds += time.perf_counter() - start
        self._totals.num_steps += 1
        for completion in completions:
            found = self._running.pop(id(completion.request), None)
            if found is not None:
                self._finish(*found, completion)

    def _on_tokens(self, request: Request, emitted: Emitted) -> None:
        found = self._running.get(id(request))
        if found is None:
            return

        job, choice = found
        job.first_token = job.first_token or time.monotonic()
        text = choice.stream.add(emitted.token_ids)
        job.tell(Piece(choice.number, text, _tokens_of(emitted)))

    def _finish(self, job: _Job, choice: _Choice, completion: Completion) -> None:
        """Ends an answer, then learns from it."""
        text = self._session.text_of(completion)
        rest = choice.stream.finish(text)
        job.tell(ChoiceEnd(choice.number, rest, completion.finish_reason))
        job.num_missing -= 1
        job.num_tokens += len(completion.token_ids)
        job.num_cached = min(job.num_cached, completion.num_reused)
        if completion.followed is not None:
            # The end was added to the prediction: it is none of the client's tokens.
            ends = self._session.target.stop_ids
            job.num_came_true += completion.followed.num_accepted(ends)
            job.num_missed += completion.followed.num_missing(ends)
        job.stats = job.stats + completion.stats
        if job.num_missing == 0:
            now = time.monotonic()
            job.tell(
                Ended(
                    Usage(
                        job.num_prompt_tokens,
                        job.num_tokens,
                        job.num_came_true,
                        job.num_missed,
                        job.num_cached,
                    ),
                    job.stats,
                    self.version,
                    job.begun - job.asked,
                    job.first_token - job.asked,
                    now - job.asked,
                )
            )

        # Nothing is learned from what a client gave up: it may ask again.
        is_on = self._paused_for is None
        can_teach = is_on and job.ask.can_teach
        can_teach &= not (job.is_cancelled or job.is_forgotten)
        seconds = self._learn(job, completion, text, can_teach)
        totals = self._totals
        totals.num_updates += max(self._session.version - self._version, 0)
        totals.learning_seconds += seconds
        totals.num_taught += can_teach
        totals.num_answers += 1
        totals.num_tokens += len(completion.token_ids)
        totals.stats = totals.stats + completion.stats
        self._note_version(completion.stats)

    def _learn(
        self, job: _Job, completion: Completion, text: str, can_teach: bool
    ) -> float:
        """Counts an answer and learns from it; returns the seconds that took."""
        session = self._session
        try:
            result = session.take_in(
                job.ask.prompt, completion, text, can_teach, job.ask.is_shared
            )
        except Exception:
            # An update that failed may have used up what is served.
            _LOG.exception("learning has failed, and is paused")
            self._paused_for = "failed"
            if self._kept:
                session.begin_again(self._kept[-1].draft)
            return 0.0

        return result.learning_seconds

    def _note_version(
        self, stats: DecodingStats | None = None, is_changed: bool = False
    ) -> None:
        """Keeps what others may ask of the draft, for whom its state is out of reach.

        Args:
          stats: Of an answer by the version that was served until now.
          is_changed: By an administrator: to be saved, though nothing was answered.
        """
        if is_changed:
            self._saved_answers = -1
        version = self._session.version
        meta = self._session.meta
        before = self._since_swap if stats is None else self._since_swap + stats
        self._since_swap = before if version == self._version else DecodingStats()
        self._version = version
        self._draft_status = {
            "family": None if meta is None else meta.family,
            "version": version,
            "kept_versions": [kept.version for kept in self._kept],
            "acceptance_length": before.mean_acceptance_length,
            "num_steps_since_swap": before.num_drafts,
        }

    # What an administrator may ask for.

    def _checkpoint(self) -> dict[str, Any]:
        if self.config.checkpoint is None:
            raise ConfigError("no folder for checkpoints was given: use --checkpoint")

        place = self._save()
        return {"saved": place and place.name, "version": self._version}

    def _pause(self, reason: str = "paused") -> dict[str, Any]:
        self._paused_for = reason
        return {"paused_for": reason, "version": self._version}

    def _resume(self) -> dict[str, Any]:
        self._paused_for = None
        return {"paused_for": None, "version": self._version}

    def _roll_back(self, version: int | None = None) -> dict[str, Any]:
        """Serves an earlier version again, by default the newest that was kept."""
        earlier = [kept for kept in self._kept if kept.version != self._version]
        found = [kept for kept in earlier if version in (None, kept.version)]
        if not found:
            known = ", ".join(str(kept.version) for kept in earlier) or "none"
            which = "" if version is None else f" {version}"
            raise ConfigError(f"no earlier version{which} is kept; there are: {known}")

        self._session.begin_again(found[-1].draft)
        self._note_version(is_changed=True)
        return {"restored": found[-1].version, "version": self._version}

    def _load(self, name: str) -> dict[str, Any]:
        """Serves another draft of the same architecture, by name."""
        folder = self.config.drafts
        if folder is None:
            raise ConfigError("no folder of drafts was given: use --drafts")
        if not name or Path(name).name != name or name.startswith("."):
            raise ConfigError(f"{name!r} is no name of a folder in {folder.name}")

        loaded = load_draft(folder / name, self._session.target)
        self._session.begin_again(loaded.draft)
        self._note_version(is_changed=True)
        return {"loaded": name, "version": self._version}

    def _forget(
        self, scope: str | None = None, is_draft_too: bool = False
    ) -> dict[str, Any]:
        """Drops kept traffic, and with `is_draft_too` all that was learned.

        Steps of the checkpoint that may hold the traffic are replaced.

        Args:
          scope: A key's name, with its tenants, or `key/tenant`; None is everybody.

        Raises:
          ConfigError: The scope has no name.
        """
        known = self._session.scopes.known
        gone = self._session.forget_traffic(scope)
        # What is being answered was said before this: it is not learned from, either.
        with self._lock:
            jobs = [job for job, _ in (*self._running.values(), *self._waiting)]
        for job in jobs:
            job.is_forgotten |= scope is None or is_within(job.ask.scope, scope)

        stays = ["how often n-grams were right, as figures without text"]
        has_taught = scope is None or any(one.has_taught for one in gone)
        if is_draft_too:
            self._session.begin_again(self._kept[0].draft)
            stays.append("what the draft had learned before this server was started")
            self._kept = deque([self._kept[0]])
        elif has_taught:
            stays.append(
                "the draft's weights and their earlier versions, which have learned "
                "from it and are shared by all"
            )
        elif gone:
            stays.append("nothing in the draft's weights since this was first heard of")
        else:
            # It never asked, or was forgotten before: nobody can say if it shared.
            stays.append(
                "whatever the draft's weights learned from it earlier, for it is not "
                "known now"
            )

        self._note_version(is_changed=True)
        stays += self._replace_checkpoint()
        names = "all scopes" if scope is None else scope
        return {
            "forgotten": f"n-grams, windows and caches of {names}",
            "scopes": [one.name for one in (known if scope is None else gone)],
            "stays": "; ".join(stays),
        }

    def _replace_checkpoint(self) -> list[str]:
        """Writes what there is now in place of all steps; says what stays."""
        folder = self.config.checkpoint
        stays = ["copies of checkpoints elsewhere"]
        if folder is None:
            return stays

        if not self._try_to_save(num_kept=1):
            stays.append(f"steps in {folder.name}, for they could not be written anew")
        stays += [
            f"{one.name}, which was set aside" for one in unreadable_steps(folder)
        ]
        return stays

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
        self._live = self._new_live()

    def _save(self, num_kept: int = 2) -> Path | None:
        """Writes a checkpoint, if there is a folder for it and something new."""
        self._saved_at = time.monotonic()
        self._keep_version()
        if self.config.checkpoint is None or self._session.meta is None:
            return None
        if self._totals.num_answers == self._saved_answers:
            return None

        place = self._session.save(
            self.config.checkpoint, self.config.keeps_traffic, num_kept
        )
        self._saved_answers = self._totals.num_answers
        return place

    def _try_to_save(self, num_kept: int = 2) -> bool:
        """Saves; where that fails, serving goes on."""
        try:
            self._save(num_kept)
        except Exception as error:
            self._save_error = f"{type(error).__name__}: {error}"[:300]
            _LOG.exception("the checkpoint could not be written")
            return False

        self._save_error = None
        return True

    def _keep_version(self) -> None:
        """Puts the served draft aside, to go back to."""
        newest = self._kept[-1].version if self._kept else None
        if self._session.draft is not None and newest != self._version:
            # On the host: learning overwrites what is on the device.
            draft = jax.device_get(self._session.draft)
            first, *rest = [*self._kept, _Kept(self._version, draft)]
            # The first one, which nothing here was learned by, stays.
            self._kept = deque([first, *rest[1 - _NUM_KEPT :]])

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
            self._try_to_save()

    def _warm_up(self) -> bool:
        """Compiles all that a request may need; returns whether it came to its end."""
        start = time.perf_counter()
        is_stopped = lambda: self._stops_at is not None
        if not self._live.warm_up(KINDS, is_stopped):
            return False

        # So that a scope is dropped for a new one without a program to wait for.
        self._session.drop_text([])
        _LOG.info(f"ready after {time.perf_counter() - start:.0f} s")
        self._compiles = _Compiles()
        self._keep_version()
        self._note_version()
        return True


def _capacities_for(session: Session, max_model_len: int) -> tuple[int, ...]:
    """Cache sizes that rows move through: few, since each is compiled for."""
    longest = Request("longest", (0,), max_model_len - 1)
    needed = session.engine.needed_slots(longest)
    largest = session.engine.capacity_for([longest], needed)
    # A last one that is hardly larger would not be worth its programs.
    return (*(size for size in _CAPACITIES if 2 * size <= largest), largest)


class _Compiles:
    """Counts the programs that are compiled from now on, in any thread."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count += 1


def _tokens_of(emitted: Emitted) -> tuple[Token, ...]:
    """Tokens one by one, with what is known of each."""
    count = len(emitted.token_ids)
    return tuple(
        Token(*facts)
        for facts in zip(
            emitted.token_ids,
            emitted.is_drafted,
            emitted.log_probs or [None] * count,
            emitted.alternatives or [()] * count,
            strict=True,
        )
    )
