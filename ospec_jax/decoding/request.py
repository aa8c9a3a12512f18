# SPDX-License-Identifier: Apache-2.0
"""A request on its way: what is asked, what has come, what was answered."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from ospec_jax.config import (
    MAX_ALTERNATIVES,
    ConfigError,
    InputError,
    SamplingConfig,
    StepKind,
    whole_number,
)
from ospec_jax.control.base import Action, Context, Row
from ospec_jax.control.contexts import opening_of
from ospec_jax.control.lengths import Pending, Windows
from ospec_jax.control.similar import embedding_of
from ospec_jax.decoding.predicted import Followed
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.sources import Source, names_of
from ospec_jax.types import Feedback, Owner, StepOutput
from ospec_jax.typing import short_repr


class PromptTooLongError(InputError):
    """A prompt and its answer do not fit the model's context or the cache."""


class StopPoint(NamedTuple):
    """Where a stop string ends an answer.

    Attributes:
      num_tokens: That the answer keeps; the last of them may run into the string.
      text_over: What their text has of the string, at its end.
    """

    num_tokens: int
    text_over: str = ""


Alternatives = tuple[tuple[int, float], ...]
"""The most probable tokens in one place, with their log-probabilities."""


class Emitted(NamedTuple):
    """What one pass added to an answer: tokens that it keeps, and facts on each.

    Attributes:
      token_ids: At least one.
      sources: Who proposed each token; see `drafters.sources`.
      log_probs: The target's own, before temperature and cuts; empty if not reported.
      alternatives: Likewise of the most probable tokens; empty if not reported.
      drafter: Number of the pool's member that drafted, or `SUGGESTIONS`; 0 without a
        pool, None for a prompt.
    """

    token_ids: list[int]
    sources: list[Source]
    log_probs: list[float]
    alternatives: list[Alternatives]
    drafter: int | None = None

    @property
    def is_drafted(self) -> list[bool]:
        """Whether each token had been proposed; else the target chose it."""
        return [source != "target" for source in self.sources]


def check_num_log_probs(number: int | None) -> None:
    """Refuses numbers of alternatives that are not reported.

    Raises:
      ConfigError: It is such a number.
    """
    if number is None:
        return
    if whole_number("num_log_probs", number, least=0) > MAX_ALTERNATIVES:
        raise ConfigError(
            f"num_log_probs is {number}; use 0 (none but the token's own) to "
            f"{MAX_ALTERNATIVES}, or None for no log-probabilities"
        )


@functools.lru_cache
def _key_of(seed: int) -> Key[Array, ""]:
    return jax.random.key(seed)


# One program: operation by operation it would take a quarter of a millisecond.
@jax.jit
def _folded(key: Key[Array, ""], kind: int, number: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, kind), number)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
      prompt_ids: Token ids, chat template already applied.
      sampling: Its seed is that of the whole call; see `key`.
      find_stop: Given the answer's ids, where it ends when a stop string occurs in
        their text, else None.
      prediction_ids: What the answer is expected to be; empty for nothing.
      prediction_confidence: See `drafters.prediction`.
      seed: Of this request alone; None shares the call's.
      choice: Which of the answers to a request with a seed of its own this is, or which
        request of practice.
      num_log_probs: Report each token's log-probability, and so many of the most
        probable tokens with theirs; None reports what the engine does for all.
      can_speculate: Draft for it; without, each step emits one token.
      scope: Whose it is: what was kept of one scope's text serves no other; 0 for
        nobody in particular.
      domain: Of the prompt, for who selects among drafts by it; empty for none.
      is_left_out: Nothing is learned from its answer, as its user wishes: no controller
        hears of it, either.
      is_practice: Nobody asked for it: a draft is to learn from it. Its numbers are
        those of no request, no controller hears of it, and its caches are not kept.
    """

    __repr__ = short_repr

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    find_stop: Callable[[list[int]], StopPoint | None] | None = None
    prediction_ids: tuple[int, ...] = ()
    prediction_confidence: float = 0.5
    seed: int | None = None
    choice: int = 0
    num_log_probs: int | None = None
    can_speculate: bool = True
    scope: int = 0
    domain: str = ""
    is_left_out: bool = False
    is_practice: bool = False

    def __post_init__(self):
        whole_number("max_new_tokens", self.max_new_tokens, least=1)
        check_num_log_probs(self.num_log_probs)

    def key(self, ordinal: int) -> Key[Array, ""]:
        """The request's own random numbers, folded with the position at each step.

        Where the draft draws its children no two requests may share them: what a
        session carries from one answer to the next (n-grams, a learned draft, a depth)
        depends on the numbers that the first was accepted with, and if the second were
        accepted with them, too, it would leave the target's law.

        Args:
          ordinal: Its number among all that were ever admitted. With a seed of its own
            a request's numbers follow from that and `choice` alone, so that they
            repeat; see `can_teach`. Those of practice follow from `choice`, too; nobody
            is given what comes of them.
        """
        if self.is_practice:
            return _folded(_key_of(self.sampling.seed), 2, self.choice)

        if self.seed is None:
            return _folded(_key_of(self.sampling.seed), 0, ordinal)

        return _folded(_key_of(self.seed), 1, self.choice)

    @property
    def kind(self) -> StepKind:
        """The least that a pass must be able to do for it."""
        if self.num_log_probs is not None or not self.can_speculate:
            return "full"

        return self.sampling.kind

    @property
    def own_key(self) -> tuple[int | None, int]:
        """What its numbers follow from, if it has a seed of its own."""
        return self.seed, self.choice

    @property
    def has_own_numbers(self) -> bool:
        """Whether its answer follows from random numbers that may come again.

        Greedy answers use none, those of the call's seed none that another request will
        use.
        """
        return self.seed is not None and self.sampling.temperature > 0

    def can_teach(self, is_drawn: bool) -> bool:
        """Whether others may be served with what its answer teaches.

        Args:
          is_drawn: The draft's children are drawn (`TreeConfig.is_drawn`): then not, if
            its numbers may come again.
        """
        return not (self.is_left_out or is_drawn and self.has_own_numbers)


@dataclasses.dataclass
class Completion:
    """An answered request.

    Attributes:
      finish_reason: `stop` or `length`.
      seconds: Wall-clock time from prefill to the last token.
      feedback: The row's recorded features, `[1, capacity, ...]`, or None.
      num_recorded: Positions of `feedback` that are real.
      capacity: Slots of the cache it was decoded in.
      text_over: See `StopPoint`.
      num_reused: Tokens of the prompt that were not run, since another row had them.
      followed: How far the request's prediction came true; None if it has none.
      alternatives: Of each token, the most probable ones; empty if not asked for.
      owner: Whose it is, for what keeps its text; None is nobody in particular.
      num_steps_of: Passes that each member of a pool drafted for, by its number.
    """

    __repr__ = short_repr

    request: Request
    token_ids: list[int]
    finish_reason: str
    stats: DecodingStats
    log_probs: list[float]
    seconds: float
    feedback: Feedback | None = None
    num_recorded: int = 0
    capacity: int = 0
    text_over: str = ""
    num_reused: int = 0
    followed: Followed | None = None
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)
    owner: Owner | None = None
    num_steps_of: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Slot:
    """A request being decoded.

    Attributes:
      has_log_probs: Somebody asked for log-probabilities.
      is_done: Its last token has been read.
      is_sure: A long chain of suggestions is likely to be right next.
      pending: Evidence on a pool's drafters that is not complete.
      num_reused: See `Completion`.
      draft_number: When it began, by which `kept.KeptRows` knows what it is good for.
      followed: How far the request's prediction came true; None if it has none.
      num_steps_of: See `Completion`.
      embedding: Of its prompt; see `control.base.Context`.
      only: Of a pool's members the one that reads it, by its number; the others do not,
        and are not judged by it. None for all.
    """

    __repr__ = short_repr

    request: Request
    stats: DecodingStats
    has_log_probs: bool = False
    started: float = dataclasses.field(default_factory=time.perf_counter)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)
    is_done: bool = False
    is_sure: bool = False
    finish_reason: str = "length"
    text_over: str = ""
    pending: Pending = dataclasses.field(default_factory=Pending)
    num_reused: int = 0
    draft_number: int = 0
    followed: Followed | None = None
    num_steps_of: dict[int, int] = dataclasses.field(default_factory=dict)
    embedding: str = ""
    only: int | None = None

    def __post_init__(self):
        if self.request.prediction_ids:
            self.followed = Followed(self.request.prediction_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens that the host knows to be still wanted."""
        return self.request.max_new_tokens - len(self.token_ids)

    @functools.cached_property
    def _opening(self) -> str:
        return opening_of(self.request.prompt_ids)

    @property
    def context(self) -> Context:
        """What its request says of itself."""
        request = self.request
        return Context(request.scope, request.domain, self._opening, self.embedding)

    def as_row(self) -> Row:
        """What a controller may know of it."""
        num_tokens = len(self.request.prompt_ids) + len(self.token_ids)
        # A step of suggestions alone would be one that its drafter misses.
        can_be_sure = self.request.can_speculate and self.only is None
        is_sure = self.is_sure and can_be_sure
        return Row(is_sure, num_tokens, self.num_remaining, self.context)

    def judge(self, output: StepOutput, row: int) -> Windows | None:
        """What one pass completes of the evidence on a pool's drafters.

        Args:
          output: Fetched; its members stand in the order of their numbers.
        """
        if output.judged is None:
            return None

        count = int(output.num_emitted[row])
        members = output.judged.items
        stacked = lambda name: np.stack(
            [np.asarray(getattr(one, name))[row, :count] for one in members], axis=-1
        )

        return self.pending.add(stacked("chances"), stacked("couplings"))

    def book(
        self,
        output: StepOutput,
        row: int,
        action: Action | None,
        stop_ids: Sequence[int],
    ) -> Emitted:
        """Takes one pass's tokens in; returns those that belong to the answer.

        Args:
          output: Fetched.
          action: That the pass ran; None for a prompt.
        """
        count = int(output.num_emitted[row])
        if action is None and output.prompt_states is not None:
            self.embedding = embedding_of(output.prompt_states[row])
        # Of the newest pass alone: what an earlier one said is out of date.
        self.is_sure = output.is_sure is not None and bool(output.is_sure[row])
        tokens = output.tokens[row, :count].tolist()
        log_probs = []
        if self.has_log_probs and output.log_probs is not None:
            log_probs = output.log_probs[row, :count].tolist()
        alternatives = self._alternatives(output, row, count)
        sources = None if output.sources is None else output.sources[row].tolist()

        # The stop string is looked for in the answer with the new tokens: it may have
        # begun in an earlier pass.
        self.token_ids += tokens
        self.log_probs += log_probs
        self.alternatives += alternatives
        drafted = int(output.num_drafted[row])
        accepted = int(output.num_accepted[row])
        kept = count - self._cut_at_stop_string(count)
        # Accepted tokens behind a stop string were of no use to anybody, so they do not
        # count. A finished row's pass emits nothing, and is no verification.
        if action is not None and count:
            depth = action.tree.num_steps
            self.stats.add_step(drafted, min(accepted, kept), depth)
            number = action.drafter
            self.num_steps_of[number] = self.num_steps_of.get(number, 0) + 1
        if self.followed is not None:
            self.followed.add(tokens[:kept], min(accepted, kept))

        if output.is_finished[row] and not self.is_done:
            self.is_done = True
            if self.token_ids[-1] in stop_ids:
                self.finish_reason = "stop"

        return Emitted(
            token_ids=tokens[:kept],
            sources=names_of(sources, accepted, kept),
            log_probs=log_probs[:kept],
            alternatives=alternatives[:kept],
            drafter=None if action is None else action.drafter,
        )

    def _alternatives(
        self, output: StepOutput, row: int, count: int
    ) -> list[Alternatives]:
        """Of a pass's tokens, as many as were asked for."""
        wanted = self.request.num_log_probs
        if wanted is None or output.alternatives is None:
            return []

        ids, log_probs = (x[row, :count, :wanted].tolist() for x in output.alternatives)
        pairs = zip(ids, log_probs, strict=True)
        return [tuple(zip(*one, strict=True)) for one in pairs]

    def _cut_at_stop_string(self, count: int) -> int:
        """Drops tokens behind a stop string; returns how many of the newest."""
        if self.request.find_stop is None:
            return 0

        found = self.request.find_stop(self.token_ids)
        if found is None:
            return 0

        cut = len(self.token_ids) - found.num_tokens
        self.token_ids = self.token_ids[: found.num_tokens]
        self.log_probs = self.log_probs[: found.num_tokens]
        self.alternatives = self.alternatives[: found.num_tokens]
        self.text_over = found.text_over
        self.is_done = True
        self.finish_reason = "stop"

        # Where the string began in tokens of earlier passes, more is cut off than is
        # new.
        return min(cut, count)

    def completion(self, feedback: Feedback | None, capacity: int) -> Completion:
        """The answer.

        Args:
          feedback: The row's.
          capacity: Slots of its cache.
        """
        # The last emitted token was never a root: nothing was verified after it.
        num_recorded = len(self.request.prompt_ids) + len(self.token_ids) - 1
        return Completion(
            request=self.request,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stats=self.stats,
            log_probs=self.log_probs,
            seconds=time.perf_counter() - self.started,
            feedback=feedback,
            num_recorded=0 if feedback is None else num_recorded,
            capacity=capacity,
            text_over=self.text_over,
            num_reused=self.num_reused,
            followed=self.followed,
            alternatives=self.alternatives,
            num_steps_of=self.num_steps_of,
        )
