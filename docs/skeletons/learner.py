# SPDX-License-Identifier: Apache-2.0
"""An update rule of your own: steps along the gradient's sign, ever shorter ones.

    session = ospec_jax.Session(target, draft, learner=sign_sgd)
    session = ospec_jax.Session(target, draft, learner=LearnerConfig(
        rule=functools.partial(sign_sgd, step=1e-3), update_interval=256, window=32))

A rule is a function from an `Objective`, which knows the draft and the loss, to a
`Learner`: pure functions on a state of arrays, compiled and checkpointed as they are.
"""

import jax
import jax.numpy as jnp
import optax

from ospec_jax.learners.base import Learner, distance, moved_if, new_state
from ospec_jax.learners.objective import Objective


def sign_sgd(objective: Objective, step: float = 3e-4, decay: float = 0.01) -> Learner:
    """`w <- w - step / (1 + decay t) sign(grad f(w))` at update t."""

    def init(params):
        # What the rule remembers: any tree of arrays, here its clock.
        return new_state(params, jnp.zeros(()))

    def update(state, segments, shared, token_ids):
        grad = jax.grad(objective.loss, has_aux=True)
        grads, info = grad(state.params, segments, shared, token_ids)

        def move(state):
            size = step / (1.0 + decay * state.opt_state)
            shift = jax.tree.map(lambda g: -size * jnp.sign(g), grads)
            params = optax.apply_updates(state.params, shift)
            return state.replace(params=params, opt_state=state.opt_state + 1.0)

        # Where nothing was verified there is nothing to learn: all must stand still.
        new = moved_if(info.weight > 0, state, move)
        extra = {"step_norm": distance(new.params, state.params)}  # for looking at
        return new, info._replace(grad_norm=optax.global_norm(grads), extra=extra)

    return Learner(init=init, update=update, evaluate=objective.score)
