# SPDX-License-Identifier: Apache-2.0
"""How experts are weighed by their losses: step sizes of an ensemble, or drafters.

Rules are pure transitions. They run on JAX's arrays within an update, and on NumPy's on
the host, where a controller asks them between two steps.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def init_meta(num_experts: int) -> MetaState:
    """No losses."""
    zero = jnp.zeros(())
    return MetaState(jnp.zeros(num_experts), zero, zero)


class Meta(NamedTuple):
    """A rule for weights, which begin even, or at a rule's prior.

    Attributes:
      observe: `(state, losses [m], weights [m]) -> (state, weights [m])`.
      begin: `state -> state`, at a new round of traffic.
      init: `num_experts -> state`, before any losses.
    """

    observe: Callable
    begin: Callable
    init: Callable[[int], Any] = init_meta


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
        namespace = namespace_of(losses)
        # Relative losses keep the totals small; a constant taken off all of them
        # changes no weight.
        relative = losses - namespace.sum(losses * weights)
        spread = namespace.max(losses) - namespace.min(losses)
        # Experts that are equal but for rounding have not been told apart.
        is_told = spread > 1e-6 * (1.0 + namespace.max(namespace.abs(losses)))
        state = MetaState(
            total=discount * state.total + namespace.where(is_told, relative, 0.0),
            count=discount * state.count + is_told,
            square=discount * state.square + namespace.where(is_told, spread**2, 0.0),
        )
        scale = namespace.sqrt(state.square / namespace.maximum(state.count, 1e-12))
        regret = state.total / namespace.maximum(scale, 1e-12)

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


def fixed_hedge(rate: float) -> Meta:
    """Hedge as in the books: `p_i ~ exp(-rate * L_i)`, for losses in [0, 1].

    After T rounds the regret is at most `log(m) / rate + rate * T / 8`: for T known
    beforehand the best rate is `sqrt(8 log(m) / T)`.
    """
    return _exponential(lambda count, num_experts: rate)


def anytime_hedge() -> Meta:
    """Hedge whose rate falls as rounds go by: `sqrt(8 log(m) / t)` after t of them.

    Regret is at most `sqrt(2 T log(m)) + sqrt(log(m) / 8)` for every T, which need not
    be known (Cesa-Bianchi and Lugosi, theorem 2.3).
    """
    return _exponential(
        lambda count, num_experts: (8.0 * np.log(num_experts) / count) ** 0.5
    )


def _exponential(rate_of: Callable) -> Meta:
    def observe(state: MetaState, losses, weights):
        state = MetaState(state.total + losses, state.count + 1, state.square)
        rate = rate_of(state.count, losses.shape[0])
        return state, _softmax(-rate * state.total, None)

    return Meta(observe, begin=lambda state: state)


def fixed_share(rate: float, share: float) -> Meta:
    """Hedge that gives a part of every round's weight back to all alike.

    So an expert that was bad for long is found again within `log(m / share) / rate`
    rounds or so of being the best (Herbster and Warmuth, 1998). Against any sequence
    of experts with S shifts in T rounds regret is at most `(log(m) + S log((m - 1) /
    share) + (T - 1 - S) log(1 / (1 - share))) / rate + rate * T / 8`.

    Args:
      rate: As for `fixed_hedge`.
      share: Of the weight, that is spread evenly over the other experts.
    """

    def observe(state: MetaState, losses, weights):
        namespace = namespace_of(losses)
        # The weights are all that there is to remember: a total of losses would bring
        # the old ones back.
        posterior = weights * namespace.exp(-rate * (losses - losses.min()))
        posterior = posterior / posterior.sum()
        others = (1.0 - posterior) / max(losses.shape[0] - 1, 1)
        state = state.replace(count=state.count + 1)

        return state, (1.0 - share) * posterior + share * others

    return Meta(observe, begin=lambda state: state)


def follow_leader(discount: float = 1.0) -> Meta:
    """All the weight to the expert of the least loss so far, of equal ones the first.

    Where losses are drawn alike every round nothing is better; an adversary can make
    it wrong every time.

    Args:
      discount: Of older losses at each round; 1 never forgets.
    """

    def observe(state: MetaState, losses, weights):
        total = discount * state.total + losses
        state = MetaState(total, discount * state.count + 1, state.square)
        index = namespace_of(losses).arange(losses.shape[0])

        return state, (index == total.argmin()).astype(total.dtype)

    return Meta(observe, begin=lambda state: state)


def namespace_of(array: Any) -> ModuleType:
    """The library that an array is of: rules run on the device and on the host."""
    return jnp if isinstance(array, jax.Array) else np


def _softmax(logits: Float[Array, " m"], prior) -> Float[Array, " m"]:
    namespace = namespace_of(logits)
    if prior is not None:
        # A prior of 0 is a logit of -inf: that expert never gets any weight.
        logits = logits + namespace.log(namespace.asarray(prior))
    if namespace is jnp:
        return jax.nn.softmax(logits)

    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
