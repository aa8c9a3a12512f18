# SPDX-License-Identifier: Apache-2.0
"""Public EAGLE-3 heads: every variant is read, written back bitwise, or refused."""

import dataclasses
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import public_heads as heads
import pytest
from reference import random_params
from safetensors.numpy import load_file, save_file

from ospec_jax import Session, load_draft
from ospec_jax.config import ConfigError, Llama3Scaling, TreeConfig
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts
from ospec_jax.drafters.eagle import eagle3 as build_eagle3
from ospec_jax.drafters.eagle import eagle3_taps
from ospec_jax.formats import eagle3, exporting
from ospec_jax.formats.importing import load_folder
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.weights import WeightsError
from ospec_jax.session.self_check import self_check
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.testing import (
    tiny_draft,
    tiny_draft_config,
    tiny_model_config,
    tiny_target,
)
from ospec_jax.types import Draft, Pairs, SharedTables

VOCAB = 259


@pytest.fixture(scope="module")
def target():
    # Large matrices make the output depend on more than the last token.
    found = tiny_target(VOCAB, num_layers=4)
    return dataclasses.replace(found, params=random_params(found.config, gain=2.5))


def flat(tmp_path, dtype="float32", changes=None, **tensor_changes):
    weights = heads.tensors(VOCAB, dtype, **tensor_changes)
    config = heads.flat_config(VOCAB, **(changes or {}))
    return heads.write(tmp_path / "head", config, weights)


def nested(tmp_path, dtype="float32", changes=None, layer_changes=None, **more):
    weights = heads.tensors(VOCAB, dtype, "layers.0.", **more)
    config = heads.speculators_config(VOCAB, layer_changes, **(changes or {}))
    return heads.write(tmp_path / "head", config, weights)


def assert_same_bits(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("dtype", list(heads.DTYPES))
@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@pytest.mark.parametrize("has_embedding", [False, True])
def test_round_trip_is_bitwise(layout, dtype, has_embedding, tmp_path):
    """Read, kept as a checkpoint, written again: the same tensors, of the same type."""
    embedding = np.random.default_rng(5).normal(size=(VOCAB, heads.D))
    make = {"eagle3": flat, "speculators": nested}[layout]
    folder = make(tmp_path, dtype, embedding=embedding if has_embedding else None)
    found = eagle3.read(folder, num_target_layers=4, taps=(1, 2, 3))
    assert (found.layout, found.dtype) == (layout, dtype)
    assert found.config.has_own_embedding == has_embedding
    checkpoint.save(tmp_path / "kept", 0, Meta.create(None, found.config), found.draft)
    kept = checkpoint.load(tmp_path / "kept")
    exporting.write(
        tmp_path / "out", kept.draft, kept.meta.draft, layout, found.dtype, "target"
    )
    first = load_file(folder / "model.safetensors")
    assert_same_bits(first, load_file(tmp_path / "out" / "model.safetensors"))
    again = eagle3.read(tmp_path / "out")  # its taps are written down now
    assert again.config == found.config
    assert again.layout == layout
    jax.tree.map(np.testing.assert_array_equal, again.draft, found.draft)


def numpy_pair_logits(weights, layer, embedding, taps, normed_residual, eps):
    """The reference code's first step for a lone pair, in float64."""
    wide = lambda name: np.asarray(weights[f"{name}.weight"], np.float64)
    norm = lambda x, gain: x / np.sqrt(np.mean(x * x) + eps) * gain
    g = wide("fc") @ taps
    normed = norm(g, wide(f"{layer}hidden_norm"))
    z = np.concatenate([norm(embedding, wide(f"{layer}input_layernorm")), normed])
    # A lone pair attends to itself: its output is its value, whatever the angles.
    v = (wide(f"{layer}self_attn.v_proj") @ z).reshape(heads.KV_HEADS, -1)
    spread = np.repeat(v, heads.HEADS // heads.KV_HEADS, axis=0).reshape(-1)
    u = (normed if normed_residual else g) + wide(f"{layer}self_attn.o_proj") @ spread
    x = norm(u, wide(f"{layer}post_attention_layernorm"))
    gate = wide(f"{layer}mlp.gate_proj") @ x
    inner = gate / (1 + np.exp(-gate)) * (wide(f"{layer}mlp.up_proj") @ x)
    u = u + wide(f"{layer}mlp.down_proj") @ inner
    return wide("lm_head") @ norm(u, wide("norm"))


@pytest.mark.parametrize("make", [flat, nested])
def test_a_head_computes_what_the_reference_does(make, tmp_path):
    folder = make(tmp_path)
    found = eagle3.read(folder, 4, (1, 2, 3))
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(3)
    embedding = rng.normal(size=(VOCAB, heads.D)).astype(np.float32)
    taps = rng.normal(size=(1, 1, 3 * heads.D)).astype(np.float32)
    drafter = build_eagle3(found.config, TreeConfig(num_steps=1))
    shared = SharedTables(embedding={"kernel": jnp.asarray(embedding)}, head={})
    ints = lambda *values: jnp.asarray(values, jnp.int32)
    _, context = jax.jit(drafter.extend)(
        found.draft,
        shared,
        drafter.init_cache(1, 64),
        Pairs(ints(5)[None], ints(7)[None], jnp.asarray(taps), ints(0), ints(1)),
    )
    expected = numpy_pair_logits(
        weights, "midlayer." if make is flat else "layers.0.", embedding[7], taps[0, 0],
        make is nested, found.config.rms_norm_eps,
    )  # fmt: skip
    np.testing.assert_allclose(context.logits[0], expected, atol=1e-4)
    np.testing.assert_array_equal(found.draft.token_ids, heads.draft_ids(VOCAB))


@pytest.mark.parametrize(("changes", "num_layers", "taps"), [
    ({}, 30, (2, 15, 27)),
    ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, 30, (1, 3, 5)),
    # SpecForge's gpt-oss and DeepSeek configurations name the layers *before*.
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 29, 57],
                       "use_aux_hidden_state": True}}, 61, (2, 30, 58)),
])  # fmt: skip
def test_taps_follow_either_convention(changes, num_layers, taps, tmp_path):
    assert eagle3.read(flat(tmp_path, changes=changes), num_layers).config.taps == taps


def test_configurations_are_read_in_full(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    layer = {"rope_theta": 500000.0, "rope_scaling": scaling}
    config = eagle3.read(nested(tmp_path, layer_changes=layer)).config
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    newer = heads.speculators_config(VOCAB)  # as transformers 5 writes it
    del newer["transformer_layer_config"]["rope_theta"]
    rope = {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    newer["transformer_layer_config"] |= rope
    weights = heads.tensors(VOCAB, layer="layers.0.")
    folder = heads.write(tmp_path / "head", newer, weights)
    assert eagle3.read(folder).config == config
    assert config.has_norm_before_residual
    assert config.rms_norm_eps == 1e-6
    assert not eagle3.read(flat(tmp_path), 9).config.has_norm_before_residual
    # What equals a default of transformers' LlamaConfig is not written there.
    raw = heads.speculators_config(VOCAB)
    for name in ("rope_theta", "rms_norm_eps", "hidden_act"):
        del raw["transformer_layer_config"][name]
    weights = heads.tensors(VOCAB, layer="layers.0.")
    config = eagle3.read(heads.write(tmp_path / "head", raw, weights)).config
    assert (config.rope_theta, config.rms_norm_eps) == (1e4, 1e-6)


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_a_sliding_window_is_read_and_written(layout, tmp_path):
    """Only where the layer's type says so, as other servers have it."""
    make = {"eagle3": flat, "speculators": nested}[layout]
    key = {"eagle3": "changes", "speculators": "layer_changes"}[layout]
    read = lambda **values: eagle3.read(make(tmp_path, **{key: values}), 9)
    assert read(sliding_window=96).config.sliding_window == 0
    full = {"layer_types": ["full_attention"]}
    assert read(sliding_window=96, **full).config.sliding_window == 0
    sliding = {"layer_types": ["sliding_attention"]}
    found = read(sliding_window=96, **sliding)
    assert found.config.sliding_window == 96
    out = tmp_path / "out"
    exporting.write(out, found.draft, found.config, layout, "float32", "a/b")
    assert eagle3.read(out).config == found.config
    with pytest.raises(ConfigError, match="sliding_window"):
        read(**sliding)
    with pytest.raises(ConfigError, match="layer of the type 'chunked_attention'"):
        read(layer_types=["chunked_attention"])


def test_our_own_draft_round_trips(target, tmp_path):
    config = tiny_draft_config(target.config, 100)
    draft = tiny_draft(build_eagle3(config, TreeConfig(num_steps=1)), config)
    for layout in eagle3.LAYOUTS:
        exporting.write(
            tmp_path / layout, draft, config, layout, "float32", target.name
        )
        found = eagle3.read(tmp_path / layout)
        assert found.config == config
        jax.tree.map(np.testing.assert_array_equal, found.draft, draft)
    raw = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert raw["speculators_config"]["verifier"]["name_or_path"] == target.name
    assert set(heads.speculators_config(VOCAB)) - set(raw) <= {
        "dtype", "embed_requires_grad", "norm_before_fc", "speculators_version",
    }  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("midlayer.hidden_norm.weight"),
     "lacks the tensors layers.0.hidden_norm.weight"),
    (lambda t: t.pop("fc.weight"), "lacks the tensors fc.weight"),
    (lambda t: t.pop("d2t"), "lacks the tensor d2t"),
    (lambda t: t.update({"layers.1.mlp.up_proj.weight": t["norm.weight"]}),
     "one layer has not: layers.1.mlp.up_proj.weight"),
    (lambda t: t.update({"fc.weight": t["fc.weight"][:, :64].copy()}),
     r"fc.weight .* has shape \(32, 64\).* give \(32, 96\)"),
    (lambda t: t.update(d2t=heads.draft_ids(VOCAB)), "must hold offsets"),
    (lambda t: t.update(t2d=~t["t2d"]), "t2d and d2t .* contradict"),
])  # fmt: skip
def test_wrong_tensors_are_named(change, message, tmp_path):
    weights = heads.tensors(VOCAB)
    change(weights)
    folder = heads.write(tmp_path / "head", heads.flat_config(VOCAB), weights)
    with pytest.raises(WeightsError, match=message):
        eagle3.read(folder, 4, (1, 2, 3))


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'; only 'silu'"),
    ({"num_hidden_layers": 2}, "num_hidden_layers 2; only 1"),
    ({"norm_before_fc": True}, "norm_before_fc True"),
    ({"eagle_config": {"use_aux_hidden_state": False}}, "reads no inner states"),
    ({"rope_scaling": {"rope_type": "ntk"}}, "rope type 'ntk'"),
    ({"speculators_model_type": "dflash"}, "speculators_model_type 'dflash'"),
    ({}, "pass --target, for the usual three, or --taps"),
])  # fmt: skip
def test_unsupported_configurations_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        eagle3.read(flat(tmp_path, changes=changes))


def test_incomplete_folders_are_refused(tmp_path):
    folder = flat(tmp_path)
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(WeightsError, match="truncated or corrupt"):
        eagle3.read(folder, 4)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="neither"):
        eagle3.read(folder, 4)
    (folder / "config.json").write_text('{"hidden_size": 3')
    with pytest.raises(WeightsError, match="is not JSON"):
        eagle3.read(folder, 4)
    with pytest.raises(WeightsError, match="no config.json"):
        eagle3.read(tmp_path)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"vocab_size": 300}, "vocabulary size 259"),
    ({"hidden_size": 48, "head_dim": 8}, "hidden size 32"),
    ({"num_layers": 3}, "reads layers"),
])  # fmt: skip
def test_heads_for_other_targets_are_refused(target, sizes, message, tmp_path):
    folder = flat(tmp_path, changes={"eagle_aux_hidden_state_layer_ids": [1, 2, 4]})
    config = dataclasses.replace(target.config, **sizes)
    with pytest.raises(CheckpointError, match=message):
        load_folder(folder, dataclasses.replace(target, config=config))


def test_a_narrow_head_needs_its_own_embedding(target, tmp_path):
    folder = flat(tmp_path, changes={"target_hidden_size": 64})
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"] = np.zeros((32, 192), np.float32)
    heads.write(folder, json.loads((folder / "config.json").read_text()), weights)
    with pytest.raises(CheckpointError, match="embed_tokens.weight is missing"):
        load_folder(folder, None, (1, 2, 3))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_targets_own_embedding_is_shared(precision, tmp_path):
    target = tiny_target(VOCAB, precision, num_layers=4)
    table = tiny_target(VOCAB, num_layers=4).params["embed_tokens_kernel"]
    draft, meta = load_folder(flat(tmp_path, embedding=table), target, (1, 2, 3))
    assert not meta.draft.has_own_embedding
    assert "embed_tokens" not in draft.params
    assert meta.fingerprint == target.fingerprint
    draft, meta = load_folder(flat(tmp_path, embedding=table + 0.1), target, (1, 2, 3))
    assert meta.draft.has_own_embedding
    assert draft.params["embed_tokens"]["kernel"].shape == (VOCAB, heads.D)


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
def test_a_folder_drafts_as_it_is(target, tmp_path):
    """A wider table than the target's, too: outputs stay those of plain decoding."""
    table = np.random.default_rng(2).normal(size=(VOCAB, heads.D))
    taps = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    plain = [r.token_ids for r in Session(target).generate(["one", "two"], 24)]
    for embedding in (None, table):
        folder = flat(tmp_path, "bfloat16", taps, embedding=embedding)
        session = Session(target, load_draft(folder, target))
        assert [r.token_ids for r in session.generate(["one", "two"], 24)] == plain
        assert session.stats.num_draft_tokens > 0


def test_a_head_that_is_never_right_is_refused(target):
    """Heads of one token each: one that the target says, and one that it never does."""
    prompts = [p for domain in DEMO_DOMAINS for p in demo_prompts(domain)[:2]]
    answers = [r.token_ids for r in Session(target).generate(prompts, 32)]
    said = np.bincount(np.concatenate(answers), minlength=VOCAB)
    config = tiny_draft_config(target.config, 1)
    drafter = build_eagle3(config, TreeConfig(num_steps=1))
    params = drafter.init_params(jax.random.key(0))

    def always(token):
        draft = Draft(params, jnp.asarray([token], jnp.int32))
        return LoadedDraft(draft, Meta.create(target, config))

    assert self_check(target, always(said.argmax())) > 1.01
    with pytest.raises(CheckpointError, match=r"wrong layers .* \(1, 2, 3\).* fc proj"):
        self_check(target, always(said.argmin()))


def test_bin_files_need_torch(tmp_path, monkeypatch):
    folder = flat(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"pip install 'ospec-jax\[torch\]'"):
        eagle3.read(folder, 4, (1, 2, 3))


class FakeTensor:
    """As much of a torch tensor as the reader uses; numpy knows no bfloat16 of it."""

    def __init__(self, array):
        self.array = array
        self.dtype = "bf16" if array.dtype == heads.DTYPES["bfloat16"] else array.dtype

    def float(self):
        return FakeTensor(self.array.astype(np.float32))

    def numpy(self):
        assert self.dtype != "bf16"
        return self.array


def test_bin_files_are_read_without_running_code(tmp_path, monkeypatch):
    folder = flat(tmp_path, "bfloat16")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")

    def load(file, map_location, weights_only):
        assert (file, map_location) == (folder / "pytorch_model.bin", "cpu")
        assert weights_only
        return {name: FakeTensor(value) for name, value in weights.items()}

    torch = types.SimpleNamespace(load=load, bfloat16="bf16")
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = eagle3.read(folder, 4, (1, 2, 3))
    assert found.dtype == "bfloat16"
    kernel = np.asarray(weights["fc.weight"], np.float32)
    np.testing.assert_array_equal(found.draft.params["fc"]["kernel"], kernel)


def test_drafts_without_a_place_in_the_format_are_refused(target, tmp_path):
    config = tiny_draft_config(target.config, 0)
    draft = tiny_draft(build_eagle3(config, TreeConfig(num_steps=1)), config)
    with pytest.raises(ConfigError, match="uses its target's head"):
        exporting.write(tmp_path, draft, config, "eagle3", "float32", "x")
    with pytest.raises(ConfigError, match="unknown format 'gguf'"):
        exporting.write(tmp_path, draft, config, "gguf", "float32", "x")
    with pytest.raises(ConfigError, match="unknown type 'int4'"):
        exporting.write(tmp_path, draft, config, "eagle3", "int4", "x")


@pytest.mark.parametrize(
    ("num_layers", "message"), [(2, "(2, 1, -1)"), (1, "(2, 0, -2)")]
)
def test_layers_that_no_target_has_are_refused(num_layers, message, tmp_path):
    """The usual three of a target that has too few: -1 would be another state."""
    with pytest.raises(ConfigError, match=re.escape(message) + ".*--taps"):
        eagle3.read(flat(tmp_path), num_layers)


@pytest.mark.parametrize("taps", [(-1, 2, 3), (1, 2, -3)])
def test_layers_below_the_first_are_refused(target, taps, tmp_path):
    with pytest.raises(ConfigError, match="--taps"):
        load_folder(flat(tmp_path), target, taps)
    with pytest.raises(ConfigError, match="counted from 0"):
        tiny_draft_config(target.config, taps=taps)


def test_a_layer_that_is_read_twice_is_told_of(target, tmp_path):
    with pytest.warns(UserWarning, match=r"twice: \(2, 2, 1\)"):
        found, meta = load_folder(flat(tmp_path), target)
    assert meta.draft.taps == (2, 2, 1)


@pytest.mark.parametrize("num_layers", range(1, 40))
def test_new_drafts_read_each_layer_once(num_layers):
    taps = eagle3_taps(tiny_model_config(num_layers=num_layers))
    assert len(taps) == len(set(taps)) == min(num_layers, 3)
    assert min(taps) >= 0
    assert max(taps) < num_layers


def test_no_file_of_a_head_overrides_another(tmp_path):
    folder = flat(tmp_path)
    surplus = {"norm.weight": np.zeros(heads.D, np.float32)}
    save_file(surplus, folder / "other.safetensors")
    found = eagle3.read(folder, 4, (1, 2, 3))
    assert np.any(found.draft.params["norm"]["scale"])
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    with pytest.raises(WeightsError, match="'norm.weight' in other.safetensors"):
        eagle3.read(folder, 4, (1, 2, 3))


def test_quantised_heads_are_refused(tmp_path):
    weights = heads.tensors(VOCAB)
    weights["fc.weight"] = weights["fc.weight"].astype(ml_dtypes.float8_e4m3fn)
    folder = heads.write(tmp_path / "head", heads.flat_config(VOCAB), weights)
    with pytest.raises(WeightsError, match="fc.weight .* stored as F8"):
        eagle3.read(folder, 4, (1, 2, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "32"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": -1.0},
        {"eagle_aux_hidden_state_layer_ids": ["1", "2"]},
        {"eagle_config": 3},
        {"draft_vocab_size": 10**6},
        {"norm_before_residual": "no"},
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(changes, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        eagle3.read(flat(tmp_path, changes=changes), 30)
