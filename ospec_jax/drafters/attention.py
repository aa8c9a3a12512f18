# SPDX-License-Identifier: Apache-2.0
"""How drafts attend: over a cache while drafting, over a window while training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import DraftConfig
from ospec_jax.models import cache as kv
from ospec_jax.models.attention import attend
from ospec_jax.models.layers import Numerics, split_groups
from ospec_jax.models.rope import rotary_angles, rotate
from ospec_jax.types import Pairs


def split_heads(
    qkv, config: DraftConfig, numerics: Numerics, positions, num_positions=None
):
    """Rotated queries and keys, and values, of a joint projection `[b, t, _]`.

    Returns:
      `[b, t, heads, e]`, and `[b, t, h, e]` twice.
    """
    c = config
    rest = config.num_heads + config.num_kv_heads
    qkv = qkv.reshape(*qkv.shape[:2], rest + c.num_kv_heads, c.head_dim)
    angles = rotary_angles(c, positions, num_positions)
    # Queries and keys are rotated together, as one array of `rest` heads: one pass.
    split = lambda x, *sizes: split_groups(x, sizes, numerics.num_groups, axis=2)
    rotated, values = split(qkv, rest, c.num_kv_heads)
    rotated = rotate(rotated, angles, numerics.is_row_invariant)

    return *split(rotated, c.num_heads, c.num_kv_heads), values


def attend_cached(qkv, config, numerics, positions, bias, cache: kv.KVCache, starts):
    """Appends to a one-layer cache and attends to it.

    Args:
      qkv: `[b, t, _]` joint projection.
      positions: `[b, t]`.
      bias: `[b, t, s]` of all slots that each entry may see; `config.sliding_window`
        takes those that lie too far behind it.
      starts: `[b]` slot of the first entry.

    Returns:
      `[b, t, heads * e]`, and the cache.
    """
    num_positions = cache.capacity if numerics.is_row_invariant else None
    q, k, v = split_heads(qkv, config, numerics, positions, num_positions)
    keys, values = kv.append(
        cache.keys[0], cache.values[0], k, v, starts, numerics.has_batched_writes
    )
    bias = kv.within_window(bias, positions, config.sliding_window)
    out = attend(q, keys, values, bias, numerics)
    return out, kv.KVCache(keys=(keys,), values=(values,))


def run_if_seen(run: Callable, cache: Any, blank: Any, pairs: Pairs, window: int):
    """`run(cache)`, unless no token that is yet to come attends to any of the pairs.

    That is so far in front of a prompt's end, for a draft of one layer that sees the
    last `window` tokens: what such a pair leaves in the cache nobody reads.

    Args:
      run: Returns a cache and a context.
      blank: In place of the context, if it is not run.
      window: 0 for all tokens.
    """
    if pairs.num_ahead is None or not window:
        return run(cache)

    is_unseen = pairs.num_ahead > window
    return jax.lax.cond(is_unseen, lambda cache: (cache, blank), run, cache)


def num_unseen(num_context: int, sliding_window: int) -> int:
    """Leading pairs of a context that no trained pair behind it attends to."""
    return max(num_context - sliding_window + 1, 0) if sliding_window else 0


def seen_in_window(positions, num_context: int, sliding_window: int = 0, depth=0):
    """Which entries of a window each trained one attends to, `[b, t - c, t]`.

    Args:
      sliding_window: See `DraftConfig`.
      depth: Of the draft that attends: so many tokens beyond its trained entry.
    """
    # Entry `num_context + i` sees all up to itself; negative positions are padding.
    order = jnp.arange(positions.shape[1])
    own = order[num_context:, None]
    is_before = order <= own
    if sliding_window:
        is_before &= order > own + depth - sliding_window

    return is_before & (positions >= 0)[:, None, :]


def attend_unrolled(q, k, v, own_keys, own_values, is_seen):
    """Attention of entry i to the verified ones it sees and to its own deeper drafts.

    Args:
      q: `[b, t, heads, e]` of the entries.
      k: `[b, s, h, e]` of the verified ones, `v` likewise.
      is_seen: `[b, t, s]`.
      own_keys: One `[b, t, h, e]` for each deeper draft, `own_values` likewise.
    """
    b, t, heads, e = q.shape
    h = k.shape[2]

    # Scores of verified entries `[b, h, g, t, s]`, and one column more for each deeper
    # draft, which only the entry that it was drafted from attends to: that is the path
    # that it stands on while drafting.
    q = q.reshape(b, t, h, heads // h, e) * e**-0.5
    scores = jnp.einsum("bthge,bshe->bhgts", q, k)
    scores = [jnp.where(is_seen[:, None, None], scores, -1e30)]
    scores += [jnp.einsum("bthge,bthe->bhgt", q, own)[..., None] for own in own_keys]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    num_keys = k.shape[1]
    out = jnp.einsum("bhgts,bshe->bthge", weights[..., :num_keys], v)

    # `[b, t, h, g, 1]` shares of `[b, t, h, 1, e]` values.
    for i, own in enumerate(own_values):
        share = weights[..., num_keys + i].transpose(0, 3, 1, 2)[..., None]
        out = out + share * own[:, :, :, None, :]

    return out.reshape(b, t, heads * e)


def attend_blocks(queries, own, context, is_seen, is_causal: bool = False):
    """Attention of blocks to the context that each sees, and each within itself.

    Args:
      queries: `[b, t * n, heads, e]` of `t` blocks of `n` entries.
      own: Keys and values of the same entries, `[b, t * n, h, e]`.
      context: Keys and values of the context, `[b, s, h, e]`.
      is_seen: `[b, t, n, s]`.
      is_causal: An entry sees those of its block up to itself; else all of them.
    """
    b, _, h, e = own[0].shape
    _, t, n, s = is_seen.shape
    heads = queries.shape[2]
    q = queries.reshape(b, t, n, h, heads // h, e) * e**-0.5
    own_k, own_v = (x.reshape(b, t, n, h, e) for x in own)
    k, v = context

    scores = jnp.einsum("btnhge,bshe->bhgtns", q, k)
    scores = jnp.where(is_seen[:, None, None], scores, -1e30)
    within = jnp.einsum("btnhge,btmhe->bhgtnm", q, own_k)
    if is_causal:
        within = jnp.where(np.tri(n, dtype=bool), within, -1e30)

    weights = jax.nn.softmax(jnp.concatenate([scores, within], axis=-1), axis=-1)
    out = jnp.einsum("bhgtns,bshe->btnhge", weights[..., :s], v)
    out = out + jnp.einsum("bhgtnm,btmhe->btnhge", weights[..., s:], own_v)

    return out.reshape(b, t * n, heads * e)
