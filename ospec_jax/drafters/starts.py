# SPDX-License-Identifier: Apache-2.0
"""Where training a draft starts: from what the target knows, where shapes allow."""

import jax
import jax.numpy as jnp

from ospec_jax.drafters.base import Family, dequantized
from ospec_jax.models.hub import Target
from ospec_jax.models.llama import head_table, layer_params


def start_warm(family: Family, params: dict, target: Target, token_ids) -> dict:
    """Gives a new draft the parts of the target that its family can begin with.

    Args:
      params: Of the draft, freshly initialised.
      token_ids: `[q]` its vocabulary; None for one that uses the target's head.

    Returns:
      The parameters, untouched for a draft of another shape than the target's.
    """
    if family.warm_start is None:
        return params

    started = dict(family.warm_start(params, target))
    # Its head begins as the target's rows of its own vocabulary.
    if token_ids is not None:
        rows = dequantized(head_table(target.params))[token_ids]
        started["lm_head"] = {"kernel": rows}

    # A draft of another shape starts at random as a whole, rather than in part.
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if shapes(started) != shapes({name: params[name] for name in started}):
        return params

    # Training donates what it starts from: the target must keep its own.
    return params | jax.tree.map(jnp.copy, started)


def last_layer(target: Target) -> dict:
    """The target's last decoder layer and final norm, kernels in float32."""
    layer = decoder_layer(target, target.config.num_layers - 1)
    return layer | {"norm": target.params["norm"]}


def decoder_layer(target: Target, number: int) -> dict:
    """One of the target's decoder layers, kernels in float32.

    Norms that it does not have in front of its blocks (OLMo-2) have a gain of one.
    """
    plain = {"scale": jnp.ones(target.config.hidden_size)}
    layer = layer_params(target.params, number)
    wide = lambda table: {"kernel": dequantized(table)}
    return {
        "input_layernorm": layer.get("input_layernorm", plain),
        "qkv_proj": wide(layer["self_attn"]["qkv_proj"]),
        "o_proj": wide(layer["self_attn"]["o_proj"]),
        "mlp": {name: wide(table) for name, table in layer["mlp"].items()},
        "post_attention_layernorm": layer.get("post_attention_layernorm", plain),
    }


def passing(kernel: jax.Array, first_column: int) -> jax.Array:
    """A projection `[d, e]` that passes `d` of its inputs on, the others hardly.

    Args:
      kernel: `[d, e]`, at random.
      first_column: Of the inputs that are passed on.
    """
    width, num_inputs = kernel.shape
    return jnp.eye(width, num_inputs, first_column) + 0.01 * kernel
