# SPDX-License-Identifier: Apache-2.0
"""Many talks with one target at once, each waiting for its own rows of batches.

What a talk leads to is a function of the target, the seed and its number: its random
numbers are its own, and a row's tokens do not depend on its neighbours where the target
is row invariant, as on a CPU.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ospec_jax.config import SamplingConfig, TreeConfig
from ospec_jax.data.prompts import Prompt, parse_prompt, row_of
from ospec_jax.data.templates import encode, encode_opening
from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Completion, PromptTooLongError, Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.distill.kinds import KINDS, Dropped, Talk, Wanted, Written
from ospec_jax.distill.self_config import SelfPromptConfig
from ospec_jax.models.hub import Target

_SMALLEST = 512
"""Slots of the rows that `batch_size` counts; of larger ones there are fewer."""
_NUM_OPEN = 4
"""Talks that are held at once, in batches."""
_WELL_FILLED = 0.5
"""Share of a batch's rows that makes a step worth its while."""


class Result(NamedTuple):
    """The end of a talk.

    Attributes:
      prompt: None if it was dropped.
      fault: Why, in two words.
    """

    number: int
    kind: str
    prompt: Prompt | None
    fault: str = ""

    def to_json(self) -> dict:
        """A row of `ahead_file`."""
        row = None if self.prompt is None else row_of(self.prompt)
        return {
            "id": str(self.number),
            "kind": self.kind,
            "row": row,
            "fault": self.fault,
        }


class _Talking(NamedTuple):
    """A talk under way.

    Attributes:
      rng: Of all its choices.
      begin: Of what is being written.
    """

    number: int
    kind: str
    rng: np.random.Generator
    talk: Talk
    begin: str = ""


class _Pool:
    """A batch of one capacity, and the requests that wait for its rows."""

    def __init__(self, engine: Engine, num_rows: int, capacity: int):
        self._engine = engine
        self._num_rows = num_rows
        self._batch = Batch(engine, num_rows, capacity)
        self._waiting: deque[Request] = deque()
        self._numbers: set[int] = set()

    def add(self, request: Request) -> None:
        """Puts a request behind the others."""
        self._waiting.append(request)
        self._numbers.add(int(request.id))

    @property
    def rank(self) -> tuple[float, int]:
        """How much a step of it is worth, against others.

        A step costs about the same whether its rows are taken or not, so well filled
        ones come first; of these, those that hold the earliest talk, behind which the
        results of all later ones wait.
        """
        load = len(self._numbers) / self._num_rows
        return min(_WELL_FILLED, load), -min(self._numbers, default=0)

    def step(self) -> list[Completion]:
        """Begins what fits, decodes a token of all, and gives what is complete."""
        while self._waiting and self._batch.num_free:
            self._batch.admit(self._waiting.popleft(), None)

        num_ahead = 0
        if self._batch.has_work:
            self._batch.dispatch(None, self._engine.action)
            num_ahead = 1

        completions = list(self._batch.collect(num_ahead))
        for completion in completions:
            self._numbers.discard(int(completion.request.id))

        return completions


class Writer:
    """Holds many talks at once with one target.

    Attributes:
      num_tokens: Decoded so far.
    """

    def __init__(
        self,
        target: Target,
        config: SelfPromptConfig,
        batch_size: int,
        ahead: dict[int, Result],
        on_end: Callable[[Result], None],
    ):
        """Prepares it.

        Args:
          ahead: Ends that are known, by number: these talks are not held again.
          on_end: Called with each other end as soon as it comes, in any order.
        """
        self._on_end = on_end
        self._target = target
        self._config = config
        self._batch_size = batch_size
        step = StepConfig(
            model=target.config,
            numerics=target.numerics,
            tree=TreeConfig(num_steps=0),
            taps=(),
            stop_ids=target.stop_ids,
        )
        self._engine = Engine(step, target.params)
        self._special = set(target.tokenizer.all_special_ids) | set(target.stop_ids)
        self._pools: dict[int, _Pool] = {}
        self._talks: dict[str, _Talking] = {}
        self._results = dict(ahead)
        self.num_tokens = 0

    @property
    def num_ready(self) -> int:
        """Talks that are over, and wait for one before them."""
        return len(self._results)

    def results(
        self,
        first: int,
        num_missing: Callable[[], int],
        should_stop: Callable[[], bool],
        on_step: Callable[[], None],
    ) -> Iterator[Result]:
        """Ends of the talks from number `first` on, in order.

        Args:
          num_missing: How many more must be kept; none ends it.
          should_stop: Asked before each step.
          on_step: Called behind each.
        """
        begun = due = first

        while num_missing() > 0 and not should_stop():
            # About a third is dropped. Near the end no more are begun than it takes.
            room = min(_NUM_OPEN * self._batch_size, math.ceil(1.5 * num_missing()))
            while begun < due + room:
                if begun not in self._results:
                    self._begin(begun)
                begun += 1

            if self._talks:
                pool = max(self._pools.values(), key=lambda pool: pool.rank)
                for completion in pool.step():
                    self._hear(completion)
                on_step()

            while due in self._results and num_missing() > 0:
                yield self._results.pop(due)
                due += 1

    def _begin(self, number: int) -> None:
        rng = np.random.default_rng((self._config.seed, number))
        names, weights = zip(*self._config.kinds, strict=True)
        shares = np.array(weights) / sum(weights)
        kind = names[int(rng.choice(len(names), p=shares))]
        talk = KINDS[kind](rng, self._config.limits)
        self._go_on(_Talking(number, kind, rng, talk), None)

    def _hear(self, completion: Completion) -> None:
        talking = self._talks.pop(completion.request.id)
        ids = completion.token_ids
        self.num_tokens += len(ids)
        has_ended = completion.finish_reason == "stop"
        ids = ids[:-1] if has_ended else ids
        if self._special.intersection(ids):
            self._drop(talking, "special tokens")
            return

        text = self._target.tokenizer.decode(ids)
        self._go_on(talking, Written(talking.begin + text, has_ended))

    def _go_on(self, talking: _Talking, written: Written | None) -> None:
        """Tells a talk what was written, and has the next thing written."""
        try:
            # None begins it.
            wanted = talking.talk.send(written)  # type: ignore[arg-type]
            request = self._request(talking, wanted)
            capacity = max(_SMALLEST, self._engine.capacity_for([request]))
        except StopIteration as end:
            self._keep(talking, end.value)
            return
        except Dropped as fault:
            self._drop(talking, str(fault))
            return
        except PromptTooLongError:
            self._drop(talking, "beyond the context")
            return

        if capacity not in self._pools:
            num_rows = max(1, self._batch_size * _SMALLEST // capacity)
            self._pools[capacity] = _Pool(self._engine, num_rows, capacity)

        self._talks[request.id] = talking._replace(begin=wanted.begin)
        self._pools[capacity].add(request)

    def _request(self, talking: _Talking, wanted: Wanted) -> Request:
        config = self._config
        tokenizer = self._target.tokenizer
        if wanted.writer == "user":
            ids = encode_opening(wanted.turns, tokenizer)
            temperature = config.turn_temperature
        else:
            text = wanted.turns[-1]["content"]
            ids = encode(Prompt("an answer", text, wanted.turns), tokenizer)
            temperature = config.writing_temperature

        if wanted.begin:
            ids += tuple(tokenizer.encode(wanted.begin, add_special_tokens=False))

        return Request(
            str(talking.number),
            ids,
            wanted.max_new_tokens,
            SamplingConfig(temperature, top_p=config.top_p),
            seed=int(talking.rng.integers(2**32)),
            choice=talking.number % 2**32,
        )

    def _keep(self, talking: _Talking, turns: tuple[dict, ...]) -> None:
        name = f"self-{self._config.seed}-{talking.number}"
        row = {"id": name, "domain": talking.kind, "messages": list(turns)}
        prompt = parse_prompt(row, name)
        self._end(Result(talking.number, talking.kind, prompt))

    def _drop(self, talking: _Talking, fault: str) -> None:
        self._end(Result(talking.number, talking.kind, None, fault))

    def _end(self, result: Result) -> None:
        self._results[result.number] = result
        self._on_end(result)
