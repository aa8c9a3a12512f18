# SPDX-License-Identifier: Apache-2.0
"""Lookahead Reasoning: a small model drafts steps, and the target writes its own.

A cycle (Lookahead Reasoning, arXiv 2506.19830, section 3, its synchronous form): the
draft writes the next steps; the target writes its own step behind each drafted prefix,
all of them in one batch; drafted steps are kept up to the first one that the verifier
tells from the target's, whose own takes its place. Where all are kept, the target's
step behind the last of them is added.

No work of the target is saved, it is only done side by side: the target writes every
step in full. **With any verifier but `exact` the answer is not the target's.** That is
why nothing here is part of `Session`.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

from ospec_jax.config import whole_number
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.reasoning.verifiers import Judgement, Pair, Verifier
from ospec_jax.reasoning.writing import Step, Writer, Written, check_pair


class Cycle(NamedTuple):
    """What one round came to.

    Attributes:
      prefix: Token ids of the prompt and of all steps before.
      drafted: Steps of the draft, in order.
      written: The target's own behind 0, 1, ... of them; there is none behind a draft
        that has ended.
      judgements: Of each drafted step up to the first that differs.
      num_accepted: Drafted steps that were kept.
    """

    prefix: Step
    drafted: tuple[Step, ...]
    written: tuple[Step, ...]
    judgements: tuple[Judgement, ...]
    num_accepted: int

    @property
    def tokens(self) -> Step:
        """What the answer grew by."""
        kept = self.drafted[: self.num_accepted]
        added = self.written[self.num_accepted : self.num_accepted + 1]
        return tuple(token for step in (*kept, *added) for token in step)


@dataclasses.dataclass(frozen=True)
class LossyAnswer:
    """An answer of drafted and of the target's own steps.

    Attributes:
      is_lossless: Whether it is the target's own, by the verifier.
      finish_reason: `stop` or `length`.
      seconds: Wall-clock time; of these `draft_seconds` and `verify_seconds` were the
        draft's and the verifier's.
      stats: Of the target's passes, `draft_stats` of the draft's.
    """

    token_ids: Step
    cycles: tuple[Cycle, ...]
    is_lossless: bool
    finish_reason: str
    seconds: float
    draft_seconds: float
    verify_seconds: float
    stats: DecodingStats
    draft_stats: DecodingStats

    @property
    def num_drafted(self) -> int:
        """Steps that a verifier was asked about."""
        return sum(len(cycle.judgements) for cycle in self.cycles)

    @property
    def num_accepted(self) -> int:
        """Drafted steps that were kept."""
        return sum(cycle.num_accepted for cycle in self.cycles)


class Reasoner:
    """Answers by steps; see this module.

    Args:
      draft: Writes ahead; one row.
      target: Its session has a row for each drafted step and one more.
      num_ahead: Steps that are drafted in a cycle.

    Raises:
      ConfigError: The models have different tokenizers, or the target's rows are too
        few.
    """

    def __init__(
        self, draft: Writer, target: Writer, verifier: Verifier, num_ahead: int = 3
    ):
        whole_number("num_ahead", num_ahead, least=1)
        check_pair(draft.session, target.session)
        target.check_rows(num_ahead + 1)
        self.draft = draft
        self.target = target
        self.verifier = verifier
        self.num_ahead = num_ahead

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> LossyAnswer:
        """Answers a prompt.

        Args:
          prompt_ids: The chat template applied.

        Raises:
          PromptTooLongError: Prompt and answer do not fit one of the models.
        """
        whole_number("max_new_tokens", max_new_tokens, least=1)
        begin = time.perf_counter()
        clock = _Clock()
        prompt = tuple(prompt_ids)
        answer: Step = ()
        cycles: list[Cycle] = []
        stats = DecodingStats()
        draft_stats = DecodingStats()
        has_ended = False

        while len(answer) < max_new_tokens and not has_ended:
            prefix = prompt + answer
            room = max_new_tokens - len(answer)
            with clock.of("draft"):
                (ahead,) = self.draft.write([prefix], self.num_ahead, [room])
            own = self._own_steps(prefix, ahead, room)
            with clock.of("verify"):
                cycle = self._compare(prefix, ahead, own)

            cycles.append(cycle)
            draft_stats = draft_stats + ahead.stats
            stats = sum((one.stats for one in own), stats)
            answer += cycle.tokens
            has_ended = answer[-1] in self.target.session.target.stop_ids

        # A step may run beyond what was asked for.
        is_cut = len(answer) > max_new_tokens
        answer = answer[:max_new_tokens]
        return LossyAnswer(
            token_ids=answer,
            cycles=tuple(cycles),
            is_lossless=self.verifier.is_lossless,
            finish_reason="stop" if has_ended and not is_cut else "length",
            seconds=time.perf_counter() - begin,
            draft_seconds=clock.seconds["draft"],
            verify_seconds=clock.seconds["verify"],
            stats=stats,
            draft_stats=draft_stats,
        )

    def _own_steps(self, prefix: Step, ahead: Written, room: int) -> list[Written]:
        """The target's steps behind 0, 1, ... of the drafted ones."""
        prefixes = [prefix]
        for step in ahead.steps:
            prefixes.append(prefixes[-1] + step)

        # Nothing follows a draft that says that it has ended, nor one that is as long
        # as the answer may be.
        left = [room - (len(one) - len(prefix)) for one in prefixes]
        is_last = ahead.has_ended or left[-1] < 1
        count = len(prefixes) - is_last
        return self.target.write(prefixes[:count], 1, left[:count])

    def _compare(self, prefix: Step, ahead: Written, own: list[Written]) -> Cycle:
        """Keeps drafted steps up to the first that differs."""
        written = tuple(one.steps[0] for one in own)
        judgements: list[Judgement] = []
        # One by one: behind the first that differs nobody needs to know.
        for pair in map(Pair, ahead.steps, written):
            judgements.append(self._judge(pair))
            if not judgements[-1].is_same:
                break

        num_accepted = sum(one.is_same for one in judgements)
        return Cycle(prefix, ahead.steps, written, tuple(judgements), num_accepted)

    def _judge(self, pair: Pair) -> Judgement:
        """What the verifier says, where both steps end the answer or neither does."""
        ends = self.target.session.target.stop_ids
        # Whether there is more to come is no matter of wording.
        if (pair.drafted[-1] in ends) != (pair.written[-1] in ends):
            return Judgement(False)

        return self.verifier.compare([pair])[0]


class _Clock:
    """Adds up seconds by name."""

    def __init__(self):
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def of(self, name: str) -> Generator[None]:
        """Counts what is done within."""
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin
