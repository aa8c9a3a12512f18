# SPDX-License-Identifier: Apache-2.0
"""Weights arrive unchanged from both kinds of file, and broken files say so."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import (
    VOCAB,
    gguf_tensors,
    hf_config,
    hf_tensors,
    model_config,
    write_folder,
    write_gguf,
)
from reference import random_params

from ospec_jax.config import ConfigError, FactorScaling, Llama3Scaling
from ospec_jax.models import hub, weights
from ospec_jax.models.hub import load_target
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.weights import WeightsError

MODELS = {
    "tied": {"tie_embeddings": True},
    "untied": {},
    "qwen2": {"has_qkv_bias": True},
    "qwen3": {"has_qk_norm": True},
}


@pytest.fixture(scope="module", params=list(MODELS))
def source(request):
    config = model_config(**MODELS[request.param])
    return config, random_params(config)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_folder(tmp_path, source, dtype):
    config, params = source
    name = write_folder(tmp_path / "tiny", config, hf_tensors(config, params), dtype)
    target = load_target(name, "float32")
    assert target.config == config
    assert_same(
        target.params, jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    )
    ids = target.tokenizer.encode("hello")
    assert target.tokenizer.decode(ids) == "hello"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_tables_are_cast_some_rows_at_a_time(tmp_path, monkeypatch, precision):
    """Seven rows a time, and fewer the last time."""
    config = model_config()
    params = random_params(config)
    name = write_folder(tmp_path / "tiny", config, hf_tensors(config, params))
    expected = load_target(name, precision)
    assert config.vocab_size % 7
    monkeypatch.setattr(weights, "_BLOCK", 7 * config.hidden_size)
    assert_same(load_target(name, precision).params, expected.params)
    broken = hf_tensors(config, params)
    broken["lm_head.weight"] = np.array(broken["lm_head.weight"])
    broken["lm_head.weight"][-1, -1] = np.nan
    write_folder(tmp_path / "tiny", config, broken)
    with pytest.raises(WeightsError, match=r"lm_head_kernel.*infinities or NaNs"):
        load_target(name, precision)


def test_bfloat16(tmp_path, source):
    config, params = source
    name = write_folder(tmp_path / "tiny", config, hf_tensors(config, params))
    expected = cast_params(jax.tree.map(np.asarray, params), "bfloat16")
    assert_same(load_target(name, "bfloat16").params, expected)


def test_llama3_rope_scaling_and_new_names(tmp_path):
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    config = model_config(rope_scaling=scaling, rope_theta=5e5)
    tensors = hf_tensors(config, random_params(config))
    name = write_folder(tmp_path / "old", config, tensors)
    assert load_target(name, "float32").config == config
    file = tmp_path / "old" / "config.json"
    values = json.loads(file.read_text())
    rope = values.pop("rope_scaling") | {"rope_theta": values.pop("rope_theta")}
    file.write_text(json.dumps(values | {"rope_parameters": rope}))
    assert load_target(name, "float32").config == config


def test_fingerprints_tell_weights_apart(tmp_path):
    config = model_config()
    names = [
        write_folder(tmp_path / str(seed), config, hf_tensors(config, params))
        for seed, params in enumerate((random_params(config), random_params(config, 1)))
    ]
    first, second = (load_target(name, "float32") for name in names)
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == load_target(names[0], "int8").fingerprint


@pytest.mark.parametrize("is_quantized", [False, True], ids=["f32", "q8_0"])
def test_gguf(tmp_path, source, is_quantized):
    config, params = source
    file = tmp_path / "tiny.gguf"
    write_gguf(file, config, gguf_tensors(config, params), is_quantized)
    target = load_target(str(file), "float32")
    # Scalars are stored in float32.
    assert target.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    values = {"rms_norm_eps": config.rms_norm_eps}
    assert type(config)(**vars(target.config) | values) == config
    if not is_quantized:
        assert_same(target.params, params)
        return

    def close(found, expected):
        if expected.ndim == 1:  # norms and biases are not quantised
            np.testing.assert_array_equal(found, expected)
            return
        # Half a step of each block of 32, whose largest value is 127 steps.
        blocks = np.asarray(expected).reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        error = np.abs(np.asarray(found).reshape(-1, 32) - blocks)
        assert np.all(error <= 0.51 * step + 1e-3 * np.abs(blocks))

    jax.tree.map(close, target.params, params)


def test_gguf_tokenizer(tmp_path):
    config = model_config()
    tensors = gguf_tensors(config, random_params(config))
    file = write_gguf(tmp_path / "tiny.gguf", config, tensors)
    tokenizer = load_target(file, "float32").tokenizer
    text = "<|im_start|>the thé 12<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:2] == ["<|im_start|>", "the"]
    assert tokens[-1] == "<|im_end|>"
    assert tokens[-3:-1] == ["1", "2"]
    assert tokenizer.eos_token_id == 2
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"


def test_gguf_rope_factors_are_not_ignored(tmp_path):
    """llama.cpp stores Llama-3's rope scaling as a tensor of divisors."""
    config = model_config()
    params = random_params(config)
    tensors = gguf_tensors(config, params)
    tensors["rope_freqs.weight"] = np.float32([1, 1, 2, 4, 8, 8, 8, 8])
    file = write_gguf(tmp_path / "tiny.gguf", config, tensors)
    target = load_target(file, "float32")
    assert target.config.rope_scaling == FactorScaling((1, 1, 2, 4, 8, 8, 8, 8))
    assert_same(target.params, params)


def truncate(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_gguf(tmp_path, share):
    config = model_config()
    file = tmp_path / "tiny.gguf"
    write_gguf(file, config, gguf_tensors(config, random_params(config)))
    truncate(file, share)
    with pytest.raises(WeightsError, match="tiny.gguf"):
        load_target(str(file), "float32")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_safetensors(tmp_path, share):
    config = model_config()
    name = write_folder(
        tmp_path / "tiny", config, hf_tensors(config, random_params(config))
    )
    truncate(tmp_path / "tiny" / "model-00002-of-00002.safetensors", share)
    with pytest.raises(WeightsError, match="model-00002-of-00002"):
        load_target(name, "float32")


@pytest.mark.parametrize(
    "missing", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
)
def test_missing_tensor_in_a_folder(tmp_path, missing):
    config = model_config()
    tensors = hf_tensors(config, random_params(config))
    del tensors[missing]
    name = write_folder(tmp_path / "tiny", config, tensors)
    with pytest.raises(WeightsError, match=missing):
        load_target(name, "float32")


def test_missing_tensor_in_gguf(tmp_path):
    config = model_config()
    tensors = gguf_tensors(config, random_params(config))
    del tensors["blk.1.ffn_up.weight"]
    file = write_gguf(tmp_path / "tiny.gguf", config, tensors)
    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_up\.weight"):
        load_target(file, "float32")


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("model.embed_tokens.weight", (VOCAB - 1, 32)),
        ("model.layers.1.mlp.down_proj.weight", (32, 32)),
        ("model.layers.0.self_attn.v_proj.weight", (32, 16)),
        ("model.layers.0.mlp.gate_proj.weight", (60, 32)),
        ("model.layers.1.input_layernorm.weight", (31,)),
    ],
)
def test_wrong_shapes_are_named(tmp_path, tensor, shape):
    config = model_config()
    tensors = hf_tensors(config, random_params(config))
    tensors[tensor] = jnp.zeros(shape)
    name = write_folder(tmp_path / "tiny", config, tensors)
    with pytest.raises(WeightsError) as caught:
        load_target(name, "float32")
    short = tensor.removesuffix(".weight").split(".")[-1]
    assert short in str(caught.value)
    assert str(shape[0]) in str(caught.value)


def test_misplaced_rows_are_noticed(tmp_path):
    """q and k of the wrong heights whose sum is right."""
    config = model_config()
    tensors = hf_tensors(config, random_params(config))
    q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]
    name = write_folder(tmp_path / "tiny", config, tensors)
    with pytest.raises(WeightsError):
        load_target(name, "float32")


def test_unknown_architecture_in_a_folder(tmp_path):
    config = model_config()
    tensors = hf_tensors(config, random_params(config))
    name = write_folder(tmp_path / "tiny", config, tensors, model_type="mamba")
    with pytest.raises(ConfigError, match="mamba"):
        load_target(name, "float32")


def test_unknown_architecture_in_gguf(tmp_path):
    config = model_config()
    tensors = gguf_tensors(config, random_params(config))
    file = write_gguf(tmp_path / "tiny.gguf", config, tensors, architecture="gpt2")
    with pytest.raises(ConfigError, match="gpt2"):
        load_target(file, "float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unsupported_variants_are_refused(tmp_path, changes):
    """Rather than computed without what they need."""
    config = model_config()
    tensors = hf_tensors(config, random_params(config))
    name = write_folder(tmp_path / "tiny", config, tensors, **changes)
    with pytest.raises(ConfigError):
        load_target(name, "float32")


@pytest.mark.parametrize("name", ["smollm3-9b", "nowhere/at/all", "missing.gguf"])
def test_unknown_names(name):
    with pytest.raises(FileNotFoundError, match=name) as caught:
        load_target(name, "float32")
    assert "smollm2-135m" in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_target(str(tmp_path), "float32")


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model_config())))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_target(str(tmp_path), "float32")


def test_known_models_pin_their_digest():
    for model in hub.KNOWN_MODELS.values():
        assert len(model.sha256) == 64
