# SPDX-License-Identifier: Apache-2.0
"""Writing a draft as a public EAGLE-3 head; `formats.eagle3` says what that is."""

from pathlib import Path

import numpy as np

from ospec_jax.config import ConfigError, DraftConfig
from ospec_jax.formats import speculators
from ospec_jax.formats.eagle3 import LAYER_NAME, LAYOUTS
from ospec_jax.formats.tensors import DTYPES, check_is_free, write_folder
from ospec_jax.types import Draft


def to_tensors(
    draft: Draft, config: DraftConfig, dtype: str, layer: str
) -> dict[str, np.ndarray]:
    """A head's tensors by their public names.

    Args:
      dtype: One of `DTYPES`.
      layer: Prefix of the decoder layer's names.
    """
    c = config
    params = draft.params
    kind = DTYPES[dtype]
    q_rows = c.num_heads * c.head_dim
    kv_rows = c.num_kv_heads * c.head_dim
    qkv = np.asarray(params["qkv_proj"]["kernel"])
    q, k, v = np.split(qkv, [q_rows, q_rows + kv_rows])
    gate, up = np.split(np.asarray(params["mlp"]["gate_up_proj"]["kernel"]), 2)
    values = {
        "fc": params["fc"]["kernel"],
        "norm": params["norm"]["scale"],
        "lm_head": params["lm_head"]["kernel"],
        f"{layer}self_attn.q_proj": q,
        f"{layer}self_attn.k_proj": k,
        f"{layer}self_attn.v_proj": v,
        f"{layer}self_attn.o_proj": params["o_proj"]["kernel"],
        f"{layer}mlp.gate_proj": gate,
        f"{layer}mlp.up_proj": up,
        f"{layer}mlp.down_proj": params["mlp"]["down_proj"]["kernel"],
    }

    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        values[layer + name] = params[name]["scale"]

    if c.has_own_embedding:
        values["embed_tokens"] = params["embed_tokens"]["kernel"]

    ids = np.asarray(draft.token_ids, np.int64)
    is_drafted = np.zeros(c.vocab_size, bool)
    is_drafted[ids] = True
    weights = {f"{name}.weight": np.asarray(x, kind) for name, x in values.items()}

    return weights | {"d2t": ids - np.arange(len(ids)), "t2d": is_drafted}


def _to_config(c: DraftConfig, dtype: str, max_position: int) -> dict:
    """The flat config.json of the reference layout."""
    config = speculators.layer_config(c, max_position) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": c.draft_vocab_size,
        "torch_dtype": dtype,
        # Both conventions, so that every reader finds its own.
        "eagle_aux_hidden_state_layer_ids": list(c.taps),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in c.taps],
            "use_aux_hidden_state": True,
        },
    }
    if c.target_hidden_size != c.hidden_size:
        config["target_hidden_size"] = c.target_hidden_size
    if c.has_norm_before_residual:
        config["norm_before_residual"] = True

    return config


def write(
    folder: Path,
    draft: Draft,
    config: DraftConfig,
    layout: str,
    dtype: str,
    verifier: str,
    max_position: int = 2048,
) -> None:
    """Writes a head that other servers load.

    Args:
      layout: One of `LAYOUTS`.
      verifier: Name of the target.
      max_position: Of the target; servers size their caches by it.

    Raises:
      ConfigError: The draft has no head of its own, the layout is unknown, or the
        folder is not empty.
    """
    check_is_free(folder)
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown format {layout!r}; use {' or '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown type {dtype!r}; use one of {', '.join(DTYPES)}")
    if draft.token_ids is None:
        raise ConfigError(
            "this draft uses its target's head, which the format has no place for; "
            "distill one with --draft-vocab-size"
        )

    if layout == "eagle3":
        tensors = to_tensors(draft, config, dtype, "midlayer.")
        write_folder(folder, _to_config(config, dtype, max_position), tensors)
    else:
        tensors = to_tensors(draft, config, dtype, LAYER_NAME)
        values = speculators.to_config(config, dtype, verifier, max_position)
        write_folder(folder, values, tensors)
