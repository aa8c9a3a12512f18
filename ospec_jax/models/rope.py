# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings, and how models scale them to longer contexts."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ospec_jax.config import (
    DraftConfig,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from ospec_jax.models.layers import keep_apart
from ospec_jax.typing import typed


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray:
    """Angular frequencies of rotary embeddings, `[head_dim // 2]` radians a token."""
    freqs = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, Llama3Scaling):
        freqs = _stretch_long_waves(freqs, scaling)
    elif isinstance(scaling, YarnScaling):
        freqs = _stretch_by_yarn(freqs, theta, scaling)
    elif isinstance(scaling, LinearScaling):
        freqs = freqs / scaling.factor
    elif isinstance(scaling, FactorScaling):
        freqs = freqs / np.asarray(scaling.factors)

    return freqs.astype(np.float32)


def _stretch_long_waves(freqs: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, and those between
    the two limits are interpolated (arXiv 2407.21783)."""
    wavelength = 2 * np.pi / freqs
    ratio = scaling.original_max_position / wavelength
    span = scaling.high_freq_factor - scaling.low_freq_factor
    # 1 where all of a frequency is kept, 0 where it is stretched by the full factor.
    keep = np.clip((ratio - scaling.low_freq_factor) / span, 0.0, 1.0)

    return keep * freqs + (1 - keep) * freqs / scaling.factor


def _stretch_by_yarn(
    freqs: np.ndarray, theta: float, scaling: YarnScaling
) -> np.ndarray:
    """The rule by parts (arXiv 2309.00071, section 3.2).

    Between its two limits it interpolates by the number of the pair, not by the
    wavelength as the paper does: so do the authors' own code and all others.
    """
    num_pairs = len(freqs)
    length = scaling.original_max_position

    def pair_that_turns(num_turns: float) -> float:
        """The pair, not a whole number, that turns so often in the original context."""
        return num_pairs * np.log(length / (2 * np.pi * num_turns)) / np.log(theta)

    low = pair_that_turns(scaling.beta_fast)
    high = pair_that_turns(scaling.beta_slow)
    if scaling.is_truncated:
        low = np.floor(low)
        high = np.ceil(high)

    low = max(low, 0.0)
    high = min(high, 2 * num_pairs - 1.0)
    stretch = (np.arange(num_pairs) - low) / max(high - low, 0.001)
    stretch = np.clip(stretch, 0.0, 1.0)

    return (1 - stretch) * freqs + stretch * freqs / scaling.factor


def rotary_angles(
    config: ModelConfig | DraftConfig,
    positions: Int[Array, "b t"],
    num_positions: int | None = None,
    is_native: bool = False,
) -> tuple[Float[Array, "b t 1 e"], Float[Array, "b t 1 e"]]:
    """`rope_angles` of a model's own rotary embedding."""
    c = config
    frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    # What YaRN and LongRoPE multiply queries and keys by.
    magnitude = getattr(c.rope_scaling, "attention_factor", 1.0)

    return rope_angles(positions, frequencies, num_positions, is_native, magnitude)


@typed
def rope_angles(
    positions: Int[Array, "b t"],
    frequencies: np.ndarray,
    num_positions: int | None = None,
    is_native: bool = False,
    magnitude: float = 1.0,
) -> tuple[Float[Array, "b t 1 e"], Float[Array, "b t 1 e"]]:
    """Cosines and sines for `rotate`, computed once for all layers.

    Args:
      num_positions: Bound of the positions. With it they are looked up in a table: a
        cosine's last bit depends on how the loop around it is vectorised. The lookup is
        a product with one-hot rows, which no loop is fused with and recomputes.
      is_native: A native layer reads them, with which no loop is fused: rows of the
        table are taken as they lie, which are the same bits.
      magnitude: Factor of all of them.
    """
    if num_positions is None:
        angles = positions[..., None].astype(jnp.float32) * frequencies
        halves = jnp.cos(angles), jnp.sin(angles)
        if magnitude != 1.0:
            halves = tuple(half * magnitude for half in halves)
    else:
        # In float64: of a large angle float32 keeps few bits behind the point.
        table = np.outer(np.arange(num_positions), frequencies.astype(np.float64))
        table = np.concatenate([np.cos(table), np.sin(table)], axis=1) * magnitude
        table = jnp.asarray(table.astype(np.float32))
        one_hot = lambda: jax.nn.one_hot(positions, num_positions)
        found = table[positions] if is_native else one_hot() @ table
        halves = jnp.split(found, 2, axis=-1)

    spread = lambda half: jnp.concatenate([half, half], axis=-1)[:, :, None, :]
    return spread(halves[0]), spread(halves[1])


def rotate(
    x: Float[Array, "b t heads e"], angles, is_row_invariant: bool
) -> Float[Array, "b t heads e"]:
    """Applies rotary embedding in the half-split layout of Hugging Face."""
    cos, sin = angles
    first, second = jnp.split(x, 2, axis=-1)
    products = x * cos, jnp.concatenate([-second, first], axis=-1) * sin
    own, turned = (keep_apart(product, is_row_invariant) for product in products)

    return own + turned
