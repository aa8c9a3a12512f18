# SPDX-License-Identifier: Apache-2.0
"""A draft's step in one call: what the modules compute; row by row the same bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import TreeConfig
from ospec_jax.drafters.eagle import EagleHead, Version, eagle1, eagle3
from ospec_jax.kernels import native
from ospec_jax.models import cache as kv
from ospec_jax.models.hub import cache_folder
from ospec_jax.models.layers import Numerics
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.rope import rope_angles, rope_frequencies
from ospec_jax.testing import tiny_draft_config, tiny_model_config
from ospec_jax.types import Draft, Pairs, Roots, SamplingParams, SharedTables

pytestmark = pytest.mark.optimized

NATIVE = Numerics("int8", is_native=True)
CAPACITY = 48
TREE = TreeConfig(num_steps=3)
BUILDERS = {"eagle3": eagle3, "eagle1": eagle1}


@pytest.fixture(scope="module", autouse=True)
def _available():
    if not native.is_available(cache_folder()):
        pytest.skip("layers cannot be built here: no C++ compiler, or no CPU")


KINDS = {
    "eagle3": {},
    "normed residual": dict(has_norm_before_residual=True),
    "window": dict(sliding_window=5),
    "target's head": dict(draft_vocab_size=0),
    "eagle1": dict(taps=(2,), draft_vocab_size=0, has_fc_bias=True),
}


def random_draft(kind):
    """A draft's configuration, its version, its parameters and the target's tables."""
    model = tiny_model_config(vocab_size=70, head_dim=16, hidden_size=64)
    config = tiny_draft_config(model, draft_vocab_size=40)
    config = dataclasses.replace(config, **KINDS[kind])
    version: Version = "eagle1" if kind == "eagle1" else "eagle3"
    build = BUILDERS[version]
    params = build(config, TREE, Numerics()).init_params(jax.random.key(0))
    rng = np.random.default_rng(0)
    # Gains of one would hide that a norm is missing, or another one's is taken.
    params = jax.tree.map(
        lambda x: x if x.ndim > 1 else jnp.asarray(rng.random(x.shape) + 0.5, x.dtype),
        params,
    )
    table = cast_params({"kernel": rng.normal(size=(70, 64)) / 8}, "int8")
    draft = Draft(cast_params(params, "int8"))

    return config, version, draft, SharedTables(embedding=table, head=table)


def random_step(config, num_tokens, starts=(7, 20)):
    """Arguments of `EagleHead.step`."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    starts = jnp.asarray(starts, jnp.int32)
    b = len(starts)
    heads = (b, config.num_kv_heads)
    cache = kv.KVCache(
        keys=(normal(*heads, config.head_dim, CAPACITY),),
        values=(normal(*heads, CAPACITY, config.head_dim),),
    )
    positions = starts[:, None] + jnp.arange(num_tokens)
    return (
        normal(b, num_tokens, config.hidden_size),
        normal(b, num_tokens, config.hidden_size),
        positions,
        kv.causal_bias(starts, num_tokens, CAPACITY),
        cache,
        starts,
    )


def run_step(kind, numerics, args):
    """Outputs, logits, keys and values of `step_and_score`."""
    config, version, draft, shared = random_draft(kind)
    module = EagleHead(config, numerics, version)
    head = None if config.has_own_head else shared.head
    run = functools.partial(module.apply, method=EagleHead.step_and_score)
    outputs, logits, cache = jax.jit(run)({"params": draft.params}, *args, head)

    return outputs, logits, cache.keys[0], cache.values[0]


@pytest.mark.crossed
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_the_modules(kind, num_tokens):
    args = random_step(random_draft(kind)[0], num_tokens)
    expected = run_step(kind, Numerics("int8"), args)
    found = run_step(kind, NATIVE, args)
    names = "outputs", "logits", "keys", "values"
    for name, x, y in zip(names, found, expected, strict=True):
        # Another last bit may move a number of some row to the next of int8's levels.
        np.testing.assert_allclose(x, y, atol=0.1, err_msg=name)
        assert np.mean(np.isclose(x, y, rtol=1e-4, atol=1e-5)) > 0.6, name


@pytest.mark.parametrize("kind", ["eagle3", "normed residual", "eagle1"])
def test_tokens_do_not_depend_on_their_neighbours(kind):
    args = random_step(random_draft(kind)[0], 20, starts=(5,))
    features, embeddings, positions, bias, cache, starts = args
    together = run_step(kind, NATIVE, args)
    for size in (1, 5):
        parts = []
        kept = cache
        for first in range(0, 20, size):
            cut = lambda a, first=first, size=size: a[:, first : first + size]
            own = *map(cut, (features, embeddings, positions, bias)), kept
            *found, keys, values = run_step(kind, NATIVE, (*own, starts + first))
            kept = kv.KVCache(keys=(keys,), values=(values,))
            parts.append(found)
        outputs, logits = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        found = outputs, logits, kept.keys[0], kept.values[0]
        for x, y in zip(found, together, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["eagle3", "target's head", "eagle1"])
def test_logits_of_a_state_are_those_of_its_step(kind):
    """The root's are made by themselves, those of deeper nodes with their states."""
    config, version, draft, shared = random_draft(kind)
    outputs, logits, *_ = run_step(kind, NATIVE, random_step(config, 4))
    module = EagleHead(config, NATIVE, version)
    head = None if config.has_own_head else shared.head
    alone = module.apply(
        {"params": draft.params}, outputs[:1, 2:3], head, method=EagleHead.logits
    )
    np.testing.assert_array_equal(alone, logits[:1, 2:3])


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_tiles_change_no_bit(num_tokens):
    config, _, draft, _ = random_draft("normed residual")
    features, embeddings, positions, bias, cache, starts = random_step(
        config, num_tokens
    )
    params = draft.params
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, None)
    call = functools.partial(
        native.decoder_layer,
        features,
        rope_angles(positions, frequencies, CAPACITY),
        bias,
        cache.keys[0],
        cache.values[0],
        starts,
        native.layer_weights(params, "hidden_norm"),
        1e-5,
        beside=(embeddings, params["input_layernorm"]["scale"]),
        head=(params["norm"]["scale"], *params["lm_head"].values()),
        has_normed_residual=True,
    )
    for found, expected in zip(call(True), call(False), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
def test_drafting_is_one_call_a_token(kind, monkeypatch):
    """What needs two rows is XLA's products, of which there are none."""
    config, version, draft, shared = random_draft(kind)
    shapes = []
    real = native.decoder_layer

    def noting(x, *args, **kwargs):
        shapes.append(x.shape)
        return real(x, *args, **kwargs)

    monkeypatch.setattr(native, "decoder_layer", noting)
    drafter = BUILDERS[version](config, TREE, NATIVE)
    cache = drafter.init_cache(1, CAPACITY)
    one = jnp.ones((1, 1), jnp.int32)
    width = len(config.taps) * config.target_hidden_size
    taps = jnp.ones((1, 1, width))
    pairs = Pairs(one, one, taps, one[0], one[0])
    cache, context = jax.jit(drafter.extend)(draft, shared, cache, pairs)
    assert context.logits.shape == (1, config.num_draft_ids)
    sampling = SamplingParams(jnp.zeros(1), one[0] - 1, jnp.ones(1))
    keys = jax.random.split(jax.random.key(0), 1)
    roots = Roots(one[0], 2 * one[0], keys, context, sampling)
    tree, _ = jax.jit(drafter.propose)(draft, shared, cache, roots)
    assert tree.tokens.shape == (1, 4)
    # The loop's body is traced for the last two tokens together.
    assert set(shapes) == {(1, 1, 64)}


def test_drafts_of_other_kinds_are_left_to_the_modules():
    config, version, draft, _ = random_draft("eagle3")
    cache = random_step(config, 1)[4]

    def is_one_call(numerics=NATIVE, cache=cache, params=draft.params):
        module = EagleHead(config, numerics, version)
        return module.apply({"params": params}, cache, method=EagleHead.is_one_call)

    assert is_one_call()
    assert not is_one_call(Numerics("int8"))
    assert not is_one_call(Numerics("int8", is_native=True, num_groups=2))
    assert not is_one_call(cache=kv.KVCache((cache.keys[0][..., :40],), cache.values))
    for name in ("fc", "o_proj"):
        wide = {"kernel": jnp.zeros(draft.params[name]["kernel"].shape)}
        assert not is_one_call(params=draft.params | {name: wide})


@pytest.mark.parametrize("count", [1, 4, 70])
def test_most_probable_entries(count):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 70)).astype(np.float32)
    # Equal entries come in the order of their places, wherever they lie in a vector.
    logits[0, 0, ::7] = 5.0
    logits[1, 2, 3:] = -np.inf
    log_probs, places = native.most_probable(logits, count)
    values, expected = jax.lax.top_k(logits, count)
    np.testing.assert_array_equal(places, expected)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    np.testing.assert_allclose(log_probs, values - total, rtol=1e-5, atol=1e-6)


def test_most_probable_entries_of_a_row_alone():
    logits = np.random.default_rng(0).normal(size=(40, 9000)).astype(np.float32)
    together = native.most_probable(logits, 3)
    for row in (0, 17, 39):
        alone = native.most_probable(logits[row : row + 1], 3)
        for x, y in zip(alone, together, strict=True):
            np.testing.assert_array_equal(x[0], y[row])


def test_places_of_what_is_no_number_lie_in_the_row():
    log_probs, places = native.most_probable(np.full((1, 33), np.nan, np.float32), 4)
    assert sorted(np.asarray(places)[0].tolist()) == [0, 1, 2, 3]
    assert np.all(np.isnan(log_probs))


def test_a_norm_in_front_of_a_product():
    """With the bits that it has within a layer: those of `head`, see above."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 100)).astype(np.float32)
    gain = rng.random(100).astype(np.float32)
    kernel = rng.integers(-127, 128, size=(30, 100)).astype(np.int8)
    scale = rng.random(30).astype(np.float32)
    normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-3) * gain
    expected = native.int8_linear(normed, kernel, scale)
    found = native.int8_linear(x, kernel, scale, gain=gain, eps=1e-3)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=5.0)
    alone = native.int8_linear(x[2:3], kernel, scale, gain=gain, eps=1e-3)
    np.testing.assert_array_equal(alone[0], found[2])


def test_angles_are_looked_up_with_the_same_bits():
    positions = jnp.asarray([[0, 5, 47], [3, 4, 46]])
    frequencies = rope_frequencies(16, 1e4, None)
    of_product = jax.jit(lambda p: rope_angles(p, frequencies, CAPACITY))(positions)
    taken = rope_angles(positions, frequencies, CAPACITY, is_native=True)
    for x, y in zip(taken, of_product, strict=True):
        np.testing.assert_array_equal(x, y)
