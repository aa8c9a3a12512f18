# SPDX-License-Identifier: Apache-2.0
"""Families of targets, and what sets each apart from Llama."""

from typing import Any, NamedTuple

from ospec_jax.config.fields import Fields


class Family(NamedTuple):
    """What differs from Llama.

    Attributes:
      traits: Of `ModelConfig`.
      defaults: What a `config.json` means where it has no such value.
      is_in_gguf: GGUF files of this name are read.
    """

    traits: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    is_in_gguf: bool = False


FAMILIES = {
    "llama": Family(is_in_gguf=True),
    "mistral": Family(defaults={"sliding_window": 4096}, is_in_gguf=True),
    "qwen2": Family({"has_qkv_bias": True}, is_in_gguf=True),
    "qwen3": Family({"has_qk_norm": True}, is_in_gguf=True),
    "olmo2": Family(
        {"has_wide_qk_norm": True, "norms": "after"}, {"rms_norm_eps": 1e-5}
    ),
    "granite": Family(),
    "phi3": Family(defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
}
"""By the name that both file formats use."""

_HAS_WINDOW = ("mistral", "phi3")
"""In these a number is a window of all layers, and there is no switch for it."""


class Multipliers(NamedTuple):
    """What Granite multiplies by, beside embeddings.

    Attributes:
      queries: Of them, beside the usual `head_dim ** -0.5`.
      residual: Of what each block adds to the residual stream.
      hidden: Of final states, in front of the head.
    """

    queries: float = 1.0
    residual: float = 1.0
    hidden: float = 1.0


def read_multipliers(fields: Fields, head_dim: int) -> Multipliers:
    """Multipliers of a `config.json`, which weights are multiplied by as they are read.

    So layers stay those of Llama. In bfloat16 such a weight is rounded once more.
    """
    if fields.text("model_type") != "granite":
        return Multipliers()

    return Multipliers(
        queries=fields.number("attention_multiplier", 1.0) * head_dim**0.5,
        residual=fields.number("residual_multiplier", 1.0),
        hidden=1 / fields.number("logits_scaling", 1.0),
    )


def read_embedding_multiplier(fields: Fields) -> float:
    """Granite's."""
    is_granite = fields.text("model_type") == "granite"
    return fields.number("embedding_multiplier", 1.0) if is_granite else 1.0


def read_window(fields: Fields, num_positions: int) -> int:
    """Tokens that each one of all layers sees; 0 for all."""
    if fields.text("model_type") not in _HAS_WINDOW:
        return 0

    window = fields.whole("sliding_window", None) or 0
    return window if window < num_positions else 0
