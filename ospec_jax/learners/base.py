# SPDX-License-Identifier: Apache-2.0
"""What a learner is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
from jaxtyping import Array, Float, Int

from ospec_jax.types import Feedback
from ospec_jax.typing import Params


@flax.struct.dataclass
class Segments:
    """Windows of consecutive tokens to learn from.

    A window has `num_context` leading pairs that are only attended to, then the pairs
    that are trained, then one token for each further unrolled step.

    Attributes:
      feedback: `[b, t]` windows.
      start: `[b]` position of the first token; negative ones pad short contexts.
      weight: `[b, t]` how much the target's distribution after token i counts; 0 where
        nothing was verified.
    """

    feedback: Feedback
    start: Int[Array, " b"]
    weight: Float[Array, "b t"]


@flax.struct.dataclass
class LearnerState:
    """The learner's iterate and what its optimizer remembers.

    Attributes:
      params: Draft parameters at which gradients are taken (`w_play`).
      num_updates: Updates done so far.
    """

    params: Params
    opt_state: Any
    num_updates: Int[Array, ""]


class LearnerInfo(NamedTuple):
    """For looking at; the next update does not need it.

    Attributes:
      loss: Weighted mean over depths.
      agreement: `[j]` share of positions at which the draft's best token is the
        target's, by depth.
      acceptance: `[j]` mean of sum(min(p, q)), by depth.
      grad_norm: Global norm of the gradient.
    """

    loss: Float[Array, ""]
    agreement: Float[Array, " j"]
    acceptance: Float[Array, " j"]
    grad_norm: Float[Array, ""]


class Learner(NamedTuple):
    """An online learner.

    Attributes:
      init: `params -> LearnerState`.
      update: `(state, segments, shared, token_ids) -> (state, LearnerInfo)`. Of the
        target it sees the frozen embedding and head only, so it cannot run it again.
      evaluate: `(params, segments, shared, token_ids) -> (LearnerInfo, accepted [b])`,
        forward only; accepted draft tokens by window.
    """

    init: Callable
    update: Callable
    evaluate: Callable
