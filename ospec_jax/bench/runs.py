# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is asked, and what each who took part in it did."""

import dataclasses

from ospec_jax.bench.passes import PassSeconds
from ospec_jax.config import (
    ConfigError,
    SamplingConfig,
    TreeConfig,
    check_types,
    whole_number,
)
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft
from ospec_jax.session import Result, Session

MODES = ("autoregressive", "static", "ngrams", "learned")
"""Without a draft; with the draft as it is; that with n-grams of the request; that with
learning from earlier requests."""

IDLE = "idle"
"""Learning from earlier requests, and between two turns, off the clock, from what the
target writes for itself meanwhile: as a machine would that has nothing else to do."""

LONGER = "longer"
"""The draft with n-grams of the request, of which a longer chain is drafted where they
are likely; see `drafters.combine.longer`."""

LEARNED_LONGER = "learned-longer"
"""That with learning from earlier requests."""

UNPADDED = "unpadded"
"""Plain decoding without what keeps a row's bits independent of the others: a lone
token is not computed twice. Faster, and no oracle: it may round differently."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
      modes: Some of `MODES`, `LONGER`, `LEARNED_LONGER`, `IDLE` and `UNPADDED`.
      max_new_tokens: Of each answer.
      ngrams: Let n-grams suggest tokens in the learned mode, too.
      stop: Strings that end an answer.
      num_predicted_tokens: Tokens verified at once while a prediction holds.
      batch_size: Prompts decoded together.
      select: Which member of a pool drafts; see `control.selectors`.
      learn_idle: In the mode `IDLE`, exercises for each answer.
    """

    modes: tuple[str, ...] = MODES
    max_new_tokens: int = 128
    tree: TreeConfig = TreeConfig(num_steps=3)
    learner: LearnerConfig = LearnerConfig()
    sampling: SamplingConfig = SamplingConfig()
    is_raw: bool = False
    ngrams: bool = True
    batch_size: int = 1
    stop: tuple[str, ...] = ()
    num_predicted_tokens: int = 12
    select: str | None = None
    learn_idle: int = 2

    def __post_init__(self):
        check_types(self)
        whole_number("learn_idle", self.learn_idle, least=1)
        known = (*MODES, LONGER, LEARNED_LONGER, IDLE, UNPADDED)
        unknown = set(self.modes) - set(known)
        if unknown or not self.modes:
            raise ConfigError(f"unknown modes {sorted(unknown)}; use some of {known}")


@dataclasses.dataclass(frozen=True)
class Contender:
    """What takes part beside the modes, under a name of its own.

    Attributes:
      draft: Who drafts.
      tree: How much, at most.
      ngrams: Let n-grams suggest tokens.
      controller: Says how much of that is drafted; None for all, always.
      learner: Trains the draft; None for the draft as it is.
      learn_idle: Exercises between two turns, for each answer.
    """

    draft: LoadedDraft
    tree: TreeConfig
    ngrams: bool = False
    controller: str | None = None
    learner: LearnerConfig | None = None
    learn_idle: int = 0

    @property
    def is_static(self) -> bool:
        """Whether all its steps are alike."""
        return self.controller is None and self.learner is None


@dataclasses.dataclass
class Turns:
    """What anybody did who took part.

    Attributes:
      turn_seconds: Wall-clock time of each turn, learning included.
      turn_tokens: Of each turn's answers.
    """

    compile_seconds: float = 0.0
    turn_seconds: list[float] = dataclasses.field(default_factory=list)
    turn_tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.turn_tokens)

    @property
    def total_seconds(self) -> float:
        """All wall-clock time."""
        return sum(self.turn_seconds)

    @property
    def tokens_per_second_with_learning(self) -> float:
        """All wall-clock time of all turns."""
        return self.num_tokens / max(self.total_seconds, 1e-9)

    def keep(self, num_turns: int, num_prompts: int) -> None:
        """Forgets what was done after so many turns and prompts."""
        del self.turn_seconds[num_turns:]
        del self.turn_tokens[num_turns:]


@dataclasses.dataclass
class PeerRun(Turns):
    """What another decoder did."""


@dataclasses.dataclass(kw_only=True)
class ModeRun(Turns):
    """What one mode did.

    Attributes:
      idle_seconds: What it took to practise between turns, which no turn counts.
      num_exercises: That were learned from then.
    """

    session: Session
    results: list[Result] = dataclasses.field(default_factory=list)
    idle_seconds: float = 0.0
    num_exercises: int = 0

    def keep(self, num_turns: int, num_prompts: int) -> None:
        """Forgets what was done after so many turns and prompts."""
        super().keep(num_turns, num_prompts)
        del self.results[num_prompts:]

    @property
    def stats(self) -> DecodingStats:
        """Counters of all answers."""
        empty = DecodingStats(num_spec_tokens=self.session.tree.num_steps)
        return sum((r.stats for r in self.results), empty)

    @property
    def seconds(self) -> float:
        """All wall-clock time of the mode's turns but learning."""
        return self.total_seconds - self.learning_seconds

    @property
    def learning_seconds(self) -> float:
        """Ring writes, updates, promotion scoring and swaps."""
        return sum(r.learning_seconds for r in self.results)

    @property
    def tokens_per_second(self) -> float:
        """Without learning."""
        return self.num_tokens / max(self.seconds, 1e-9)


@dataclasses.dataclass
class BenchRun:
    """A finished benchmark.

    Attributes:
      prompts: Those that all modes have answered; each turn of a conversation is one.
      prompt_lengths: Of each prompt, in tokens.
      conversations: Of each prompt, the name of the conversation that it is a turn of;
        None of a prompt alone.
      left_out: Names of what does not fit into the context.
      is_complete: Whether nothing ended it early.
      verify_seconds: Of the target's pass over each mode's nodes; empty unless drafts
        were compared.
    """

    config: BenchConfig
    prompts: list[Prompt]
    modes: dict[str, ModeRun]
    peers: dict[str, PeerRun]
    reference: list[list[int]]
    pass_seconds: dict[str, PassSeconds]
    verify_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    prompt_lengths: list[int] = dataclasses.field(default_factory=list)
    conversations: list[str | None] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    is_complete: bool = True
