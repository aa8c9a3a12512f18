# SPDX-License-Identifier: Apache-2.0
"""A target, its draft and what the draft has learned: the library's front door.

A `Session` is the one mutable object: it owns the current state, and moves it on by the
pure transitions of `decoding` and `online`, which meet only here.
"""

import contextlib
import dataclasses
import itertools
import logging
import threading
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from ospec_jax import sharding
from ospec_jax._platform import release_memory
from ospec_jax.config import (
    ConfigError,
    SamplingConfig,
    TreeConfig,
    whole_number,
)
from ospec_jax.control.base import Chooser, Controller
from ospec_jax.control.registry import BuildController
from ospec_jax.data.known import content_hash, find_known
from ospec_jax.data.prompts import Prompt, parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.judging import JUDGE_EVERY
from ospec_jax.decoding.kept import KeptRows
from ospec_jax.decoding.request import (
    Completion,
    Emitted,
    Request,
    check_num_log_probs,
)
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.base import Family
from ospec_jax.drafters.sizing import SizeFn
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.learners.config import LearnerConfig, Rule
from ospec_jax.loading import LoadedDraft, check_draft
from ospec_jax.models.hub import Target
from ospec_jax.models.tokenizer import TextStream
from ospec_jax.online.scopes import Enrolled, Scope, Scopes, as_mask
from ospec_jax.online.trainer import (
    Learned,
    UpdateReport,
    attach_traffic,
    forget,
    go_on_from,
    observe,
    taught,
)
from ospec_jax.session import arguments, build, how_much, resume, warm_up
from ospec_jax.session.members import with_records
from ospec_jax.session.practice import Exercise, Practice, PracticeConfig
from ospec_jax.session.requests import is_default_name, tokenized
from ospec_jax.session.result import Result
from ospec_jax.session.state import SessionState
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.types import Draft, NgramMemory

_LOG = logging.getLogger(__name__)
_COLLAPSE_STEPS = 200
_MAX_REPORTS = 256
"""One has some 75 kB, and a session may serve for years."""


@dataclasses.dataclass
class _Update:
    """An update of the draft that is under way.

    Attributes:
      slices: See `Trainer.update_in_slices`.
      seconds: That they took so far.
    """

    slices: Generator[None, None, Any]
    seconds: float = 0.0


class Session:
    """Decodes, and learns from what it decodes.

    Args:
      target: From `load_target`, or a name that it takes.
      draft: From `load_draft`, or what it takes: a name, a folder, a family's record;
        None, like `none`, decodes plainly.
      learner: How to learn: settings, the name of a learner, or an update rule of your
        own, a function from a `learners.objective.Objective` to a
        `learners.base.Learner` (with settings: `LearnerConfig(rule=...)`). None serves
        the draft as it is. Of drafts that are not trained (`ngram`, `model`) only
        n-grams are learned.
      tree: How much to draft; a chain of three by default. `TreeConfig.auto()` drafts
        as deep as pays, which is measured once, at warm-up or before the first answer.
        How deep that is, neighbours in the batch have a say in: tokens do not depend on
        it, only where children are drawn sampled ones do, though their law does not.
      num_speculative_tokens: In place of a tree: the depth of a chain, 0 to decode
        plainly; `auto` is `TreeConfig.auto()`.
      batch_size: Requests decoded together.
      stop: A string that ends an answer, or several; the text ends in front of it.
      has_log_probs: Report log-probabilities.
      ngrams: Let n-grams of the request, and of learned traffic, suggest tokens. Drawn
        children (`tree.children` other than `topk`) leave no room for them.
      num_predicted_tokens: Tokens verified at once while a request's prediction holds;
        0 keeps to the tree.
      controller: What each step runs, of the tree's depths: `fixed`, `auto`, or a
        function from actions to a `control.base.Controller`; of a pool's drafters one
        of `control.selectors`, such as `normalhedge` or `ucb:time`. By default `auto`
        where the tree has several depths, and the first drafter. `load` drafts the tree
        or nothing, whichever pays with as many rows. `joint` chooses the pool's drafter
        and the depth that yield most tokens a second. `marginal` chooses depth and size
        within the step, up to those of the tree, by default a chain of five; `ltd:DIR`
        asks policies of `ospec train-control`.
      stop_fn: When a draft grows no deeper within a step, from what it has drafted so
        far: a rule of `drafters.stopping`, for chains and dynamic trees.
      size_fn: How many nodes are verified then, of a tree that has `sizes`: a rule of
        `drafters.sizing`, by default all that was drafted.
      judge_every: Steps after which a pool's drafters are judged by what was emitted
        meanwhile, for controllers that judge them. Until then only the one that drafts
        is kept up to date; it changes at no other time.
      learn_control: Share of decoding's time in which the policies of `ltd:DIR` go on
        learning, from every verified step; 0 leaves them as they are. It comes beside
        what the learner takes.
      learn_idle: Exercises that each answer makes due, or a `PracticeConfig`: between
        requests the target writes more of what it was lately asked, and the draft
        learns from that. See `practise`.
      follow_clock: Time every step while serving, for controllers that weigh time: what
        steps take changes as others use the machine. Which steps are taken then depends
        on time, and where children are drawn sampled tokens with it, though not their
        law.
      promote: `automatic` serves what was learned as the learner gives it out;
        `manual` goes on serving the same draft until `promote` is called. n-grams are
        served at once either way.

    Sampled answers draw from `SamplingConfig.seed` and the number of requests that the
    session, or the checkpoint it resumed, has begun before: copies of a prompt are
    answered independently of each other, and a new session repeats an old one.

    `reports` holds what the newest 256 updates did.

    `on_update`, if set, is called after each update with its report and the draft that
    was served before and is after it; its time is not learning's. The learners `head`
    and `preference` overwrite the projection: there, that of the draft before is gone.
    Where promotion is by hand, these are the drafts as they are learned.

    `kept` holds the caches of answered requests for those that go on from them, where
    `session.live` keeps any.

    Threads may share a session: each answer, save and so on waits for the one before.

    Raises:
      ConfigError: An argument means nothing, or some do not go together.
      CheckpointError: The draft does not fit the target.
    """

    def __init__(
        self,
        target: Target | str | Path,
        draft: LoadedDraft | str | Path | Family | None = None,
        *,
        learner: LearnerConfig | str | Rule | None = None,
        tree: TreeConfig | None = None,
        num_speculative_tokens: int | Literal["auto"] | None = None,
        batch_size: int = 1,
        stop: str | Iterable[str] = (),
        has_log_probs: bool = False,
        ngrams: bool = True,
        num_predicted_tokens: int = 12,
        controller: str | BuildController | None = None,
        stop_fn: StopFn | None = None,
        size_fn: SizeFn | None = None,
        judge_every: int = JUDGE_EVERY,
        learn_control: float = 0.0,
        learn_idle: int | PracticeConfig = 0,
        follow_clock: bool = False,
        promote: Literal["automatic", "manual"] = "automatic",
    ):
        batch_size = whole_number("batch_size", batch_size, least=1)
        num_predicted_tokens = whole_number(
            "num_predicted_tokens", num_predicted_tokens, least=0
        )
        judge_every = whole_number("judge_every", judge_every, least=1)
        learn_control = arguments.as_share("learn_control", learn_control)
        stop = arguments.as_stop(stop)
        tree = arguments.as_tree(tree, num_speculative_tokens)
        has_log_probs = arguments.as_flag("has_log_probs", has_log_probs)
        ngrams = arguments.as_flag("ngrams", ngrams)
        follow_clock = arguments.as_flag("follow_clock", follow_clock)

        # Before the target is loaded, which takes seconds: a slip in the draft's name
        # shows at once.
        if isinstance(draft, str | Path) and draft != "none":
            check_draft(draft)

        target = arguments.as_target(target)
        sharding.check_batch(target.mesh, batch_size)
        draft = arguments.as_draft(draft, target)
        learner = arguments.as_learner(learner, draft)
        exercises = arguments.as_practice(learn_idle, learner)
        is_by_hand = arguments.is_promoted_by_hand(promote, learner)

        # From here on everything fits together; what is built never changes.
        plan = how_much.resolve(
            tree, draft, controller, stop_fn, size_fn, learn_control, batch_size
        )
        _check_learns_control(learn_control, target)
        tree = build.fitting_tree(plan.tree, draft)
        parts = build.assembled(
            target,
            draft,
            plan._replace(tree=tree),
            learner,
            ngrams,
            num_predicted_tokens,
            has_log_probs,
            judge_every,
        )
        self.target = target
        self.tree = tree
        self.batch_size = batch_size
        self.stop = stop
        self.engine = parts.engine
        self.chooser = Chooser.start(parts.controller, batch_size)
        if follow_clock:
            _check_weighs_time(parts.controller, controller)
            self.chooser.now = time.perf_counter
        self.own_family = draft.own_family if draft else None
        self.learner = parts.learner
        self.trainer = parts.trainer
        self.is_promoted_by_hand = is_by_hand
        self._serve = parts.serve
        self.practice = self._new_practice(exercises)

        # What does change: counters, reports, and the state.
        self.stats = DecodingStats(num_spec_tokens=tree.num_steps)
        self._unjudged = self.stats
        self.reports: list[UpdateReport] = []
        self.on_update: Callable[[UpdateReport, Draft, Draft], None] | None = None
        self.kept: KeptRows | None = None
        self._saved: resume.Saved | None = None
        self._update: _Update | None = None
        # One that a thread may take again: `on_text` may ask for another answer.
        self._lock = threading.RLock()
        self._adopt(self._first_state(draft))

    def _new_practice(self, config: PracticeConfig | None) -> Practice | None:
        if config is None:
            return None

        tokenizer = self.target.tokenizer
        special = {*tokenizer.all_special_ids, *self.target.stop_ids}
        stops = self.target.stop_ids
        return Practice(tokenizer, self.decode, special, stops, config)

    def _first_state(self, loaded: LoadedDraft | None) -> SessionState:
        """Before anything was answered."""
        if loaded is None:
            return SessionState()

        meta = with_records(loaded, self.learner, self.target).meta
        draft = build.grouped(loaded.draft, meta.draft, self.target.mesh)
        if self.trainer is None:
            return SessionState(meta, draft)

        return SessionState(meta, draft, *self.trainer.init(draft))

    def _adopt(self, state: SessionState) -> None:
        """Goes on from a state, whatever was before."""
        self.drop_update()
        state = state.serving(self.is_promoted_by_hand)
        self._state = state
        self._served = None
        # What learning goes on from, as it decodes, where it is not served at once.
        self._waiting: Draft | None = None
        # The served draft is made of the state's: it is never a part of it, so that the
        # two cannot contradict each other.
        if state.draft is not None and self.trainer is None:
            self._served = self._serve(state.draft)
        elif state.draft is not None and self.trainer is not None:
            self._served = self._served_of(state, state.draft)
            if state.waiting is state.draft:
                # Nothing was learned since: so that caches that the draft wrote stay
                # good when what is learned is promoted.
                self._waiting = self._served
                self._served = self.trainer.own(self._waiting)
            elif state.waiting is not None:
                self._waiting = self._served_of(state, state.waiting)

        self.chooser.resume(state.controller)

    def _served_of(self, state: SessionState, draft: Draft) -> Draft:
        """A draft in float32 as it decodes, with the n-grams of a state."""
        assert self.trainer is not None
        assert state.traffic is not None
        return go_on_from(self.trainer, state.trainer, state.traffic, draft).served

    def __repr__(self) -> str:
        family = self.meta.family if self.meta is not None else None
        learner = self.learner.name if self.learner is not None else None
        return (
            f"Session({self.target!r}, draft={family!r}, learner={learner!r}, "
            f"tree={self.tree.kind!r} of depth {self.tree.num_steps}, "
            f"batch_size={self.batch_size}, {len(self._state.answered)} answered, "
            f"draft version {self.version})"
        )

    @property
    def state(self) -> SessionState:
        """Where it stands: all that `save` writes."""
        return dataclasses.replace(self._state, controller=self.chooser.to_json())

    @property
    def meta(self) -> Meta | None:
        """What the draft belongs to; None when decoding plainly."""
        return self._state.meta

    @property
    def draft(self) -> Draft | None:
        """The draft in use, in float32; None when decoding plainly."""
        return self._state.draft

    @property
    def served_draft(self) -> Draft | None:
        """The same, as it decodes: in the target's precision, with its n-grams."""
        return self._served

    @property
    def memory(self) -> NgramMemory | None:
        """The n-grams in use; None when decoding plainly."""
        return None if self._served is None else self._served.memory

    @property
    def answered(self) -> list[str]:
        """Ids of the answered prompts, in order."""
        return list(self._state.answered)

    @property
    def num_admitted(self) -> int:
        """Requests that were ever begun."""
        return self._state.num_admitted

    @property
    def version(self) -> int:
        """Of the served draft: how often learning has changed it."""
        return self._state.version

    @property
    def num_waiting(self) -> int:
        """Changes that were learned and are not served; see `promote`."""
        return self._state.num_waiting

    @property
    def is_drafting(self) -> bool:
        """Whether anything is ever proposed."""
        return self.engine.drafter is not None and self.tree.num_steps > 0

    def warm_up(
        self,
        capacities: int | Iterable[int | None] | None = (None,),
        sampling: SamplingConfig = SamplingConfig(),
        has_predictions: bool = False,
    ) -> float:
        """Compiles what decoding and learning need; returns the seconds it took.

        Also turns a learning budget into an interval of target passes, and measures
        what steps of varying depth cost, unless a checkpoint told that.

        Args:
          capacities: Of the caches to compile for; None is the smallest one.
          has_predictions: Some of the prompts to come have one.

        Raises:
          ConfigError: A capacity is no such number.
        """
        capacities = arguments.as_capacities(capacities)
        sampling = arguments.as_sampling(sampling)
        start = time.perf_counter()
        with self._lock:
            self._warm_up(capacities, sampling, has_predictions)

        release_memory()
        return time.perf_counter() - start

    def _warm_up(
        self,
        capacities: Iterable[int | None],
        sampling: SamplingConfig,
        has_predictions: bool = False,
    ) -> None:
        request = self.probe_request(24, sampling)
        requests = [request]
        # A prediction has a place in the state: rows with one are another program.
        if has_predictions and self.is_drafting:
            predicted = dataclasses.replace(request, prediction_ids=request.prompt_ids)
            requests = [predicted, request]

        completions = warm_up.warm_up(
            self.engine,
            self.chooser,
            self._served,
            requests,
            capacities,
            self.batch_size,
        )
        self.warm_up_learning(completions, self.batch_size)

    def warm_up_learning(self, completions: list[Completion], batch_size: int) -> None:
        """Compiles what learning needs, and turns its budget into an interval.

        Args:
          completions: An answer in a cache of each capacity, the last one decoded at
            full speed; nothing is learned from them.
          batch_size: Requests that were decoded beside each other.
        """
        warm_up.rehearse(self.chooser)
        if self.trainer is None or self._served is None:
            return

        _LOG.info("compiling what learning needs")
        trained = warm_up.warm_up_trainer(
            self.trainer, self._state, self._served, completions, batch_size
        )
        self._state = dataclasses.replace(self._state, trainer=trained)
        if self._state.waiting is not None:
            # A promotion shall find its programs.
            jax.block_until_ready(self._promoted())

    def rehearse_slices(self, completion: Completion) -> None:
        """Compiles what updates in slices need, behind `warm_up_learning`."""
        if self.trainer is None or self.trainer.update_in_slices is None:
            return

        _LOG.info("compiling slices of updates")
        self.trainer.rehearse_slices(*self._learned()[:4], completion)

    def measure_costs(
        self,
        capacity: int | None = None,
        sampling: SamplingConfig = SamplingConfig(),
    ) -> None:
        """Times steps for a controller that weighs time and does not know it yet.

        Args:
          capacity: Slots of a row; by default the fewest.
        """
        if not self.chooser.has_costs:
            warm_up.measure_costs(
                self.engine,
                self.chooser,
                self._served,
                self.probe_request(sampling=sampling),
                self.batch_size,
                capacity,
            )
        warm_up.rehearse(self.chooser)

    def probe_request(
        self, max_new_tokens: int = 128, sampling: SamplingConfig = SamplingConfig()
    ) -> Request:
        """A request for warming up and timing."""
        prompt = parse_prompt({"prompt": "Tell me about the sea."}, "probe")
        ids = encode(prompt, self.target.tokenizer)
        return Request("probe", ids, max_new_tokens, sampling)

    def requests(
        self,
        prompts: Iterable[Prompt],
        max_new_tokens: int,
        sampling: SamplingConfig,
        is_raw: bool = False,
        num_log_probs: int | None = None,
    ) -> Iterator[tuple[Prompt, Request]]:
        """Tokenises prompts."""
        return tokenized(
            prompts,
            self.target.tokenizer,
            max_new_tokens,
            sampling,
            is_raw,
            self.stop,
            has_predictions=self.is_drafting,
            num_log_probs=num_log_probs,
        )

    def generate(
        self,
        prompts: str | dict | Prompt | Iterable[Prompt | str | dict],
        max_new_tokens: int = 128,
        sampling: SamplingConfig = SamplingConfig(),
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        is_raw: bool = False,
        num_log_probs: int | None = None,
        on_text: Callable[[Prompt, str], None] | None = None,
        predictions: str | Iterable[str | None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Result]:
        """Answers prompts, in order of completion, learning in between.

        Of a list or tuple all prompts are checked before anything is decoded. Any other
        source is read as it goes, as many prompts ahead as are decoded together, so it
        need not end.

        Args:
          prompts: Strings, `{prompt}` or `{messages}` rows, or `Prompt`s; or one of
            them. One without an id is called `prompt-N`, by the number of requests
            begun before.
          temperature: In place of that of `sampling`, like `top_k`, `top_p`, `seed`.
          num_log_probs: Report each token's log-probability under the target, and so
            many of the most probable tokens, at most 20; None reports what the session
            does for all.
          on_text: Called with new text as it comes.
          predictions: What each answer is expected to be, None for no idea; rows may
            have a key `prediction` instead.
          should_stop: Asked before every step. Once it says so, what is on its way is
            dropped, and the iteration ends. At batch size 1 the next call then goes on
            as if the dropped request had never been begun.

        Raises:
          ConfigError: An argument means nothing, or a prompt is none.
          PromptTooLongError: A prompt and its answer do not fit.
        """
        sampling = arguments.as_sampling(
            sampling, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        is_raw = arguments.as_flag("is_raw", is_raw)
        check_num_log_probs(num_log_probs)
        if on_text is not None and not callable(on_text):
            raise ConfigError(
                f"on_text is {on_text!r:.60}; use a function of a prompt and text"
            )
        has_none = isinstance(predictions, list | tuple) and not any(predictions)
        if predictions is not None and not has_none and not self.is_drafting:
            raise ConfigError(
                "predictions are verified as drafts, and this session decodes "
                "plainly; give it a draft, if only load_draft('prediction', target)"
            )

        parsed = arguments.as_prompts(prompts, predictions, self.num_admitted)
        pairs = self.requests(parsed, max_new_tokens, sampling, is_raw, num_log_probs)
        # All are tokenised and measured before the first is decoded, so a prompt that
        # does not fit is no surprise in the middle.
        if isinstance(parsed, list):
            pairs = list(pairs)
            self.engine.capacity_for(request for _, request in pairs)

        return self._locked(self._answers(pairs, sampling, on_text, should_stop))

    def _locked(self, results: Generator[Result, None, None]) -> Iterator[Result]:
        """Lets one thread at a time move the session on, from answer to answer."""
        # The lock is free while the caller looks at a result: an answer from another
        # thread may come in between.
        with contextlib.closing(results):
            while True:
                with self._lock:
                    result = next(results, None)
                if result is None:
                    return
                yield result

    def _answers(
        self,
        pairs: Iterable[tuple[Prompt, Request]],
        sampling: SamplingConfig,
        on_text: Callable[[Prompt, str], None] | None,
        should_stop: Callable[[], bool],
    ) -> Generator[Result, None, None]:
        """Answers requests; see `generate`."""
        # By identity: ids of requests are users' and need not differ.
        prompt_of: dict[int, Prompt] = {}
        streams: dict[int, TextStream] = {}

        def taken(pairs: Iterable[tuple[Prompt, Request]]) -> Iterator[Request]:
            for prompt, request in pairs:
                prompt_of[id(request)] = prompt
                yield request

        if isinstance(pairs, list):
            requests = list(taken(pairs))
            first = requests
        else:
            source = taken(pairs)
            # Of a source that need not end only so many are taken as are decoded
            # together.
            first = list(itertools.islice(source, self.batch_size))
            requests = itertools.chain(first, source)

        # What must be known before the first answer is measured in a cache of its size.
        if first:
            self._prepare(self.engine.capacity_for(first), sampling)

        def on_tokens(request: Request, emitted: Emitted):
            stream = streams.get(id(request))
            if stream is None:
                stream = streams[id(request)] = TextStream(self.decode, self.stop)
            if text := stream.add(emitted.token_ids):
                assert on_text is not None
                on_text(prompt_of[id(request)], text)

        completions = self.engine.serve(
            requests,
            # Asked before every step, so a swap after one answer holds for all rows.
            lambda: self.served_draft,
            self.batch_size,
            on_tokens=on_tokens if on_text else None,
            chooser=self.chooser,
            ordinals=self.ordinals(),
            should_stop=should_stop,
        )
        before = self.num_admitted, self.chooser.state

        for completion in completions:
            prompt = prompt_of.pop(id(completion.request))
            text = self.text_of(completion)
            # What a stream held back, as the beginning of a stop string that never
            # came, is shown when the answer has ended.
            stream = streams.pop(id(completion.request), None)
            if stream and on_text and (rest := stream.finish(text)):
                on_text(prompt, rest)
            result = self.take_in(prompt, completion, text)
            self._count_answer(prompt)
            yield result
            before = self.num_admitted, self.chooser.state

        if self.batch_size == 1:
            # Of a request that was dropped nothing was learned, and nothing is kept:
            # with the same numbers it will be answered as it would have been.
            num_admitted, self.chooser.state = before
            self._move_on(num_admitted=num_admitted)

    def take_in(
        self,
        prompt: Prompt,
        completion: Completion,
        text: str,
        can_teach: bool = True,
        is_shared: bool = True,
        in_slices: bool = False,
    ) -> Result:
        """Counts an answer, and learns from it.

        Args:
          can_teach: Learn from it, if its request allows that, too.
          is_shared: Learn what serves all from it; else it is only remembered for its
            own scope.
          in_slices: Only begin an update of the draft that is due; see `go_on`.
        """
        # Of the draft that served this answer: learning may change it next.
        version = self.version
        learning_seconds = 0.0
        if can_teach:
            learning_seconds = self._learn_from(completion, is_shared, in_slices)
            learning_seconds += self.chooser.learn()
            if self.practice is not None and self._may_teach(completion):
                self.practice.note(prompt, completion, text, is_shared)
        self.stats = self.stats + completion.stats
        self._warn_of_collapse(completion.stats)

        return Result(
            prompt=prompt,
            text=text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            stats=completion.stats,
            log_probs=completion.log_probs,
            seconds=completion.seconds,
            learning_seconds=learning_seconds,
            version=version,
            precision=self.target.precision,
            alternatives=completion.alternatives,
        )

    def practise(
        self,
        count: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Exercise]:
        """Has the target write more of what it was lately asked, and learns from it.

        For the time between requests: nobody's answers change by it, but for what the
        draft has learned. A resumed run has no recent requests to begin from, and goes
        on bit by bit only where nothing was practised.

        Args:
          count: Exercises to begin, of the scope that was heard of last; by default
            those that answers have made due. Of some, nothing comes that is of use.
          should_stop: Asked before every step. Once it says so, what is on its way is
            dropped, to be begun again.

        Returns:
          What was learned from.

        Raises:
          ConfigError: The session was made without `learn_idle`.
        """
        practice = self.practice
        if practice is None:
            raise ConfigError(
                "this session keeps no recent requests to practise with; make it with "
                "Session(..., learn_idle=2)"
            )

        found = []
        with self._lock:
            if count is not None:
                practice.ask_for(whole_number("count", count, least=0))
            while not should_stop() and (request := practice.next_request()):
                completions = self.engine.serve(
                    [request],
                    lambda: self.served_draft,
                    self.batch_size,
                    chooser=self.chooser,
                    should_stop=should_stop,
                )
                completion = next(completions, None)
                if completion is None:
                    break
                exercise = self.take_practice(completion)
                if exercise is not None:
                    found.append(exercise)

        return found

    def is_practising(self, request: Request) -> bool:
        """Whether a request is an exercise's that is under way."""
        return self.practice is not None and self.practice.is_writing(request)

    def take_practice(
        self,
        completion: Completion,
        can_teach: bool = True,
        in_slices: bool = False,
    ) -> Exercise | None:
        """Goes on with an exercise, and learns from it once it is complete.

        Args:
          completion: Of the request that `practice` asked for.
          can_teach: Learn from it.
          in_slices: See `take_in`.
        """
        assert self.practice is not None, "it asked for the request"
        exercise = self.practice.take(completion)
        if can_teach and exercise is not None:
            self._learn_from(exercise.completion, exercise.is_shared, in_slices)

        return exercise

    def _prepare(self, capacity: int, sampling: SamplingConfig) -> None:
        """Measures what learning, or the choice of a depth, must know beforehand."""
        # A full warm-up times a step as well.
        if self.trainer and not self.trainer.is_ready(self._state.trainer):
            self._warm_up([capacity], sampling)
            release_memory()
        else:
            self.measure_costs(capacity, sampling)

    def unanswered(self, prompts: Iterable[Prompt | str | dict]) -> list[Prompt]:
        """Those of the prompts that this session, or a checkpoint, has not answered.

        They are known by their content, and by their name where an older version's
        checkpoint holds nothing else. Where the two disagree a warning says so, with
        counts. A prompt whose name another one was answered under gets one of its own.
        """
        state = self._state
        parsed = list(arguments.as_prompts(prompts, first=self.num_admitted))
        found = find_known(parsed, state.answered, state.contents)
        moved = tuple(name for name in found.moved if not is_default_name(name))
        dataclasses.replace(found, moved=moved).warn("what was answered before")
        return found.new

    def _count_answer(self, prompt: Prompt) -> None:
        """Remembers that a prompt was answered."""
        self._move_on(
            answered=(*self._state.answered, prompt.id),
            contents=(*self._state.contents, content_hash(prompt)),
        )

    def ordinals(self) -> Iterator[int]:
        """Numbers for requests, each taken when one is begun; none ever comes twice.

        In a larger batch a request that is begun again after an interruption gets
        another one: what is kept may depend on the numbers that it was accepted with.
        """
        while True:
            ordinal = self._state.num_admitted
            self._move_on(num_admitted=ordinal + 1)
            yield ordinal

    def _move_on(self, **changes) -> None:
        """Changes a part of the state; the served draft is kept in step by callers."""
        self._state = dataclasses.replace(self._state, **changes)

    def text_of(self, completion: Completion) -> str:
        """An answer's text, without what its last token has of a stop string."""
        return self.decode(completion.token_ids).removesuffix(completion.text_over)

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, without special ones."""
        return self.target.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _may_teach(self, completion: Completion) -> bool:
        return completion.request.can_teach(self.engine.is_drawn)

    def _learn_from(
        self, completion: Completion, is_shared: bool, in_slices: bool = False
    ) -> float:
        """Remembers the answer and updates the draft when it is time."""
        if self.trainer is None or not self._may_teach(completion):
            return 0.0

        # Whatever comes now is learned behind what came before.
        self.finish_update()
        # A step that is under way has to end first, and its time is not learning's.
        jax.block_until_ready(completion.feedback)
        start = time.perf_counter()
        before = self._state
        scope = completion.request.scope
        now = observe(
            self.trainer,
            self._learned(),
            dataclasses.replace(completion, owner=before.scopes.owner_of(scope)),
            is_shared,
            self._served,
        )
        self._follow(now)
        # What is kept of a scope alone is nobody else's: then nothing was taught.
        assert self.learner is not None
        if is_shared and self.learner.recording != "nothing":
            self._move_on(scopes=before.scopes.having_taught(scope))
        seconds = time.perf_counter() - start
        if not is_shared or not self.trainer.is_due(now.state):
            return seconds

        owned = dataclasses.replace(completion, owner=before.scopes.owner_of(scope))
        slices = self.trainer.update_in_slices if in_slices else None
        if slices is not None:
            self._update = _Update(slices(*now[:4], owned))
            return seconds

        start = time.perf_counter()
        learned = taught(self.trainer, now, self.trainer.update(*now[:4], owned))
        self._follow(learned)
        seconds += time.perf_counter() - start
        self._report(learned, now)

        return seconds

    def _learned(self) -> Learned:
        """Where learning stands."""
        state = self._state
        assert state.learned is not None
        assert state.traffic is not None
        assert self._served is not None
        served = self._served if self._waiting is None else self._waiting
        return Learned(state.trainer, state.traffic, state.learned, served)

    def _follow(self, now: Learned) -> None:
        """Goes on from where learning stands by now."""
        if self._waiting is None:
            self._served = now.served
            self._move_on(draft=now.draft)
        else:
            # The served draft stays, but for its n-grams.
            assert self._served is not None
            self._waiting = now.served
            self._served = attach_traffic(self._served, now.traffic)
            self._move_on(waiting=now.draft)
        self._move_on(trainer=now.state, traffic=now.traffic)

    def _report(self, now: Learned, before: Learned) -> None:
        """Tells of an update."""
        assert now.report is not None
        self.reports.append(now.report)
        del self.reports[:-_MAX_REPORTS]
        if self.on_update is not None:
            self.on_update(now.report, before.draft, now.draft)

    @property
    def is_updating(self) -> bool:
        """Whether an update in slices is under way."""
        return self._update is not None

    def go_on(self) -> float:
        """Runs a slice of the update under way; returns the seconds that it took.

        With the last slice what was learned is served, or waits to be. Until then
        nothing of it is there: neither for what is decoded nor for a checkpoint.
        """
        with self._lock:
            update = self._update
            if update is None:
                return 0.0

            start = time.perf_counter()
            updated = None
            try:
                next(update.slices)
            except StopIteration as end:
                updated = end.value
            except BaseException:
                self.drop_update()
                raise

            if updated is None:
                seconds = time.perf_counter() - start
                update.seconds += seconds
                return seconds

            assert self.trainer is not None
            self._update = None
            # Requests joined and left meanwhile, which nothing was learned from.
            before = self._learned()
            now = taught(self.trainer, before, updated)
            self._follow(now)
            # What was saved is not what there is now, though nothing was answered.
            self._saved = None
            seconds = time.perf_counter() - start
            update.seconds += seconds
            assert now.report is not None
            report = dataclasses.replace(now.report, seconds=update.seconds)
            self._report(now._replace(report=report), before)
            return seconds

    def finish_update(self) -> None:
        """Runs all slices that are left of the update under way, if there is one."""
        while self._update is not None:
            self.go_on()

    def drop_update(self) -> None:
        """Gives up the update under way: it has never been.

        Windows that it was to learn from are kept, and an update is due again with the
        next answer. Learners of single answers keep none: that answer is passed over.
        """
        update = self._update
        self._update = None
        if update is not None:
            update.slices.close()

    def _warn_of_collapse(self, newest: DecodingStats) -> None:
        # Judged in spans, so that a collapse late in a long service shows as well.
        self._unjudged = stats = self._unjudged + newest
        if stats.num_draft_tokens and stats.num_drafts >= _COLLAPSE_STEPS:
            # A controller of its own accord hardly drafts where that does not pay.
            if stats.mean_acceptance_length < 1.05 and not self.tree.depths:
                warnings.warn(
                    f"the mean acceptance length is {stats.mean_acceptance_length:.2f} "
                    f"over {stats.num_drafts} steps: the draft hardly ever predicts "
                    f"this target; check that it was trained for it (taps, "
                    f"vocabulary), or decode with --draft none",
                    stacklevel=4,
                )
            self._unjudged = DecodingStats(num_spec_tokens=self.tree.num_steps)

    @property
    def scopes(self) -> Scopes:
        """Whose text is kept, by name."""
        return self._state.scopes

    def enroll(self, scope: str, busy: Collection[int] = ()) -> Enrolled:
        """Gives a scope a number, for `Request.scope`; see `online.scopes`.

        Args:
          scope: A name, `key` or `key/tenant`; empty is nobody in particular.
          busy: Numbers of requests that are being answered.

        Returns:
          With the scope that was forgotten for it, if none was free.
        """
        with self._lock:
            enrolled = self._state.scopes.enroll(scope, busy)
            self._move_on(scopes=enrolled.scopes)
            if enrolled.dropped is not None:
                self.drop_text([enrolled.dropped.number])

        return enrolled

    def drop_text(self, numbers: Collection[int]) -> None:
        """Drops what is kept of scopes alone, by their numbers: n-grams, caches, ..."""
        with self._lock:
            if self.practice is not None:
                self.practice.forget(numbers)
            if self.chooser.forget(numbers):
                self._saved = None
            for number in numbers:
                if self.kept is not None:
                    self.kept.forget(number)
            if numbers:
                # It may learn from their text.
                self.drop_update()
            if self._state.traffic is None or self._served is None:
                return
            traffic = forget(self._state.traffic, as_mask(numbers))
            traffic = sharding.put_params(traffic, self.target.mesh)
            self._served = attach_traffic(self._served, traffic)
            if self._waiting is not None:
                self._waiting = attach_traffic(self._waiting, traffic)
            self._move_on(traffic=traffic)
            # What was saved is not what there is now, though nothing was answered.
            self._saved = None

    def forget_traffic(self, scope: str | None = None) -> tuple[Scope, ...]:
        """Drops what is kept of prompts and answers: n-grams, windows, caches.

        What the draft has learned from them stays in it: see `begin_again`.

        Args:
          scope: A key's name, whose tenants are forgotten with it, or `key/tenant`;
            None is all that is kept, of whomever.

        Returns:
          The scopes that were known; their numbers may be given to others now.

        Raises:
          ConfigError: The scope has no name.
        """
        if scope == "":
            raise ConfigError(
                "scope is empty; name a key or a `key/tenant`, or leave it out to "
                "forget the traffic of all"
            )

        with self._lock:
            known = self._state.scopes
            if scope is not None:
                gone = known.within(scope)
                self._move_on(scopes=known.without(gone))
                self.drop_text([one.number for one in gone])
                return gone

            self._move_on(scopes=Scopes())
            self.drop_update()
            if self.chooser.forget(None):
                self._saved = None
            if self.kept is not None:
                self.kept.forget()
            if self.practice is not None:
                self.practice.forget()
            if self.trainer is not None and self.draft is not None:
                _, traffic = self.trainer.init(self.draft)
                self._adopt(dataclasses.replace(self.state, traffic=traffic))
                self._saved = None

            return known.known

    def promote(self) -> int:
        """Serves what was learned, from the next step on; returns its version.

        Learning goes on from where it is.

        Raises:
          ConfigError: Promotion is not by hand, or nothing waits.
        """
        with self._lock:
            state = self._state
            if self._waiting is None:
                raise ConfigError(
                    "what is learned is served at once here; begin with "
                    "promote='manual', on the command line --promote manual, to say "
                    "when it is"
                )
            if not state.num_waiting:
                raise ConfigError(
                    f"nothing waits: version {state.version}, which is served, is all "
                    f"that was learned; promote it when there have been updates"
                )

            draft, self._served = self._promoted()
            self._move_on(draft=draft, served_version=state.learned_version)
            self._saved = None
            return self.version

    def _promoted(self) -> tuple[Draft, Draft]:
        """What waits, in float32 and as it decodes, for updates to leave alone."""
        assert self.trainer is not None
        assert self._waiting is not None
        assert self._state.waiting is not None
        return self.trainer.own(self._state.waiting), self.trainer.own(self._waiting)

    def begin_again(self, draft: Draft) -> None:
        """Goes on with another draft of the same architecture, as one more version.

        Learning begins anew from it, and what waits to be promoted is dropped; traffic,
        counters and the controller stay.

        Args:
          draft: In float32, as `draft` gives it.

        Raises:
          ConfigError: It has other shapes, or the session decodes plainly.
        """
        own = self.draft
        shapes = lambda one: jax.tree.map(lambda x: (x.shape, x.dtype), one)
        if own is None or shapes(own) != shapes(draft.replace(memory=own.memory)):
            raise ConfigError(
                "the draft has other shapes than the one that is served; begin a "
                "session of its own with it"
            )

        with self._lock:
            state = self.state
            if self.trainer is not None:
                fresh, empty = self.trainer.init(draft)
                trainer = fresh.going_on_from(state.trainer)
                state = dataclasses.replace(state, trainer=trainer)
                # Scopes' differences are from the draft that was served.
                if state.traffic is not None:
                    traffic = state.traffic.replace(deltas=empty.deltas)
                    state = dataclasses.replace(state, traffic=traffic)
            # It is served at once, wherever promotion is by hand.
            self._adopt(
                dataclasses.replace(
                    state, draft=draft, waiting=None, served_version=None
                )
            )
            self._saved = None

    def save(
        self, folder: str | Path, with_feedback: bool = True, num_kept: int = 2
    ) -> Path:
        """Writes a checkpoint of the draft and of what learning needs to go on.

        Nothing is written if the step is there as this session last wrote or read it,
        nothing was answered since, and it holds feedback as wished.

        Args:
          with_feedback: Also store recent traffic and remembered n-grams, from which
            users' prompts and answers can be read back; without them a resumed run
            starts with none.
          num_kept: Steps that are there afterwards, this one among them.

        Raises:
          ConfigError: `num_kept` is less than 1.
        """
        num_kept = whole_number("num_kept", num_kept, least=1)
        folder = arguments.as_folder(folder)
        with self._lock:
            last = self._saved if self.trainer is not None else None
            self._saved = saved = resume.save(
                folder,
                self.state,
                self.learner,
                self.target.mesh,
                with_feedback,
                last,
                num_kept,
            )

        return saved.place

    def resume(self, folder: str | Path) -> list[str]:
        """Goes on from a checkpoint; returns the ids of the prompts it had answered.

        At batch size 1 all that follows is bitwise what an uninterrupted run does. In
        larger batches requests that were on their way begin again, as new ones.

        The same draft is served as before, and what waits to be promoted waits on, or
        is served at once where promotion is not by hand.

        Raises:
          CheckpointError: It holds no state of the same learner.
        """
        folder = arguments.as_folder(folder)
        with self._lock:
            state = resume.resume(
                folder,
                self.target,
                self.learner,
                self.trainer,
                self._state,
                self.own_family,
            )
            self._adopt(state)
            # What could not be read back counts as saved: it is gone for good.
            self._saved = resume.Saved(
                place=resume.step_folder(folder, self._state),
                meta=resume.current_meta(self.state, self.learner),
                has_all_feedback=True,
            )

        return self.answered


def _check_learns_control(share: float, target: Target) -> None:
    """Refuses to teach policies where they do not learn.

    Raises:
      ConfigError: The target is split over devices.
    """
    if share and target.mesh is not None:
        raise ConfigError(
            f"learn_control is {share}, and the target lies on a mesh, where policies "
            f"do not learn yet; leave it out"
        )


def _check_weighs_time(rule: Controller, name: object) -> None:
    """Refuses to follow a clock for whom nothing depends on it.

    Raises:
      ConfigError: The controller does not weigh time, or several processes would not
        agree on it.
    """
    if rule.set_costs is None:
        raise ConfigError(
            f"follow_clock times steps for a controller that weighs time, and the "
            f"controller {name!r} does not; use auto, marginal or joint, or leave it "
            f"out"
        )
    if jax.process_count() > 1:
        raise ConfigError(
            f"follow_clock would have {jax.process_count()} processes choose other "
            f"steps, each by its own clock; leave it out"
        )
