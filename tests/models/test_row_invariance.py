# SPDX-License-Identifier: Apache-2.0
"""A token's numbers are the same bits, whatever pass it is computed in."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.kernels import native
from ospec_jax.models import cache as kv
from ospec_jax.models.hub import cache_folder
from ospec_jax.models.layers import Numerics
from ospec_jax.models.llama import Llama, init_cache, target_logits
from ospec_jax.models.quantization import cast_params
from ospec_jax.testing import tiny_model_config

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        jax.default_backend() != "cpu", reason="the guarantee is the CPU's"
    ),
]

LENGTH = 64
# Heads of 64, as real models have: XLA:CPU multiplies much narrower ones differently.
MODELS = {
    "grouped": dict(
        hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=64, intermediate_size=96,
    ),
    "ungrouped": dict(
        vocab_size=67, hidden_size=128, intermediate_size=192, num_heads=2,
        num_kv_heads=2, head_dim=64, tie_embeddings=False,
    ),
    "smollm": dict(
        vocab_size=1000, hidden_size=192, intermediate_size=512, num_heads=9,
        num_kv_heads=3, head_dim=64,
    ),
}  # fmt: skip
TREES = {
    "chain": (-1, 0, 1, 2, 3),
    "static": topology.static_parents(TreeConfig("static", 3, branching=(3, 2, 1))),
    "ragged": (-1, 0, 0, 0, 0, 1, 1, 3, 5, 7, 7, 7, 10),
}


class Passes:
    """Compiled passes of one model, and a sequence with its one-pass numbers."""

    def __init__(self, config, params, numerics, taps, seed=0):
        self.config, self.params = config, params
        self.numerics = numerics
        self.model = Llama(config, self.numerics, taps)
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, config.vocab_size, LENGTH).astype(np.int32)
        self.expected = self.in_passes([LENGTH])

    def empty_cache(self, batch_size=1, capacity=256):
        c = self.config
        return init_cache(c, self.numerics, batch_size, capacity)

    @functools.partial(jax.jit, static_argnums=0)
    def run(self, params, tokens, positions, bias, cache, starts):
        hidden, taps, cache = self.model.apply(
            {"params": params}, tokens, positions, bias, cache, starts
        )
        return target_logits(params, hidden, self.numerics), taps, cache

    def causal(self, tokens, cache, starts):
        """One pass over consecutive tokens `[b, t]`."""
        tokens = jnp.asarray(tokens, jnp.int32)
        starts = jnp.asarray(starts, jnp.int32)
        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        bias = kv.causal_bias(starts, tokens.shape[1], cache.capacity)
        return self.run(self.params, tokens, positions, bias, cache, starts)

    def in_passes(self, sizes, capacity=256):
        """Logits, taps, keys and values of the sequence, computed in cuts."""
        cache, start, logits, taps = self.empty_cache(1, capacity), 0, [], []
        for size in sizes:
            chunk = self.tokens[None, start : start + size]
            out = self.causal(chunk, cache, [start])
            logits.append(out[0][0])
            taps.append(out[1][0])
            start, cache = start + size, out[2]
        return np.concatenate(logits), np.concatenate(taps), *entries(cache, 0, start)


def entries(cache, row, length):
    """A row's committed keys and values, `[layers, h, length, e]`."""
    take = lambda layers: np.stack([np.asarray(x)[row, :, :length] for x in layers])
    return take([k.swapaxes(2, 3) for k in cache.keys]), take(cache.values)


def assert_same_bits(found, expected):
    for name, x, y in zip(("logits", "taps", "keys", "values"), found, expected,
                          strict=True):  # fmt: skip
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture(scope="module", params=["float32", "int8", "native"])
def numerics(request):
    if request.param != "native":
        return Numerics(request.param)
    if not native.is_available(cache_folder()):
        pytest.skip("no C++ compiler")
    return Numerics("int8", is_native=True)


@pytest.fixture(scope="module", params=list(MODELS))
def passes(request, numerics):
    config = tiny_model_config(**{"num_layers": 2} | MODELS[request.param])
    params = cast_params(random_params(config), numerics.precision)
    return Passes(config, params, numerics, taps=(0, 1))


CUTS = {
    "ones": [1] * LENGTH,
    "mixed": [16, 1, 5, 8, 2, 3, 1, 8, 16, 1, 3],
    "eights": [8] * 8,
}


@pytest.mark.crossed
@pytest.mark.parametrize("cut", list(CUTS))
def test_cuts(passes, cut):
    assert sum(CUTS[cut]) == LENGTH
    assert_same_bits(passes.in_passes(CUTS[cut]), passes.expected)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_layers_of_other_families(precision):
    """With a window, multiplied embeddings, and norms behind blocks."""
    traits = dict(
        norms="after", has_wide_qk_norm=True, attention_window=9,
        embedding_multiplier=3.3,
    )  # fmt: skip
    config = tiny_model_config(**{"num_layers": 2} | MODELS["grouped"] | traits)
    params = cast_params(random_params(config), precision)
    has_native = precision == "int8" and native.is_available(cache_folder())
    passes = Passes(config, params, Numerics(precision, is_native=has_native), (0, 1))
    assert_same_bits(passes.in_passes(CUTS["mixed"]), passes.expected)
    parents = np.asarray(TREES["ragged"], np.int32)
    path, start = deepest_path(parents), 16
    prefix = passes.causal(passes.tokens[None, :start], passes.empty_cache(), [0])
    logits, taps, _ = tree_pass(passes, parents, path, start, prefix[2])
    rows = slice(start, start + len(path))
    np.testing.assert_array_equal(logits[0][path], passes.expected[0][rows])
    np.testing.assert_array_equal(taps[0][path], passes.expected[1][rows])


@pytest.mark.crossed
@pytest.mark.parametrize("cut", [[LENGTH], [1] * LENGTH], ids=["one", "ones"])
def test_capacity(passes, cut):
    assert_same_bits(passes.in_passes(cut, capacity=512), passes.expected)


@pytest.mark.crossed
@pytest.mark.parametrize("size", [1, 5])
def test_batch(passes, size):
    rng = np.random.default_rng(1)
    row, prefixes = 1, [11, 16, 3]
    tokens = rng.integers(0, passes.config.vocab_size, (3, LENGTH)).astype(np.int32)
    tokens[row] = passes.tokens
    caches = []
    for i in range(3):
        out = passes.causal(tokens[i : i + 1, :16], passes.empty_cache(), [0])
        caches.append(out[2])
        if i == row:
            before = out
    cache = jax.tree.map(lambda *rows: jnp.concatenate(rows), *caches)
    logits, taps = [before[0][0]], [before[1][0]]
    for step in range(40 // size):
        starts = np.asarray(prefixes) + step * size
        chunk = np.stack([t[s : s + size] for t, s in zip(tokens, starts, strict=True)])
        out = passes.causal(chunk, cache, starts)
        logits.append(out[0][row])
        taps.append(out[1][row])
        cache = out[2]
    expected = passes.expected
    found = np.concatenate(logits), np.concatenate(taps), *entries(cache, row, 56)
    cut = expected[0][:56], expected[1][:56], *(x[:, :, :56] for x in expected[2:])
    assert_same_bits(found, cut)


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("layout", "capacity"), [("chain", 256), ("static", 256), ("ragged", 512)]
)
def test_tree_nodes(passes, layout, capacity):
    parents = np.asarray(TREES[layout], np.int32)
    start = 16
    path = deepest_path(parents)
    cache = passes.empty_cache(1, capacity)
    prefix = passes.causal(passes.tokens[None, :start], cache, [0])
    out = tree_pass(passes, parents, path, start, prefix[2])
    committed = len(path)
    moved = kv.keep_path(
        out[2], jnp.full((1,), start, jnp.int32), jnp.asarray(path)[None]
    )
    after = passes.causal(
        passes.tokens[None, start + committed : start + committed + 8], moved,
        [start + committed],
    )  # fmt: skip
    end = start + committed + 8
    found = (
        np.concatenate([prefix[0][0], out[0][0][path], after[0][0]]),
        np.concatenate([prefix[1][0], out[1][0][path], after[1][0]]),
        *entries(after[2], 0, end),
    )
    expected = passes.expected
    cut = expected[0][:end], expected[1][:end], *(x[:, :, :end] for x in expected[2:])
    assert_same_bits(found, cut)


def deepest_path(parents):
    """Nodes from the root to the last of the deepest ones."""
    depths = topology.static_depths(parents)
    node = len(parents) - 1 - int(np.argmax(depths[::-1]))
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, int(parents[path[0]]))
    return np.asarray(path, np.int32)


def tree_pass(passes, parents, path, start, cache):
    """Scores a tree whose `path` continues the sequence, other nodes being random."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, passes.config.vocab_size, len(parents)).astype(np.int32)
    tokens[path] = passes.tokens[start : start + len(path)]
    starts = jnp.full((1,), start, jnp.int32)
    mask = jnp.asarray(topology.static_ancestor_mask(parents))[None]
    positions = start + jnp.asarray(topology.static_depths(parents))[None]
    bias = kv.tree_bias(starts, mask, cache.capacity)
    return passes.run(passes.params, tokens[None], positions, bias, cache, starts)


@pytest.mark.parametrize("name", list(MODELS))
def test_products_are_fused_with_nothing(name):
    config = tiny_model_config(**{"num_layers": 1} | MODELS[name])
    model = Llama(config, Numerics())
    tokens = jnp.zeros((2, 8), jnp.int32)
    starts = tokens[:, 0]
    cache = kv.init_cache(1, 2, config.num_kv_heads, 512, config.head_dim, jnp.float32)
    bias = kv.causal_bias(starts, 8, 512)
    params = random_params(config)
    run = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
    compiled = run.lower(params, tokens, tokens, bias, cache, starts).compile()
    # One computation a paragraph, one operation a line, `NAME = TYPE OPERATION(...)`.
    paragraphs = compiled.as_text().split("\n\n")
    fused = [text for text in paragraphs if text.startswith("%") and " dot(" in text]
    assert len(fused) > 5

    for text in fused:
        operations = set(re.findall(r"= \S+ ([\w-]+)\(", text))
        assert operations <= {"dot", "parameter", "bitcast"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", [pytest.param("float32", marks=pytest.mark.thorough), "int8"]
)
def test_real_weights(precision):
    from ospec_jax.models.hub import load_target

    try:
        target = load_target("smollm2-135m", precision)
    except FileNotFoundError as error:
        pytest.skip(f"SmolLM2 is neither here nor to be downloaded: {error}")
    layers = target.config.num_layers
    real = Passes(
        target.config, target.params, target.numerics, (2, layers // 2, layers - 3)
    )
    eights = real.in_passes(CUTS["eights"])
    assert_same_bits(eights, real.expected)
    assert_same_bits(real.in_passes(CUTS["ones"]), real.expected)
    assert_same_bits(real.in_passes([16, 43, 5], 512), real.expected)
    parents = np.asarray(TREES["ragged"], np.int32)
    path, start = deepest_path(parents), 16
    prefix = real.causal(real.tokens[None, :start], real.empty_cache(), [0])
    logits, taps, _ = tree_pass(real, parents, path, start, prefix[2])
    rows = slice(start, start + len(path))
    np.testing.assert_array_equal(logits[0][path], real.expected[0][rows])
    np.testing.assert_array_equal(taps[0][path], real.expected[1][rows])
