# SPDX-License-Identifier: Apache-2.0
"""From logits to the probabilities that tokens are drawn from.

Target, draft and plain decoding share these functions: exactness holds for the
*processed* distributions, so a temperature on one side only would be a silent error.
The vocabulary is never sorted (121 ms for 8 x 49,152 on two cores): a top-k prefix
answers nearly always, and an exact bisection of the threshold answers the rest.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ospec_jax.models.layers import row_sum
from ospec_jax.types import SamplingParams
from ospec_jax.typing import typed

_PREFIX = 64
"""Largest logits looked at before bisecting; top-p's mass nearly always lies there."""
_BLOCK = 256
"""Tokens of a block that is drawn before the token; about the vocabulary's root."""


@typed
def argmax(logits: Float[Array, "*rows v"]) -> Int[Array, "*rows"]:
    """The first of each row's largest entries.

    Two plain reductions: XLA:CPU does not vectorise `jnp.argmax`, which takes twice as
    long.
    """
    is_top = logits == jnp.max(logits, axis=-1, keepdims=True)
    last = logits.shape[-1] - 1
    index = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(is_top, index, last), axis=-1)


@typed
def processed_probs(
    logits: Float[Array, "b v"], params: SamplingParams, is_row_invariant: bool = True
) -> Float[Array, "b v"]:
    """Temperature, min-p, top-k, then top-p of what is left; temperature 0 is one-hot.

    Min-p drops tokens less probable than its share of the most probable one. The order
    is vLLM's.

    Tokens that tie with the last kept one are kept too, so that the result does not
    depend on their order.
    """
    # Temperature 0 is replaced by 1 in the division, and its rows by one-hot ones at
    # the end. The largest logit is taken off, so that `exp` cannot overflow.
    is_greedy = params.temperature == 0
    safe = jnp.where(is_greedy, 1.0, params.temperature)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / safe

    # Top-k, then top-p of what is left, each as a threshold on values: no sorting, and
    # ties with the last kept token stay.
    top, _ = jax.lax.top_k(scaled, min(_PREFIX, scaled.shape[-1]))
    kept = scaled >= _top_k_threshold(scaled, top, params.top_k)[:, None]
    if params.min_p is not None:
        # The most probable token's weight is 1.
        kept &= jnp.exp(scaled) >= params.min_p[:, None]

    weights = jnp.where(kept, jnp.exp(scaled), 0.0)
    total = row_sum(weights, is_row_invariant)[:, 0]
    threshold = _top_p_threshold(scaled, weights, top, params.top_p, total)
    weights = jnp.where(scaled >= threshold[:, None], weights, 0.0)
    probs = weights / row_sum(weights, is_row_invariant)
    best = argmax(logits)[:, None] == jnp.arange(logits.shape[-1])

    return jnp.where(is_greedy[:, None], best.astype(probs.dtype), probs)


def _top_k_threshold(scaled, top, top_k):
    """The top_k-th largest value of each row, -inf for top_k = 0."""
    width = top.shape[-1]
    is_in_prefix = top_k <= width
    threshold = jnp.take_along_axis(
        top, jnp.clip(top_k - 1, 0, width - 1)[:, None], axis=-1
    )[:, 0]
    # Both branches of a `cond` inside `vmap` would run; the rows are a plain batch axis
    # here, so the bisection runs only if one of them needs it.
    threshold = jax.lax.cond(
        jnp.all(is_in_prefix),
        lambda: threshold,
        lambda: jnp.where(
            is_in_prefix, threshold, _bisect(scaled, jnp.ones_like(scaled), top_k)
        ),
    )
    return jnp.where(top_k > 0, threshold, -jnp.inf)


def _top_p_threshold(scaled, weights, top, top_p, total):
    """Value of the last token needed for a mass of top_p, -inf for top_p = 1."""
    goal = top_p * total
    mass = jnp.cumsum(jnp.exp(top), axis=-1)
    is_enough = mass >= goal[:, None]
    is_in_prefix = jnp.any(is_enough, axis=-1) | (top_p >= 1)
    threshold = jnp.take_along_axis(
        top, jnp.argmax(is_enough, axis=-1)[:, None], axis=-1
    )[:, 0]
    threshold = jax.lax.cond(
        jnp.all(is_in_prefix),
        lambda: threshold,
        lambda: jnp.where(is_in_prefix, threshold, _bisect(scaled, weights, goal)),
    )

    return jnp.where(top_p < 1, threshold, -jnp.inf)


def _bisect(scaled, weights, goal):
    """Largest value t of each row with `sum(weights where scaled >= t) >= goal`.

    Values are at most 0, so the bit patterns of what they are below 0, as integers,
    grow as they fall: 32 halvings of that range find the exact float.
    """

    def halve(_, bounds):
        low, high = bounds  # low keeps too little mass, high enough
        middle = low + (high - low) // 2
        value = -jax.lax.bitcast_convert_type(middle, jnp.float32)
        mass = jnp.sum(jnp.where(scaled >= value[:, None], weights, 0.0), axis=-1)
        is_enough = mass >= goal

        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    rows = scaled.shape[0]
    # A bound below the bits of zero. As a float it is no number, which nothing is at
    # least as large as: it keeps no mass.
    low = jnp.full((rows,), -1, jnp.int32)
    high = jnp.full((rows,), 0x7F800000, jnp.int32)  # bits of +inf
    _, high = jax.lax.fori_loop(0, 32, halve, (low, high))

    return -jax.lax.bitcast_convert_type(high, jnp.float32)


@typed
def sample(keys: Key[Array, " b"], probs: Float[Array, "b v"]) -> Int[Array, " b"]:
    """Draws one token a row, each row with its own key; `probs` need not sum to one."""
    return jax.vmap(draw)(keys, probs)


def draw(key: Key[Array, ""], probs: Float[Array, " v"]) -> Int[Array, ""]:
    """Draws one token: first its block, then itself, each by the inverse of a sum.

    Two uniform numbers instead of one for every token of the vocabulary, of which the
    generator alone takes 2 ms for 49,152 (measured; this takes 0.1). Sums are plain
    additions in a fixed order, so that the row's neighbours cannot change them.
    """
    size = probs.shape[-1]
    # A vocabulary that is no multiple of the block is filled with zeros, never drawn.
    blocks = jnp.pad(probs, (0, -size % _BLOCK)).reshape(-1, _BLOCK)
    uniforms = jax.random.uniform(key, (2,))

    block = _draw_index(uniforms[0], _halved_sum(blocks))
    return block * _BLOCK + _draw_index(uniforms[1], blocks[block])


def _halved_sum(x):
    """Sums over the last axis, a power of two long, half onto half."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]

    return x[..., 0]


def _draw_index(uniform, weights):
    """The first index with more than `uniform` of the sum up to it, never a zero's."""
    size = weights.shape[-1]
    sums = jnp.cumsum(weights)
    index = jnp.arange(size, dtype=jnp.int32)
    # Rounding may leave no such index: then it is the last one that weighs anything.
    priority = jnp.where(sums > uniform * sums[-1], 2 * size - index, index)
    return jnp.argmax(jnp.where(weights > 0, priority, -1)).astype(jnp.int32)


def gumbel(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Gumbel noise whose upper tail is as fine as float32 is.

    By default JAX makes it from 23 random bits. Its largest values are then few and far
    between, and tokens of probability below 1e-6 are drawn too seldom: 0.0070 of the
    time instead of 0.0098, for 49,151 of them that weigh 2e-7 each.
    """
    return jax.random.gumbel(key, shape, mode="high")


@typed
def sample_without_replacement(
    keys: Key[Array, " b"], probs: Float[Array, "b v"], num_samples: int
) -> Int[Array, "b c"]:
    """Distinct draws, in order: the largest Gumbel-perturbed log-probabilities."""

    def draw(key, p):
        return jax.lax.top_k(jnp.log(p) + gumbel(key, p.shape), num_samples)[1]

    return jax.vmap(draw)(keys, probs).astype(jnp.int32)


@typed
def is_any_of(tokens: Int[Array, "b m"], ids: tuple[int, ...]) -> Bool[Array, "b m"]:
    """Whether each token is one of a few ids."""
    found = jnp.zeros(tokens.shape, bool)
    for i in ids:
        found |= tokens == i

    return found
