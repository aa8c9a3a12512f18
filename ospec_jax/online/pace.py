# SPDX-License-Identifier: Apache-2.0
"""Learning only while it pays: the gain of updates against what they cost.

Rounds of learning come in spans, each twice as long as the one before. In the last
rounds of a span its first and its newest iterate are compared on fresh windows, of
which neither has seen anything: a gain that the stream's drift cannot fake. It is taken
at the lower end of its 90% interval. How long it will be enjoyed nobody knows; a regime
that has lasted for T tokens is expected to last for T more (Lindy's law). So a span of
learning has paid if

    relative gain in tokens a pass * T > tokens that could be decoded meanwhile,

which at full pace, where a span is half of what was learned, asks that half for a gain
of half the share of time that learning takes. A span that has not paid doubles the
*stride*, and learning takes only every second, fourth, ... of its occasions; one that
has halves it. Longer spans need no more comparisons, and show smaller gains.

Served answers tell of drift: their acceptance rates, held against their running mean in
a one-sided CUSUM test (Page 1954). An alarm begins a new regime, at full pace.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax import sharding
from ospec_jax.decoding.request import Completion
from ospec_jax.typing import struct

MAX_STRIDE = 16
_ALARM = 6.0
"""CUSUM of standardised drops, less half a one each, that is taken for drift. Noise
alone gets there once in some thousands of answers, a drop by two deviations in five."""
_MEMORY = 64
"""Answers over which the running mean is taken."""
_NUM_KNOWN = 8
"""Answers of a regime before any can be out of line."""
_MIN_DEVIATION = 0.03


_Z_90 = 1.2816
"""One-sided 90% quantile of the normal distribution."""


@struct
class Gains:
    """Paired gains of windows.

    Attributes:
      count: Windows compared.
      total: Sum of their gains in expected accepted tokens.
      total_square: Sum of the squares.
    """

    count: Int[Array, ""]
    total: Float[Array, ""]
    total_square: Float[Array, ""]


@struct
class PaceState:
    """Where learning stands in its regime.

    Attributes:
      snapshot: What was learned when the span began.
      first: Rounds of a regime's first span; half as many are compared in each.
      span: Rounds of this one.
      num_rounds: Of it, so far.
      stride: Occasions to learn, for each that is taken.
      cost: Of an update, in the tokens that could be decoded meanwhile; measured once.
      spent: Of the span, likewise.
      num_tokens: Answer tokens since the regime began.
      gains: Of the newest iterate over the snapshot, in tokens a pass, by window.
      length: Sum of the windows' tokens a pass.
      num_answers: Of the regime.
      mean: Running mean of their acceptance rates.
      variance: Likewise.
      alarm: The CUSUM of their drops.
    """

    snapshot: Any
    first: Int[Array, ""]
    span: Int[Array, ""]
    num_rounds: Int[Array, ""]
    stride: Int[Array, ""]
    cost: Float[Array, ""]
    spent: Float[Array, ""]
    num_tokens: Int[Array, ""]
    gains: Gains
    length: Float[Array, ""]
    num_answers: Int[Array, ""]
    mean: Float[Array, ""]
    variance: Float[Array, ""]
    alarm: Float[Array, ""]


def start(snapshot: Any, first: int | Array, cost: float | Array) -> PaceState:
    """A regime's beginning, at full pace."""
    count = jnp.zeros((), jnp.int32)
    number = jnp.zeros(())
    first = jnp.asarray(first, jnp.int32)
    return PaceState(
        snapshot=snapshot,
        first=first,
        span=first,
        num_rounds=count,
        stride=count + 1,
        cost=jnp.asarray(cost, jnp.float32),
        spent=number,
        num_tokens=count,
        gains=Gains(count, number, number),
        length=number,
        num_answers=count,
        mean=number,
        variance=number,
        alarm=number,
    )


def _compiled(move: Callable[..., PaceState]) -> Callable[..., PaceState]:
    """Compiles a transition; the snapshot stays outside, so that nothing copies it."""
    compiled = jax.jit(move)

    @functools.wraps(move)
    def run(pace: PaceState, *args) -> PaceState:
        light = compiled(pace.replace(snapshot=None), *args)
        return light.replace(snapshot=pace.snapshot)

    return run


@_compiled
def record_answer(pace: PaceState, num_tokens, num_drafted, num_accepted) -> PaceState:
    """Notes an answer, and how many of its drafted tokens were accepted."""
    has_drafts = jnp.asarray(num_drafted) > 0
    # A running mean of the first answers, later an exponential one over `_MEMORY`.
    # Answers without drafts tell nothing.
    seen = pace.num_answers + has_drafts
    share = has_drafts / jnp.clip(seen, 1, _MEMORY)
    drop = pace.mean - num_accepted / jnp.maximum(num_drafted, 1)
    deviation = jnp.maximum(jnp.sqrt(pace.variance), _MIN_DEVIATION)
    # Half a deviation is allowed for: noise alone makes the CUSUM fall back to 0. One
    # odd answer counts as three deviations at most.
    step = jnp.clip(drop / deviation, -3.0, 3.0) - 0.5
    is_tested = has_drafts & (seen > _NUM_KNOWN)

    return pace.replace(
        num_tokens=pace.num_tokens + num_tokens,
        num_answers=seen,
        mean=pace.mean - share * drop,
        variance=(1.0 - share) * (pace.variance + share * drop**2),
        alarm=jnp.maximum(pace.alarm + step * is_tested, 0.0),
    )


def is_drift(pace: PaceState) -> bool:
    """Whether answers have become so much worse that a new regime is to `start`."""
    return float(pace.alarm) > _ALARM


def is_compared(pace: PaceState) -> bool:
    """Whether the coming round's windows are to be compared before it.

    See `record_gain`.
    """
    return int(pace.num_rounds) >= int(pace.span) - int(pace.first) // 2


@_compiled
def record_gain(
    pace: PaceState, newest: Float[Array, " b"], oldest: Float[Array, " b"], weight
) -> PaceState:
    """Adds windows' accepted tokens a pass, with the newest iterate and the snapshot.

    Args:
      weight: `[b]`; windows without any are none.
    """
    is_real = weight > 0
    old = pace.gains
    gains = jnp.where(is_real, newest - oldest, 0.0)
    lengths = jnp.where(is_real, 1.0 + newest, 0.0)
    return pace.replace(
        gains=Gains(
            count=old.count + jnp.sum(is_real),
            total=old.total + jnp.sum(gains),
            total_square=old.total_square + jnp.sum(gains**2),
        ),
        length=pace.length + jnp.sum(lengths),
    )


@_compiled
def record_update(pace: PaceState, num_updates) -> PaceState:
    """Notes a round of so many updates; a comparison counts as another one."""
    return pace.replace(
        num_rounds=pace.num_rounds + 1, spent=pace.spent + num_updates * pace.cost
    )


def is_over(pace: PaceState) -> bool:
    """Whether the span has ended; see `end_span`."""
    return int(pace.num_rounds) >= int(pace.span)


@_compiled
def end_span(pace: PaceState) -> PaceState:
    """Sets the pace of the next span, whose `snapshot` is to be taken."""
    # Lower end of the 90% interval of the mean gain, in tokens a pass, relative to the
    # tokens that a pass yields.
    count = jnp.maximum(pace.gains.count, 1)
    mean = pace.gains.total / count
    variance = jnp.maximum(pace.gains.total_square / count - mean**2, 0.0)
    margin = _Z_90 * jnp.sqrt(variance / jnp.maximum(count - 1, 1))
    gain = (mean - margin) / jnp.maximum(pace.length / count, 1.0)
    # Lindy's law: the regime is expected to last for as many tokens as it has had.
    has_paid = gain * pace.num_tokens > pace.spent
    stride = jnp.where(has_paid, pace.stride // 2, pace.stride * 2)
    stride = jnp.clip(stride, 1, MAX_STRIDE)
    # A single window has no variance, and changes nothing.
    is_told = pace.gains.count >= 2

    return pace.replace(
        stride=jnp.where(is_told, stride, pace.stride),
        span=2 * pace.span,
        num_rounds=jnp.zeros_like(pace.num_rounds),
        spent=jnp.zeros_like(pace.spent),
        gains=jax.tree.map(jnp.zeros_like, pace.gains),
        length=jnp.zeros_like(pace.length),
    )


def warm_up(pace: PaceState, num_windows: int) -> None:
    """Compiles all transitions.

    Args:
      num_windows: That are compared at once.
    """
    windows = jnp.zeros(num_windows)
    end_span(record_update(record_gain(pace, windows, windows, windows), 1))


def set_cost(pace: PaceState | None, cost: float) -> PaceState | None:
    """Fixes what an update costs, in tokens that could be decoded meanwhile."""
    if pace is None:
        return None

    return pace.replace(cost=jnp.asarray(sharding.agreed(cost), jnp.float32))


def observe(
    pace: PaceState | None, completion: Completion, take_snapshot: Callable[[], Any]
) -> PaceState | None:
    """Notes how an answer was drafted; after a shift, a new regime begins.

    Args:
      take_snapshot: Returns what has been learned so far.
    """
    if pace is None:
        return None

    stats = completion.stats
    pace = record_answer(
        pace,
        len(completion.token_ids),
        stats.num_draft_tokens,
        stats.num_accepted_tokens,
    )
    if is_drift(pace):
        # The cost of an update was measured once, and stays.
        return start(take_snapshot(), pace.first, pace.cost)

    return pace


def finish_round(
    pace: PaceState | None, num_updates: int, take_snapshot: Callable[[], Any]
) -> PaceState | None:
    """Notes a round of learning, and sets the pace where a span ends with it.

    Args:
      num_updates: Of the round; a comparison counts as another one.
      take_snapshot: Returns what has been learned so far.
    """
    if pace is None:
        return None

    pace = record_update(pace, num_updates)
    if is_over(pace):
        return end_span(pace).replace(snapshot=take_snapshot())

    return pace
