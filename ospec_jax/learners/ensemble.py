# SPDX-License-Identifier: Apache-2.0
"""Experts of different step sizes, each with its own gradient (OnlineSPEC's ensemble).

Every expert learns on its own, from its own gradients and with its own optimizer state;
what is served is the average of their parameters, weighted by how well they did. The
first expert is the static draft: it never moves, costs a forward pass, and is what an
ensemble falls back to. See `shared_ensemble` for one gradient for all.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ospec_jax.config import ConfigError
from ospec_jax.config.learner import check
from ospec_jax.control import weighting
from ospec_jax.control.weighting import Meta, MetaState, init_meta
from ospec_jax.learners.base import (
    Learner,
    LearnerInfo,
    LearnerState,
    chosen,
    distance,
    moved_if,
    new_state,
    stepped,
)
from ospec_jax.learners.method import OptimizedMethod
from ospec_jax.learners.objective import Objective
from ospec_jax.learners.optimizers import is_parameter_free, make_optimizer
from ospec_jax.learners.parts import Given
from ospec_jax.typing import Params, struct


@dataclasses.dataclass(frozen=True)
class ExpertsMethod(OptimizedMethod):
    """A rule that weighs experts of several step sizes, the static draft among them.

    Its learning rate is the middle of the experts' grid.

    Attributes:
      num_experts: The static draft counted.
      step_ratio: Between neighbours in the grid of step sizes.
      meta: How experts are weighed: `hedge` on their cumulative normalised losses, or
        `last_chunk`, softmax of their mean loss in the last round (released code).
      meta_rate: Of Hedge; see `control.weighting`.
      meta_discount: Of older losses at each update, in Hedge; 1 never forgets.
      temperature: Of `last_chunk`, in units of the loss.
    """

    num_experts: int = 4
    step_ratio: float = 2.0
    meta: str = "hedge"
    meta_rate: float = 1.0
    meta_discount: float = 1.0
    temperature: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        wanted = "2 (the static draft and another) or more"
        check(self, "num_experts", lambda x: x >= 2, wanted)
        check(self, "step_ratio", lambda x: x > 1, "above 1")
        check(self, "meta_rate temperature", lambda x: x > 0, "above 0")
        check(self, "meta_discount", lambda x: 0 < x <= 1, "above 0, and at most 1")
        if self.meta not in ("hedge", "last_chunk"):
            raise ConfigError(f"meta is {self.meta!r}; use hedge or last_chunk")

    def grid(self) -> tuple[optax.GradientTransformation, tuple[float, ...]]:
        """An optimizer of step 1, and the experts' steps."""
        optimizer, rate = self.optimizer_and_rate
        if is_parameter_free(optimizer):
            raise ConfigError(
                f"{optimizer!r} finds its own step size: there is no grid of them "
                f"for an ensemble; use it with the gradient learner"
            )

        steps = step_grid(rate, self.step_ratio, self.num_experts - 1)
        return make_optimizer(optimizer, 1.0), steps

    def weights(self, has_static: bool = True) -> weighting.Meta:
        """How experts are weighed.

        Args:
          has_static: Whether the static draft may get weight.
        """
        prior = (float(has_static), *(1.0,) * (self.num_experts - 1))
        if self.meta == "last_chunk":
            return weighting.last_chunk(self.temperature, prior)

        return weighting.hedge(self.meta_rate, self.meta_discount, prior)


@dataclasses.dataclass(frozen=True)
class Ensemble(ExpertsMethod):
    """Settings of `ensemble`.

    Attributes:
      static_expert: Whether the static draft may get weight.
      reset_experts: Experts begin each round at their average (released code).
    """

    static_expert: bool = True
    reset_experts: bool = False

    def build(self, objective: Objective) -> Learner:
        """The learner."""
        optimizer, steps = self.grid()
        return ensemble(
            objective,
            optimizer,
            steps,
            self.weights(self.static_expert),
            self.static_expert,
            self.reset_experts,
        )


@struct
class EnsembleState:
    """What the ensemble remembers.

    Attributes:
      anchor: The static draft.
      experts: `[m - 1, ...]` parameters of the others.
      inner: `[m - 1, ...]` their optimizers.
      meta: Their losses.
      weights: `[m]`, the static draft's first.
      path_length: How far the played average has moved in all.
    """

    anchor: Params
    experts: Params
    inner: Any
    meta: MetaState
    weights: Float[Array, " m"]
    path_length: Float[Array, ""]


def step_grid(learning_rate: float, ratio: float, count: int) -> tuple[float, ...]:
    """`count` step sizes, each `ratio` times the one before, around `learning_rate`.

    >>> step_grid(2e-4, 2.0, 3)
    (0.0001, 0.0002, 0.0004)
    """
    return tuple(learning_rate * ratio ** (i - (count - 1) / 2) for i in range(count))


def ensemble(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: tuple[float, ...],
    meta: Meta,
    has_static: bool = True,
    is_reset: bool = False,
) -> Learner:
    """Builds the learner of `1 + len(steps)` experts.

    An expert's loss is that of a batch before it trains on it, without the windows that
    it has trained on before; a batch of such windows alone trains experts, and leaves
    their weights as they are. `extra` holds `expert_weights` and `expert_losses` `[m]`,
    `step_norm` and `path_length`; other facts are the experts' means under the weights
    that were played.

    Args:
      optimizer: With step size 1; the experts' steps multiply what it does.
      steps: Of the experts that learn.
      has_static: Whether the static draft may get weight; its loss is shown anyway.
      is_reset: All experts that learn begin each round at the average, as in the
        released commands, not where they stood.
    """
    sizes = jnp.asarray(steps)
    teach = functools.partial(_teach, optimizer)
    move_on = functools.partial(_move_on, meta)

    def restart(state: LearnerState, params):
        return init(params, state.opt_state.anchor)

    def init(params, anchor=None):
        anchor = params if anchor is None else anchor
        return _first_state(optimizer, len(steps), has_static, params, anchor)

    def begin(state: LearnerState):
        opt_state = state.opt_state
        opt_state = opt_state.replace(meta=meta.begin(opt_state.meta))
        if is_reset:
            merged = lambda many, one: jnp.broadcast_to(one, many.shape)
            experts = jax.tree.map(merged, opt_state.experts, state.params)
            opt_state = opt_state.replace(experts=experts)

        return state.replace(opt_state=opt_state)

    def update(state: LearnerState, *data):
        def learn(expert):
            found = jax.grad(objective.loss, has_aux=True)(expert[0], *data)
            return teach(expert, *found)

        old = state.opt_state
        # One expert after the other: the activations of one are held at a time.
        learned, infos = jax.lax.map(learn, (old.experts, old.inner, sizes))
        static = objective.loss(old.anchor, *data)[1]
        return move_on(state, learned, infos, static)

    def given_update(state: LearnerState, found, *_):
        old = state.opt_state
        grads, infos = jax.tree.map(lambda *x: jnp.stack(x), *found[:-1])
        experts = old.experts, old.inner, sizes
        learned, infos = jax.lax.map(lambda args: teach(*args), (experts, grads, infos))
        # It has no gradient to follow.
        static = found[-1][1]._replace(grad_norm=jnp.float32(0.0))
        return move_on(state, learned, infos, static)

    def point(state: LearnerState, number: int):
        # The static draft comes last: of it the info alone is wanted.
        old = state.opt_state
        if number == len(steps):
            return old.anchor
        return jax.tree.map(lambda x: x[number], old.experts)

    given = None
    if objective.parts is not None:
        given = Given(objective.parts, len(steps) + 1, point, given_update, False)

    return Learner(init, update, objective.score, begin, restart, given)


def _first_state(
    optimizer: optax.GradientTransformation,
    num_learning: int,
    has_static: bool,
    params,
    anchor,
) -> LearnerState:
    """The state at the start, with so many experts at `params`."""
    copies = lambda x: jnp.repeat(x[None], num_learning, axis=0)
    count = 1 + num_learning
    # A static draft without weight keeps its place, so that shapes do not depend on it.
    start = jnp.arange(count) >= (0 if has_static else 1)
    experts = jax.tree.map(copies, params)
    opt_state = EnsembleState(
        anchor=jax.tree.map(jnp.copy, anchor),
        experts=experts,
        inner=jax.vmap(optimizer.init)(experts),
        meta=init_meta(count),
        weights=start / jnp.sum(start),
        path_length=jnp.zeros(()),
    )

    return new_state(params, opt_state)


def _teach(optimizer: optax.GradientTransformation, expert, grads, info):
    """Moves one expert, `(params, inner, size)`, by its own gradient."""
    params, inner, size = expert
    move = lambda: stepped(optimizer, grads, inner, params, info.loss, size)
    # Each expert decides for itself: with positions that depend on the draft, one of
    # them may have nothing to learn where another has.
    learned = jax.lax.cond(info.weight > 0, move, lambda: (params, inner))
    return learned, info._replace(grad_norm=optax.global_norm(grads))


def _move_on(
    meta: Meta, state: LearnerState, learned, infos, static
) -> tuple[LearnerState, LearnerInfo]:
    """Weighs the experts by how they did, and plays their new average.

    Args:
      learned: Their parameters and optimizers after the update.
      infos: Of them; `static`, of the static draft.
    """
    old = state.opt_state
    experts, inner = learned
    infos = jax.tree.map(lambda a, b: jnp.append(a[None], b, 0), static, infos)

    def move(state: LearnerState):
        heard = meta.observe(old.meta, infos.fresh_loss, old.weights)
        # What experts have trained on flatters those that follow it fastest.
        seen, weights = chosen(is_heard, heard, (old.meta, old.weights))
        played = averaged(weights, old.anchor, experts)
        length = old.path_length + distance(played, state.params)
        new = old.replace(
            experts=experts,
            inner=inner,
            meta=seen,
            weights=weights,
            path_length=length,
        )

        return state.replace(params=played, opt_state=new)

    is_heard = jnp.max(infos.fresh_weight) > 0
    new = moved_if(jnp.max(infos.weight) > 0, state, move)
    losses = jnp.where(is_heard, infos.fresh_loss, infos.loss)

    return new, _summary(infos, losses, old.weights, new, state)


def _summary(
    infos, losses, weights, new: LearnerState, old: LearnerState
) -> LearnerInfo:
    """Means over experts, and what each of them did."""
    mean = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), infos)
    return mean._replace(
        extra={
            "expert_weights": new.opt_state.weights,
            "expert_losses": losses,
            "step_norm": distance(new.params, old.params),
            "path_length": new.opt_state.path_length,
        }
    )


def averaged(weights: Float[Array, " m"], anchor: Params, experts: Params) -> Params:
    """The experts' mean under the weights, the anchor being the first of them.

    Leaves of `experts` are `[m - 1, ...]`; the anchor and the mean lack that axis.

    Only floating-point leaves are averaged: tables of integers stay the anchor's.
    """

    def mean(first, rest):
        if not jnp.issubdtype(first.dtype, jnp.floating):
            return first

        others = jnp.tensordot(weights[1:], rest, 1)
        return (weights[0] * first + others).astype(first.dtype)

    return jax.tree.map(mean, anchor, experts)
