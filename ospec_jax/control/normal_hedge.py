# SPDX-License-Identifier: Apache-2.0
"""Weights without a rate to tune: NormalHedge and AdaNormalHedge.

Both weigh an expert by how much better than the weighted mean it has been, and not at
all where it has been worse. Nothing need be known of the number of rounds, nor of the
losses' range, as long as that is [0, 1] at most.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ospec_jax.control.weighting import Meta, namespace_of
from ospec_jax.typing import struct

_NUM_STEPS = 12
"""Of Newton's method, from a bound within a factor 1 + log(m) of the root: it converges
from one side, doubling the digits each time."""


@struct
class RegretState:
    """How much better than the weighted mean each expert has been.

    Attributes:
      regret: `[m]` sum of the weighted mean's loss less the expert's.
      spread: `[m]` sum of these differences' sizes.
    """

    regret: Float[Array, " m"]
    spread: Float[Array, " m"]


def init_regret(num_experts: int) -> RegretState:
    """No losses."""
    return RegretState(jnp.zeros(num_experts), jnp.zeros(num_experts))


def normal_hedge() -> Meta:
    """NormalHedge (Chaudhuri, Freund and Hsu, arXiv 0903.2851).

    With `r_i` the positive part of an expert's regret, the scale c solves `mean(exp(r_i
    ** 2 / (2 c))) = e`, and weights are `r_i exp(r_i ** 2 / (2 c))`, made to sum to
    one. Regret grows as `sqrt(T log(m))`.
    """

    def observe(state: RegretState, losses, weights):
        state = _book(state, losses, weights)
        return state, normal_weights(state.regret)

    return Meta(observe, begin=lambda state: state, init=init_regret)


def normal_weights(regret: Float[Array, " m"]) -> Float[Array, " m"]:
    """The weights of `normal_hedge`; even where nobody is ahead of the mean."""
    namespace = namespace_of(regret)
    count = regret.shape[0]
    positive = namespace.maximum(regret, 0.0)
    largest = positive.max()
    is_any = largest > 0
    relative = (positive / namespace.where(is_any, largest, 1.0)) ** 2
    # Where nobody is ahead all count alike, and the arithmetic stays finite.
    relative = namespace.where(is_any, relative, 1.0)

    # In units of the largest square, `largest ** 2 / (2 c)` lies between 1, where only
    # one expert counts less than e, and 1 + log(m), where all the mean is its own. The
    # logarithm of the mean is convex and increasing: from above Newton's steps only
    # ever fall, down to the root.
    scale = 1.0 + np.log(count)
    for _ in range(_NUM_STEPS):
        powers = namespace.exp(scale * (relative - 1.0))
        total = powers.sum()
        excess = scale + namespace.log(total / count) - 1.0
        scale = scale - excess * total / (powers * relative).sum()

    found = namespace.sqrt(relative) * namespace.exp(scale * (relative - 1.0))

    return found / found.sum()


def ada_normal_hedge() -> Meta:
    """AdaNormalHedge (Luo and Schapire, arXiv 1502.05934).

    With `phi(R, C) = exp(max(R, 0) ** 2 / (3 C))` of an expert's regret R and spread C,
    its weight is `phi(R + 1, C + 1) - phi(R - 1, C + 1)`, made to sum to one. Regret is
    at most `sqrt(3 C (log(m) + log(B) + log(1 + log(m))))` with `B = 5 / 2 + 3 / 2
    log(1 + T)`: little against an expert that hardly ever differs from the mean.
    """

    def observe(state: RegretState, losses, weights):
        state = _book(state, losses, weights)
        namespace = namespace_of(losses)
        count = losses.shape[0]
        # Exponents grow with T: only their differences are ever raised to.
        power = lambda regret: (
            namespace.maximum(regret, 0.0) ** 2 / (3.0 * (state.spread + 1.0))
        )
        high = power(state.regret + 1.0)
        low = power(state.regret - 1.0)
        found = namespace.exp(high - high.max()) - namespace.exp(low - high.max())
        is_any = found.sum() > 0
        total = namespace.where(is_any, found.sum(), 1.0)

        return state, namespace.where(is_any, found / total, 1.0 / count)

    return Meta(observe, begin=lambda state: state, init=init_regret)


def _book(state: RegretState, losses, weights) -> RegretState:
    gain = (weights * losses).sum() - losses
    return RegretState(state.regret + gain, state.spread + abs(gain))
