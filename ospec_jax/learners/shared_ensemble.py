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

To judge and to move all experts costs most of what another learner would. So it is done
once in a *round* of several updates. Until then directions add up, and the ensemble
plays as if its weights stayed: `w_play <- w_play - sum_i weight_i eta_i d_t`. A round
that would end with a batch that has been trained on before goes on to the next fresh
one: on the others experts cannot be judged.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ospec_jax.config import ConfigError
from ospec_jax.config.learner import Batches, check
from ospec_jax.control.weighting import Meta, MetaState, init_meta
from ospec_jax.learners.base import (
    Learner,
    LearnerState,
    difference,
    directed,
    distance,
    moved_if,
    new_state,
)
from ospec_jax.learners.ensemble import ExpertsMethod
from ospec_jax.learners.objective import Objective
from ospec_jax.learners.parts import given_gradient
from ospec_jax.typing import Params, struct


@dataclasses.dataclass(frozen=True)
class SharedEnsemble(ExpertsMethod):
    """Settings of `shared_ensemble`; Hedge forgets, for streams that shift.

    Attributes:
      expert_pull: Part of the way that an expert of the middle step is drawn to the
        played parameters at each update.
      radius: Experts stay in the ball of this radius around the static draft; 0 for no
        bound.
      num_scored: Windows of each batch that experts are judged on.
      round_length: Updates between two judgements; directions add up in between, and
        experts move once for all of them.
    """

    # The paper's rule never forgets, and its rate is 1.
    meta_rate: float = 3.0
    meta_discount: float = 0.8
    expert_pull: float = 0.2
    radius: float = 0.0
    num_scored: int = 1
    round_length: int = 4

    def __post_init__(self):
        super().__post_init__()
        check(self, "expert_pull radius", lambda x: x >= 0, "0 (off) or more")
        check(self, "num_scored round_length", lambda x: x >= 1, "1 or more")
        if not self.expert_pull and not self.radius:
            raise ConfigError(
                "experts that share a gradient would lie on one line; set expert_pull "
                "or radius above 0"
            )

    def check_parts(self, **parts: Any) -> None:
        """Refuses to judge experts on more windows than there are."""
        batches: Batches = parts["batches"]
        if self.num_scored > batches.batch_size:
            raise ConfigError(
                f"num_scored {self.num_scored} exceeds batch_size {batches.batch_size}"
            )

    @property
    def updates_of_round(self) -> int:
        """The last one also judges and moves the experts."""
        return self.round_length

    def build(self, objective: Objective) -> Learner:
        """The learner."""
        optimizer, steps = self.grid()
        return shared_ensemble(
            objective,
            optimizer,
            steps,
            self.weights(),
            self.expert_pull,
            self.radius,
            self.num_scored,
            self.round_length,
        )


@struct
class SharedEnsembleState:
    """What the ensemble remembers.

    Attributes:
      anchor: The static draft, w_0.
      shifts: `[m - 1, ...]` from it to the experts that learn, as the round began.
      ahead: Sum of the round's directions so far.
      inner: The one optimizer's.
      meta: The experts' losses.
      losses: `[m]` of the last round.
      weights: `[m]`.
      path_length: How far the played average has moved in all.
      is_overdue: Whether the round waits for a fresh batch to end with.
    """

    anchor: Params
    shifts: Params
    ahead: Params
    inner: Any
    meta: MetaState
    losses: Float[Array, " m"]
    weights: Float[Array, " m"]
    path_length: Float[Array, ""]
    is_overdue: Bool[Array, ""]


def shared_ensemble(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: tuple[float, ...],
    meta: Meta,
    pull: float = 0.2,
    radius: float = 0.0,
    num_scored: int = 1,
    round_length: int = 1,
) -> Learner:
    """Builds the learner of `1 + len(steps)` experts, the static draft the first.

    `extra` is that of `ensemble`; `expert_losses` are those on the last scored windows.

    Args:
      optimizer: With step size 1; the experts' steps multiply what it does.
      steps: Of the experts that learn.
      pull: Part of the way to the played parameters for each update, of an expert whose
        step is the geometric mean of `steps`; others are pulled in proportion to their
        step, all the way at most.
      radius: Of a ball around the static draft that holds each expert; 0 for none.
      num_scored: Windows of a batch, the newest, on which experts are judged.
      round_length: Updates of a round.
    """
    experts = _experts_of(steps, pull, radius, num_scored, round_length)
    judge = functools.partial(_judge, objective, experts)

    def restart(state: LearnerState, params):
        return init(params, state.opt_state.anchor)

    def init(params, anchor=None):
        start = params if anchor is None else anchor
        return _first_state(optimizer, len(steps), params, start)

    def update(state: LearnerState, *data):
        found = jax.grad(objective.loss, has_aux=True)(state.params, *data)
        return moved_by(state, *found, *data)

    def moved_by(state: LearnerState, grads, info, *data):
        old = state.opt_state
        has_signal = info.weight > 0
        is_due, is_fresh = _is_due(experts, state, info, has_signal)
        is_last = is_due & is_fresh
        losses, scored = jax.lax.cond(
            is_last, lambda: judge(old, *data), lambda: (old.losses, jnp.zeros(()))
        )
        seen, weights = jax.lax.cond(
            scored > 0,
            lambda: meta.observe(old.meta, losses, old.weights),
            lambda: (old.meta, old.weights),
        )

        def move(state: LearnerState):
            return _moved(experts, optimizer, grads, info, state)

        new = moved_if(has_signal, state, move)
        shifts, ahead, played = _end_round(experts, is_last, old, weights, new)
        step_norm = distance(played, state.params)
        opt_state = new.opt_state.replace(
            shifts=shifts,
            ahead=ahead,
            meta=seen,
            losses=losses,
            weights=weights,
            path_length=old.path_length + step_norm,
            is_overdue=is_due & ~is_fresh,
        )
        extra = {
            "expert_weights": weights,
            "expert_losses": losses,
            "step_norm": step_norm,
            "path_length": opt_state.path_length,
        }
        info = info._replace(grad_norm=optax.global_norm(grads), extra=extra)

        return new.replace(params=played, opt_state=opt_state), info

    given = given_gradient(objective.parts, moved_by)
    return Learner(init, update, objective.score, restart=restart, given=given)


class _Experts(NamedTuple):
    """The experts that learn, and their rounds.

    Attributes:
      sizes: `[m - 1]` their steps.
      pulls: `[m - 1]` part of the way to the played parameters, of a whole round.
      radius: Of a ball around the static draft; 0 for none.
      num_scored: Windows on which they are judged.
      round_length: Updates of a round.
    """

    sizes: Array
    pulls: Array
    radius: float
    num_scored: int
    round_length: int


def _experts_of(
    steps: tuple[float, ...],
    pull: float,
    radius: float,
    num_scored: int,
    round_length: int,
) -> _Experts:
    sizes = jnp.asarray(steps)
    middle = jnp.exp(jnp.mean(jnp.log(sizes)))
    # As many pulls as a round has updates, done at once: (1 - pull) of the distance is
    # left after each.
    pulls = 1.0 - (1.0 - jnp.minimum(pull * sizes / middle, 1.0)) ** round_length

    return _Experts(sizes, pulls, radius, num_scored, round_length)


def _first_state(
    optimizer: optax.GradientTransformation, num_learning: int, params, anchor
) -> LearnerState:
    """The state at the start, with so many experts at `params`."""
    count = 1 + num_learning
    each = lambda x: jnp.repeat(x[None], num_learning, axis=0)
    opt_state = SharedEnsembleState(
        anchor=jax.tree.map(jnp.copy, anchor),
        shifts=jax.tree.map(each, difference(params, anchor)),
        ahead=jax.tree.map(jnp.zeros_like, params),
        inner=optimizer.init(params),
        meta=init_meta(count),
        losses=jnp.zeros(count),
        weights=jnp.ones(count) / count,
        path_length=jnp.zeros(()),
        is_overdue=jnp.zeros((), bool),
    )

    return new_state(params, opt_state)


def _is_due(experts: _Experts, state: LearnerState, info, has_signal):
    """Whether a round is to end, and whether experts can be judged on this batch.

    It ends with its last update, or with the next fresh batch if that one is not.
    """
    is_fresh = info.fresh_weight > 0
    is_due = (state.num_updates + 1) % experts.round_length == 0
    is_due = (is_due & has_signal) | state.opt_state.is_overdue

    return is_due, is_fresh


def _judge(
    objective: Objective,
    experts: _Experts,
    old: SharedEnsembleState,
    segments,
    shared,
    token_ids,
):
    """`[m]` losses on the newest windows that are fresh, and what they weigh."""
    # Windows of a batch come newest first.
    newest = jax.tree.map(lambda x: x[: experts.num_scored], segments)

    def loss_of(expert):
        # Number 0 is the static draft; others are where the round has led them.
        number = jnp.maximum(expert - 1, 0)
        is_moved = expert > 0
        size = is_moved * experts.sizes[number]
        move = lambda a, s, d: a + is_moved * s[number] + size * d
        point = jax.tree.map(move, old.anchor, old.shifts, old.ahead)
        info = objective.loss(point, newest, shared, token_ids)[1]

        return info.fresh_loss, info.fresh_weight

    # One expert after the other: only one of them exists as parameters at a time.
    losses, weights = jax.lax.map(loss_of, jnp.arange(1 + len(experts.sizes)))
    weight = jnp.min(weights)
    return jnp.where(weight > 0, losses, old.losses), weight


def _moved(
    experts: _Experts,
    optimizer: optax.GradientTransformation,
    grads,
    info,
    state: LearnerState,
) -> LearnerState:
    """The state after one direction, in which the played mean moves."""
    old = state.opt_state
    direction, inner = directed(optimizer, grads, old.inner, state.params, info.loss)
    # Moving the mean as its experts will move: each by its own step along the
    # direction.
    size = old.weights[1:] @ experts.sizes
    ahead = jax.tree.map(jnp.add, old.ahead, direction)
    played = jax.tree.map(lambda p, d: p + size * d, state.params, direction)
    new = old.replace(ahead=ahead, inner=inner)

    return state.replace(params=played, opt_state=new)


def _end_round(
    experts: _Experts,
    is_last,
    old: SharedEnsembleState,
    weights,
    state: LearnerState,
):
    """Moves the experts and plays their new average, if the round is at its end.

    Args:
      old: As the round's last update began.
      weights: `[m]` that the new average has.
    """

    def next_round(_, carry):
        shifts, ahead, _ = carry
        shifts = _shifts_after(experts, old.weights, shifts, ahead)
        mean = lambda a, s: a + jnp.tensordot(weights[1:], s, 1)
        played = jax.tree.map(mean, old.anchor, shifts)
        return shifts, jax.tree.map(jnp.zeros_like, ahead), played

    # A loop of one pass or none works in place, where a branch would copy.
    carry = state.opt_state.shifts, state.opt_state.ahead, state.params
    return jax.lax.fori_loop(0, is_last.astype(int), next_round, carry)


def _shifts_after(experts: _Experts, weights, shifts, ahead):
    """Experts after a round whose directions add up to `ahead`.

    Args:
      weights: `[m]` that the ensemble played with when the round began.
    """

    # The mean of the shifts under these weights is where it played then, the static
    # draft's shift being 0.
    def along(s, d):
        played = jnp.tensordot(weights[1:], s, 1)
        pulled = s + _each(experts.pulls, played[None] - s)
        return pulled + jnp.tensordot(experts.sizes, d, 0)

    shifts = jax.tree.map(along, shifts, ahead)
    if experts.radius:
        norms = jax.vmap(optax.global_norm)(shifts)
        shrink = jnp.minimum(1.0, experts.radius / jnp.maximum(norms, 1e-12))
        shifts = jax.tree.map(lambda s: _each(shrink, s), shifts)

    return shifts


def _each(factors: Float[Array, " m"], stacked: Array) -> Array:
    """`factors[i] * stacked[i]`."""
    return factors.reshape(-1, *(1,) * (stacked.ndim - 1)) * stacked
