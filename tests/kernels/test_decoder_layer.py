# SPDX-License-Identifier: Apache-2.0
"""A layer in one call: what the modules compute, and row by row the same bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.kernels import native
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import cache_folder
from ospec_jax.models.layers import Numerics
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.rope import rope_angles, rope_frequencies
from ospec_jax.testing import tiny_model_config

pytestmark = pytest.mark.optimized

NATIVE = Numerics("int8", is_native=True)
CAPACITY = 48


@pytest.fixture(scope="module", autouse=True)
def _available():
    if not native.is_available(cache_folder()):
        pytest.skip("layers cannot be built here: no C++ compiler, or no CPU")


def random_layer(num_tokens, starts=(7, 20), **changes):
    """A layer's configuration, its parameters and its arguments."""
    sizes = dict(num_layers=1, head_dim=16, hidden_size=64, intermediate_size=128)
    config = tiny_model_config(**(sizes | changes))
    params = cast_params(random_params(config), "int8")["layers_0"]
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    starts = jnp.asarray(starts, jnp.int32)
    b = len(starts)
    positions = starts[:, None] + jnp.arange(num_tokens)
    frequencies = rope_frequencies(config.head_dim, 1e4, None)
    args = (
        normal(b, num_tokens, config.hidden_size),
        rope_angles(positions, frequencies, 2 * CAPACITY),
        kv.causal_bias(starts, num_tokens, CAPACITY),
        normal(b, config.num_kv_heads, config.head_dim, CAPACITY),
        normal(b, config.num_kv_heads, CAPACITY, config.head_dim),
        starts,
    )
    return config, params, args


def _random_head(config):
    """An int8 output projection of 40 tokens, and its scale."""
    rng = np.random.default_rng(2)
    kernel = rng.integers(-127, 128, (40, config.hidden_size), dtype=np.int8)
    return jnp.asarray(kernel), jnp.asarray(rng.random(40), jnp.float32)


def run_modules(config, numerics, params, args):
    layer = llama.DecoderLayer(config, numerics)
    return jax.jit(layer.apply)({"params": params}, *args)


KINDS = {
    "plain": {},
    "odd": dict(hidden_size=40, intermediate_size=50, num_heads=6, num_kv_heads=2),
    "bias": dict(has_qkv_bias=True),
    "qk_norm": dict(has_qk_norm=True),
    "single": dict(num_heads=1, num_kv_heads=1),
}


@pytest.mark.crossed
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_the_modules(kind, num_tokens, monkeypatch):
    layer = random_layer(num_tokens, **KINDS[kind])
    calls = []
    real = native.decoder_layer
    monkeypatch.setattr(
        native,
        "decoder_layer",
        lambda *a, **b: (calls.append(a), real(*a, **b))[1],
    )
    config, params, args = layer
    expected = run_modules(config, Numerics("int8"), params, args)
    assert not calls
    found = run_modules(config, NATIVE, params, args)
    assert len(calls) == 1
    for name, x, y in zip(("x", "keys", "values"), found, expected, strict=True):
        # Another last bit may move a number of some row to the next of int8's levels.
        np.testing.assert_allclose(x, y, atol=0.05, err_msg=name)
        assert np.mean(np.isclose(x, y, rtol=1e-4, atol=1e-5)) > 0.85, name


def test_writes_nothing_but_the_new_slots():
    """A start that is too late is moved forward, as XLA moves it."""
    starts, num_tokens = (3, CAPACITY), 4
    config, params, args = random_layer(num_tokens, starts)
    _, keys, values = run_modules(config, NATIVE, params, args)
    is_new = np.zeros((2, CAPACITY), bool)
    is_new[0, 3:7] = is_new[1, CAPACITY - num_tokens :] = True
    changed = np.any(np.asarray(keys) != np.asarray(args[3]), axis=(1, 2))
    np.testing.assert_array_equal(changed, is_new)
    changed = np.any(np.asarray(values) != np.asarray(args[4]), axis=(1, 3))
    np.testing.assert_array_equal(changed, is_new)


@pytest.mark.parametrize("num_valid", [1, 5, 8])
def test_padding_is_left_out(num_valid):
    """Behind a lone request's tokens: no bit differs from those of a call without."""
    config, params, args = random_layer(8, starts=(7,))
    x, angles, bias, keys, values, starts = args
    weights = native.layer_weights(params)
    head = jnp.ones(config.hidden_size), *_random_head(config)
    call = functools.partial(native.decoder_layer, head=head)
    count = jnp.asarray([num_valid])
    found = call(*args, weights, 1e-5, num_valid=count)
    cut = lambda a: a[:, :num_valid]
    own = cut(x), tuple(map(cut, angles)), cut(bias), keys, values, starts
    expected = call(*own, weights, 1e-5)
    for i in (0, 3):  # states and logits
        np.testing.assert_array_equal(cut(found[i]), expected[i])
        assert not np.any(found[i][:, num_valid:])
    for i in (1, 2):  # keys and values
        np.testing.assert_array_equal(found[i], expected[i])


def test_padding_of_several_requests_is_computed():
    _, params, args = random_layer(3)
    weights = native.layer_weights(params)
    count = jnp.asarray([1, 2])
    found = native.decoder_layer(*args, weights, 1e-5, num_valid=count)
    expected = native.decoder_layer(*args, weights, 1e-5)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_padding_of_stacked_layers_has_no_inputs_either():
    """Zeros stand for what was not computed, in every tap."""
    sizes = dict(head_dim=16, hidden_size=64, intermediate_size=128)
    config = tiny_model_config(num_layers=2, **sizes)
    params = llama.stack_layers(cast_params(random_params(config), "int8"))
    numerics = dataclasses.replace(NATIVE, is_scanned=True)
    model = llama.build(config, numerics, taps=(0, 1, 2))
    starts = jnp.zeros(1, jnp.int32)
    positions = jnp.arange(6)[None]

    def run(num_tokens, num_valid=None):
        cache = llama.init_cache(config, numerics, 1, CAPACITY)
        bias = kv.causal_bias(starts, num_tokens, CAPACITY)
        own = positions[:, :num_tokens]
        return model(params, own + 3, own, bias, cache, starts, num_valid)

    found = run(6, jnp.asarray([4]))
    expected = run(4)
    width = config.hidden_size
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(one[:, :4], other)
    assert not np.any(found[0][:, 4:])
    assert not np.any(found[1][:, 4:, width:])
    np.testing.assert_array_equal(found[2].keys, expected[2].keys)
    np.testing.assert_array_equal(found[2].values, expected[2].values)


def test_its_arguments_stay_when_others_read_them():
    config, params, args = random_layer(2)
    before = np.array(args[3]), np.array(args[4])
    run_modules(config, NATIVE, params, args)
    np.testing.assert_array_equal(args[3], before[0])
    np.testing.assert_array_equal(args[4], before[1])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_tokens_do_not_depend_on_their_neighbours(size):
    config, params, args = random_layer(20, starts=(5,))
    x, angles, bias, keys, values, starts = args
    together = run_modules(config, NATIVE, params, args)
    parts = []
    for first in range(0, 20, size):
        cut = lambda a, first=first: a[:, first : first + size]
        own = cut(x), tuple(map(cut, angles)), cut(bias), keys, values, starts + first
        out, keys, values = run_modules(config, NATIVE, params, own)
        parts.append(out)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), together[0])
    np.testing.assert_array_equal(keys, together[1])
    np.testing.assert_array_equal(values, together[2])


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 30])
def test_tiles_change_no_bit(num_tokens):
    config, params, args = random_layer(num_tokens, starts=(2, 9, 11))
    weights = native.layer_weights(params)
    call = functools.partial(native.decoder_layer, *args, weights, 1e-5)
    for found, expected in zip(call(True), call(False), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_layers_of_other_kinds_are_left_to_the_modules():
    config, params, args = random_layer(2)
    is_one_call = lambda numerics, keys=args[3], params=params: llama.is_one_call(
        config, numerics, keys, params
    )
    assert is_one_call(NATIVE)
    assert not is_one_call(Numerics("int8"))
    assert not is_one_call(Numerics("int8", is_native=True, num_groups=2))
    assert not is_one_call(NATIVE, keys=args[3][..., :40])
    mixed = {**params, "mlp": {**params["mlp"]}}
    mixed["mlp"]["down_proj"] = {"kernel": jnp.zeros((64, 128))}
    assert not is_one_call(NATIVE, params=mixed)


def test_a_lone_token_is_computed_once(monkeypatch):
    """What needs two rows is XLA's products, of which there are none."""
    shapes = []
    real = native.decoder_layer
    monkeypatch.setattr(
        native,
        "decoder_layer",
        lambda *a, **b: (shapes.append(a[0].shape), real(*a, **b))[1],
    )
    config = tiny_model_config(num_layers=2, head_dim=16, hidden_size=64)
    params = cast_params(random_params(config), "int8")
    cache = kv.init_cache(2, 1, config.num_kv_heads, CAPACITY, 16, jnp.float32)
    tokens, starts = jnp.ones((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    bias = kv.causal_bias(starts, 1, CAPACITY)
    llama.build(config, NATIVE)(params, tokens, tokens, bias, cache, starts)
    assert shapes == [(1, 1, 64)] * 2


@pytest.mark.parametrize("num_layers", [3, 2])
def test_stacked_layers_are_layers_one_after_the_other(num_layers):
    """With taps of some of them; of three layers two may be run."""
    sizes = dict(head_dim=16, hidden_size=64, intermediate_size=128, has_qkv_bias=True)
    params = cast_params(
        random_params(tiny_model_config(num_layers=3, **sizes)), "int8"
    )
    config = tiny_model_config(num_layers=num_layers, **sizes)
    taps = (2, 0, num_layers)
    starts = jnp.asarray([5, 9], jnp.int32)
    tokens = jnp.asarray([[3, 1, 4], [1, 5, 9]], jnp.int32)
    positions = starts[:, None] + jnp.arange(3)
    bias = kv.causal_bias(starts, 3, CAPACITY)

    def run(numerics, params):
        cache = llama.init_cache(config, numerics, 2, CAPACITY)
        model = llama.build(config, numerics, taps)
        return jax.jit(model)(params, tokens, positions, bias, cache, starts)

    hidden, features, cache = run(NATIVE, params)
    stacked = dataclasses.replace(NATIVE, is_scanned=True)
    found = run(stacked, llama.stack_layers(dict(params)))
    np.testing.assert_array_equal(found[0], hidden)
    np.testing.assert_array_equal(found[1], features)
    assert features.shape == (2, 3, 3 * config.hidden_size)
    for own, all_layers in (
        (cache.keys, found[2].keys),
        (cache.values, found[2].values),
    ):
        np.testing.assert_array_equal(jnp.stack(own), all_layers)


def test_stacking_takes_the_layers_out():
    """Else all of them would be held twice until the last one is stacked."""
    params = dict(cast_params(random_params(tiny_model_config(num_layers=2)), "int8"))
    second = params["layers_1"]["mlp"]["down_proj"]["kernel"]
    stacked = llama.stack_layers(params)
    assert not [name for name in params if name.startswith("layers")]
    found = llama.layer_params(stacked, 1)["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(found, second)
