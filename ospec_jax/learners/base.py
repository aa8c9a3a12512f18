# SPDX-License-Identifier: Apache-2.0
"""What a learner is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.types import Feedback
from ospec_jax.typing import Params, struct


@struct
class Segments:
    """Windows of consecutive tokens to learn from.

    A window has `num_context` leading pairs that are only attended to, then the pairs
    that are trained, then one token for each further unrolled step.

    Attributes:
      feedback: `[b, t]` windows.
      start: `[b]` position of the first token; negative ones pad short contexts.
      weight: `[b, t]` how much the target's distribution after token i counts; 0 where
        nothing was verified.
      is_fresh: `[b]` whether no update has trained on the window before; None if that
        holds for all. Windows come round again in later epochs, and to be repeated.
    """

    feedback: Feedback
    start: Int[Array, " b"]
    weight: Float[Array, "b t"]
    is_fresh: Bool[Array, " b"] | None = None


@struct
class LearnerState:
    """The learner's iterate and what its update rule remembers.

    Attributes:
      params: Draft parameters that are played (`w_play`): what promotion serves.
      opt_state: Of the rule: optax's state, or a frozen dataclass of the rule's own.
      num_updates: Updates with a signal so far.
    """

    params: Params
    opt_state: Any
    num_updates: Int[Array, ""]


class LearnerInfo(NamedTuple):
    """For looking at; the next update does not need it.

    An update with `num_candidates` computes no other logits of the draft, and does not
    know how likely they are: what it can say of the draft it says under names of their
    own, and `agreement` and `acceptance`, claims about the whole draft vocabulary, are
    None. Serving's acceptance is what decoding counts (`DecodingStats`).

    Attributes:
      loss: What is minimised, weighted mean over depths; with candidates that of a
        draft with these tokens alone.
      agreement: `[j]` share of positions at which the draft's best token is the
        target's, by depth, all drafted tokens before it being right; None with
        candidates.
      acceptance: `[j]` mean of sum(min(p, q)), by depth, of the distributions at
        temperature 1; None with candidates.
      grad_norm: Global norm of the gradient.
      weight: Of all positions that the loss counts; without any there is no signal.
      extra: What only this learner has to say, under names that never change between
        its updates: scalars, or `[m]` one for each expert.
      candidate_agreement: `agreement` of the draft that has the candidates alone: it
        hears of no position at which the draft prefers another token. None without
        candidates.
      candidate_acceptance: Likewise `acceptance`, its softmax over the candidates
        alone, which is more than the draft gives them.
      fresh_loss: `loss` of the windows that no update has trained on before.
      fresh_weight: Their part of `weight`; without any there is no `fresh_loss`.
    """

    loss: Float[Array, ""]
    agreement: Float[Array, " j"] | None
    acceptance: Float[Array, " j"] | None
    grad_norm: Float[Array, ""]
    weight: Float[Array, ""]
    extra: dict[str, Array] = {}
    candidate_agreement: Float[Array, " j"] | None = None
    candidate_acceptance: Float[Array, " j"] | None = None
    fresh_loss: Float[Array, ""] | None = None
    fresh_weight: Float[Array, ""] | None = None

    def of_candidates(self) -> "LearnerInfo":
        """The same figures, said of the candidates alone."""
        return self._replace(
            agreement=None,
            acceptance=None,
            candidate_agreement=self.agreement,
            candidate_acceptance=self.acceptance,
        )


def unchanged(state: LearnerState) -> LearnerState:
    """The state as it is."""
    return state


class Learner(NamedTuple):
    """An online learner: a rule that moves a draft's parameters.

    Its functions are pure, and compiled once. States keep their structure, shapes and
    dtypes, and hold arrays alone: they are stored as they are. Compiled, `update`
    overwrites all of a state but `params`, which may be in use elsewhere; whoever
    compiles it so gives it copies of what `init` and `restart` return.

    Attributes:
      init: `params -> LearnerState`.
      update: `(state, segments, shared, token_ids) -> (state, LearnerInfo)`. Where the
        segments weigh nothing, the state stays as it is. `shared` (of the target the
        frozen embedding and head only, so that it cannot be run again) and `token_ids`
        (the draft vocabulary) are there to be handed on to the objective.
      evaluate: `(params, segments, shared, token_ids) -> (LearnerInfo, accepted [b])`,
        forward only; accepted draft tokens by window.
      begin: `state -> state`, called before the first update on a new round of traffic
        (an interval, a chunk of prompts). Most learners do nothing then, and all of
        them learn without it.
      restart: `(state, params) -> state`: begins anew at `params`, keeping what a
        learner shall not forget (a static draft, say); None begins as `init` does.
      given: An update whose gradients are found part by part, so that others need not
        wait for all of it; None where there is no such thing.
    """

    init: Callable
    update: Callable
    evaluate: Callable
    begin: Callable = unchanged
    restart: Callable | None = None
    given: Any = None


def new_state(params: Params, opt_state: Any) -> LearnerState:
    """A state that has seen nothing."""
    return LearnerState(params, opt_state, jnp.zeros((), jnp.int32))


def moved_if(
    has_signal: Array, state: LearnerState, move: Callable[[LearnerState], LearnerState]
) -> LearnerState:
    """Moves on where there is something to learn.

    Without any verified token a rule with momentum or weight decay must not move
    either, nor may its counters.
    """
    # Chosen number by number, in the pass that computes them: branches copy the state.
    moved = move(state).replace(num_updates=state.num_updates + 1)
    return chosen(has_signal, moved, state)


def chosen(is_first: Array, first: Any, second: Any) -> Any:
    """One of two trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second)


def stepped(
    optimizer: optax.GradientTransformation,
    grads,
    opt_state,
    params,
    loss,
    size=1.0,
    grad_norm=None,
) -> tuple[Params, Any]:
    """One step of an optax optimizer; returns parameters and its state.

    Args:
      loss: At `params`; some optimizers ask for it.
      size: Factor of the step.
      grad_norm: Global norm of the gradient, where it is known.
    """
    updates, opt_state = directed(optimizer, grads, opt_state, params, loss, grad_norm)
    # The optimizer runs at step 1 where several step sizes share it; see `ensemble`.
    updates = jax.tree.map(lambda update: size * update, updates)
    return optax.apply_updates(params, updates), opt_state


def directed(
    optimizer: optax.GradientTransformation,
    grads,
    opt_state,
    params,
    loss,
    grad_norm=None,
) -> tuple[Params, Any]:
    """What an optax optimizer would add to the parameters, and its state."""
    # Some optimizers (momo, say) ask for the loss; the others are not told.
    run = optax.with_extra_args_support(optimizer).update
    return run(grads, opt_state, params, value=loss, grad_norm=grad_norm)


def difference(left: Params, right: Params) -> Params:
    """`left - right`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, left, right)


def distance(left: Params, right: Params) -> Float[Array, ""]:
    """Euclidean distance of two parameter trees."""
    return optax.global_norm(difference(left, right))


def restarted(learner: Learner, state: LearnerState, params: Params) -> LearnerState:
    """Begins anew at `params`, and goes on counting."""
    if learner.restart is None:
        new = learner.init(params)
    else:
        new = learner.restart(state, params)

    # The count goes on: it seeds the choice of older windows, which must not repeat.
    return new.replace(num_updates=state.num_updates)
