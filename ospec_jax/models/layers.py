# SPDX-License-Identifier: Apache-2.0
"""Layers shared by targets and drafts.

**Row invariance.** Speculative decoding computes the same token's logits in passes of
different shapes (one row, K + 1 rows, a prefill chunk), and greedy equality holds bit
for bit only if a row's value does not depend on how many rows stand beside it. On
XLA:CPU matrix products have this property when the weights are stored `[out, in]`,
there are at least two rows, and nothing is fused with them (see `_platform`);
vectorised reductions have not. So with `Numerics.is_row_invariant` every sum over a row
is itself a product with ones. Native layers (`kernels.native.decoder_layer`) compute
row by row, and need none of this.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float, Int

from ospec_jax import sharding
from ospec_jax.config import AttentionKind, ConfigError, Precision
from ospec_jax.kernels.native import int8_linear
from ospec_jax.typing import typed

_ONES = 8
"""Columns of ones in `row_sum`: fewer than two take another code path on XLA:CPU."""

WIDE = 64
"""Columns from which a product adds its terms strictly one after the other.

Narrower products keep several partial sums, so that zeros *between* the terms, as a
tree's other branches put them, change the last bit. Measured with AVX-512.
"""


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model computes, as opposed to what.

    Attributes:
      precision: Of weights and products. `int8` quantises weights by output channel
        and activations by row, and accumulates in int32.
      is_row_invariant: Keep a row's bits independent of the other rows (for the CPU).
      is_native: int8 layers, products and attention are those of `ospec_jax.kernels`.
      num_groups: Groups in which rows of fused products lie; see `sharding`.
      num_row_groups: Groups of rows of a batch that lie on different devices.
      has_dear_launches: Every operation on an array is a program of its own that the
        device is handed, as on NVIDIA's: few large ones are better than many small.
      is_scanned: Trace one layer and run it over stacked weights and caches, so that
        compiling takes no longer for more layers. XLA:CPU and XLA:GPU copy each layer's
        weights at every step, which on an H100 takes longer than reading them. Native
        layers are one call then, and nothing is copied. See `llama.stack_layers`.
      attention: Who computes it; see `models.attention`.
      mesh: Devices that it is split over, for who must know: a kernel of Pallas.
    """

    precision: Precision = "float32"
    is_row_invariant: bool = True
    is_native: bool = False
    num_groups: int = 1
    num_row_groups: int = 1
    has_dear_launches: bool = False
    is_scanned: bool = False
    attention: AttentionKind = "xla"
    mesh: sharding.AnyMesh | None = None

    def __post_init__(self):
        if self.attention == "cudnn" and self.precision != "bfloat16":
            raise ConfigError(
                f"cuDNN's attention reads bfloat16, but the precision is "
                f"{self.precision}; use bfloat16, or attention='xla'"
            )
        # A product reads a layer of stacked caches where it lies; a kernel gets a copy.
        if self.attention == "pallas" and self.is_scanned:
            raise ConfigError(
                "attention='pallas' takes layers one by one, but they are scanned; use "
                "is_scanned=False, --no-scan, or attention='xla'"
            )

    @property
    def cache_dtype(self):
        """Type of cached keys and values."""
        return jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32

    @property
    def has_batched_writes(self) -> bool:
        """Whether one scatter writes the cache entries of all rows.

        It stays local where rows are split over devices: a slice for each row would be
        written by all of them, and caches would move. Else it is slower, but where each
        slice would be a launch.
        """
        return self.num_row_groups > 1 or self.has_dear_launches

    @property
    def pads_lone_rows(self) -> bool:
        """Whether a product of one row gets a second one, of zeros.

        XLA:TPU does a lone row's product by adding up on its vector unit, in float32:
        by its own estimate that takes three to four times as long as reading the
        weights. Of two rows, one unused, it is a product of the matrix unit.
        """
        return not self.is_row_invariant and self.precision != "float32"

    def for_training(self) -> "Numerics":
        """In float32, of rows that need not be independent, with the same kernels.

        Trained kernels are float32; where a draft is scored as it is served, they are
        int8, and these take both.
        """
        return Numerics(
            "float32",
            is_row_invariant=False,
            is_native=self.is_native,
            num_groups=self.num_groups,
            num_row_groups=self.num_row_groups,
            has_dear_launches=self.has_dear_launches,
        )


@typed
def row_sum(
    x: Float[Array, "*rows n"], is_row_invariant: bool, num_columns: int = _ONES
) -> Float[Array, "*rows 1"]:
    """Sums over the last axis; see the module's text for why as a product.

    Args:
      num_columns: `WIDE` where zeros between the terms must not change the sum.
    """
    if not is_row_invariant:
        return jnp.sum(x, axis=-1, keepdims=True)

    ones = jnp.ones((num_columns, x.shape[-1]), x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    num_rows = len(flat)
    if num_rows == 1:  # takes another path, see `at_least_two_rows`
        flat = jnp.concatenate([flat, flat])

    sums = _contract_last(flat, ones, jnp.float32)[:num_rows, :1]

    return sums.reshape(*x.shape[:-1], 1)


def quantize_rows(x):
    """Rounds each row to int8 and returns it with its scale, `x ~ q * scale`.

    Args:
      x: `[..., n]`.

    Returns:
      `[..., n]` int8 and `[..., 1]` float32.
    """
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # XLA may turn a division by a constant into this product, which rounds otherwise.
    scale = jnp.maximum(amax, 1e-12) * np.float32(1 / 127)
    return jnp.round(x / scale).astype(jnp.int8), scale


def _contract_last(x, kernel, dtype):
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, kernel, dims, preferred_element_type=dtype)


def linear(x, params, numerics: Numerics):
    """`x @ kernel.T` for `params = {kernel, [scale], [bias]}`, in float32.

    `x` is `[..., in]`, the kernel `[out, in]`, scale and bias `[out]`.

    The kernel's own type says how it is multiplied, so one tree of parameters may mix
    int8 and floating-point layers.
    """
    kernel = params["kernel"]
    if numerics.pads_lone_rows and x.size == x.shape[-1]:
        rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return linear(rows, params, numerics)[:1].reshape(*x.shape[:-1], -1)
    if kernel.dtype == jnp.int8 and numerics.is_native:
        y = int8_linear(x.astype(jnp.float32), kernel, params["scale"])
    elif kernel.dtype == jnp.int8:
        # Sums of integers are exact, so their order does not matter.
        quantized, scale = quantize_rows(x)
        y = _contract_last(quantized, kernel, jnp.int32).astype(jnp.float32)
        y = y * scale * params["scale"]
    elif numerics.precision == "bfloat16":
        y = _contract_last(
            x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), jnp.float32
        )
    else:
        y = _contract_last(x, kernel.astype(x.dtype), jnp.float32)

    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]):
    """`module.param`, which does not trace `init` for the shape of a value it is given.

    A sixth of what it takes to trace a step goes to that.

    Raises:
      ScopeParamShapeError: The value's shape is not `shape`.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)

    value = module.get_variable("params", name)
    if value.shape != shape:
        path = "/".join(module.path)
        raise ScopeParamShapeError(name, path, value.shape, shape)

    return value


class Linear(nn.Module):
    """A projection with its kernel stored `[out, in]`.

    Its input's range by channel goes into the collection `ranges` if that is mutable.
    """

    features: int
    numerics: Numerics
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        # Else it would be compiled away, but traced with each product; see `smoothing`.
        if self.is_mutable_collection("ranges"):
            self._note_range(x)
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        shape = (self.features, x.shape[-1])
        params = {"kernel": parameter(self, "kernel", init, shape)}
        if params["kernel"].dtype == jnp.int8:
            params["scale"] = self.get_variable("params", "scale")

        if self.use_bias:
            zeros = nn.initializers.zeros
            params["bias"] = parameter(self, "bias", zeros, (self.features,))

        return linear(x, params, self.numerics)

    def _note_range(self, x):
        largest = jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)))
        self.sow("ranges", "input", largest, reduce_fn=jnp.maximum, init_fn=lambda: 0.0)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    eps: float
    numerics: Numerics

    @nn.compact
    def __call__(self, x):
        gain = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        mean = row_sum(x * x, self.numerics.is_row_invariant) / x.shape[-1]
        return x * jax.lax.rsqrt(mean + self.eps) * gain.astype(jnp.float32)


class SwiGLU(nn.Module):
    """The gated feed-forward block; gate and up are one product."""

    intermediate_size: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x):
        both = Linear(2 * self.intermediate_size, self.numerics, name="gate_up_proj")(x)
        sizes = (self.intermediate_size,) * 2
        gate, up = split_groups(both, sizes, self.numerics.num_groups, axis=-1)
        return Linear(x.shape[-1], self.numerics, name="down_proj")(nn.silu(gate) * up)


def keep_apart(x, is_row_invariant: bool):
    """A product whose sum with something else is not computed in one operation.

    A compiler may contract a sum with a product that it is of, which rounds once
    instead of twice, and does so in one loop and not in another. Clipping the product
    at the largest number changes nothing and keeps it from that.
    """
    if not is_row_invariant:
        return x

    largest = float(np.finfo(np.float32).max)
    return jnp.clip(x, -largest, largest)


def split_groups(x, sizes: tuple[int, ...], num_groups: int, axis: int) -> list:
    """Takes a fused product's result apart; with groups, device by device.

    Args:
      sizes: Entries of each part along `axis`, over all groups.
    """
    if num_groups == 1:
        return jnp.split(x, np.cumsum(sizes)[:-1], axis=axis)

    axis %= x.ndim
    # With groups each device holds its share of every part, side by side.
    before = x.shape[:axis]
    after = x.shape[axis + 1 :]
    grouped = x.reshape(*before, num_groups, -1, *after)
    ends = np.cumsum(sizes)[:-1] // num_groups
    pieces = jnp.split(grouped, ends, axis=axis + 1)

    return [piece.reshape(*before, -1, *after) for piece in pieces]


def at_least_two_rows(*arrays, is_grouped: bool = True):
    """Repeats the token axis of `[b, 1, ...]` arrays where a product has a single row.

    Such a product takes another path on XLA:CPU: its bits differ, and int8 or bfloat16
    weights are widened at every call.

    Args:
      is_grouped: Several query heads share each key-value head; else attention's
        products have one row for a lone token, however many requests there are.
    """
    num_rows, num_tokens = arrays[0].shape[:2]
    if num_tokens > 1 or (num_rows > 1 and is_grouped):
        return arrays

    return tuple(jnp.concatenate([array, array], axis=1) for array in arrays)


def embed(tokens: Int[Array, "b t"], table: dict) -> Float[Array, "b t d"]:
    """Looks tokens up in an embedding table `{kernel, [scale]}` of any precision."""
    rows = table["kernel"][tokens].astype(jnp.float32)
    return rows * table["scale"][tokens][..., None] if "scale" in table else rows
