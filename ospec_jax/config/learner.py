# SPDX-License-Identifier: Apache-2.0
"""What learners share: how much time they take, when, what from, and which loss.

Settings of a single update rule stand beside it, in `ospec_jax.learners`; all of them
together are an `ospec_jax.learners.config.LearnerConfig`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from ospec_jax.config.base import ConfigError, check_types

Recording = Literal["nothing", "features", "states", "choices"]
"""What the engine keeps of verified tokens: the target's `features`, the draft's own
`states` while it drafted, or these and its `choices`; see `types.Feedback`."""
RECORDS_STATES: tuple[Recording, ...] = ("states", "choices")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much time learning may take.

    Attributes:
      budget: Share of wall-clock time, turned into an interval of target passes by a
        measurement at the start and then kept. For `head` and `preference`, what `pace`
        holds a gain against.
      pace: `always` learns on every occasion (an interval, a chunk of prompts, for
        those two an answer); `pays` on ever fewer while the gain of learning is less
        than the time it takes, and on all of them again after a shift; see
        `online.pace`.
    """

    budget: float = 0.02
    pace: Literal["always", "pays"] = "always"

    def __post_init__(self):
        check_finite(self)
        check(self, "budget", lambda x: 0 < x < 1, "above 0 and below 1")
        check_choice(self, "pace", ("always", "pays"))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When updates are done, and what of them is served.

    Attributes:
      update_interval: Answer tokens between two updates; 0 derives it from the budget.
      update_every_prompts: Instead: prompts between two rounds of learning, each of
        `num_epochs` over all their windows, as far as the ring holds them; 0 for off.
      num_epochs: Updates done at each interval; or see `update_every_prompts`. An
        ensemble weighs its experts in the first of them only.
      promotion: `always` serves each iterate; `guarded` only proven ones.
      promotion_level: Probability that a run with guarded promotion ever serves an
        iterate that is no better than the one before; see `online.promotion`.
      promotion_patience: Requests on which a candidate is scored before the newest
        iterate takes its place: each of a chunk of prompts, one for each interval.
    """

    update_interval: int = 0
    update_every_prompts: int = 0
    num_epochs: int = 1
    promotion: Literal["always", "guarded"] = "always"
    promotion_level: float = 0.1
    promotion_patience: int = 128

    def __post_init__(self):
        check_finite(self)
        check(self, "update_interval", lambda x: x >= 0, "0 or more")
        check(self, "update_every_prompts", lambda x: x >= 0, "0 (off) or more")
        check(self, "num_epochs promotion_patience", lambda x: x >= 1, "1 or more")
        check(self, "promotion_level", lambda x: 0 < x < 1, "above 0 and below 1")
        check_choice(self, "promotion", ("always", "guarded"))


@dataclasses.dataclass(frozen=True)
class Batches:
    """What an update trains on.

    Attributes:
      batch_size: Windows in one update.
      window: Pairs trained in a window.
      num_context: Pairs before each window that are attended to.
      num_steps: Unrolled draft steps.
      ring_capacity: Windows remembered.
      replay_share: Part of each batch drawn from older windows.
    """

    batch_size: int = 4
    window: int = 64
    num_context: int = 64
    num_steps: int = 3
    ring_capacity: int = 64
    replay_share: float = 0.0

    def __post_init__(self):
        check_finite(self)
        check(self, "batch_size window num_steps", lambda x: x >= 1, "1 or more")
        check(self, "replay_share", lambda x: 0 <= x < 1, "0 to below 1")
        if self.batch_size > self.ring_capacity:
            raise ConfigError(
                f"batch_size {self.batch_size} exceeds ring_capacity "
                f"{self.ring_capacity}"
            )
        if round(self.batch_size * self.replay_share) >= self.batch_size:
            raise ConfigError(
                f"replay_share {self.replay_share} of a batch_size of "
                f"{self.batch_size} leaves no window to new traffic"
            )
        if self.num_context < 64:
            raise ConfigError(
                f"num_context is {self.num_context}; at least 64 pairs of context are "
                f"needed for a window's first pairs to see what they saw when serving"
            )


@dataclasses.dataclass(frozen=True)
class Loss:
    """What an update makes smaller.

    Attributes:
      loss: forward_kl, reverse_kl, jsd, total_variation or acceptance_length. The
        default is jsd, whose acceptance length was 1.0 to 2.7% longer than forward_kl's
        on eight real streams; for `momentum` and `osd` forward_kl, as published. All
        of them compare raw logits; total_variation and acceptance_length are chances of
        acceptance at temperature 1, whatever the traffic is sampled at.
      forward_share: Of forward KL in jsd, the rest is reverse KL.
      decay: Weight of each depth relative to the one before.
      position_decay: Weight of each position of a window relative to the one before.
      positions: Learn from all positions, or where the draft would be `rejected`.
      token_share: Share of positions that are learned from, drawn at random.
      num_candidates: Draft tokens that an update looks at, the likeliest ones; its loss
        knows no others, and it tells `candidate_agreement` and `candidate_acceptance`
        instead of `agreement` and `acceptance`. 0 for all, at twice the cost.
    """

    loss: str = "jsd"
    forward_share: float = 0.9
    decay: float = 0.8
    position_decay: float = 1.0
    positions: Literal["all", "rejected"] = "all"
    token_share: float = 1.0
    num_candidates: int = 1024

    def __post_init__(self):
        check_finite(self)
        check(self, "forward_share", lambda x: 0 <= x <= 1, "0 to 1")
        check(self, "decay position_decay", lambda x: x > 0, "above 0")
        check(self, "token_share", lambda x: 0 < x <= 1, "above 0, and at most 1")
        check(self, "num_candidates", lambda x: x >= 0, "0 (all of them) or more")
        check_choice(self, "positions", ("all", "rejected"))


def check_finite(config: Any) -> None:
    """Refuses settings of another type, and numbers that are infinite or NaN."""
    check_types(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} is {value}; use a finite number")


def check(config: Any, names: str, is_good: Callable[[Any], bool], wanted: str) -> None:
    """Refuses settings out of their range; None, unset, is in all of them.

    Args:
      names: Of the settings, with spaces between.
      wanted: The range, in words.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not is_good(value):
            raise ConfigError(f"{name} is {value}; use {wanted}")


def check_choice(config: Any, name: str, known: tuple[str, ...]) -> None:
    """Refuses a setting that is none of the known ones."""
    value = getattr(config, name)
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; use {' or '.join(known)}")


GRADIENT_PARTS: tuple[type, ...] = (Effort, Schedule, Batches, Loss)
"""What rules read that follow gradients."""


@dataclasses.dataclass(frozen=True)
class Method:
    """The settings of one update rule; each rule's own stand beside its algorithm.

    None means unset: `settled` puts the rule's own default in its place.

    Attributes:
      parts: Shared settings that the rule reads.
      defaults: Of them, where the rule was published with others.
      fixed: Shared settings that are part of the rule, and cannot be set.
      recording: What the engine must record of verified tokens.
    """

    parts: ClassVar[tuple[type, ...]] = GRADIENT_PARTS
    defaults: ClassVar[dict[str, Any]] = {}
    fixed: ClassVar[dict[str, Any]] = {}
    recording: ClassVar[Recording] = "features"

    def settled(self) -> Any:
        """The same rule with nothing unset."""
        return self

    def check_parts(self, **parts: Any) -> None:
        """Refuses shared settings that do not go together with the rule's own.

        Args:
          parts: `effort`, `schedule`, `batches` and `loss`, those that it reads.
        """

    @property
    def updates_of_round(self) -> int:
        """Updates behind which the rule does something that it else does not."""
        return 1

    def build(self, objective: Any) -> Any:
        """The `learners.base.Learner` of a `learners.objective.Objective`.

        None where the trainer needs no such learner.
        """
        return None
