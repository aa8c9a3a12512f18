# SPDX-License-Identifier: Apache-2.0
"""What learning while serving remembers, and what it reports."""

import dataclasses

import flax.struct
from jaxtyping import Array, Bool, Int

from ospec_jax.learners.base import LearnerInfo, LearnerState
from ospec_jax.learners.last_layer import HeadInfo
from ospec_jax.online.pace import PaceState
from ospec_jax.online.promotion import GuardState
from ospec_jax.online.ring import FeedbackRing
from ospec_jax.types import NgramMemory


@flax.struct.dataclass
class AdaptationState:
    """What learning remembers between requests.

    Attributes:
      learner: The iterate (`w_play`) and its optimizer.
      num_prompts: Requests seen, so that a resumed run knows where it stands.
      num_waiting: Answer tokens since the last update; under a budget, target passes.
      num_fresh: Windows added since the last update.
      version: Promotions so far; the version of the served draft.
      update_interval: Of what is waiting, between updates.
      is_stopped: Whether an update was not finite, behind which there is no learning.
      pace: How often learning is worth its time; None if it always is.
      guard: The candidate for promotion; None if every iterate is served.
    """

    learner: LearnerState
    num_prompts: Int[Array, ""]
    num_waiting: Int[Array, ""]
    num_fresh: Int[Array, ""]
    version: Int[Array, ""]
    update_interval: Int[Array, ""]
    is_stopped: Bool[Array, ""]
    pace: PaceState | None = None
    guard: GuardState | None = None


@flax.struct.dataclass
class Traffic:
    """What is kept of users' prompts and answers; both can be read back from it.

    Attributes:
      ring: Recent windows to train on, or None.
      memory: n-grams, or None.
    """

    ring: FeedbackRing | None
    memory: NgramMemory | None


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """What one round of learning did; for looking at.

    Attributes:
      decision: `promote`: the served draft is another one now. Of guarded promotion
        also `rollback`, `expire` or `wait`; see `promotion.verdict`. `stopped` if the
        update was not finite: learning has ended, the served draft stays.
      stride: Occasions to learn, for each that is taken.
      step_length: How far the served parameters moved, if the learner knows.
    """

    info: LearnerInfo | HeadInfo
    decision: str
    seconds: float
    stride: int = 1
    step_length: float | None = None
