# SPDX-License-Identifier: Apache-2.0
"""config.json of the `speculators` project, which vLLM reads directly.

Keys as in speculators' `Eagle3SpeculatorConfig` and `SpeculatorsConfig`. The layer's
configuration is written as a difference to transformers' `LlamaConfig`, so a missing
key means that class's default.
"""

import re
from pathlib import Path
from typing import Any

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    FactorScaling,
    LinearScaling,
    RopeScaling,
    YarnScaling,
)
from ospec_jax.config.fields import Fields, read_json
from ospec_jax.models.hub import KNOWN_MODELS

_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
_NUM_SPECULATIVE_TOKENS = 3


def is_config(raw: dict) -> bool:
    """Whether a config.json is of this project."""
    return "speculators_model_type" in raw or "speculators_config" in raw


def verifier_of(raw: dict) -> str | None:
    """The target that a head was trained for."""
    where = Fields(raw, "config.json").section("speculators_config")
    return where.section("verifier").text("name_or_path", None)


def loadable_name(name: str) -> str:
    """What a reader of the head can load its target by: a folder here, or a hub id.

    Raises:
      ConfigError: It is neither, nor a name that stands for one.
    """
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name].hub_id

    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name

    raise ConfigError(
        f"a head in the format speculators names the model that it drafts for, and "
        f"{name!r} is no name that others can load; pass --target with its hub id "
        f"(owner/name) or its Hugging Face folder"
    )


def _architectures(verifier: str) -> list[str]:
    """Of the target: as its own config.json says, else by its name."""
    file = Path(verifier) / "config.json"
    if file.is_file():
        found = Fields(read_json(file), str(file)).items("architectures", str, None)
        if found:
            return list(found)

    # Of the families that targets are of, those of Qwen carry it in their names.
    qwen = re.search(r"qwen-?(2|3)", verifier.lower())
    return [f"Qwen{qwen[1]}ForCausalLM" if qwen else "LlamaForCausalLM"]


def flatten(raw: dict) -> dict:
    """The keys of a flat EAGLE-3 configuration."""
    outer = {k: v for k, v in raw.items() if k != "transformer_layer_config"}
    layer = Fields(raw, "config.json").section("transformer_layer_config").values
    return _LLAMA_DEFAULTS | layer | outer


def layer_config(c: DraftConfig, max_position: int) -> dict:
    """The decoder layer in the words of transformers' `LlamaConfig`."""
    window: dict[str, Any] = {}
    if c.sliding_window:
        window["sliding_window"] = c.sliding_window
        window["layer_types"] = ["sliding_attention"]

    return window | {
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": _rope_config(c.rope_scaling, max_position),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def _rope_config(scaling: RopeScaling | None, max_position: int) -> dict | None:
    """A scaling in the words of transformers."""
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, FactorScaling):
        factors = list(scaling.factors)
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": scaling.attention_factor,
            "original_max_position_embeddings": max_position,
        }

    both = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
    if isinstance(scaling, YarnScaling):
        return both | {
            "rope_type": "yarn",
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.is_truncated,
        }

    return both | {
        "rope_type": "llama3",
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def to_config(c: DraftConfig, dtype: str, verifier: str, max_position: int) -> dict:
    """The config.json of an EAGLE-3 head."""
    is_narrow = c.target_hidden_size != c.hidden_size
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": _NUM_SPECULATIVE_TOKENS,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {
                "name_or_path": verifier,
                "architectures": _architectures(verifier),
            },
        },
        "transformer_layer_config": layer_config(c, max_position),
        "draft_vocab_size": c.draft_vocab_size,
        "norm_before_residual": c.has_norm_before_residual,
        "target_hidden_size": c.target_hidden_size if is_narrow else None,
        "eagle_aux_hidden_state_layer_ids": list(c.taps),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
