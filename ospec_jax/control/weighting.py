# SPDX-License-Identifier: Apache-2.0
"""How an ensemble weighs its experts by their losses."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.typing import struct


@struct
class MetaState:
    """Losses so far.

    Attributes:
      total: `[m]` cumulative loss of each expert.
      count: Rounds in it.
      square: Sum of the rounds' squared ranges, best to worst expert.
    """

    total: Float[Array, " m"]
    count: Float[Array, ""]
    square: Float[Array, ""]


class Meta(NamedTuple):
    """A rule for weights.

    Attributes:
      observe: `(state, losses [m], weights [m]) -> (state, weights [m])`.
      begin: `state -> state`, at a new round of traffic.
    """

    observe: Callable
    begin: Callable


def init_meta(num_experts: int) -> MetaState:
    """No losses."""
    zero = jnp.zeros(())
    return MetaState(jnp.zeros(num_experts), zero, zero)


def hedge(
    rate: float = 1.0, discount: float = 1.0, prior: tuple[float, ...] | None = None
) -> Meta:
    """Hedge on normalised cumulative losses: `p_i ~ exp(-rate * L_i / scale)`.

    A round's losses are taken relative to their mean under the weights, and L_i is
    divided by the root mean square of the rounds' ranges. So `rate` means the same for
    every loss, model and batch, which the papers' rates (0.2, 10) do not. Regret is
    least near `sqrt(8 log(m) / T)` for T rounds.

    Args:
      discount: Of older losses at each round; 1 never forgets, as the paper.
      prior: `[m]` of the experts; even by default.
    """

    def observe(state: MetaState, losses, weights):
        # Relative losses keep the totals small; a constant taken off all of them
        # changes no weight.
        relative = losses - jnp.sum(losses * weights)
        spread = jnp.max(losses) - jnp.min(losses)
        # Experts that are equal but for rounding have not been told apart.
        is_told = spread > 1e-6 * (1.0 + jnp.max(jnp.abs(losses)))
        state = MetaState(
            total=discount * state.total + jnp.where(is_told, relative, 0.0),
            count=discount * state.count + is_told,
            square=discount * state.square + jnp.where(is_told, spread**2, 0.0),
        )
        scale = jnp.sqrt(state.square / jnp.maximum(state.count, 1e-12))
        regret = state.total / jnp.maximum(scale, 1e-12)

        return state, _softmax(-rate * regret, prior)

    return Meta(observe, begin=lambda state: state)


def last_chunk(
    temperature: float = 0.2, prior: tuple[float, ...] | None = None
) -> Meta:
    """As OnlineSPEC's released commands: softmax of the last round's mean loss.

    Args:
      temperature: In units of the loss.
      prior: As for `hedge`.
    """

    def observe(state: MetaState, losses, weights):
        state = MetaState(state.total + losses, state.count + 1, state.square)
        return state, _softmax(-state.total / state.count / temperature, prior)

    return Meta(observe, begin=lambda state: init_meta(state.total.shape[0]))


def _softmax(logits: Float[Array, " m"], prior) -> Float[Array, " m"]:
    if prior is not None:
        # A prior of 0 is a logit of -inf: that expert never gets any weight.
        logits = logits + jnp.log(jnp.asarray(prior))

    return jax.nn.softmax(logits)
