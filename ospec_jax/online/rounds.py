# SPDX-License-Identifier: Apache-2.0
"""When a round of learning from windows comes: what is counted, and what is enough."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ospec_jax.decoding.request import Completion
from ospec_jax.learners.base import LearnerState
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.online.promotion import GuardState
from ospec_jax.online.trainer import TrainerState
from ospec_jax.typing import struct


@struct
class WindowsState(TrainerState):
    """What learning from windows remembers between answers.

    Attributes:
      learner: The iterate (`w_play`) and its optimizer.
      num_waiting: Answer tokens since the last update; under a budget, target passes.
      num_fresh: Windows added since the last update.
      update_interval: Of what is waiting, between updates.
      guard: The candidate for promotion; None if every iterate is served.
    """

    learner: LearnerState = flax.struct.field(kw_only=True)
    num_waiting: Int[Array, ""] = flax.struct.field(kw_only=True)
    num_fresh: Int[Array, ""] = flax.struct.field(kw_only=True)
    update_interval: Int[Array, ""] = flax.struct.field(kw_only=True)
    guard: GuardState | None = None

    def going_on_from(self, before: Any) -> Any:
        """See `TrainerState`; what a budget buys was measured before."""
        counted = super().going_on_from(before)
        return counted.replace(update_interval=before.update_interval)

    @property
    def num_updates(self) -> Int[Array, ""]:
        """Steps that the update rule has taken."""
        return self.learner.num_updates


def is_ready(config: LearnerConfig, state: WindowsState) -> bool:
    """Whether it is known when to learn: a budget of time has to be measured."""
    if config.update_every_prompts:
        return True

    return int(state.update_interval) > 0


def is_due(config: LearnerConfig, state: WindowsState) -> bool:
    """Whether enough prompts, tokens or passes came since the last round."""
    if bool(state.is_stopped):
        return False

    # A chunk that left no window has nothing to train on.
    if every := config.update_every_prompts:
        is_over = int(state.num_prompts) % (every * state.stride) == 0
        return is_over and int(state.num_fresh) > 0

    return int(state.num_waiting) >= int(state.update_interval) * state.stride


def answers_until_due(
    config: LearnerConfig, state: WindowsState, num_tokens: Sequence[int]
) -> int:
    """See `Trainer`; under a budget, as if each token took a target pass."""
    if bool(state.is_stopped):
        return len(num_tokens)

    if every := config.update_every_prompts:
        every *= state.stride
        return min(len(num_tokens), every - int(state.num_prompts) % every)

    # The answer with which the missing ones are reached is the last that may be decoded
    # before an update.
    missing = int(state.update_interval) * state.stride - int(state.num_waiting)
    num_before = int(np.sum(np.cumsum(num_tokens) < missing))
    return min(len(num_tokens), num_before + 1)


def count_answer(
    config: LearnerConfig, state: WindowsState, completion: Completion, num_windows: int
) -> WindowsState:
    """Counts an answer, and the windows that it left."""
    num_waited = len(completion.token_ids)
    # Under a budget the interval counts target passes: tokens get cheaper as the draft
    # learns, passes do not.
    if config.update_interval == 0:
        num_waited = completion.stats.num_drafts

    num_prompts, num_waiting, num_fresh = _count(
        state.num_prompts,
        state.num_waiting,
        state.num_fresh,
        num_waited,
        num_windows,
        config.update_every_prompts,
    )
    return state.replace(
        num_prompts=num_prompts, num_waiting=num_waiting, num_fresh=num_fresh
    )


@functools.partial(jax.jit, static_argnames="every")
def _count(num_prompts, num_waiting, num_fresh, num_waited, num_windows, every: int):
    """The sums; windows of a chunk that was passed over are fresh no more."""
    # The answer begins a new chunk.
    if every:
        num_fresh = jnp.where(num_prompts % every == 0, 0, num_fresh)

    return num_prompts + 1, num_waiting + num_waited, num_fresh + num_windows
