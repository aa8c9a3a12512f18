# SPDX-License-Identifier: Apache-2.0
"""When the learner's iterate is served.

`always` serves it after every update, as the papers do. `guarded` scores each fresh
window with the served and the learning parameters *before* training on it, and promotes
once the paired gain in accepted tokens is positive with 90% confidence; if the iterate
is worse with the same confidence it is rolled back to what is served.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Z_90 = 1.2816
"""One-sided 90% quantile of the normal distribution."""


@flax.struct.dataclass
class GuardState:
    """Paired gains since the last promotion or rollback.

    Attributes:
      count: Windows compared.
      total: Sum of gains in expected accepted tokens.
      total_square: Sum of their squares.
    """

    count: Int[Array, ""]
    total: Float[Array, ""]
    total_square: Float[Array, ""]


def init_guard() -> GuardState:
    """No windows compared."""
    zero = jnp.zeros(())
    return GuardState(jnp.zeros((), jnp.int32), zero, zero)


def observe(
    guard: GuardState, gains: Float[Array, " b"], weight: Float[Array, " b"]
) -> GuardState:
    """Adds the gains of windows with positive weight."""
    is_real = weight > 0
    return GuardState(
        count=guard.count + jnp.sum(is_real),
        total=guard.total + jnp.sum(jnp.where(is_real, gains, 0.0)),
        total_square=guard.total_square + jnp.sum(jnp.where(is_real, gains**2, 0.0)),
    )


def interval(guard: GuardState) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean gain, and how far below and above it one-sided 90% bounds are."""
    count = jnp.maximum(guard.count, 1)
    mean = guard.total / count
    variance = jnp.maximum(guard.total_square / count - mean**2, 0.0)
    return mean, Z_90 * jnp.sqrt(variance / jnp.maximum(count - 1, 1))


def verdict(guard: GuardState, min_count: int) -> str:
    """`promote`, `rollback` or `wait`."""
    if int(guard.count) < max(min_count, 2):
        return "wait"
    mean, margin = (float(x) for x in interval(guard))
    if mean - margin > 0:
        return "promote"
    return "rollback" if mean + margin < 0 else "wait"
