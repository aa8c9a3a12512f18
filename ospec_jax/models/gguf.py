# SPDX-License-Identifier: Apache-2.0
"""Reading llama.cpp's GGUF files: configuration and weights."""

import math

import numpy as np

from ospec_jax.config import (
    ConfigError,
    FactorScaling,
    LinearScaling,
    ModelConfig,
    Precision,
    RopeScaling,
    YarnScaling,
)
from ospec_jax.config.fields import Fields
from ospec_jax.models.families import FAMILIES
from ospec_jax.models.gguf_file import GGUFFile
from ospec_jax.models.smoothing import LayerRanges
from ospec_jax.models.weights import (
    QK_NORMS,
    QKV_BIASES,
    LayerWeights,
    Place,
    assemble,
    check_all_read,
)

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_KEYS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
"""What is read of a family's metadata. Others that change how attention or positions
are computed are refused."""
_COMPUTED = ("attention.", "rope.")
_NO_SCALING = ("none", "")


def read_config(file: GGUFFile) -> ModelConfig:
    """The architecture that a GGUF file describes.

    Raises:
      ConfigError: It is not supported, or the file lacks a value, or one is wrong.
    """
    family = file.fields.text("general.architecture")
    known = [name for name, its in FAMILIES.items() if its.is_in_gguf]
    if family not in known:
        raise ConfigError(
            f"{file.path} holds a {family!r} model; supported architectures: "
            f"{', '.join(known)} (and in Hugging Face folders {', '.join(FAMILIES)})"
        )
    fields = Fields(file.fields.values, str(file.path), f"{family}.")
    fields.refuse_slips(_KEYS)
    _check_computed(file, fields)
    heads = fields.whole("attention.head_count")
    hidden = fields.whole("embedding_length")
    head_dim = fields.whole("attention.key_length", None) or hidden // heads

    for key in ("attention.value_length", "rope.dimension_count"):
        found = fields.whole(key, head_dim)
        if found != head_dim:
            raise ConfigError(
                f"{file.path} has {fields.prefix}{key} {found}, and heads of "
                f"{head_dim}; only the same for both is supported"
            )

    scaling, length = _read_scaling(file, fields)

    return ModelConfig(
        vocab_size=len(file.fields.items("tokenizer.ggml.tokens", str)),
        hidden_size=hidden,
        intermediate_size=fields.whole("feed_forward_length"),
        num_layers=fields.whole("block_count"),
        num_heads=heads,
        num_kv_heads=fields.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_position=min(fields.whole("context_length"), length),
        # A file without a head of its own shares the embedding.
        tie_embeddings="output.weight" not in file,
        **FAMILIES[family].traits,
    )


def _check_computed(file: GGUFFile, fields: Fields) -> None:
    """Refuses settings that would have to be computed with, and are not."""
    for name, value in fields.values.items():
        key = name.removeprefix(fields.prefix)
        is_own = name.startswith(fields.prefix) and key.startswith(_COMPUTED)
        if not is_own or key in _KEYS:
            continue
        raise _not_computed(file, name, value)


def _not_computed(file: GGUFFile, name: str, value: object) -> ConfigError:
    return ConfigError(
        f"{file.path} has {name} {value!r:.80}, which is not supported in GGUF; load "
        f"its Hugging Face folder instead, if that does without"
    )


def _read_scaling(file: GGUFFile, fields: Fields) -> tuple[RopeScaling | None, int]:
    """Scaling of rotary embeddings, and how many positions it is good for."""
    length = fields.whole("context_length")
    # As llama.cpp reads it where there is no name.
    kind = fields.text("rope.scaling.type", "linear")
    old_factor = fields.number("rope.scale_linear", 1.0)
    factor = fields.number("rope.scaling.factor", old_factor)
    magnitude = fields.number("rope.scaling.attn_factor", 1.0)
    original = fields.whole("rope.scaling.original_context_length", length)
    if kind in _NO_SCALING:
        factor = 1.0

    # Llama-3's scaling, and LongRoPE's within the context that was trained before it,
    # are stored as what each frequency is divided by.
    for name, good_for in (("rope_freqs", length), ("rope_factors_short", original)):
        if f"{name}.weight" in file:
            if kind == "yarn" or factor != 1:
                raise ConfigError(
                    f"{file.path} scales its rotary frequencies twice, by a tensor, "
                    f"{name}, and by {fields.prefix}rope.scaling; load its Hugging "
                    f"Face folder instead"
                )
            factors = file.tensor(f"{name}.weight").reshape(-1)
            return FactorScaling(tuple(map(float, factors)), magnitude), good_for

    if kind == "yarn":
        scaling = YarnScaling(
            factor=factor,
            original_max_position=original,
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=magnitude * (1 + 0.1 * math.log(max(factor, 1.0))),
        )
        return scaling, length
    if kind not in ("linear", *_NO_SCALING):
        raise _not_computed(file, f"{fields.prefix}rope.scaling.type", kind)
    if magnitude != 1:
        name = f"{fields.prefix}rope.scaling.attn_factor"
        raise _not_computed(file, name, magnitude)

    return (LinearScaling(factor) if factor != 1 else None), length


def unpermute_rotary(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaved order of q and k rows (llama architecture).

    Args:
      kernel: `[num_heads * e, d]`.
    """
    out, fan_in = kernel.shape
    # Interleaved pairs `[heads, e / 2, 2]` to two halves `[heads, 2, e / 2]`.
    pairs = kernel.reshape(num_heads, out // num_heads // 2, 2, fan_in)
    return pairs.swapaxes(1, 2).reshape(out, fan_in)


def load_params(
    file: GGUFFile,
    config: ModelConfig,
    precision: Precision,
    ranges: list[LayerRanges] | None = None,
    place: Place = lambda params: params,
) -> dict:
    """Reads the target's parameters, dequantising and casting tensor by tensor.

    Args:
      ranges: See `weights.assemble`, as for `place`.

    Raises:
      WeightsError: A tensor is missing, surplus, not finite or of the wrong shape.
    """
    read = set()

    def tensor(name: str) -> np.ndarray:
        read.add(name)
        return file.tensor(name)

    def layer(i: int) -> LayerWeights:
        names = {ours: f"{theirs}.weight" for theirs, ours in _LAYER_TENSORS.items()}
        if config.has_qkv_bias:
            names |= {n: f"attn_{n[0]}.bias" for n in QKV_BIASES}
        if config.has_qk_norm:
            names |= {n: f"attn_{n}.weight" for n in QK_NORMS}

        weights = {ours: tensor(f"blk.{i}.{n}") for ours, n in names.items()}
        if file.get("general.architecture") == "llama":
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
            for name, count in heads.items():
                rows = count * config.head_dim
                # A wrong shape is told by `assemble`, which names the tensor.
                if weights[name].shape == (rows, config.hidden_size):
                    weights[name] = unpermute_rotary(weights[name], count)

        return weights

    def top(name: str) -> np.ndarray:
        names = {
            "embed_tokens": "token_embd.weight",
            "norm": "output_norm.weight",
            "lm_head": "output.weight",
        }
        return tensor(names[name])

    params = assemble(config, precision, top, layer, ranges, place)
    check_all_read(str(file.path), file.tensor_names, read)

    return params
