# SPDX-License-Identifier: Apache-2.0
"""Hydra heads as public checkpoints hold them (zankner/Hydra, arXiv 2402.05109).

A folder holds `hydra_lm_head.pt`, the heads' tensors, and a config.json with their
number and kind. Of the target it says nothing: the prefix layer of Hydra++ is "one more
layer of the target", with its heads, rotary embedding and epsilon.

Dropout layers are numbered, too: the blocks of a `prefix-mlp` head are 1, 3, 5, ...,
those of an `mlp` head 0, 1, 2, .... All blocks after the first are one module, listed
under each of its numbers. The tensors include the target's embedding, which the heads
read, and one of the prefix layer, which nothing does.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, HydraConfig, ModelConfig
from ospec_jax.config.fields import Fields
from ospec_jax.formats.tensors import DTYPES, read_config, read_tensors
from ospec_jax.models.weights import WeightsError
from ospec_jax.types import Draft

WEIGHTS = "hydra_lm_head.pt"
_KINDS = ("mlp", "prefix-mlp")
_LAYER = "prefix_embeding_layer.layers.0."  # as it is spelt
_EMBEDDING = "input_embed_fn.weight"
_MOST_HEADS = 64
"""Far more heads, or blocks, than any public draft has."""
_IGNORED = ("rotary_emb.inv_freq", "prefix_embeding_layer.embed_tokens.weight")


@dataclasses.dataclass(frozen=True)
class ImportedHydra:
    """Heads that were read.

    Attributes:
      dtype: In which their weights were stored.
      verifier: Name of the target they were trained for, if the file says so.
      embedding: `[v, d]` the table that they were trained to read, or None.
    """

    draft: Draft
    config: HydraConfig
    dtype: str
    verifier: str | None
    embedding: np.ndarray | None


def is_config(raw: dict) -> bool:
    """Whether a config.json is of Hydra heads."""
    return "hydra_num_heads" in raw


def read(folder: Path, target: ModelConfig) -> ImportedHydra:
    """Reads public Hydra or Hydra++ heads for a target.

    Raises:
      ConfigError: Heads of this kind are not supported.
      WeightsError: Tensors are missing, surplus or of the wrong shape.
    """
    raw = read_config(folder)
    found = read_tensors(folder, WEIGHTS)
    tensors = {name: x for name, x in found.items() if not name.endswith(_IGNORED)}
    config = _read_config(folder, raw, target, tensors)
    _check_tensors(folder, config, tensors)
    dtype = tensors[_block(config, 0, 0) + "linear.weight"].dtype

    return ImportedHydra(
        draft=Draft(_to_params(config, tensors), jnp.arange(config.vocab_size)),
        config=config,
        dtype=next((n for n, d in DTYPES.items() if d == dtype), "float32"),
        verifier=Fields(raw, "config.json").text("base_model_name_or_path", None),
        embedding=tensors.get(_EMBEDDING),
    )


def _read_config(folder, raw: dict, target: ModelConfig, tensors) -> HydraConfig:
    kind = raw.get("hydra_head_arch", "mlp")
    supported = {
        "hydra_head_arch": (kind, _KINDS),
        "grounded_heads": (raw.get("grounded_heads", False), (True,)),
        "hidden_state_offset": (raw.get("hidden_state_offset", 0), (0,)),
    }

    for key, (value, values) in supported.items():
        if not any(type(value) is type(x) and value == x for x in values):
            raise ConfigError(
                f"{folder} has {key} {value!r}; only "
                f"{' and '.join(map(repr, values))} can be read"
            )

    fields = Fields(raw, str(folder / "config.json"))
    gate = tensors.get(f"{_LAYER}mlp.gate_proj.weight")
    return HydraConfig(
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size if gate is None else len(gate),
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        taps=(target.num_layers,),
        draft_vocab_size=target.vocab_size,
        rope_theta=target.rope_theta,
        rms_norm_eps=target.rms_norm_eps,
        rope_scaling=target.rope_scaling,
        depth=fields.whole("hydra_num_heads", high=_MOST_HEADS),
        num_blocks=fields.whole("hydra_num_layers", 1, high=_MOST_HEADS),
        has_prefix=kind == "prefix-mlp",
        has_separate_heads=True,
    )


def _block(c: HydraConfig, head: int, block: int) -> str:
    """The prefix of a block's names; dropout has a number, too."""
    return f"hydra_mlp.{head}.{1 + 2 * block if c.has_prefix else block}."


def _projection(c: HydraConfig, head: int) -> str:
    return f"hydra_lm_head.{head}." + ("1." if c.has_prefix else "")


def _shapes(c: HydraConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that heads must have; of blocks that share weights, the first."""
    d = c.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(name, num_rows, num_columns):
        shapes[f"{name}weight"] = (num_rows, num_columns)
        shapes[f"{name}bias"] = (num_rows,)

    for head in range(c.depth):
        first = _block(c, head, 0)
        dense(f"{first}linear.", d, (head + 2) * d)
        dense(f"{first}res_connection.", d, (head + 2) * d)
        if c.num_blocks > 1:
            dense(f"{_block(c, head, 1)}linear.", d, d)
        dense(_projection(c, head), c.vocab_size, d)

    return shapes | (_prefix_shapes(c) if c.has_prefix else {})


def _prefix_shapes(c: HydraConfig) -> dict[str, tuple[int, ...]]:
    d = c.hidden_size
    q = c.num_heads * c.head_dim
    kv = c.num_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (c.intermediate_size, d),
        "mlp.up_proj": (c.intermediate_size, d),
        "mlp.down_proj": (d, c.intermediate_size),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {f"{_LAYER}{name}.weight": shape for name, shape in layer.items()}

    return shapes | {"prefix_embeding_layer.norm.weight": (d,)}


def _copies(c: HydraConfig) -> dict[str, str]:
    """Names under which shared weights are listed again, with the first ones."""
    return {
        f"{_block(c, head, block)}linear.{part}": f"{_block(c, head, 1)}linear.{part}"
        for head in range(c.depth)
        for block in range(2, c.num_blocks)
        for part in ("weight", "bias")
    }


def _check_tensors(folder: Path, c: HydraConfig, tensors) -> None:
    shapes = _shapes(c)
    copies = _copies(c)
    if missing := sorted(set(shapes) - set(tensors)):
        raise WeightsError(f"{folder} lacks the tensors {', '.join(missing)}")

    optional = {_EMBEDDING: (c.vocab_size, c.hidden_size)}
    optional |= {name: shapes[first] for name, first in copies.items()}
    if surplus := sorted(set(tensors) - set(shapes) - set(optional)):
        raise WeightsError(
            f"{folder} has tensors that {c.depth} Hydra heads of {c.num_blocks} blocks "
            f"have not: {', '.join(surplus)}"
        )

    for name, value in tensors.items():
        shape = (shapes | optional)[name]
        if value.dtype not in DTYPES.values():
            raise WeightsError(
                f"{name} of {folder} is stored as {value.dtype}; heads in "
                f"{', '.join(DTYPES)} can be read"
            )
        if value.shape != shape:
            raise WeightsError(
                f"{name} of {folder} has shape {value.shape}, but its config.json and "
                f"its target give {shape}"
            )

    for name, first in copies.items():
        if name in tensors and not np.array_equal(tensors[name], tensors[first]):
            raise WeightsError(
                f"{name} of {folder} is not {first}: the blocks of a head after its "
                f"first one share their weights"
            )


def _to_params(c: HydraConfig, tensors) -> dict:
    wide = lambda name: jnp.asarray(np.asarray(tensors[name], np.float32))
    dense = lambda name: {"kernel": wide(f"{name}weight"), "bias": wide(f"{name}bias")}
    params = {}

    for head in range(c.depth):
        first = _block(c, head, 0)
        blocks: dict[str, Any] = {
            "residual": dense(f"{first}res_connection."),
            "first": dense(f"{first}linear."),
        }
        if c.num_blocks > 1:
            blocks["block"] = dense(f"{_block(c, head, 1)}linear.")
        params[f"heads_{head}"] = blocks
        params[f"lm_heads_{head}"] = dense(_projection(c, head))

    return params | ({"prefix": _to_prefix(wide)} if c.has_prefix else {})


def _to_prefix(wide) -> dict:
    layer = lambda name: wide(f"{_LAYER}{name}.weight")
    join = lambda *names: {"kernel": jnp.concatenate([*map(layer, names)])}
    return {
        "input_layernorm": {"scale": layer("input_layernorm")},
        "qkv_proj": join(*(f"self_attn.{n}_proj" for n in "qkv")),
        "o_proj": join("self_attn.o_proj"),
        "post_attention_layernorm": {"scale": layer("post_attention_layernorm")},
        "mlp": {
            "gate_up_proj": join("mlp.gate_proj", "mlp.up_proj"),
            "down_proj": join("mlp.down_proj"),
        },
        "norm": {"scale": wide("prefix_embeding_layer.norm.weight")},
    }
