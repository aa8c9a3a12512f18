# SPDX-License-Identifier: Apache-2.0
"""Attention over long caches of unequal rows, as a Pallas kernel for TPUs.

It goes over the slots in blocks and keeps what it needs of those before: the largest
score, the sum of the exponentials, and their product with the values (*FlashAttention*,
arXiv 2205.14135, for few queries). So scores never leave the chip, and of a row only
blocks are fetched that some query of it sees: not what lies behind its length, nor
before a sliding window. Neither is so with XLA's own products.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ospec_jax import sharding
from ospec_jax.models.cache import MASKED
from ospec_jax.typing import typed

BLOCKS = (512, 256, 128)
"""Slots that are fetched at once, if they divide a cache's. A block is the least that
is skipped; the next one is fetched while one is computed. Chosen, not measured."""
_MOST_BYTES = 1 << 20
"""Keys of a block: 512 slots of eight heads of 128. As many of values come with them,
twice, and 16 MB is what a kernel has of the chip unless it asks for more."""
_MOST_ENTRIES = 1 << 18
"""Of all heads' queries: 256 of eight key-value heads of 128, as prompts have them."""
_TILE_ROWS = 16
"""Rows of a tile of bfloat16."""


def can_attend(queries, keys) -> bool:
    """Whether the kernel knows these shapes; see `attend` for what they are."""
    return math.prod(queries.shape[1:]) <= _MOST_ENTRIES and block_of(keys) > 0


@typed
def attend(
    queries: Float[Array, "b t heads e"],
    keys: Float[Array, "b h e s"],
    values: Float[Array, "b h s e"],
    bias: Float[Array, "b t s"],
    mesh: sharding.AnyMesh | None = None,
    is_interpreted: bool = False,
) -> Float[Array, "b t heads_e"]:
    """Softmax attention as in `models.attention`, of shapes that `can_attend` knows.

    Args:
      bias: 0 or `MASKED`. Each query sees some slot.
      mesh: Devices that rows and heads are split over.
      is_interpreted: Run the kernel on any device, slowly.
    """
    b, t, heads, e = queries.shape
    h = keys.shape[1]
    group = heads // h
    num_rows = -(-group * t // _TILE_ROWS) * _TILE_ROWS
    fill = ((0, 0), (0, num_rows - group * t), (0, 0))

    # All queries that read one key-value head, `[b, h, g * t, e]`, as whole tiles.
    q = queries.reshape(b, t, h, group, e).transpose(0, 2, 3, 1, 4)
    q = (q * e**-0.5).reshape(b, h, group * t, e).astype(keys.dtype)
    q = jnp.pad(q, ((0, 0), *fill))
    # What is added to their scores, likewise: made once for all layers.
    added = jnp.pad(jnp.tile(bias.astype(keys.dtype), (1, group, 1)), fill)

    run = functools.partial(
        _attend_all, size=block_of(keys), is_interpreted=is_interpreted
    )
    if mesh is not None:
        # The compiler cannot split a kernel: each device runs it on what it has. A
        # prompt is a row alone, and on all groups of devices.
        rows, heads_axis = sharding.AXES
        along = rows if b % mesh.shape[rows] == 0 else None
        heads_split = PartitionSpec(along, heads_axis)
        places = (*[heads_split] * 3, *[PartitionSpec(along)] * 2)
        run = jax.shard_map(
            run, mesh=mesh, in_specs=places, out_specs=heads_split, check_vma=False
        )

    out = run(q, keys, values, added, seen_blocks(bias, block_of(keys)))
    out = out[:, :, : group * t].reshape(b, h, group, t, e)

    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, heads * e)


def block_of(keys) -> int:
    """Slots of a block, of keys `[b, h, e, s]`; 0 where none fits."""
    _, h, e, s = keys.shape
    fits = lambda size: h * e * size * keys.dtype.itemsize <= _MOST_BYTES
    return next((size for size in BLOCKS if s % size == 0 and fits(size)), 0)


@typed
def seen_blocks(bias: Float[Array, "b t s"], size: int) -> Int[Array, "b 3"]:
    """Of each row the first and the last block of which some query sees a slot, and the
    first from there on of which some query does not see all slots.

    Args:
      size: Slots of a block.
    """
    is_seen = (bias > MASKED / 2).reshape(*bias.shape[:2], -1, size)
    is_any = is_seen.any(axis=(1, 3))
    first = jnp.argmax(is_any, axis=-1)
    last = is_any.shape[-1] - 1 - jnp.argmax(is_any[:, ::-1], axis=-1)
    is_behind = jnp.arange(is_any.shape[-1]) >= first[:, None]
    partly = jnp.argmax(is_behind & ~is_seen.all(axis=(1, 3)), axis=-1)

    return jnp.stack([first, last, partly], axis=-1).astype(jnp.int32)


def _attend_all(q, keys, values, bias, seen, size: int, is_interpreted: bool):
    """The kernel on one device, `[b, h, rows, e]`.

    Args:
      q: `[b, h, rows, e]`, and `bias`, `[b, rows, s]`, of whole tiles of rows.
      seen: See `seen_blocks`.
      size: Slots of a block.
    """
    b, h, num_rows, e = q.shape
    # What is asked for again is not fetched: behind the last block that is seen, that
    # one; and before the first that is partly seen, its bias.
    at = lambda row, step, seen: jnp.minimum(seen[row, 0] + step, seen[row, 1])
    bias_at = lambda *i: (i[0], 0, jnp.maximum(at(*i), i[2][i[0], 2]))
    whole = lambda row, step, seen: (row, 0, 0, 0)
    return pl.pallas_call(
        _attend_block,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, keys.shape[3] // size),
            in_specs=[
                pl.BlockSpec((1, h, num_rows, e), whole),
                pl.BlockSpec((1, h, e, size), lambda *i: (i[0], 0, 0, at(*i))),
                pl.BlockSpec((1, h, size, e), lambda *i: (i[0], 0, at(*i), 0)),
                pl.BlockSpec((1, num_rows, size), bias_at),
            ],
            out_specs=pl.BlockSpec((1, h, num_rows, e), whole),
            scratch_shapes=[
                pltpu.VMEM((h, num_rows, 1), jnp.float32),
                pltpu.VMEM((h, num_rows, 1), jnp.float32),
                pltpu.VMEM((h, num_rows, e), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, h, num_rows, e), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=is_interpreted,
        name="attend",
    )(seen, q, keys, values, bias)


def _attend_block(seen, q, keys, values, bias, out, top, total, found):
    """One block of one row.

    Args:
      seen: Of all rows, in scalar memory. Others are blocks of the arrays above.
      top: The largest score of the blocks so far, `[h, rows, 1]`.
      total: Sum of exponentials relative to it, likewise.
      found: Their product with the values, `[h, rows, e]`.
    """
    row = pl.program_id(0)
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        found[...] = jnp.zeros_like(found)

    block = seen[row, 0] + step

    @pl.when(block <= seen[row, 1])
    def _():
        added = jnp.where(block >= seen[row, 2], bias[0].astype(jnp.float32), 0.0)
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        for head in range(q.shape[1]):
            scores = dot(q[0, head], keys[0, head]) + added
            before = top[head]
            now = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
            # Where a query has seen nothing yet all of this is rubbish of weight
            # exp(MASKED) once it has.
            weights = jnp.exp(scores - now)
            kept = jnp.exp(before - now)
            top[head] = now
            total[head] = kept * total[head] + weights.sum(axis=-1, keepdims=True)
            product = dot(weights.astype(values.dtype), values[0, head])
            found[head] = kept * found[head] + product

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[0] = found[...] / total[...]
