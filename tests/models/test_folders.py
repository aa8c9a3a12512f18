# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: what they say is heeded or refused, never passed over."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
from model_files import hf_tensors, model_config, with_native_code, write_folder
from reference import random_params
from safetensors.numpy import load_file, save_file

from ospec_jax.config import ConfigError, InputError
from ospec_jax.decoding.request import Request
from ospec_jax.models.hub import fingerprint, load_config, load_target
from ospec_jax.models.weights import WeightsError
from ospec_jax.session import Session

CONFIG = model_config(num_layers=1)
PARAMS = random_params(CONFIG)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "tiny", CONFIG, hf_tensors(CONFIG, PARAMS))
    return tmp_path / "tiny"


def load(folder):
    return load_target(str(folder), "float32")


def change(file, **changes):
    """Changes values of a JSON file; those that shall be `...` are taken out."""
    values = json.loads(file.read_text()) if file.exists() else {}
    values = {k: x for k, x in (values | changes).items() if x is not ...}
    file.write_text(json.dumps(values))


def write_index(folder):
    where = {name: shard for shard in SHARDS for name in load_file(folder / shard)}
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": where}))
    return where


@pytest.mark.parametrize(
    ("name", "ids", "expected"),
    [
        ("generation_config.json", [7, 5], (0, 2, 5, 7)),
        ("generation_config.json", 9, (0, 2, 9)),
        ("config.json", [8], (0, 2, 8)),
        ("generation_config.json", None, (0, 2)),
    ],
)
def test_the_models_own_ends_end_an_answer(folder, name, ids, expected):
    change(folder / name, eos_token_id=ids)
    target = load(folder)
    # Beside <|endoftext|> and <|im_end|>, which the tokenizer knows.
    assert target.stop_ids == expected
    # The vocabulary is gone through once, not at every request.
    assert target.stop_ids is target.stop_ids
    assert Session(target).engine.stop_ids == expected


def test_an_answer_ends_at_the_models_own_end(folder):
    (whole,) = Session(load(folder)).generate(["a b"], 8)
    assert len(whole.token_ids) == 8
    end = whole.token_ids[2]
    change(folder / "generation_config.json", eos_token_id=[end])
    (ended,) = Session(load(folder)).generate(["a b"], 8)
    length = whole.token_ids.index(end)
    assert ended.token_ids[:length] == whole.token_ids[:length]
    assert len(ended.token_ids) <= length + 1


@pytest.mark.parametrize("ids", ["</s>", [5, 261], -1, [True], 2.0, {}])
def test_ends_that_are_no_ids_are_refused(folder, ids):
    change(folder / "generation_config.json", eos_token_id=ids)
    with pytest.raises(ConfigError, match="generation_config.json has eos_token_id"):
        load(folder)


def test_quantised_folders_are_refused(folder):
    settings = {"quant_method": "compressed-tensors", "bits": 8}
    change(folder / "config.json", quantization_config=settings)
    with pytest.raises(ConfigError, match="quantised.*compressed-tensors"):
        load_config(str(folder))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
def test_quantised_tensors_are_refused(folder, kind):
    """Without a word of it in config.json."""
    tensors = load_file(folder / SHARDS[0])
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = folder / next(s for s in SHARDS if name in load_file(folder / s))
    tensors = load_file(shard)
    tensors[name] = tensors[name].astype(kind)
    save_file(tensors, shard)
    with pytest.raises(WeightsError, match="q_proj.weight of .* is stored as"):
        load(folder)


def test_scales_are_not_passed_over(folder):
    scales = {"model.layers.0.self_attn.q_proj.weight_scale": np.ones(1, np.float32)}
    save_file(scales, folder / "scales.safetensors")
    with pytest.raises(WeightsError, match="no place for, as .*q_proj.weight_scale"):
        load(folder)


def test_the_index_says_what_counts(folder):
    expected = load(folder)
    mark = fingerprint(folder)
    write_index(folder)
    wrong = {"model.norm.weight": np.zeros(CONFIG.hidden_size, np.float32)}
    save_file(wrong, folder / "zzz.safetensors")
    fingerprint.cache_clear()
    found = load(folder)
    np.testing.assert_array_equal(
        found.params["norm"]["scale"], expected.params["norm"]["scale"]
    )
    assert found.fingerprint == mark


def test_without_an_index_no_file_overrides_another(folder):
    wrong = {"model.norm.weight": np.zeros(CONFIG.hidden_size, np.float32)}
    save_file(wrong, folder / "zzz.safetensors")
    with pytest.raises(WeightsError, match="'model.norm.weight' in zzz.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": "../other.safetensors"}, "no .* file of the folder"),
        ({"model.norm.weight": 3}, "no .* file of the folder"),
        ({"model.norm.weight": "none.safetensors"}, "none.safetensors is missing"),
        ({"model.more.weight": SHARDS[0]}, "lacks the tensor 'model.more.weight'"),
    ],
)
def test_a_wrong_index_is_refused(folder, changes, message):
    where = write_index(folder)
    index = folder / "model.safetensors.index.json"
    change(index, weight_map=where | changes)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_tokens_beyond_the_embedding_are_refused(folder):
    target = load(folder)
    target.tokenizer.add_tokens(["<new>", "<newer>", "<newest>"])
    session = Session(target)
    with pytest.raises(ConfigError, match="token ids .261., for which the model has"):
        list(session.generate(["<new><newest>"]))
    # Requests that are given to an engine, too.
    with pytest.raises(ConfigError, match="token ids .-1."):
        session.engine.prefill(None, Request("a", (3, -1)), 256)


def test_a_tokenizer_of_more_tokens_is_told_of(folder):
    tokenizer = load(folder).tokenizer
    tokenizer.add_tokens(["<new>", "<newer>", "<newest>"])
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="'<newest>'.*model knows 261"):
        load(folder)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "rope_theta",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [None, "8", -1, 0, [2], {}, float("nan"), 1e999])
def test_values_that_are_none_are_refused(folder, key, value):
    change(folder / "config.json", **{key: value})
    with pytest.raises(ConfigError, match=f"config.json .*{key}"):
        load_config(str(folder))


@pytest.mark.parametrize(
    "key", ["model_type", "hidden_size", "num_hidden_layers", "vocab_size"]
)
def test_missing_values_are_named(folder, key):
    change(folder / "config.json", **{key: ...})
    with pytest.raises(ConfigError, match=f"config.json lacks '{key}'"):
        load_config(str(folder))


def test_a_slip_in_a_name_is_no_default(folder):
    change(folder / "config.json", rope_theta=..., rope_thetta=5e5)
    with pytest.raises(ConfigError, match="'rope_thetta'.*did you mean 'rope_theta'"):
        load_config(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 15},
        {"num_key_value_heads": 3},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"rope_scaling": "linear"},
        {"partial_rotary_factor": 0.5},
        {"layer_types": ["sliding_attention"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_computed_is_refused(folder, changes):
    change(folder / "config.json", **changes)
    with pytest.raises(ConfigError):
        load_config(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}']
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ],
)
def test_broken_json_names_its_file(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load(folder)


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load(folder)


def test_code_of_a_folder_is_never_run(folder, monkeypatch):
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nOwn = None\n")
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "own.Own"]},
        tokenizer_class="Own",
    )
    # A user would be asked, and this one says yes to all.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    with pytest.raises(ConfigError, match="auto_map"):
        load(folder)
    assert not ran.exists()


def test_fewer_layers_than_there_are_weights_for_are_refused(tmp_path):
    config = model_config(num_layers=2)
    tensors = hf_tensors(config, random_params(config))
    name = write_folder(tmp_path / "tiny", config, tensors, num_hidden_layers=1)
    with pytest.raises(WeightsError, match="model.layers.1.*fewer layers"):
        load_target(name, "float32")


def test_a_tied_head_is_the_embedding(folder):
    change(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(WeightsError, match="a head of its own, lm_head.weight"):
        load(folder)

    for shard in SHARDS:
        tensors = load_file(folder / shard)
        if "model.embed_tokens.weight" in tensors:
            embedding = tensors["model.embed_tokens.weight"]
    for shard in SHARDS:
        tensors = load_file(folder / shard)
        if "lm_head.weight" in tensors:
            save_file(tensors | {"lm_head.weight": embedding}, folder / shard)
    assert load(folder).config.tie_embeddings


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    for shard in SHARDS:
        tensors = load_file(folder / shard)
        if name in tensors:
            tensors[name].flat[3] = value
            save_file(tensors, folder / shard)
    with pytest.raises(WeightsError, match="infinities or NaNs"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_damaged_ranges_are_measured_anew(folder, tmp_path, monkeypatch, content):
    with_native_code(tmp_path / "cache")
    monkeypatch.setenv("OSPEC_CACHE_DIR", str(tmp_path / "cache"))
    fingerprint.cache_clear()
    load_target(str(folder), "int8")
    (file,) = (tmp_path / "cache" / "ranges").iterdir()
    whole = np.load(file)["down_proj"]
    if content is None:
        # Of a model with the same weights and more layers, as its configuration says.
        np.savez(file, **{name: np.ones((3, 2)) for name in np.load(file)})
    else:
        file.write_bytes(content)
    load_target(str(folder), "int8")
    np.testing.assert_array_equal(np.load(file)["down_proj"], whole)
