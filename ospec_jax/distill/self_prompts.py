# SPDX-License-Identifier: Apache-2.0
"""Prompts without end: a target writes its own users' turns, many at once.

What is written is a function of the target, the seed and a prompt's number: neither the
batch nor an interruption changes it, as far as rows are independent of their neighbours
(`Numerics.is_row_invariant`: on a CPU). Which of the prompts are kept depends on those
kept before, so they are judged in the order of their numbers.
"""

import dataclasses
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group

from ospec_jax.config import ConfigError, whole_number
from ospec_jax.data.filters import Seen
from ospec_jax.data.prompts import Prompt, parse_prompt, row_of
from ospec_jax.data.templates import encode_opening
from ospec_jax.distill.kinds import KINDS, SYSTEM_KIND
from ospec_jax.distill.self_config import SelfPromptConfig, check_config
from ospec_jax.distill.talking import Result, Writer
from ospec_jax.models.hub import Target
from ospec_jax.reports.answers import AnswerLog, read_answers
from ospec_jax.reports.progress import Interrupt, progress_bar
from ospec_jax.reports.tables import records_table


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
    being written is written again. `FILE.config.json` says what the file was made by.

    Args:
      batch_size: Rows decoded together, where 512 slots of the cache suffice; half as
        many where 1,024 are needed, and so on.

    Raises:
      ConfigError: The file holds prompts of another target, of other settings, or
        something else; the target has no chat template; or hardly anything it writes is
        kept.
      Interrupted: By Ctrl-C or another signal; the same call goes on.
    """
    whole_number("the number of prompts", count, least=1)
    whole_number("batch_size", batch_size, least=1)
    encode_opening((), target.tokenizer)
    config = _without_refused(config, target.tokenizer)
    check_config(file, target, config)
    rows = read_answers(file) if file.is_file() else []
    prompts = [parse_prompt(row, "") for row in rows]
    judge = _Judge(config, prompts)
    first = 1 + max((_number(prompt) for prompt in prompts), default=-1)
    ahead = _read_ahead(ahead_file(file), first)
    log = AnswerLog([file], [prompt.id for prompt in prompts])
    ahead_log = AnswerLog([ahead_file(file)], [str(number) for number in ahead])
    writer = Writer(
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


def ahead_file(file: Path) -> Path:
    """Where prompts are kept that wait for earlier ones to be judged."""
    return file.with_name(f"{file.name}.ahead.jsonl")


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
