# SPDX-License-Identifier: Apache-2.0
"""Shapes of public models, for programs that are sized without their weights."""

import dataclasses

from ospec_jax.config import Llama3Scaling, ModelConfig

ARCHITECTURES = {
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        max_position=8192,
    ),
    "qwen2.5-0.5b": ModelConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position=32768,
        has_qkv_bias=True,
    ),
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=5e5,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
        max_position=131072,
        tie_embeddings=False,
    ),
    "qwen3-8b": ModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position=40960,
        tie_embeddings=False,
        has_qk_norm=True,
    ),
}
"""By name; the figures are those of the models' own `config.json`."""


def with_layers(model: ModelConfig, num_layers: int) -> ModelConfig:
    """The same model with fewer layers, or more."""
    return dataclasses.replace(model, num_layers=num_layers)
