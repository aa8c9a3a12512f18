# SPDX-License-Identifier: Apache-2.0
"""Reading llama.cpp's GGUF files: configuration, weights and tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np

from ospec_jax.config import ConfigError, ModelConfig, Precision
from ospec_jax.models.smoothing import LayerRanges
from ospec_jax.models.weights import (
    FAMILIES,
    QK_NORMS,
    QKV_BIASES,
    LayerWeights,
    WeightsError,
    assemble,
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


class GGUFFile:
    """An opened GGUF file, whose tensors are dequantised one at a time."""

    def __init__(self, path: str | Path):
        import gguf

        self.path = Path(path)

        try:
            self._reader = gguf.GGUFReader(str(path))
            self._fields = {k: f.contents() for k, f in self._reader.fields.items()}
            self._tensors = {t.name: t for t in self._reader.tensors}
        except Exception as error:
            raise WeightsError(
                f"{path} cannot be read as GGUF ({error}); the file is truncated or "
                f"not a GGUF file: download it again"
            ) from error

        self._dequantize = gguf.quants.dequantize

    def __getitem__(self, key: str):
        return self._fields[key]

    def get(self, key: str, default=None):
        """A metadata value, or `default`."""
        return self._fields.get(key, default)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, `[out, in]` for matrices."""
        if name not in self._tensors:
            raise WeightsError(f"{self.path} has no tensor {name!r}")

        tensor = self._tensors[name]
        array = self._dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(array, np.float32).reshape(tensor.shape[::-1])


def read_config(file: GGUFFile) -> ModelConfig:
    """The architecture that a GGUF file describes."""
    family = file.get("general.architecture")
    if family not in FAMILIES:
        raise ConfigError(
            f"{file.path} holds a {family!r} model; supported architectures: "
            f"{', '.join(FAMILIES)}"
        )
    if "rope_freqs.weight" in file:
        raise ConfigError(
            f"{file.path} scales its rotary frequencies by a tensor, rope_freqs, "
            f"which is not supported in GGUF; load its Hugging Face folder instead"
        )

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"{family}.{key}", default)

    heads = get("attention.head_count")
    hidden = get("embedding_length")

    return ModelConfig(
        vocab_size=len(file["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", hidden // heads),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        max_position=get("context_length"),
        tie_embeddings="output.weight" not in file,
        **FAMILIES[family],
    )


def unpermute_rotary(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaved order of q and k rows (llama architecture)."""
    out, fan_in = kernel.shape
    pairs = kernel.reshape(num_heads, out // num_heads // 2, 2, fan_in)
    return pairs.swapaxes(1, 2).reshape(out, fan_in)


def load_params(
    file: GGUFFile,
    config: ModelConfig,
    precision: Precision,
    ranges: list[LayerRanges] | None = None,
) -> dict:
    """Reads the target's parameters, dequantising and casting tensor by tensor."""

    def layer(i: int) -> LayerWeights:
        names = {ours: f"{theirs}.weight" for theirs, ours in _LAYER_TENSORS.items()}
        if config.has_qkv_bias:
            names |= {n: f"attn_{n[0]}.bias" for n in QKV_BIASES}
        if config.has_qk_norm:
            names |= {n: f"attn_{n}.weight" for n in QK_NORMS}

        weights = {ours: file.tensor(f"blk.{i}.{n}") for ours, n in names.items()}
        if file["general.architecture"] == "llama":
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
            for name, count in heads.items():
                weights[name] = unpermute_rotary(weights[name], count)

        return weights

    def top(name: str) -> np.ndarray:
        names = {
            "embed_tokens": "token_embd.weight",
            "norm": "output_norm.weight",
            "lm_head": "output.weight",
        }
        return file.tensor(names[name])

    return assemble(config, precision, top, layer, ranges)
