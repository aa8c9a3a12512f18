# SPDX-License-Identifier: Apache-2.0
"""What sets the families of trained drafts apart before training: shapes and starts."""

from typing import Any

import jax
import jax.numpy as jnp

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    ExitConfig,
    HydraConfig,
    ModelConfig,
)
from ospec_jax.drafters.base import dequantized
from ospec_jax.drafters.registry import TRAINED
from ospec_jax.models.hub import Target
from ospec_jax.models.llama import head_table

FEATURE_WEIGHTS = {"eagle1": 10.0}
"""Published (arXiv 2401.15077): 1 for the predicted states, 0.1 for the tokens."""


def eagle3_taps(model: ModelConfig) -> tuple[int, ...]:
    """Layers that EAGLE-3 reads of a target unless its configuration says otherwise."""
    n = model.num_layers
    return (2, n // 2, n - 3) if n >= 6 else tuple(range(min(n, 3)))


def default_taps(
    model: ModelConfig, family: str, exit_layer: int = 0
) -> tuple[int, ...]:
    """Layers that a family's drafts read of a target.

    Args:
      exit_layer: Of an early exit; 0 stands for EAGLE-3's first tap.

    Raises:
      ConfigError: No early exit can lie there, or the family has none.
    """
    if exit_layer and (family != "exit" or not 0 < exit_layer < model.num_layers):
        raise ConfigError(
            f"exit_layer is {exit_layer}, and the family {family!r}; it is of the "
            f"family 'exit' alone, from 1 to {model.num_layers - 1} for this target"
        )
    if family == "exit":
        return (exit_layer or max(eagle3_taps(model)[0], 1),)
    return eagle3_taps(model) if family == "eagle3" else (model.num_layers,)


def default_draft_config(
    model: ModelConfig, draft_vocab_size: int = 8192, family: str = "eagle3",
    depth: int = 3, exit_layer: int = 0,
) -> DraftConfig:  # fmt: skip
    """A draft of the target's own shape: one layer of it, or heads beside it.

    Args:
      depth: Tokens that Hydra's heads can draft.
      exit_layer: See `default_taps`.
    """
    if family not in TRAINED:
        raise ConfigError(
            f"drafts of the family {family!r} are not trained; use {', '.join(TRAINED)}"
        )
    values: dict[str, Any] = dict(
        vocab_size=model.vocab_size,
        target_hidden_size=model.hidden_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        taps=default_taps(model, family, exit_layer),
        draft_vocab_size=draft_vocab_size,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.rms_norm_eps,
        rope_scaling=model.rope_scaling,
    )
    if family == "hydra":
        return HydraConfig(**values, depth=depth)
    if family == "exit":
        values["has_qkv_bias"] = model.has_qkv_bias
        return ExitConfig(**values, has_qk_norm=model.has_qk_norm)
    return DraftConfig(**values, has_fc_bias=family == "eagle1")


def warm_start(family: str, params, target: Target, token_ids):
    """Starts a draft of the target's own shape from the target's last layer and head.

    EAGLE-3: the newest tap passes through, and the block is the target's last one,
    reading features where it read its residual stream. EAGLE-1: likewise, with the
    final state. Hydra: the last layer is the prefix layer, and each head passes its
    state on, its blocks adding nothing yet (as published); a tenth of it, since that
    state is sure of a token that the head already knows. Early exit: its block and norm
    are those of the last layer.
    """
    started = _STARTS[family](params, target)
    if token_ids is not None:
        rows = dequantized(head_table(target.params))[token_ids]
        started["lm_head"] = {"kernel": rows}
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if shapes(started) != shapes({name: params[name] for name in started}):
        return params
    # Training donates what it starts from: the target must keep its own.
    return params | jax.tree.map(jnp.copy, started)


def _last_layer(target: Target) -> dict:
    last = target.params[f"layers_{target.config.num_layers - 1}"]
    wide = lambda table: {"kernel": dequantized(table)}
    return {
        "input_layernorm": last["input_layernorm"],
        "qkv_proj": wide(last["self_attn"]["qkv_proj"]),
        "o_proj": wide(last["self_attn"]["o_proj"]),
        "mlp": {name: wide(table) for name, table in last["mlp"].items()},
        "post_attention_layernorm": last["post_attention_layernorm"],
        "norm": target.params["norm"],
    }


def _passing(kernel, first_column: int):
    """A projection that passes one of its inputs on, with a little of the others."""
    width, num_inputs = kernel.shape
    return jnp.eye(width, num_inputs, first_column) + 0.01 * kernel


def _start_eagle3(params, target: Target) -> dict:
    layer, fused = _last_layer(target), params["fc"]["kernel"]
    qkv = layer["qkv_proj"]["kernel"]
    small = 0.01 * jax.random.normal(jax.random.key(0), qkv.shape)
    layer["hidden_norm"] = layer.pop("input_layernorm")
    layer["qkv_proj"] = {"kernel": jnp.concatenate([small, qkv], axis=1)}
    width, num_features = fused.shape
    return layer | {"fc": {"kernel": _passing(fused, num_features - width)}}


def _start_eagle1(params, target: Target) -> dict:
    layer, fused = _last_layer(target), params["fc"]["kernel"]
    del layer["input_layernorm"], layer["norm"]
    joined = {"kernel": _passing(fused, fused.shape[0])}
    return layer | {"fc": params["fc"] | joined}


def _start_hydra(params, target: Target) -> dict:
    started = {}
    for name, head in params.items():
        if name.startswith("heads_"):
            still = {
                block: jax.tree.map(jnp.zeros_like, head[block])
                for block in head
                if block != "residual"
            }
            kernel = head["residual"]["kernel"]
            residual = {"kernel": 0.1 * (jnp.eye(*kernel.shape) + kernel)}
            started[name] = still | {"residual": head["residual"] | residual}
    return started | ({"prefix": _last_layer(target)} if "prefix" in params else {})


def _start_exit(params, target: Target) -> dict:
    layer = _last_layer(target)
    return {name: layer[name] for name in ("post_attention_layernorm", "mlp", "norm")}


_STARTS = {
    "exit": _start_exit,
    "eagle3": _start_eagle3,
    "eagle1": _start_eagle1,
    "hydra": _start_hydra,
}
