# SPDX-License-Identifier: Apache-2.0
"""Online gradient descent with any optax optimizer."""

import dataclasses

import jax
import optax

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


@dataclasses.dataclass(frozen=True)
class Gradient(OptimizedMethod):
    """Settings of `gradient`: its optimizer and rate."""

    def build(self, objective: Objective) -> Learner:
        """The learner."""
        return gradient(objective, self.make_optimizer())


def gradient(objective: Objective, optimizer: optax.GradientTransformation) -> Learner:
    """Builds the learner `w <- w - optimizer(grad f(w))`.

    `extra` holds `step_norm`, the distance that the update moved.
    """

    def init(params):
        return new_state(params, optimizer.init(params))

    def update(state: LearnerState, segments, shared, token_ids):
        data = (segments, shared, token_ids)
        grads, info = jax.grad(objective.loss, has_aux=True)(state.params, *data)
        info = info._replace(grad_norm=optax.global_norm(grads))
        return moved(state, grads, info)

    def moved(state: LearnerState, grads, info, *_):
        def move(state: LearnerState):
            params, opt_state = stepped(
                optimizer,
                grads,
                state.opt_state,
                state.params,
                info.loss,
                grad_norm=info.grad_norm,
            )
            return state.replace(params=params, opt_state=opt_state)

        new = moved_if(info.weight > 0, state, move)
        extra = {"step_norm": distance(new.params, state.params)}
        return new, info._replace(extra=extra)

    given = given_gradient(objective.parts, moved, is_by_number=True)
    return Learner(init=init, update=update, evaluate=objective.score, given=given)
