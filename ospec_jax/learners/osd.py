# SPDX-License-Identifier: Apache-2.0
"""Online Speculative Decoding (Liu et al., arXiv 2310.07177), the baseline.

A buffer gathers requests; when it holds enough of them, one optimizer step is taken on
the positions where the draft was wrong, and it is emptied. The parameters stand still
in between, so the buffer can hold gradients in place of requests: their mean is the
gradient of the buffered requests' mean loss.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError
from ospec_jax.config.learner import Schedule, check
from ospec_jax.learners.base import (
    Learner,
    LearnerState,
    distance,
    moved_if,
    new_state,
    stepped,
)
from ospec_jax.learners.method import OptimizedMethod
from ospec_jax.learners.objective import Objective
from ospec_jax.learners.parts import given_gradient
from ospec_jax.typing import Params, struct


@dataclasses.dataclass(frozen=True)
class OSD(OptimizedMethod):
    """Settings of `osd`, by default as published.

    It learns where the draft was wrong alone, and an update is a request, of which its
    buffer holds so many: so a batch should hold the windows of one.

    Attributes:
      buffer_requests: Requests between two steps.
    """

    published_rate: ClassVar[float | None] = 1e-4
    defaults: ClassVar[dict[str, Any]] = {
        "update_every_prompts": 1,
        "loss": "forward_kl",
    }
    fixed: ClassVar[dict[str, Any]] = {"positions": "rejected"}

    buffer_requests: int = 8

    def __post_init__(self):
        super().__post_init__()
        check(self, "buffer_requests", lambda x: x >= 1, "1 or more")

    def check_parts(self, **parts: Any) -> None:
        """Refuses intervals of tokens: the buffer counts requests."""
        schedule: Schedule = parts["schedule"]
        if schedule.update_every_prompts < 1:
            raise ConfigError(
                f"update_every_prompts is {schedule.update_every_prompts}; the learner "
                f"'osd' counts requests: use 1 or more"
            )

    def build(self, objective: Objective) -> Learner:
        """The learner."""
        return osd(objective, self.make_optimizer(), self.buffer_requests)


@struct
class OsdState:
    """The buffer.

    Attributes:
      gradient: Sum over the buffered requests, each weighted by its wrong positions.
      weight: Sum of those weights.
      count: Requests in the buffer.
      inner: State of the optimizer.
    """

    gradient: Params
    weight: Float[Array, ""]
    count: Int[Array, ""]
    inner: Any


def osd(
    objective: Objective, optimizer: optax.GradientTransformation, interval: int = 8
) -> Learner:
    """Builds the learner.

    An update call is one request. One whose positions were all right counts as a
    request and adds nothing. `extra` holds `buffered`, the requests that wait, and
    `step_norm`.

    Args:
      objective: With `positions='rejected'`; the published loss is forward KL.
      optimizer: Adam with a constant rate, as published.
      interval: Requests between two steps.
    """

    def init(params):
        opt_state = OsdState(
            gradient=jax.tree.map(jnp.zeros_like, params),
            weight=jnp.zeros(()),
            count=jnp.zeros((), jnp.int32),
            inner=optimizer.init(params),
        )
        return new_state(params, opt_state)

    def empty(params, opt_state: OsdState, loss):
        """One step on what is buffered."""
        # A buffer whose positions were all right has no gradient: the optimizer does
        # not step, so that its momentum and its counters stay.
        scale = 1.0 / jnp.maximum(opt_state.weight, 1e-6)
        grads = jax.tree.map(lambda g: scale * g, opt_state.gradient)
        take = lambda: stepped(optimizer, grads, opt_state.inner, params, loss)
        stay = lambda: (params, opt_state.inner)
        params, inner = jax.lax.cond(opt_state.weight > 0, take, stay)

        return params, OsdState(
            gradient=jax.tree.map(jnp.zeros_like, params),
            weight=jnp.zeros(()),
            count=jnp.zeros((), jnp.int32),
            inner=inner,
        )

    def update(state: LearnerState, segments, shared, token_ids):
        data = (segments, shared, token_ids)
        found = jax.grad(objective.loss, has_aux=True)(state.params, *data)
        return moved(state, *found, *data)

    def moved(state: LearnerState, grads, info, segments, *_):
        def move(state: LearnerState):
            # The loss is a mean over wrong positions, so weighting it by their number
            # makes sums that can be divided by all of them.
            old = state.opt_state
            add = lambda total, g: total + info.weight * g
            gathered = old.replace(
                gradient=jax.tree.map(add, old.gradient, grads),
                weight=old.weight + info.weight,
                count=old.count + 1,
            )
            params, opt_state = jax.lax.cond(
                gathered.count >= interval,
                lambda: empty(state.params, gathered, info.loss),
                lambda: (state.params, gathered),
            )
            return state.replace(params=params, opt_state=opt_state)

        # Requests count by their verified tokens, even if none of them was wrong.
        new = moved_if(jnp.sum(segments.weight) > 0, state, move)
        extra = {
            "buffered": new.opt_state.count,
            "step_norm": distance(new.params, state.params),
        }
        return new, info._replace(grad_norm=optax.global_norm(grads), extra=extra)

    given = given_gradient(objective.parts, moved)
    return Learner(init=init, update=update, evaluate=objective.score, given=given)
