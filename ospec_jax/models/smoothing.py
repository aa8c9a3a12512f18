# SPDX-License-Identifier: Apache-2.0
"""Moving activation outliers into the weights before both become int8.

A few channels of a language model's activations are many times larger than the others
and take all of int8's levels. Dividing a channel by a factor and multiplying the
weights that read it by the same one changes nothing in exact arithmetic, and evens both
out (SmoothQuant, arXiv 2211.10438, equation 4 with alpha 1/2). The division is folded
into what produced the channel: a normalisation's gain, or the rows of `up_proj`.
Factors are powers of two, so that folding rounds nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ModelConfig
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import Numerics
from ospec_jax.models.llama import Llama, init_cache

LayerRanges = dict[str, np.ndarray]
"""Largest magnitudes by input channel of `qkv_proj`, `gate_up_proj`, `down_proj`."""

_TINY = 1e-5


def measure_ranges(
    config: ModelConfig, numerics: Numerics, params, texts: np.ndarray
) -> list[LayerRanges]:
    """Activation ranges of every layer over `texts`, `[b, t]` token ids."""
    b, t = texts.shape
    model = Llama(config, numerics)
    starts = jnp.zeros((b,), jnp.int32)
    cache = init_cache(config, numerics, b, t)
    # All texts have the same length: nothing is padded, and nothing else is cached.
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))

    @jax.jit
    def run(params, tokens):
        bias = kv.causal_bias(starts, t, t)
        args = (tokens, positions, bias, cache, starts)
        return model.apply({"params": params}, *args, mutable=["ranges"])[1]["ranges"]

    found = jax.device_get(run(params, jnp.asarray(texts)))
    layers = [found[f"layers_{i}"] for i in range(config.num_layers)]

    return [
        {
            "qkv_proj": layer["self_attn"]["qkv_proj"]["input"],
            "gate_up_proj": layer["mlp"]["gate_up_proj"]["input"],
            "down_proj": layer["mlp"]["down_proj"]["input"],
        }
        for layer in layers
    ]


def smooth(tensors: dict[str, np.ndarray], ranges: LayerRanges) -> dict:
    """One layer's tensors, by Hugging Face's short names, with outliers moved.

    Matrices are `[out, in]`; ranges `[in]` of the products that they are named after.
    """
    t = dict(tensors)

    # Dividing what produces a channel and multiplying all that read it, so the layer's
    # function stays the same.
    def fold(range_of, norm, readers):
        factor = _factors(ranges[range_of], [t[name] for name in readers])
        t[norm] = t[norm] / factor
        t.update({name: t[name] * factor for name in readers})

    # Where nothing is normalised in front of a block there is no gain to fold into.
    if "input_layernorm" in t:
        fold("qkv_proj", "input_layernorm", ["q_proj", "k_proj", "v_proj"])
        fold("gate_up_proj", "post_attention_layernorm", ["gate_proj", "up_proj"])
    # `down_proj` reads silu(gate) * up, which is linear in `up` alone.
    factor = _factors(ranges["down_proj"], [t["down_proj"]])
    t["up_proj"] = t["up_proj"] / factor[:, None]
    t["down_proj"] = t["down_proj"] * factor

    return t


def _factors(largest: np.ndarray, kernels: list[np.ndarray]) -> np.ndarray:
    columns = np.max([np.max(np.abs(k), axis=0) for k in kernels], axis=0)
    ratio = np.maximum(largest, _TINY) / np.maximum(columns, _TINY)
    # The square root of the ratio, less its mean: only differences between channels
    # matter, and the overall scale stays.
    exponent = 0.5 * np.log2(ratio)
    return np.exp2(np.rint(exponent - np.mean(exponent))).astype(np.float32)
