# SPDX-License-Identifier: Apache-2.0
"""Assembling target parameters from named tensors, and reading safetensors folders."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ospec_jax.config import ConfigError, ModelConfig, Precision, RopeScaling
from ospec_jax.models.quantization import cast_leaf
from ospec_jax.models.smoothing import LayerRanges, smooth

LayerWeights = dict[str, np.ndarray]
"""One layer's tensors by Hugging Face's short names, `[out, in]` for matrices."""


FAMILIES = {
    "llama": {},
    "qwen2": {"has_qkv_bias": True},
    "qwen3": {"has_qk_norm": True},
}
"""What sets each family apart, by the name that both file formats use."""

_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
"""Settings of a Hugging Face configuration that only have one supported value."""

QKV_BIASES = ("q_bias", "k_bias", "v_bias")
QK_NORMS = ("q_norm", "k_norm")


class WeightsError(ValueError):
    """Weights that are missing, truncated or of the wrong shape."""


def assemble(
    config: ModelConfig,
    precision: Precision,
    top: Callable[[str], np.ndarray],
    layer: Callable[[int], LayerWeights],
    ranges: list[LayerRanges] | None = None,
) -> dict:
    """Builds `Llama`'s parameters, fusing q, k, v and gate, up.

    Args:
      top: Gives `embed_tokens`, `norm` or (when untied) `lm_head`.
      layer: Gives one layer's tensors; only one layer is held in float32 at a time.
      ranges: Of each layer's activations, to smooth before quantising.

    Raises:
      WeightsError: A tensor's shape contradicts the configuration.
    """
    c = config
    params: dict = {}
    _put(
        params,
        "embed_tokens_kernel",
        top("embed_tokens"),
        (c.vocab_size, c.hidden_size),
        precision,
    )

    for i in range(c.num_layers):
        tensors = layer(i)
        _check_layer(c, tensors, i)
        if ranges is not None:
            tensors = smooth(tensors, ranges[i])
        params[f"layers_{i}"] = _assemble_layer(c, precision, tensors)

    params["norm"] = {}
    _put(params["norm"], "scale", top("norm"), (c.hidden_size,), precision)
    if not c.tie_embeddings:
        _put(
            params,
            "lm_head_kernel",
            top("lm_head"),
            (c.vocab_size, c.hidden_size),
            precision,
        )

    return params


def _check_layer(c: ModelConfig, tensors: LayerWeights, i: int) -> None:
    d = c.hidden_size
    f = c.intermediate_size
    e = c.head_dim
    q_rows = c.num_heads * e
    kv_rows = c.num_kv_heads * e
    expected = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "q_proj": (q_rows, d),
        "k_proj": (kv_rows, d),
        "v_proj": (kv_rows, d),
        "o_proj": (d, q_rows),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }
    if c.has_qkv_bias:
        expected |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
    if c.has_qk_norm:
        expected |= dict.fromkeys(QK_NORMS, (e,))

    for name, shape in expected.items():
        _check_shape(name, tensors[name], shape, f"layer {i}")


def _assemble_layer(
    config: ModelConfig, precision: Precision, tensors: LayerWeights
) -> dict:
    join = lambda *names: np.concatenate([tensors[name] for name in names])
    kernel = lambda value: cast_leaf("kernel", value, precision)
    norm = lambda name: cast_leaf("scale", tensors[name], precision)
    attention = {
        "qkv_proj": kernel(join("q_proj", "k_proj", "v_proj")),
        "o_proj": kernel(tensors["o_proj"]),
    }
    if config.has_qkv_bias:
        attention["qkv_proj"] |= cast_leaf("bias", join(*QKV_BIASES), precision)
    if config.has_qk_norm:
        attention |= {name: norm(name) for name in QK_NORMS}

    return {
        "input_layernorm": norm("input_layernorm"),
        "post_attention_layernorm": norm("post_attention_layernorm"),
        "self_attn": attention,
        "mlp": {
            "gate_up_proj": kernel(join("gate_proj", "up_proj")),
            "down_proj": kernel(tensors["down_proj"]),
        },
    }


def _put(target, name, value, shape, precision):
    _check_shape(name, value, shape, "the model")
    target.update(cast_leaf(name, value, precision))


def _check_shape(name, value, shape, where):
    if value.shape != shape:
        raise WeightsError(
            f"{name} of {where} has shape {value.shape}, but the configuration says "
            f"{shape}: the weights belong to another model"
        )


def read_hf_config(folder: Path) -> ModelConfig:
    """The architecture in a Hugging Face `config.json` (v4 or v5 names)."""
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no config.json: not a model folder")

    raw = json.loads(file.read_text())
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{file} describes a {family!r} model; supported families: "
            f"{', '.join(FAMILIES)}"
        )

    for key, supported in _FIXED.items():
        if raw.get(key, supported) != supported:
            raise ConfigError(
                f"{file} has {key} {raw[key]!r}; only {supported!r} is supported"
            )

    theta, scaling = read_rope(raw, str(file))
    heads = raw["num_attention_heads"]

    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads", heads),
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_position=raw.get("max_position_embeddings", 2048),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        **FAMILIES[family],
    )


def read_rope(raw: dict, where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary embeddings in a `config.json` (v4 or v5 names)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"{where} uses rope type {kind!r}; default and llama3 work")

    theta = float(raw.get("rope_theta", rope.get("rope_theta", 10000.0)))
    if kind == "default":
        return theta, None

    return theta, RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )


def load_hf_params(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    ranges: list[LayerRanges] | None = None,
) -> dict:
    """Reads `*.safetensors` shards (bfloat16, float16 or float32) tensor by tensor."""
    from safetensors import safe_open

    where = {}
    handles = []

    for file in sorted(folder.glob("*.safetensors")):
        try:
            handle = safe_open(file, framework="flax")
        except Exception as error:
            raise WeightsError(
                f"{file} cannot be read ({error}): it is truncated or corrupt"
            ) from error
        handles.append(handle)
        where.update(dict.fromkeys(handle.keys(), handle))

    if not where:
        raise FileNotFoundError(f"{folder} has no *.safetensors weights")

    def tensor(name: str) -> np.ndarray:
        if name not in where:
            raise WeightsError(f"{folder} has no tensor {name!r}")

        return np.asarray(where[name].get_tensor(name), np.float32)

    def top(name: str) -> np.ndarray:
        prefix = "" if name == "lm_head" else "model."
        return tensor(f"{prefix}{name}.weight")

    def layer(i: int) -> LayerWeights:
        parts = {
            "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        }
        paths = {n: f"{block}.{n}" for block, names in parts.items() for n in names}
        norms = ("input_layernorm", "post_attention_layernorm")
        paths |= {name: name for name in norms}
        names = {name: f"{path}.weight" for name, path in paths.items()}
        if config.has_qkv_bias:
            names |= {n: f"self_attn.{n[0]}_proj.bias" for n in QKV_BIASES}
        if config.has_qk_norm:
            names |= {n: f"self_attn.{n}.weight" for n in QK_NORMS}

        return {name: tensor(f"model.layers.{i}.{n}") for name, n in names.items()}

    return assemble(config, precision, top, layer, ranges)
