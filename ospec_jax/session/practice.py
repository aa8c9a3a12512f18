# SPDX-License-Identifier: Apache-2.0
"""What a target writes for its draft to learn from, while nobody asks for anything.

An exercise is a request like those of late, and its answer, both of the target's own.
Behind a recent exchange of the same scope the target writes another turn of a user's,
which begins with the first words of a further recent one; so a small model stays with
the kind of thing, too. Turns of a user's from a chat template are Magpie's idea (arXiv
2406.08464); to learn from them between requests, and from recent ones, is ours.

Recent exchanges are in memory alone: no checkpoint holds them. Seeds of an exercise are
of one scope, what is written belongs to that, and its random numbers are those of no
request. So users' answers stay as they would be, but for what the draft has learned.
"""

import dataclasses
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from ospec_jax.config import ConfigError, SamplingConfig, check_types, whole_number
from ospec_jax.data.filters import FilterConfig, find_fault
from ospec_jax.data.prompts import Prompt
from ospec_jax.data.templates import encode, encode_opening
from ospec_jax.decoding.request import Completion, Request

_MAX_SCOPES = 64
"""Scopes whose exchanges are kept; the one that was not heard of for longest goes."""
_MAX_DUE = 64
"""Exercises that may be due at once: an idle machine comes to rest some time."""
_NUM_SEEN = 256
"""Turns of late that a new one is compared with."""


@dataclasses.dataclass(frozen=True)
class PracticeConfig:
    """What is written, and how much of it.

    Attributes:
      num_per_answer: Exercises that each answer makes due.
      num_recent: Exchanges of a scope to begin from.
      max_example_tokens: Of an exchange that stands in front; of longer ones the answer
        is cut, and those whose prompt alone is longer are none.
      least_begin: Share of a recent turn's words that a new one begins with, at least.
      most_begin: Likewise at most.
      max_begin_words: However long the recent turn is.
      max_turn_tokens: Of the rest of a turn; one that is not ended by then is dropped.
      max_answer_tokens: Of an answer, or what its seed was allowed, if that is less.
      temperature: Of turns; answers have that of their seed.
      top_p: Of turns.
      seed: Of all choices.
      filters: What a turn must be like.
    """

    num_per_answer: int = 2
    num_recent: int = 8
    max_example_tokens: int = 384
    least_begin: float = 0.2
    most_begin: float = 0.5
    max_begin_words: int = 32
    max_turn_tokens: int = 96
    max_answer_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    filters: FilterConfig = FilterConfig(script="", min_letter_share=0.3)

    def __post_init__(self):
        check_types(self)
        for name in ("num_recent", "max_example_tokens", "max_begin_words"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("num_per_answer", "max_turn_tokens", "max_answer_tokens"):
            whole_number(name, getattr(self, name), least=1)
        SamplingConfig(self.temperature, top_p=self.top_p, seed=self.seed)
        if not 0 < self.least_begin <= self.most_begin < 1:
            raise ConfigError(
                f"turns begin with {self.least_begin} to {self.most_begin} of another "
                f"one's words; use shares between 0 and 1, the smaller one first"
            )


class Exchange(NamedTuple):
    """A request that was answered.

    Attributes:
      system: The turn in front of all others, if there is one.
      asked: The last turn of the user's.
      is_shared: All may be served with what is learned from it.
    """

    system: tuple[dict, ...]
    asked: str
    answer: str
    sampling: SamplingConfig
    max_new_tokens: int
    is_shared: bool


class Exercise(NamedTuple):
    """A request of the target's own, with its answer.

    Attributes:
      is_shared: All may be served with what is learned from it.
    """

    prompt: Prompt
    completion: Completion
    is_shared: bool


@dataclasses.dataclass
class PracticeCounts:
    """Since the beginning.

    Attributes:
      num_exercises: That were learned from.
      num_dropped: Turns that were not worth an answer.
      num_tokens: That were decoded for all of them.
    """

    num_exercises: int = 0
    num_dropped: int = 0
    num_tokens: int = 0


class _Writing(NamedTuple):
    """What is being written of an exercise.

    Attributes:
      seed: How its turn begins, and its answer is sampled.
      begin: The turn's first words, until it is complete.
      is_shared: All may be served with what is learned from either exchange.
      prompt: Whose answer is being written; None while it is the turn.
    """

    request: Request
    seed: Exchange
    begin: str
    is_shared: bool
    prompt: Prompt | None = None


class Practice:
    """Makes exercises of recent exchanges, one after another.

    Whoever decodes asks for the `next_request`, and hands over what came of it. One
    that is given up half-way is begun again.

    Args:
      tokenizer: Of the target.
      decode: Token ids to text, without special ones.
      special_ids: Tokens that no turn may have.
      stop_ids: Tokens that end one.

    Raises:
      ConfigError: The target has no chat template, so that nothing says where a user's
        turn begins.
    """

    def __init__(
        self,
        tokenizer: Any,
        decode: Callable[[list[int]], str],
        special_ids: Collection[int],
        stop_ids: Collection[int],
        config: PracticeConfig = PracticeConfig(),
    ):
        encode_opening((), tokenizer)
        self.config = config
        self.counts = PracticeCounts()
        self._tokenizer = tokenizer
        self._decode = decode
        self._special = set(special_ids)
        self._stops = set(stop_ids)
        self._recent: OrderedDict[int, deque[Exchange]] = OrderedDict()
        self._due: deque[int] = deque(maxlen=_MAX_DUE)
        self._seen: deque[bytes] = deque(maxlen=_NUM_SEEN)
        self._writing: _Writing | None = None
        self._num_begun = 0
        self._num_requests = 0

    @property
    def num_due(self) -> int:
        """Exercises that answers have made due, the one under way among them."""
        return len(self._due) + (self._writing is not None)

    def note(
        self, prompt: Prompt, completion: Completion, answer: str, is_shared: bool
    ):
        """Takes note of an answer that may teach."""
        request = completion.request
        turns = prompt.messages
        if not turns or turns[-1]["role"] != "user" or not answer.strip():
            return

        # What was asked for in a form of its own says little of how others ask.
        sampling = request.sampling
        law = SamplingConfig(
            sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=self.config.seed,
        )
        system = turns[:1] if turns[0]["role"] == "system" else ()
        exchange = Exchange(
            system,
            turns[-1]["content"],
            answer,
            law,
            request.max_new_tokens,
            is_shared,
        )
        recent = self._recent.setdefault(
            request.scope, deque(maxlen=self.config.num_recent)
        )
        self._recent.move_to_end(request.scope)
        recent.append(exchange)
        self._due.extend([request.scope] * self.config.num_per_answer)
        while len(self._recent) > _MAX_SCOPES:
            gone, _ = self._recent.popitem(last=False)
            self.forget([gone])

    def forget(self, numbers: Collection[int] | None = None) -> None:
        """Drops what is kept of some scopes, or of all."""
        gone = set(self._recent if numbers is None else numbers)
        for number in gone:
            self._recent.pop(number, None)

        self._due = deque((n for n in self._due if n not in gone), maxlen=_MAX_DUE)
        writing = self._writing
        if writing is not None and writing.request.scope in gone:
            self._writing = None

    def ask_for(self, count: int) -> None:
        """Makes so many exercises due, of the scope that was heard of last."""
        if self._recent:
            newest = next(reversed(self._recent))
            self._due.extend([newest] * count)

    def is_writing(self, request: Request) -> bool:
        """Whether a request is what is being written."""
        return self._writing is not None and self._writing.request is request

    def next_request(self) -> Request | None:
        """What is to be decoded next; None for nothing."""
        while self._writing is None and self._due:
            self._writing = self._begin(self._due.popleft())

        return None if self._writing is None else self._writing.request

    def take(self, completion: Completion) -> Exercise | None:
        """Takes what came of the request; an exercise if it is complete by that."""
        writing = self._writing
        assert writing is not None, "something was asked for"
        self._writing = None
        self.counts.num_tokens += len(completion.token_ids)
        if writing.prompt is not None:
            self.counts.num_exercises += 1
            return Exercise(writing.prompt, completion, writing.is_shared)

        prompt = self._prompt_of(writing, completion)
        if prompt is None:
            self.counts.num_dropped += 1
            return None

        limit = min(writing.seed.max_new_tokens, self.config.max_answer_tokens)
        request = self._request(
            encode(prompt, self._tokenizer),
            limit,
            writing.seed.sampling,
            writing.request.scope,
        )
        self._writing = writing._replace(request=request, prompt=prompt)
        return None

    def _begin(self, scope: int) -> _Writing | None:
        """The turn of a new exercise; None where there is nothing to begin from."""
        recent = self._recent.get(scope, ())
        if len(recent) < 2:
            return None

        config = self.config
        rng = np.random.default_rng((config.seed, self._num_begun))
        self._num_begun += 1
        # What comes next is most like what came last.
        example, seed = (recent[i] for i in rng.choice(len(recent), 2, replace=False))
        share = rng.uniform(config.least_begin, config.most_begin)
        words = seed.asked.strip().split(" ")
        count = min(max(1, round(share * len(words))), config.max_begin_words)
        begin = " ".join(words[:count])
        opening = self._opening(example, seed)
        if opening is None:
            return None

        ids = self._tokenizer.encode(begin, add_special_tokens=False)
        law = SamplingConfig(config.temperature, top_p=config.top_p, seed=config.seed)
        request = self._request(
            (*opening, *ids), config.max_turn_tokens, law, scope, can_speculate=False
        )
        # What stands in front may be told again, as what it begins with.
        is_shared = example.is_shared and seed.is_shared
        return _Writing(request, seed, begin, is_shared)

    def _opening(self, example: Exchange, seed: Exchange) -> tuple[int, ...] | None:
        """Tokens up to where the turn begins, behind an exchange that is cut to fit."""
        ids = lambda text: self._tokenizer.encode(text, add_special_tokens=False)
        room = self.config.max_example_tokens - len(ids(example.asked))
        if room < 1:
            return None

        answer = self._decode(ids(example.answer)[:room])
        shown = (
            {"role": "user", "content": example.asked},
            {"role": "assistant", "content": answer},
        )
        return encode_opening((*seed.system, *shown), self._tokenizer)

    def _request(
        self,
        ids: tuple[int, ...],
        max_new_tokens: int,
        sampling: SamplingConfig,
        scope: int,
        can_speculate: bool = True,
    ) -> Request:
        number = self._num_requests
        self._num_requests += 1
        return Request(
            f"exercise-{number}",
            ids,
            max_new_tokens,
            sampling,
            choice=number,
            can_speculate=can_speculate,
            scope=scope,
            is_practice=True,
        )

    def _prompt_of(self, writing: _Writing, completion: Completion) -> Prompt | None:
        """The turn that was written, if it is worth an answer."""
        ids = completion.token_ids
        if completion.finish_reason != "stop" or ids[-1] not in self._stops:
            return None
        if self._special.intersection(ids[:-1]):
            return None

        text = (writing.begin + self._decode(ids[:-1])).strip()
        known = {_print_of(one.asked) for one in self._recent[writing.request.scope]}
        found = _print_of(text)
        if found in known or found in self._seen:
            return None
        if find_fault(text, self.config.filters):
            return None

        self._seen.append(found)
        turns = (*writing.seed.system, {"role": "user", "content": text})
        return Prompt(f"exercise-{self.counts.num_exercises}", text, turns)


def _print_of(text: str) -> bytes:
    """Tells texts apart by their words, and keeps none of them."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
