# SPDX-License-Identifier: Apache-2.0
"""Key-value caches as values: one array per layer, rows of unequal length.

A layer's values are `[b, h, s, e]` and its keys `[b, h, e, s]`: both products of
attention then read the cache in the order in which it lies. Slots at or beyond a row's
length hold rubbish that no query attends to and that later writes replace, so nothing
is cleared.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.typing import typed

_MASKED = -1e30
"""Added to the scores of unattended slots: `exp` of it is exactly zero."""


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers.

    Attributes:
      keys: One `[b, h, e, s]` array for each layer.
      values: One `[b, h, s, e]` array for each layer.
    """

    keys: tuple
    values: tuple

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.values[0].shape[2]


def init_cache(
    num_layers: int, batch_size: int, num_kv_heads: int, capacity: int, head_dim: int,
    dtype,
) -> KVCache:  # fmt: skip
    """An empty cache."""
    outer = (batch_size, num_kv_heads)
    zeros = lambda *shape: tuple(
        jnp.zeros((*outer, *shape), dtype) for _ in range(num_layers)
    )
    return KVCache(keys=zeros(head_dim, capacity), values=zeros(capacity, head_dim))


def write_rows(
    buffer, new, starts: Int[Array, " b"], axis: int = -2, is_batched: bool = False
):
    """Writes entries into the slots of `axis` from `starts` on.

    Args:
      is_batched: In one scatter, instead of one in-place slice a row; see
        `Numerics.has_batched_writes`.
    """
    if is_batched:
        put = lambda row, entries, start: jax.lax.dynamic_update_slice_in_dim(
            row, entries.astype(row.dtype), start, axis
        )
        return jax.vmap(put)(buffer, new, starts)
    zero = jnp.zeros((), starts.dtype)
    for row in range(buffer.shape[0]):
        indices = [zero] * buffer.ndim
        indices[0], indices[axis] = jnp.full((), row, starts.dtype), starts[row]
        buffer = jax.lax.dynamic_update_slice(
            buffer, new[row : row + 1].astype(buffer.dtype), indices
        )
    return buffer


@typed
def append(
    keys: Float[Array, "b h e s"],
    values: Float[Array, "b h s e"],
    new_keys: Float[Array, "b t h e"],
    new_values: Float[Array, "b t h e"],
    starts: Int[Array, " b"],
    is_batched: bool = False,
):
    """Writes a layer's new keys and values into the slots from `starts` on."""
    return (
        write_rows(keys, new_keys.transpose(0, 2, 3, 1), starts, -1, is_batched),
        write_rows(values, new_values.transpose(0, 2, 1, 3), starts, -2, is_batched),
    )


def gather_slots(buffer, slots: Int[Array, "b m"], axis: int = -2):
    """Reads the given slots, along `axis`, of each row."""
    take = lambda row, index: jnp.take(row, index, axis=axis, mode="clip")
    return jax.vmap(take)(buffer, slots)


@typed
def keep_path(
    cache: KVCache,
    starts: Int[Array, " b"],
    path: Int[Array, "b m"],
    is_batched: bool = False,
) -> KVCache:
    """Moves an accepted path's entries to the slots behind the committed ones.

    Args:
      starts: Number of committed tokens of each row.
      path: Tree nodes to keep, in order; node i lies in slot `starts + i`.
    """
    slots = starts[:, None] + path
    move = lambda buffer, axis: write_rows(
        buffer, gather_slots(buffer, slots, axis), starts, axis, is_batched
    )
    return KVCache(
        keys=tuple(move(keys, -1) for keys in cache.keys),
        values=tuple(move(values, -2) for values in cache.values),
    )


@typed
def causal_bias(
    starts: Int[Array, " b"], num_tokens: int, capacity: int
) -> Float[Array, "b t s"]:
    """Bias of attention scores for consecutive tokens that begin at slot `starts`."""
    slots = jnp.arange(capacity)
    last = starts[:, None] + jnp.arange(num_tokens)
    return jnp.where(slots <= last[:, :, None], 0.0, _MASKED)


@typed
def tree_bias(
    starts: Int[Array, " b"], ancestor_mask: Bool[Array, "b t n"], capacity: int
) -> Float[Array, "b t s"]:
    """Bias for `t` tree nodes that see committed slots and their own ancestors.

    Args:
      ancestor_mask: Whether node j, in slot `starts + j`, is node i or its ancestor.
    """
    offset = jnp.arange(capacity) - starts[:, None]
    num_nodes = ancestor_mask.shape[-1]
    index = jnp.clip(offset, 0, num_nodes - 1)
    pick = lambda mask, columns: mask[:, columns]
    is_ancestor = jax.vmap(pick)(ancestor_mask, index) & (offset < num_nodes)[:, None]
    return jnp.where((offset < 0)[:, None] | is_ancestor, 0.0, _MASKED)
