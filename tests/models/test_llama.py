# SPDX-License-Identifier: Apache-2.0
"""Our forward pass against an independent one in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from reference import forward, random_params

from ospec_jax.config import Llama3Scaling, YarnScaling
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import Linear, Numerics
from ospec_jax.models.llama import Llama, target_logits
from ospec_jax.testing import tiny_model_config

CAPACITY = 64
TAPS = (0, 2, 3)
SCALING = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
)
NUMERICS = Numerics("float32")

YARN = YarnScaling(4.0, 64, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3)


def build(config, params, taps=TAPS):
    """`(tokens [b, t], cache, starts [b]) -> (logits, taps, cache)`, compiled."""
    model = Llama(config, NUMERICS, taps)

    @jax.jit
    def run(tokens, cache, starts):
        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        bias = kv.causal_bias(starts, tokens.shape[1], cache.capacity)
        hidden, features, cache = model.apply(
            {"params": params}, tokens, positions, bias, cache, starts
        )
        return target_logits(params, hidden, NUMERICS), features, cache

    return run


def empty_cache(config, batch_size=1):
    return kv.init_cache(
        config.num_layers, batch_size, config.num_kv_heads, CAPACITY, config.head_dim,
        jnp.float32,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["group1", "group2"])
@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_forward_equals_numpy(tied, num_kv_heads, scaling):
    config = tiny_model_config(
        vocab_size=23, num_layers=3, num_kv_heads=num_kv_heads, rope_scaling=scaling,
        tie_embeddings=tied,
    )  # fmt: skip
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 23, (2, 40)).astype(np.int32)
    run = build(config, params)
    starts = jnp.zeros(2, jnp.int32)
    logits, taps, _ = run(tokens, empty_cache(config, 2), starts)
    for row in range(2):
        expected, expected_taps = forward(params, config, tokens[row], TAPS)
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)
        np.testing.assert_allclose(taps[row], expected_taps, atol=1e-4)
        assert np.ptp(expected) > 1.0


@pytest.mark.parametrize("family", [{"has_qkv_bias": True}, {"has_qk_norm": True}])
def test_qwen_forward_equals_numpy(family):
    config = tiny_model_config(vocab_size=23, num_layers=3, head_dim=16, **family)
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 23, (1, 40)).astype(np.int32)
    starts = jnp.zeros(1, jnp.int32)
    logits, taps, _ = build(config, params)(tokens, empty_cache(config), starts)
    expected, expected_taps = forward(params, config, tokens[0], TAPS)
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)
    np.testing.assert_allclose(taps[0], expected_taps, atol=1e-4)
    plain = tiny_model_config(vocab_size=23, num_layers=3, head_dim=16)
    assert np.abs(forward(params, plain, tokens[0])[0] - expected).max() > 0.1


def test_a_scaled_magnitude_reaches_the_logits():
    config = tiny_model_config(vocab_size=23, head_dim=16, rope_scaling=YARN)
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 23, (1, 40)).astype(np.int32)
    starts = jnp.zeros(1, jnp.int32)
    logits, _, _ = build(config, params, ())(tokens, empty_cache(config), starts)
    expected = forward(params, config, tokens[0])[0]
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)


@pytest.mark.parametrize("scaling", [SCALING, YARN], ids=["llama3", "yarn"])
def test_rope_scaling_changes_the_result(scaling):
    plain = tiny_model_config(num_layers=1)
    scaled = tiny_model_config(num_layers=1, rope_scaling=scaling)
    params, tokens = random_params(plain), np.arange(16)
    difference = forward(params, plain, tokens)[0] - forward(params, scaled, tokens)[0]
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("chunks", [(16, 16, 8), (1, 2, 5, 8, 8, 16)])
def test_cached_chunks_equal_one_pass(chunks):
    config = tiny_model_config(vocab_size=23, num_layers=3)
    params = random_params(config)
    tokens = np.random.default_rng(2).integers(0, 23, (1, 40)).astype(np.int32)
    run = build(config, params)
    cache, start = empty_cache(config), 0
    logits, taps = [], []
    for size in chunks:
        chunk = tokens[:, start : start + size]
        out = run(chunk, cache, jnp.full((1,), start, jnp.int32))
        cache, start = out[2], start + size
        logits.append(out[0])
        taps.append(out[1])
    expected, expected_taps = forward(params, config, tokens[0], TAPS)
    np.testing.assert_allclose(np.concatenate(logits, 1)[0], expected, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(taps, 1)[0], expected_taps, atol=1e-4)


def test_without_taps_there_are_no_features():
    config = tiny_model_config(num_layers=1)
    run = build(config, random_params(config), taps=())
    tokens, starts = jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
    assert run(tokens, empty_cache(config), starts)[1].shape == (1, 2, 0)


def test_weights_of_another_shape_are_refused():
    params = {"kernel": jnp.zeros((3, 5))}
    with pytest.raises(ScopeParamShapeError, match=r'"kernel".*\(3, 4\).*\(3, 5\)'):
        Linear(3, NUMERICS).apply({"params": params}, jnp.zeros((2, 4)))
