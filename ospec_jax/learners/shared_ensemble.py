# SPDX-License-Identifier: Apache-2.0
"""Experts of different step sizes that share one gradient, at one learner's cost.

The gradient is taken where the ensemble plays, and turned into one direction `d_t` by
one optimizer. Left to themselves the experts would all lie on the line
`w_0 - eta_i (d_1 + ... + d_t)`, run away from it where the weights have left them, and
drive a linearised loss to one of its ends. So each expert is pulled to where the
ensemble plays, which gives it a memory of its own length,

    w_i <- w_i + pull_i (w_play - w_i) - eta_i d_t,

and may be kept in a ball around the static draft; and experts are judged by their true
loss on a few fresh windows, forward only, before anyone trained on them. (A pull to the
static draft also breaks the line, but holds back what learns; on shifting quadratics it
lost up to 70% where this form is as good as experts with gradients of their own.) The
static draft itself, the first expert, never moves.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ospec_jax.learners.base import (
    Learner,
    LearnerState,
    difference,
    distance,
    moved_if,
    new_state,
    stepped,
)
from ospec_jax.learners.meta import Meta, MetaState, init_meta
from ospec_jax.learners.objective import Objective
from ospec_jax.typing import Params


@flax.struct.dataclass
class SharedEnsembleState:
    """What the ensemble remembers.

    Attributes:
      anchor: The static draft, w_0.
      shifts: `[m, ...]` of the experts from it; the first one, the static draft's own,
        stays 0.
      inner: The one optimizer's.
      meta: The experts' losses.
      weights: `[m]`.
      path_length: How far the played average has moved in all.
    """

    anchor: Params
    shifts: Params
    inner: Any
    meta: MetaState
    weights: Float[Array, " m"]
    path_length: Float[Array, ""]


def shared_ensemble(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: tuple[float, ...],
    meta: Meta,
    pull: float = 0.2,
    radius: float = 0.0,
    num_scored: int = 1,
) -> Learner:
    """Builds the learner of `1 + len(steps)` experts, the static draft the first.

    `extra` is that of `ensemble`; `expert_losses` are those on the scored windows.

    Args:
      optimizer: With step size 1; the experts' steps multiply what it does.
      steps: Of the experts that learn.
      pull: Part of the way to the played parameters at each update, of an expert whose
        step is the geometric mean of `steps`; others are pulled in proportion to their
        step, all the way at most.
      radius: Of a ball around the static draft that holds each expert; 0 for none.
      num_scored: Windows of each batch, the newest, on which experts are judged.
    """
    sizes = jnp.asarray((0.0, *steps))
    middle = jnp.exp(jnp.mean(jnp.log(jnp.asarray(steps))))
    pulls = jnp.minimum(pull * sizes / middle, 1.0)
    count = 1 + len(steps)

    def init(params):
        zeros = lambda x: jnp.zeros((count, *x.shape), x.dtype)
        opt_state = SharedEnsembleState(
            anchor=jax.tree.map(jnp.copy, params),
            shifts=jax.tree.map(zeros, params),
            inner=optimizer.init(params),
            meta=init_meta(count),
            weights=jnp.ones(count) / count,
            path_length=jnp.zeros(()),
        )
        return new_state(params, opt_state)

    def judge(opt_state: SharedEnsembleState, segments, shared, token_ids):
        """`[m]` losses on the newest windows, and what they weigh."""
        newest = jax.tree.map(lambda x: x[:num_scored], segments)

        def loss_of(shift):
            point = jax.tree.map(jnp.add, opt_state.anchor, shift)
            info = objective.loss(point, newest, shared, token_ids)[1]
            return info.loss, info.weight

        losses, weight = jax.lax.map(loss_of, opt_state.shifts)
        return losses, jnp.min(weight)

    def shifted(shifts, played, direction):
        """Experts after one step along the shared direction."""

        def along(s, p, d):
            pulled = s + _each(pulls, p[None] - s)
            return pulled + jnp.tensordot(sizes, d, 0)

        shifts = jax.tree.map(along, shifts, played, direction)
        if radius:
            norms = jax.vmap(optax.global_norm)(shifts)
            shrink = jnp.minimum(1.0, radius / jnp.maximum(norms, 1e-12))
            shifts = jax.tree.map(lambda s: _each(shrink, s), shifts)
        return shifts

    def update(state: LearnerState, segments, shared, token_ids):
        old = state.opt_state
        losses, scored = judge(old, segments, shared, token_ids)
        grads, info = jax.grad(objective.loss, has_aux=True)(
            state.params, segments, shared, token_ids
        )

        def move(state: LearnerState):
            seen, weights = jax.lax.cond(
                scored > 0,
                lambda: meta.observe(old.meta, losses, old.weights),
                lambda: (old.meta, old.weights),
            )
            there, inner = stepped(optimizer, grads, old.inner, state.params, info.loss)
            direction = difference(there, state.params)
            shift = difference(state.params, old.anchor)
            shifts = shifted(old.shifts, shift, direction)
            mean = lambda a, s: a + jnp.tensordot(weights, s, 1)
            played = jax.tree.map(mean, old.anchor, shifts)
            length = old.path_length + distance(played, state.params)
            new = old.replace(
                shifts=shifts, inner=inner, meta=seen, weights=weights,
                path_length=length,
            )  # fmt: skip
            return state.replace(params=played, opt_state=new)

        new = moved_if(info.weight > 0, state, move)
        extra = {
            "expert_weights": new.opt_state.weights,
            "expert_losses": losses,
            "step_norm": distance(new.params, state.params),
            "path_length": new.opt_state.path_length,
        }
        return new, info._replace(grad_norm=optax.global_norm(grads), extra=extra)

    return Learner(init=init, update=update, evaluate=objective.score)


def _each(factors: Float[Array, " m"], stacked: Array) -> Array:
    """`factors[i] * stacked[i]`."""
    return factors.reshape(-1, *(1,) * (stacked.ndim - 1)) * stacked
