# SPDX-License-Identifier: Apache-2.0
"""DFlash drafts as public checkpoints hold them (z-lab/dflash, arXiv 2602.06036).

A folder holds safetensors and a config.json of Qwen3's kind with two additions: the
`block_size`, and a `dflash_config` that names the token whose embedding is the mask and
the layers that are read. These are counted by their *output*, so that ours are one
more. Embedding and head are the target's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, DFlashConfig
from ospec_jax.config.fields import Fields
from ospec_jax.drafters.base import dequantized
from ospec_jax.formats.tensors import DTYPES, read_config, read_tensors
from ospec_jax.models.hub import Target
from ospec_jax.models.llama import embedding_table
from ospec_jax.models.rope_fields import read_rope
from ospec_jax.models.weights import WeightsError
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.types import Draft

_FIXED = {"hidden_act": "silu", "attention_bias": False}
"""Settings of which one value is supported; a missing key has it."""
_OWN = {"mask_token_id", "target_layer_ids"}
"""What a `dflash_config` may say: other keys may stand for another computation."""
_MOST_ENTRIES = 1024
"""Far longer blocks, and more layers, than any public draft has."""
_IGNORED = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class ImportedDFlash:
    """A draft that was read.

    Attributes:
      dtype: In which its weights were stored.
    """

    draft: Draft
    config: DFlashConfig
    dtype: str


def is_config(raw: dict) -> bool:
    """Whether a config.json is of a DFlash draft."""
    return "dflash_config" in raw


def read(
    folder: Path, target: Target, taps: tuple[int, ...] | None = None
) -> ImportedDFlash:
    """Reads a public DFlash draft for a target.

    Args:
      taps: Layers whose input it reads, instead of what its files say.

    Raises:
      CheckpointError: It is not for a target of this vocabulary.
      ConfigError: Its architecture is not supported.
      WeightsError: Tensors are missing, surplus or of the wrong shape.
    """
    raw = read_config(folder)
    for key, supported in _FIXED.items():
        if (raw.get(key) or supported) != supported:
            raise ConfigError(
                f"{folder} has {key} {raw[key]!r}; only {supported!r} is supported"
            )

    fields = Fields(raw, str(folder / "config.json"))
    own = fields.section("dflash_config")
    if unknown := sorted(set(own.values) - _OWN):
        raise ConfigError(
            f"the dflash_config of {folder} has {', '.join(unknown)}, which is not "
            f"known; what can be read has {' and '.join(sorted(_OWN))}"
        )

    config = _read_config(folder, fields, own, target, taps)
    mask = own.whole("mask_token_id", low=0, high=config.vocab_size - 1)
    found = read_tensors(folder)
    tensors = {
        name.removeprefix("model."): value
        for name, value in found.items()
        if not name.endswith(_IGNORED)
    }
    _check_tensors(folder, config, tensors)
    dtype = tensors["fc.weight"].dtype
    params = _to_params(config, tensors)
    # The mask is a token of the target's vocabulary that no text has.
    row = jnp.asarray([mask])
    table = embedding_table(target.params)
    params["mask_embedding"] = dequantized({k: v[row] for k, v in table.items()})[0]

    return ImportedDFlash(
        draft=Draft(params),
        config=config,
        dtype=next((n for n, d in DTYPES.items() if d == dtype), "float32"),
    )


def _read_config(
    folder: Path, fields: Fields, own: Fields, target: Target, taps
) -> DFlashConfig:
    kinds = fields.items("layer_types", str, None) or ()
    if other := set(kinds) - {"full_attention"}:
        raise ConfigError(
            f"{folder} has a layer of the type {min(other)!r}; only DFlash drafts "
            f"whose layers attend to all (full_attention) can be read"
        )

    hidden = fields.whole("hidden_size")
    if hidden != target.config.hidden_size:
        raise CheckpointError(
            f"{folder} is {hidden} wide and reads the embedding of its target, but "
            f"that of {target.name} is {target.config.hidden_size} wide"
        )

    heads = fields.whole("num_attention_heads")
    theta, scaling = read_rope(fields)
    layers = own.items("target_layer_ids", int, None)
    if not taps and not layers:
        raise ConfigError(
            f"{folder} does not say which layers of its target it reads "
            f"(target_layer_ids of dflash_config); name with --taps the layers whose "
            f"input that is"
        )

    return DFlashConfig(
        vocab_size=fields.whole("vocab_size"),
        target_hidden_size=hidden,
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", None) or heads,
        head_dim=fields.whole("head_dim", None) or hidden // heads,
        taps=taps or tuple(layer + 1 for layer in layers),
        draft_vocab_size=0,
        rope_theta=theta,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_scaling=scaling,
        num_layers=fields.whole("num_hidden_layers", high=_MOST_ENTRIES),
        block_size=fields.whole("block_size", high=_MOST_ENTRIES),
        bigram_rank=0,
        has_qk_norm=True,
    )


def _shapes(c: DFlashConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a draft must have, and may not have others."""
    d = c.hidden_size
    q = c.num_heads * c.head_dim
    kv = c.num_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "self_attn.q_norm": (c.head_dim,),
        "self_attn.k_norm": (c.head_dim,),
        "mlp.gate_proj": (c.intermediate_size, d),
        "mlp.up_proj": (c.intermediate_size, d),
        "mlp.down_proj": (d, c.intermediate_size),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {
        f"layers.{number}.{name}.weight": shape
        for number in range(c.num_layers)
        for name, shape in layer.items()
    }

    return shapes | {
        "fc.weight": (d, len(c.taps) * c.target_hidden_size),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }


def _check_tensors(folder: Path, config: DFlashConfig, tensors) -> None:
    shapes = _shapes(config)
    if missing := sorted(set(shapes) - set(tensors)):
        raise WeightsError(f"{folder} lacks the tensors {', '.join(missing)}")
    if surplus := sorted(set(tensors) - set(shapes)):
        raise WeightsError(
            f"{folder} has tensors that a DFlash draft of {config.num_layers} layers "
            f"has not: {', '.join(surplus)}"
        )

    for name, value in tensors.items():
        if value.dtype not in DTYPES.values():
            raise WeightsError(
                f"{name} of {folder} is stored as {value.dtype}; drafts in "
                f"{', '.join(DTYPES)} can be read"
            )
        if value.shape != shapes[name]:
            raise WeightsError(
                f"{name} of {folder} has shape {value.shape}, but its config.json "
                f"gives {shapes[name]}"
            )


def _to_params(c: DFlashConfig, tensors) -> dict:
    wide = lambda name: jnp.asarray(np.asarray(tensors[f"{name}.weight"], np.float32))
    join = lambda *names: {"kernel": jnp.concatenate([*map(wide, names)])}
    params: dict[str, Any] = {
        "fc": join("fc"),
        "hidden_norm": {"scale": wide("hidden_norm")},
        "norm": {"scale": wide("norm")},
    }

    for number in range(c.num_layers):
        layer = f"layers.{number}."
        own = f"{layer}self_attn."
        mlp = f"{layer}mlp."
        params[f"layers_{number}"] = {
            "input_layernorm": {"scale": wide(f"{layer}input_layernorm")},
            "q_proj": join(f"{own}q_proj"),
            "kv_proj": join(f"{own}k_proj", f"{own}v_proj"),
            "q_norm": {"scale": wide(f"{own}q_norm")},
            "k_norm": {"scale": wide(f"{own}k_norm")},
            "o_proj": join(f"{own}o_proj"),
            "post_attention_layernorm": {
                "scale": wide(f"{layer}post_attention_layernorm")
            },
            "mlp": {
                "gate_up_proj": join(f"{mlp}gate_proj", f"{mlp}up_proj"),
                "down_proj": join(f"{mlp}down_proj"),
            },
        }

    return params
