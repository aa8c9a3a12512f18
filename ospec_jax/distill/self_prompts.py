# SPDX-License-Identifier: Apache-2.0
"""Prompts without end: a target writes its own users' turns, many at once.

What is written is a function of the target, the seed and a prompt's number: neither the
batch nor an interruption changes it. Which of the prompts are kept depends on those
kept before, so they are judged in the order of their numbers.
"""

import dataclasses
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group

from ospec_jax import atomic
from ospec_jax.config import (
    ConfigError,
    SamplingConfig,
    TreeConfig,
    check_types,
    whole_number,
)
from ospec_jax.config.fields import read_json
from ospec_jax.data.filters import FilterConfig, Seen
from ospec_jax.data.prompts import Prompt, parse_prompt, row_of
from ospec_jax.data.templates import encode, encode_opening
from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Completion, PromptTooLongError, Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.distill.kinds import (
    KINDS,
    SYSTEM_KIND,
    Dropped,
    Limits,
    Talk,
    Wanted,
    Written,
)
from ospec_jax.models.hub import Target
from ospec_jax.reports.answers import AnswerLog, check_unused, read_answers
from ospec_jax.reports.progress import Interrupt, progress_bar
from ospec_jax.reports.tables import records_table

DEFAULT_KINDS = (
    ("self-chat", 30.0),
    ("self-turns", 14.0),
    ("self-summary", 10.0),
    ("self-translation", 12.0),
    ("self-extraction", 6.0),
    ("self-question", 10.0),
    ("self-rewrite", 5.0),
    ("self-continuation", 3.0),
    ("self-system", 6.0),
    ("self-shots", 4.0),
)
_VERSION = 1
"""Of what is asked and how: to be raised with any change to kinds and phrases."""
_SMALLEST = 512
"""Slots of the rows that `batch_size` counts; of larger ones there are fewer."""
_NUM_OPEN = 4
"""Talks that are held at once, in batches."""
_WELL_FILLED = 0.75
"""Share of a batch's rows that makes a step worth its while."""


@dataclasses.dataclass(frozen=True)
class SelfPromptConfig:
    """What a target writes.

    Attributes:
      seed: Of all choices; another one gives other prompts.
      kinds: Kinds of prompts, of `kinds.KINDS`, with how often each is begun.
      max_turn_tokens: Of a user's turn; one that is not ended by then is dropped.
      max_answer_tokens: Of answers within a prompt; longer ones end with a sentence.
      min_document_tokens: Of the shortest limit of a document.
      max_document_tokens: Of the longest one.
      turn_temperature: Of users' turns.
      writing_temperature: Of answers and documents.
      filters: What a text must be like.
      patience: Prompts that may be dropped in a row before it is given up.
    """

    seed: int = 0
    kinds: tuple[tuple[str, float], ...] = DEFAULT_KINDS
    max_turn_tokens: int = 128
    max_answer_tokens: int = 256
    min_document_tokens: int = 200
    max_document_tokens: int = 1500
    turn_temperature: float = 1.0
    writing_temperature: float = 0.8
    top_p: float = 0.95
    filters: FilterConfig = FilterConfig()
    patience: int = 1000

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            if field.name.endswith("tokens") or field.name == "patience":
                whole_number(field.name, getattr(self, field.name), least=1)

        if self.min_document_tokens > self.max_document_tokens:
            raise ConfigError(
                f"documents of {self.min_document_tokens} to "
                f"{self.max_document_tokens} tokens: lower min_document_tokens, or "
                f"raise max_document_tokens"
            )

        for temperature in (self.turn_temperature, self.writing_temperature):
            SamplingConfig(temperature, top_p=self.top_p)

        for name, weight in self.kinds:
            if name not in KINDS:
                raise ConfigError(
                    f"unknown kind of prompts {name!r}; use {', '.join(KINDS)}"
                )
            if not 0 <= weight < math.inf:
                raise ConfigError(f"the weight of {name} is {weight}; use 0 or more")

        if not sum(weight for _, weight in self.kinds):
            raise ConfigError("no kind of prompts has a weight above 0; give one")

    @property
    def limits(self) -> Limits:
        """What talks keep to."""
        documents = self.min_document_tokens, self.max_document_tokens
        return Limits(
            self.filters, self.max_turn_tokens, self.max_answer_tokens, documents
        )


class Report(NamedTuple):
    """What came of a call.

    Attributes:
      prompts: All that are in the file.
      kept: By kind, how many this call kept.
      dropped: By kind and reason, how many it dropped.
      num_tokens: That were decoded for it.
    """

    prompts: list[Prompt]
    kept: Counter
    dropped: Counter
    num_tokens: int


def write_self_prompts(
    target: Target,
    file: Path,
    count: int,
    config: SelfPromptConfig = SelfPromptConfig(),
    batch_size: int = 32,
) -> Report:
    """Has the target write prompts until a JSONL file holds so many.

    Each is appended as soon as all before it are judged; until then it stands in
    `FILE.ahead.jsonl`. The same call goes on, also with a larger count; only what was
    being written is written again. `FILE.recipe.json` says what the file was made by.

    Args:
      batch_size: Rows decoded together, where 512 slots of the cache suffice; half as
        many where 1,024 are needed, and so on.

    Raises:
      ConfigError: The file holds prompts of another target or recipe, or something
        else; the target has no chat template; or hardly anything it writes is kept.
      Interrupted: By Ctrl-C or another signal; the same call goes on.
    """
    whole_number("the number of prompts", count, least=1)
    whole_number("batch_size", batch_size, least=1)
    encode_opening((), target.tokenizer)
    config = _without_refused(config, target.tokenizer)
    _check_recipe(file, target, config)
    rows = read_answers(file) if file.is_file() else []
    prompts = [parse_prompt(row, "") for row in rows]
    judge = _Judge(config, prompts)
    first = 1 + max((_number(prompt) for prompt in prompts), default=-1)
    ahead = _read_ahead(ahead_file(file), first)
    log = AnswerLog([file], [prompt.id for prompt in prompts])
    ahead_log = AnswerLog([ahead_file(file)], [str(number) for number in ahead])
    writer = _Writer(
        target, config, batch_size, ahead, lambda end: ahead_log.add(end.to_json())
    )

    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("write", total=count)

        def show() -> None:
            bar.update(
                task,
                completed=len(prompts),
                description=f"write, {writer.num_tokens} tokens, {judge.share:.0%} "
                f"kept, {writer.num_ready} wait for earlier ones",
            )

        show()
        results = writer.results(
            first, lambda: count - len(prompts), lambda: bool(interrupt), show
        )
        for result in results:
            if not judge.accepts(result):
                continue
            assert result.prompt is not None
            prompts.append(result.prompt)
            with interrupt.held():
                log.add(row_of(result.prompt))
            show()

    log.close()
    ahead_log.close()
    if len(prompts) < count:
        interrupt.raise_if_set()

    return Report(prompts, judge.kept, judge.dropped, writer.num_tokens)


def describe_report(report: Report) -> Group:
    """A table of what a call kept and dropped, by kind."""
    kinds = [kind for kind in KINDS if report.kept[kind] or _reasons(report, kind)]
    records = [
        (
            kind,
            str(report.kept[kind]),
            ", ".join(f"{n} {why}" for why, n in _reasons(report, kind).most_common())
            or "-",
        )
        for kind in kinds
    ]
    return records_table(("", "kept", "dropped"), records)


def _reasons(report: Report, kind: str) -> Counter:
    """Why prompts of a kind were dropped, and how often."""
    found: Counter = Counter()
    for (name, fault), number in report.dropped.items():
        if name == kind:
            found[fault] += number

    return found


def _without_refused(config: SelfPromptConfig, tokenizer: Any) -> SelfPromptConfig:
    """What can be written with a template: some of them know no system turns."""
    kinds = dict(config.kinds)
    if not kinds.get(SYSTEM_KIND):
        return config

    try:
        encode_opening(({"role": "system", "content": "Be brief."},), tokenizer)
    except ConfigError as error:
        warnings.warn(f"no prompts of {SYSTEM_KIND}: {error}", stacklevel=3)
        rest = tuple((name, kinds[name]) for name in kinds if name != SYSTEM_KIND)
        return dataclasses.replace(config, kinds=rest)

    return config


def recipe_file(file: Path) -> Path:
    """Where it stands what a file of prompts was written by."""
    return file.with_name(f"{file.name}.recipe.json")


def ahead_file(file: Path) -> Path:
    """Where prompts are kept that wait for earlier ones to be judged."""
    return file.with_name(f"{file.name}.ahead.jsonl")


def _check_recipe(file: Path, target: Target, config: SelfPromptConfig) -> None:
    """Writes down what a file is written by, or compares what is written down.

    Raises:
      ConfigError: The two differ, or the file holds something else.
    """
    wanted = {
        "version": _VERSION,
        "target": target.name,
        "fingerprint": target.fingerprint,
        "precision": target.numerics.precision,
        **dataclasses.asdict(config),
    }
    # Tuples are lists there.
    wanted = json.loads(json.dumps(wanted))
    # Where a run is given up changes nothing of what it wrote.
    wanted.pop("patience")
    place = recipe_file(file)

    if not place.is_file():
        check_unused(file)
        atomic.write_text(place, json.dumps(wanted, indent=1))
        return

    found = read_json(place)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{file} was written with {name} {found.get(name)!r:.80}, not "
                f"{wanted.get(name)!r:.80}; use what it was written with, or another "
                f"file"
            )


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


def _read_ahead(file: Path, first: int) -> dict[int, Result]:
    """Ends of talks from number `first` on that an earlier run came to.

    Raises:
      ConfigError: The file holds something else.
    """
    found = {}

    for row in read_answers(file) if file.is_file() else []:
        try:
            number = int(row["id"])
            prompt = None if row["row"] is None else parse_prompt(row["row"], "")
            result = Result(number, row["kind"], prompt, row["fault"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} holds something else than prompts that wait; delete it, and "
                f"they are written again"
            ) from error
        if number >= first:
            found[number] = result

    return found


class _Judge:
    """Keeps what is not like anything kept before, and counts."""

    def __init__(self, config: SelfPromptConfig, prompts: list[Prompt]):
        self._patience = config.patience
        self._seen = Seen(config.filters)
        self._num_in_a_row = 0
        self.kept: Counter = Counter()
        self.dropped: Counter = Counter()

        for prompt in prompts:
            self._seen.add(_said_by_users(prompt))

    @property
    def share(self) -> float:
        """Of all results, those that were kept."""
        kept = self.kept.total()
        return kept / max(1, kept + self.dropped.total())

    def accepts(self, result: Result) -> bool:
        """Whether to keep a result; they come in the order of their numbers.

        Raises:
          ConfigError: None was kept for too long.
        """
        fault = result.fault
        if result.prompt is not None:
            text = _said_by_users(result.prompt)
            fault = self._seen.find_fault(text)
            if not fault:
                self._seen.add(text)
                self.kept[result.kind] += 1
                self._num_in_a_row = 0
                return True

        self.dropped[result.kind, fault] += 1
        self._num_in_a_row += 1
        if self._num_in_a_row >= self._patience:
            self._give_up()

        return False

    def _give_up(self) -> None:
        reasons: Counter = Counter()
        for (_, fault), number in self.dropped.items():
            reasons[fault] += number

        told = ", ".join(f"{fault} ({n})" for fault, n in reasons.most_common(4))
        raise ConfigError(
            f"none of the last {self._patience} prompts that the target wrote could be "
            f"kept; dropped so far: {told}; loosen the filters, take another seed, or "
            f"ask for fewer prompts"
        )


def _said_by_users(prompt: Prompt) -> str:
    said = (m["content"] for m in prompt.messages if m["role"] == "user")
    return "\n".join(said)


def _number(prompt: Prompt) -> int:
    """The place of a prompt among all that were begun; its name ends with it."""
    number = prompt.id.rpartition("-")[2]
    if not number.isdecimal():
        raise ConfigError(
            f"the prompt {prompt.id!r} was not written here; move the file away to "
            f"begin another one"
        )

    return int(number)


class _Talking(NamedTuple):
    """A talk under way.

    Attributes:
      rng: Of all its choices.
    """

    number: int
    kind: str
    rng: np.random.Generator
    talk: Talk


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


class _Writer:
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
        self._go_on(talking, Written(text, has_ended))

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

        self._talks[request.id] = talking
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
