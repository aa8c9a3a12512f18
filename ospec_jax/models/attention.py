# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention over a cache, with an arbitrary bias.

`xla` is the reference, and what every platform has. `cudnn` is the fused kernel that
`jax.nn.dot_product_attention` reaches on NVIDIA's devices, for bfloat16; it reads keys
by slot, so each layer's are transposed for it. `pallas` is a kernel for TPUs that reads
no more of a row than there is; see `models.flash`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.kernels import native
from ospec_jax.models import flash
from ospec_jax.models.layers import WIDE, Numerics, row_sum
from ospec_jax.typing import typed


@typed
def attend(
    queries: Float[Array, "b t heads e"],
    keys: Float[Array, "b h e s"],
    values: Float[Array, "b h s e"],
    bias: Float[Array, "b t s"],
    numerics: Numerics,
) -> Float[Array, "b t heads_e"]:
    """Softmax attention; query head i reads key-value head `i // group`.

    The group and token axes are folded into one, so that each product has
    `group * t` rows. The normaliser divides after the product with the values. Both
    sums over slots are products of at least `WIDE` columns, so that the exact zeros of
    masked slots, behind a token's own or between a tree's, keep each row's bits.
    """
    if numerics.is_native and native.can_attend(queries, keys):
        return native.attention(queries, keys, values, bias)
    if numerics.attention == "cudnn":
        return by_library(queries, keys, values, bias, numerics.attention)
    if numerics.attention == "pallas" and flash.can_attend(queries, keys):
        return flash.attend(queries, keys, values, bias, numerics.mesh)

    is_row_invariant = numerics.is_row_invariant
    b, t, heads, e = queries.shape
    h = keys.shape[1]

    # Rows of the products: all queries that read one key-value head, `[b, h, g * t,
    # e]`.
    q = queries.reshape(b, t, h, heads // h, e).transpose(0, 2, 3, 1, 4)
    q = (q * e**-0.5).reshape(b, h, heads // h * t, e).astype(keys.dtype)
    scores = jnp.einsum("bhqe,bhes->bhqs", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, h, heads // h, t, -1) + bias[:, None, None]
    # Exponentials relative to the largest score cannot overflow. The shift cancels in
    # the quotient, so no gradient goes through it.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top).reshape(b, h, heads // h * t, -1)
    total = row_sum(weights, is_row_invariant, WIDE)
    if is_row_invariant:
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, -e % WIDE)))

    out = (
        jnp.einsum(
            "bhqs,bhse->bhqe",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )[..., :e]
        / total
    )
    out = out.reshape(b, h, heads // h, t, e).transpose(0, 3, 1, 2, 4)

    return out.reshape(b, t, heads * e)


def by_library(queries, keys, values, bias, kind: Literal["xla", "cudnn"]):
    """`attend` by JAX's own function, in the type of the cache.

    Shapes are those of `attend`.
    """
    b, t, heads, e = queries.shape
    # The library wants tokens before heads, `[b, s, h, e]`.
    out = jax.nn.dot_product_attention(
        queries.astype(keys.dtype),
        keys.transpose(0, 3, 1, 2),
        values.transpose(0, 2, 1, 3),
        bias[:, None].astype(keys.dtype),
        implementation=kind,
    )
    return out.reshape(b, t, heads * e).astype(jnp.float32)
