# SPDX-License-Identifier: Apache-2.0
"""What sets families apart from Llama, by an independent forward pass, and exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import (
    VOCAB,
    hf_tensors,
    layer_tensors,
    model_config,
    write_folder,
)
from reference import forward, random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import load_config, load_target
from ospec_jax.models.smoothing import smooth
from ospec_jax.models.weights import WeightsError
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

OLMO2 = {"norms": "after", "has_wide_qk_norm": True}
WINDOW = {"attention_window": 7}
# Layers of Llama, which the native kernels take, and layers that they do not.
TRAITS = {
    "window": WINDOW,
    "granite": {"embedding_multiplier": 3.0},
    "olmo2": OLMO2,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.37,
    "logits_scaling": 2.5,
}
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 24).astype(np.int32)


def logits_of(config, numerics, params, taps=()):
    """Of `TOKENS`, and what is tapped."""
    starts = jnp.zeros(1, jnp.int32)
    num_tokens = len(TOKENS)
    cache = llama.init_cache(config, numerics, 1, 32)
    run = jax.jit(llama.build(config, numerics, taps))
    hidden, features, _ = run(
        params,
        TOKENS[None],
        jnp.arange(num_tokens)[None],
        kv.causal_bias(starts, num_tokens, 32),
        cache,
        starts,
    )
    return llama.target_logits(params, hidden, numerics)[0], features[0]


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_forward_equals_numpy(traits):
    config = model_config(**traits)
    params = random_params(config)
    logits, taps = logits_of(config, tiny_target().numerics, params, (0, 1, 2))
    expected, expected_taps = forward(params, config, TOKENS, (0, 1, 2))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(taps, expected_taps, atol=1e-4)
    plain = model_config(**traits | {"attention_window": 0, "embedding_multiplier": 1})
    if plain != config:
        difference = np.abs(forward(params, plain, TOKENS)[0] - expected)
        assert difference.max() > 0.1


def test_granites_multipliers_are_in_the_weights(tmp_path):
    config = model_config(embedding_multiplier=3.0, tie_embeddings=True)
    params = random_params(config)
    changes = {"model_type": "granite"} | MULTIPLIERS
    tensors = hf_tensors(config, params)
    name = write_folder(tmp_path / "tiny", config, tensors, **changes)
    target = load_target(name, "float32")
    assert target.config == config
    found, _ = logits_of(config, target.numerics, target.params)
    expected, _ = forward(
        params, config, TOKENS, attention=0.2, residual=0.37, logits_scaling=2.5
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    plain, _ = forward(params, config, TOKENS)
    assert np.abs(plain - expected).max() > 0.1


def fused(tensors):
    """As Phi-3 stores them."""
    joined = dict(tensors)
    for i in range(2):
        layer = f"model.layers.{i}."
        for path, names in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj",
                                   "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():  # fmt: skip
            parts = [joined.pop(f"{layer}{name}.weight") for name in names]
            joined[f"{layer}{path}.weight"] = np.concatenate(parts)
    return joined


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_phi3s_products_are_stored_as_they_are_used(tmp_path):
    config = model_config(attention_window=64)
    params = random_params(config)
    tensors = fused(hf_tensors(config, params))
    changes = {"model_type": "phi3", "sliding_window": 64}
    name = write_folder(tmp_path / "tiny", config, tensors, **changes)
    target = load_target(name, "float32")
    assert target.config == config
    assert_same(target.params, params)
    path = "model.layers.1.mlp.gate_up_proj.weight"
    tensors[path] = tensors[path][:-1]
    write_folder(tmp_path / "tiny", config, tensors, **changes)
    with pytest.raises(WeightsError, match=r"mlp.gate_up_proj of layer 1 has shape"):
        load_target(name, "float32")


def test_olmo2s_norms_are_read(tmp_path):
    config = model_config(**OLMO2)
    params = random_params(config)
    name = write_folder(tmp_path / "tiny", config, hf_tensors(config, params))
    target = load_target(name, "float32")
    assert target.config == config
    assert_same(target.params, params)


def test_without_norms_in_front_only_the_last_product_is_smoothed():
    config = model_config(**OLMO2)
    tensors = layer_tensors(config, random_params(config)["layers_0"])
    ranges = {
        "qkv_proj": np.geomspace(1, 100, 32),
        "gate_up_proj": np.geomspace(1, 100, 32),
        "down_proj": np.geomspace(1, 100, 64),
    }
    found = smooth(tensors, ranges)
    changed = {n for n, x in tensors.items() if not np.array_equal(x, found[n])}
    assert changed == {"up_proj", "down_proj"}
    whole = lambda t: t["down_proj"] @ t["up_proj"]
    np.testing.assert_allclose(whole(found), whole(tensors), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral"}, 4096),  # as transformers has it
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "mistral", "sliding_window": 8192}, 0),
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "phi3"}, 0),
        ({"model_type": "phi3", "sliding_window": 2047}, 2047),
        # Theirs is switched off.
        ({"model_type": "qwen2", "sliding_window": 64}, 0),
    ],
)
def test_windows(tmp_path, changes, window):
    config = model_config(max_position=8192)
    write_folder(tmp_path / "tiny", config, hf_tensors(config, PARAMS), **changes)
    assert load_config(str(tmp_path / "tiny")).attention_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "granitemoe"}, "'granitemoe' model; supported families: llama"),
        ({"model_type": "granite", "residual_multiplier": "a"}, "residual_multiplier"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "only a part of each"),
        ({"model_type": "olmo2", "hidden_act": "gelu"}, "hidden_act 'gelu'; only"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_is_not_covered_is_refused(tmp_path, changes, message):
    config = model_config()
    tensors = hf_tensors(config, PARAMS)
    name = write_folder(tmp_path / "tiny", config, tensors, **changes)
    with pytest.raises(ConfigError, match=message):
        load_target(name, "float32")


PARAMS = random_params(model_config())


@functools.cache
def target_of(precision, traits):
    return tiny_target(16, precision, **dict(traits))


def greedy(target, tree):
    config = tiny_draft_config(target.config)
    drafter = build_drafter("eagle3", config, tree, target.numerics)
    is_plain = not tree.num_steps
    step = StepConfig(target.config, target.numerics, tree, config.taps)
    engine = Engine(step, target.params, None if is_plain else drafter)
    draft = None if is_plain else tiny_draft(drafter, config)
    prompts = [(1, 2, 3), tuple(np.arange(30) % 16)]
    requests = [Request(str(i), ids, 24) for i, ids in enumerate(prompts)]
    done = engine.serve(requests, lambda: draft, 2)
    done = sorted(done, key=lambda completion: completion.request.id)
    return [c.token_ids for c in done], sum(c.stats.num_accepted_tokens for c in done)


CHAIN = TreeConfig(num_steps=3)
DYNAMIC = TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12)


@pytest.mark.bits(others_suffice=True)
@pytest.mark.parametrize(
    ("precision", "traits", "tree"),
    [
        ("int8", {"embedding_multiplier": 3.0} | WINDOW, CHAIN),
        ("float32", {"embedding_multiplier": 3.0} | WINDOW | OLMO2, DYNAMIC),
        pytest.param("int8", OLMO2, DYNAMIC, marks=pytest.mark.thorough),
    ],
    ids=["int8-window-granite", "float32-all", "int8-olmo2"],
)
def test_greedy_equals_plain_decoding(precision, traits, tree):
    target = target_of(precision, tuple(traits.items()))
    plain, _ = greedy(target, TreeConfig(num_steps=0))
    found, num_accepted = greedy(target, tree)
    assert found == plain
    assert num_accepted > 0


def test_a_window_is_longer_than_what_is_drafted():
    target = target_of("float32", (("attention_window", 3),))
    with pytest.raises(ConfigError, match="see 3 of those.*draft 2 at most"):
        StepConfig(target.config, target.numerics, TreeConfig(num_steps=3))
