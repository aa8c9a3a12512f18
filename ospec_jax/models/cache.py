# SPDX-License-Identifier: Apache-2.0
"""Key-value caches as values: an array per layer, or all stacked; unequal rows.

A layer's values are `[b, h, s, e]` and its keys `[b, h, e, s]`: both products of
attention then read the cache in the order in which it lies. Slots at or beyond a row's
length hold rubbish that no query attends to and that later writes replace, so nothing
is cleared.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.typing import struct, typed

MASKED = -1e30
"""Added to the scores of unattended slots: `exp` of it is exactly zero."""
_MOST_SLICES = 128
"""Rows that are written by a slice each."""


@struct
class KVCache:
    """Keys and values of all layers.

    Attributes:
      keys: One `[b, h, e, s]` array for each layer, or one `[layers, b, h, e, s]`.
      values: One `[b, h, s, e]` array for each layer, or one `[layers, b, h, s, e]`.
    """

    keys: Any
    values: Any

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return jax.tree.leaves(self.values)[0].shape[-2]

    @property
    def batch_axis(self) -> int:
        """Axis of the rows: behind that of the layers when they are stacked."""
        return 0 if isinstance(self.values, tuple) else 1


def init_cache(
    num_layers: int,
    batch_size: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype,
    is_stacked: bool = False,
) -> KVCache:
    """An empty cache; stacked for `Numerics.is_scanned`."""
    outer = (batch_size, num_kv_heads)
    if is_stacked:
        outer = (num_layers, *outer)
        return KVCache(
            keys=jnp.zeros((*outer, head_dim, capacity), dtype),
            values=jnp.zeros((*outer, capacity, head_dim), dtype),
        )

    zeros = lambda *shape: tuple(
        jnp.zeros((*outer, *shape), dtype) for _ in range(num_layers)
    )
    return KVCache(keys=zeros(head_dim, capacity), values=zeros(capacity, head_dim))


def write_rows(
    buffer,
    new,
    starts: Int[Array, " b"],
    axis: int = -2,
    is_batched: bool = False,
    layer=None,
    batch_axis: int = 0,
):
    """Writes entries into the slots of `axis` from `starts` on.

    Each row is a slice of its own, in place. In one scatter XLA:CPU would write them
    index by index, and XLA:TPU in a loop of a dozen small operations for every row. Of
    very many rows it is one all the same, for programs would grow with them.

    Args:
      buffer: `[b, ...]`, with `s` slots along `axis`; `[layers, b, ...]` with `layer`.
      new: `[b, ...]`, with `t` entries along `axis`.
      is_batched: In one scatter all the same; see `Numerics.has_batched_writes`.
      layer: Which of the stacked layers of `buffer` to write; None for all there are.
      batch_axis: Of `buffer` and `new` without a `layer`; 1 if both are stacked.
    """
    if layer is not None:
        batch_axis = 1
    zero = jnp.zeros((), starts.dtype)

    def put(buffer, entries, row, start):
        indices = [zero] * buffer.ndim
        if layer is not None:
            # The other layers are not touched.
            indices[0] = jnp.asarray(layer, starts.dtype)
            entries = entries[None]
        indices[batch_axis] = row
        indices[axis] = start
        # No slot lies before the first: to count from the end would be three
        # operations more for each axis of each row.
        return jax.lax.dynamic_update_slice(
            buffer, entries.astype(buffer.dtype), indices, allow_negative_indices=False
        )

    # The axis of the rows of what is written.
    new_axis = 0 if layer is not None else batch_axis
    if is_batched or len(starts) > _MOST_SLICES:
        one = lambda row, entries, start: put(
            jnp.expand_dims(row, batch_axis),
            jnp.expand_dims(entries, new_axis),
            zero,
            start,
        ).squeeze(batch_axis)
        return jax.vmap(one, (batch_axis, new_axis, 0), batch_axis)(buffer, new, starts)

    for row in range(len(starts)):
        number = jnp.full((), row, starts.dtype)
        entries = jax.lax.slice_in_dim(new, row, row + 1, axis=new_axis)
        buffer = put(buffer, entries, number, starts[row])

    return buffer


@typed
def append(
    keys: Float[Array, "*layers b h e s"],
    values: Float[Array, "*layers b h s e"],
    new_keys: Float[Array, "b t h e"],
    new_values: Float[Array, "b t h e"],
    starts: Int[Array, " b"],
    is_batched: bool = False,
    layer: Int[Array, ""] | None = None,
):
    """Writes a layer's new keys and values into the slots from `starts` on.

    Args:
      layer: Its number, when the caches of all layers are stacked.
    """
    how = is_batched, layer
    return (
        write_rows(keys, new_keys.transpose(0, 2, 3, 1), starts, -1, *how),
        write_rows(values, new_values.transpose(0, 2, 1, 3), starts, -2, *how),
    )


def gather_slots(buffer, slots: Int[Array, "b m"], axis: int = -2, batch_axis: int = 0):
    """Reads the given slots, along `axis`, of each row of `buffer`, `[b, ...]`."""
    take = lambda row, index: jnp.take(row, index, axis=axis, mode="clip")
    return jax.vmap(take, (batch_axis, 0), batch_axis)(buffer, slots)


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
    # All are read before any is written: a kept node may lie where an earlier one goes.
    slots = starts[:, None] + path
    rows = cache.batch_axis
    move = lambda buffer, axis: write_rows(
        buffer,
        gather_slots(buffer, slots, axis, rows),
        starts,
        axis,
        is_batched,
        batch_axis=rows,
    )
    each = lambda axis: lambda buffer: move(buffer, axis)
    return KVCache(
        keys=jax.tree.map(each(-1), cache.keys),
        values=jax.tree.map(each(-2), cache.values),
    )


@typed
def causal_bias(
    starts: Int[Array, " b"], num_tokens: int, capacity: int
) -> Float[Array, "b t s"]:
    """Bias of attention scores for consecutive tokens that begin at slot `starts`."""
    # Token i of a row sees slots up to its own, `starts + i`.
    slots = jnp.arange(capacity)
    last = starts[:, None] + jnp.arange(num_tokens)
    return jnp.where(slots <= last[:, :, None], 0.0, MASKED)


@typed
def within_window(
    bias: Float[Array, "b t s"], positions: Int[Array, "b t"], window: int
) -> Float[Array, "b t s"]:
    """Takes from each query the committed slots that are `window` or more behind it.

    A tree's own nodes lie in slots at or beyond their positions: they stay, as long as
    no path is longer than the window.

    Args:
      window: Slots that are seen, the query's own included; 0 for all.
    """
    if not window:
        return bias

    slots = jnp.arange(bias.shape[-1])
    return jnp.where(slots > positions[..., None] - window, bias, MASKED)


@typed
def tree_bias(
    starts: Int[Array, " b"], ancestor_mask: Bool[Array, "b t n"], capacity: int
) -> Float[Array, "b t s"]:
    """Bias for `t` tree nodes that see committed slots and their own ancestors.

    Args:
      ancestor_mask: Whether node j, in slot `starts + j`, is node i or its ancestor.
    """
    # Slots before `starts` are committed tokens, all visible; slot `starts + j` is node
    # j; what lies behind the tree is rubbish.
    offset = jnp.arange(capacity) - starts[:, None]
    num_nodes = ancestor_mask.shape[-1]
    index = jnp.clip(offset, 0, num_nodes - 1)
    pick = lambda mask, columns: mask[:, columns]
    is_ancestor = jax.vmap(pick)(ancestor_mask, index) & (offset < num_nodes)[:, None]

    return jnp.where((offset < 0)[:, None] | is_ancestor, 0.0, MASKED)
