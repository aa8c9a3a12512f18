# SPDX-License-Identifier: Apache-2.0
"""Optimistic online gradient descent: play where the next gradient is expected to lead.

The two-state rule of OnlineSPEC (arXiv 2603.12617), with P the projection onto a ball:

    play     w_t       = P(w^_t - eta h_t)
    observe  g_t       = grad f_t(w_t)
    learn    w^_{t+1}  = P(w^_t - eta g_t)
    expect   h_{t+1}   = g_t

Its bound grows with sum ||g_t - h_t||^2 instead of sum ||g_t||^2: it gains where one
gradient is like the next. Unconstrained with a constant step it is the one-state rule
`w_{t+1} = w_t - 2 eta g_t + eta g_{t-1}`, `optax.optimistic_gradient_descent` but for
that one's plain first step.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ospec_jax.config.learner import check
from ospec_jax.learners.base import (
    Learner,
    LearnerState,
    difference,
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
class Optimistic(OptimizedMethod):
    """Settings of `optimistic`.

    Attributes:
      hint_decay: The hint is the last gradient (0), or an average of past ones that
        keeps this part of its old value at each update.
      radius: Parameters stay in the ball of this radius around the first ones; 0 for
        no bound.
    """

    published_optimizer: ClassVar[str] = "sgd"

    hint_decay: float = 0.0
    radius: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check(self, "hint_decay", lambda x: 0 <= x < 1, "0 to below 1")
        check(self, "radius", lambda x: x >= 0, "0 (off) or more")

    def build(self, objective: Objective) -> Learner:
        """The learner."""
        optimizer = self.make_optimizer()
        return optimistic(objective, optimizer, self.hint_decay, self.radius)


@struct
class OptimisticState:
    """What the rule remembers.

    Attributes:
      params: The learned iterate, w^ in the paper.
      hint: The gradient that is expected next, h.
      inner: State of the optimizer.
      anchor: Centre of the ball, or None without one.
      path_length: How far the played iterate has moved in all.
    """

    params: Params
    hint: Params
    inner: Any
    anchor: Params | None
    path_length: Float[Array, ""]


def optimistic(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    hint_decay: float = 0.0,
    radius: float = 0.0,
) -> Learner:
    """Builds the learner.

    `extra` holds `hint_error`, ||g - h||^2, `step_norm` and `path_length`.

    Args:
      optimizer: What a gradient does to the iterate; `optax.sgd` is the paper's. With
        another one the played iterate is where its next step would lead if the hint
        came true.
      hint_decay: 0 expects the last gradient; above, an exponential average of them
        that keeps this part of its old value. It begins at zero: cautiously.
      radius: Of the ball around the first parameters; 0 for no bound.
    """

    def bounded(params, anchor):
        return projected(params, anchor, radius) if radius else params

    def init(params, anchor=None):
        # Copies: what is served must not share a buffer with what may be donated.
        copy = lambda tree: jax.tree.map(jnp.copy, tree)
        opt_state = OptimisticState(
            params=copy(params),
            hint=jax.tree.map(jnp.zeros_like, params),
            inner=optimizer.init(params),
            anchor=copy(params if anchor is None else anchor) if radius else None,
            path_length=jnp.zeros(()),
        )
        return new_state(params, opt_state)

    def update(state: LearnerState, segments, shared, token_ids):
        data = (segments, shared, token_ids)
        found = jax.grad(objective.loss, has_aux=True)(state.params, *data)
        return moved(state, *found, *data)

    def moved(state: LearnerState, grads, info, *_):
        hint_error = distance(grads, state.opt_state.hint) ** 2

        # The four lines of the rule, in the order learn, expect, play; the gradient
        # above was observed at the played parameters.
        def move(state: LearnerState):
            old = state.opt_state
            learned, inner = stepped(optimizer, grads, old.inner, old.params, info.loss)
            learned = bounded(learned, old.anchor)
            keep = lambda h, g: hint_decay * h + (1.0 - hint_decay) * g
            hint = jax.tree.map(keep, old.hint, grads)
            # The optimizer's state after this step is dropped: the step is only
            # expected.
            ahead, _ = stepped(optimizer, hint, inner, learned, info.loss)
            played = bounded(ahead, old.anchor)
            length = old.path_length + distance(played, state.params)
            new = old.replace(
                params=learned, hint=hint, inner=inner, path_length=length
            )

            return state.replace(params=played, opt_state=new)

        new = moved_if(info.weight > 0, state, move)
        extra = {
            "hint_error": hint_error,
            "step_norm": distance(new.params, state.params),
            "path_length": new.opt_state.path_length,
        }

        return new, info._replace(grad_norm=optax.global_norm(grads), extra=extra)

    given = given_gradient(objective.parts, moved, is_by_number=True)
    return Learner(init=init, update=update, evaluate=objective.score, given=given)


def projected(params: Params, anchor: Params, radius: float) -> Params:
    """The nearest parameters in the ball of that radius around `anchor`."""
    shift = difference(params, anchor)
    shrink = jnp.minimum(1.0, radius / jnp.maximum(optax.global_norm(shift), 1e-12))
    return jax.tree.map(lambda a, s: a + shrink * s, anchor, shift)
