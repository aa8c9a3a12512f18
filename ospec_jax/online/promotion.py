# SPDX-License-Identifier: Apache-2.0
"""When the learner's iterate is served.

`always` serves it after every update, as the papers do. `guarded` serves what has been
proved better. A *candidate* is the learner's iterate at one moment, frozen: it is
scored against what is served, on requests that came after that moment, so that neither
has trained on them, while the learner goes on. Exactly the candidate is served once it
has won; the learner begins anew from what is served once it has lost. A candidate
without a verdict after many requests is dropped, and the newest iterate becomes the
next one.

Windows of one request are alike, so that a request is one observation: the mean gain of
its windows in expected accepted tokens, divided by the number of drafted ones, x in
[-1, 1]. The test is by betting (Waudby-Smith and Ramdas 2023, "Estimating means of
bounded random variables by betting", https://arxiv.org/abs/2010.09686, section 4). If
the candidate is no better, E[x] <= 0 given the past, then

    wealth_n = mean over bets b of (1 + b x_1) ... (1 + b x_n)

is a nonnegative supermartingale that starts at 1, and by Ville's inequality exceeds 1 /
a at *any* time with probability a at most: it may be looked at after every request.
`-x` tests likewise whether the candidate is worse. The j-th candidate of a run gets the
level a_j = level / (j (j + 1)), which add up to `level`: so much is the probability
that a run ever serves a candidate that is no better, whatever becomes of the others.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.typing import struct

BETS = (0.125, 0.25, 0.5, 0.95)
"""Small ones win on noisy gains, large ones on clear ones; one of 1 could lose all."""


@struct
class GuardState:
    """The candidate, and the evidence on it.

    Attributes:
      candidate: Parameters. Without one, any that are in memory anyway.
      is_open: Whether there is a candidate.
      number: Candidates of the run so far, this one counted.
      num_requests: On which it has been scored.
      better: `[k]` log-wealth of each bet that it is better than what is served.
      worse: `[k]` that it is worse.
    """

    candidate: Any
    is_open: Bool[Array, ""]
    number: Int[Array, ""]
    num_requests: Int[Array, ""]
    better: Float[Array, " k"]
    worse: Float[Array, " k"]


def init_guard(params: Any) -> GuardState:
    """No candidate yet."""
    count = jnp.zeros((), jnp.int32)
    wealth = jnp.zeros(len(BETS))
    return GuardState(params, jnp.zeros((), bool), count, count, wealth, wealth)


def _compiled(move: Callable[..., GuardState]) -> Callable[..., GuardState]:
    """Compiles a transition; parameters stay outside, so that nothing copies them."""
    compiled = jax.jit(move)

    @functools.wraps(move)
    def run(guard: GuardState, *args) -> GuardState:
        light = compiled(guard.replace(candidate=None), *args)
        return light.replace(candidate=guard.candidate)

    return run


def nominate(guard: GuardState, params: Any) -> GuardState:
    """Freezes parameters as the next candidate."""
    return init_guard(params).replace(
        is_open=jnp.ones((), bool), number=guard.number + 1
    )


def dismiss(guard: GuardState, params: Any) -> GuardState:
    """Leaves the candidate, which may have won; `params` take its place in memory."""
    return init_guard(params).replace(number=guard.number)


def gain_of(
    candidate: Float[Array, " b"], served: Float[Array, " b"], weight, num_steps: int
) -> Float[Array, ""]:
    """A request's gain, between -1 and 1.

    Args:
      candidate: `[b]` expected accepted tokens of its windows; `served` likewise. A
        draft whose outputs are no numbers gets nothing accepted.
      weight: `[b]`; windows without any are none.
      num_steps: Tokens that are drafted, more than which cannot be accepted.
    """
    is_real = weight > 0
    accepted = lambda x: jnp.nan_to_num(x, nan=0.0)
    gains = jnp.where(is_real, accepted(candidate) - accepted(served), 0.0)
    mean = jnp.sum(gains) / jnp.maximum(jnp.sum(is_real), 1)
    return jnp.clip(mean / num_steps, -1.0, 1.0)


@_compiled
def observe(guard: GuardState, gain: Float[Array, ""]) -> GuardState:
    """Adds one request's gain."""
    bets = jnp.asarray(BETS)
    return guard.replace(
        num_requests=guard.num_requests + 1,
        better=guard.better + jnp.log1p(bets * gain),
        worse=guard.worse + jnp.log1p(-bets * gain),
    )


def verdict(guard: GuardState, level: float, patience: int) -> str:
    """`promote`, `rollback`, `expire` after `patience` requests without either, `wait`.

    Args:
      level: Probability that the run promotes any candidate that is no better.
    """
    is_open, number, num_requests, better, worse = jax.device_get(
        (guard.is_open, guard.number, guard.num_requests, guard.better, guard.worse)
    )
    if not is_open:
        return "wait"

    # Ville: wealth above 1 / a_j, with a_j = level / (j (j + 1)).
    needed = np.log(number * (number + 1.0) / level)
    if log_wealth(better) >= needed:
        return "promote"
    if log_wealth(worse) >= needed:
        return "rollback"

    return "expire" if num_requests >= patience else "wait"


def log_wealth(bets: np.ndarray) -> np.ndarray:
    """Of the mean of bets `[..., k]`, each given by its own log-wealth."""
    # In logs: wealth of a long run would overflow.
    return np.logaddexp.reduce(np.asarray(bets, float), axis=-1) - np.log(len(BETS))
