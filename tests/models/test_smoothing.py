# SPDX-License-Identifier: Apache-2.0
"""Smoothing changes no float32 output, and what int8 loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import (
    hf_tensors,
    layer_tensors,
    model_config,
    with_native_code,
    write_folder,
)
from reference import random_params

from ospec_jax.models import cache as kv
from ospec_jax.models import hub, llama
from ospec_jax.models.hub import load_target
from ospec_jax.models.layers import Numerics
from ospec_jax.models.smoothing import measure_ranges
from ospec_jax.models.weights import assemble

CONFIG = model_config(tie_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16))


@pytest.fixture(scope="module")
def params():
    """A model two of whose activation channels are far larger than the others."""
    params = random_params(CONFIG)
    outliers = jnp.ones(CONFIG.hidden_size).at[jnp.array([3, 20])].set(60.0)
    for i in range(CONFIG.num_layers):
        layer = params[f"layers_{i}"]
        for norm, reader in (
            ("input_layernorm", layer["self_attn"]["qkv_proj"]),
            ("post_attention_layernorm", layer["mlp"]["gate_up_proj"]),
        ):
            layer[norm]["scale"] = layer[norm]["scale"] * outliers
            reader["kernel"] = reader["kernel"] / outliers
    return params


@pytest.fixture(scope="module")
def ranges(params):
    return measure_ranges(CONFIG, Numerics(), params, TOKENS)


def assembled(params, precision, ranges=None):
    top = lambda name: np.asarray(
        params["norm"]["scale"] if name == "norm" else params[f"{name}_kernel"]
    )
    layer = lambda i: layer_tensors(CONFIG, params[f"layers_{i}"])
    return assemble(CONFIG, precision, top, layer, ranges)


def logits(params, precision):
    numerics = Numerics(precision)
    run = llama.build(CONFIG, numerics)
    b, t = TOKENS.shape
    start = jnp.zeros(b, jnp.int32)
    cache = kv.init_cache(
        CONFIG.num_layers, b, CONFIG.num_kv_heads, t, CONFIG.head_dim, jnp.float32
    )
    bias, positions = kv.causal_bias(start, t, t), jnp.tile(jnp.arange(t), (b, 1))

    @jax.jit
    def score(params):
        tokens = jnp.asarray(TOKENS, jnp.int32)
        hidden = run(params, tokens, positions, bias, cache, start)[0]
        return llama.target_logits(params, hidden, numerics)

    return np.asarray(score(params))


def test_ranges_are_those_of_the_inputs(params, ranges):
    assert len(ranges) == CONFIG.num_layers
    widths = {name: value.shape for name, value in ranges[0].items()}
    d, f = CONFIG.hidden_size, CONFIG.intermediate_size
    assert widths == {"qkv_proj": (d,), "gate_up_proj": (d,), "down_proj": (f,)}
    # The first layer reads normed embeddings, which are easily computed by hand.
    x = np.asarray(params["embed_tokens_kernel"])[TOKENS]
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)
    normed *= np.asarray(params["layers_0"]["input_layernorm"]["scale"])
    expected = np.abs(normed).max(axis=(0, 1))
    np.testing.assert_allclose(ranges[0]["qkv_proj"], expected, rtol=1e-5)


def test_float32_output_keeps_its_bits(params, ranges):
    smoothed = assembled(params, "float32", ranges)
    gains = [p["layers_0"]["input_layernorm"]["scale"] for p in (smoothed, params)]
    assert np.any(np.asarray(gains[0]) != np.asarray(gains[1]))
    np.testing.assert_array_equal(
        logits(smoothed, "float32"), logits(params, "float32")
    )


def test_int8_comes_nearer_to_float32(params, ranges):
    exact = logits(params, "float32")
    error = lambda ranges: np.mean(
        (logits(assembled(params, "int8", ranges), "int8") - exact) ** 2
    )
    assert error(ranges) < 0.5 * error(None)


def test_ranges_are_measured_once(tmp_path, monkeypatch, params):
    with_native_code(tmp_path / "cache")
    monkeypatch.setenv("OSPEC_CACHE_DIR", str(tmp_path / "cache"))
    name = write_folder(tmp_path / "tiny", CONFIG, hf_tensors(CONFIG, params))
    first = load_target(name, "int8")
    monkeypatch.setattr(hub, "measure_ranges", None)
    again = load_target(name, "int8")
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
