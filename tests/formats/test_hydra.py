# SPDX-License-Identifier: Apache-2.0
"""Public Hydra heads: both kinds compute what the reference does, or are refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import public_heads as heads
import pytest
from safetensors.numpy import load_file

from ospec_jax import Session, load_draft
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.hydra import hydra as build_hydra
from ospec_jax.formats import hydra
from ospec_jax.formats.importing import load_folder
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.weights import WeightsError
from ospec_jax.session.self_check import self_check
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.testing import tiny_target
from ospec_jax.types import Feedback, Pairs

KINDS = ("mlp", "prefix-mlp")
NUM_TOKENS, DEPTH = 9, 3


@pytest.fixture(scope="module")
def target():
    return tiny_target(rope_theta=500.0, rms_norm_eps=1e-3)


@pytest.fixture
def folder(target, tmp_path):
    """Writes heads, with whatever is changed about them."""

    def make(kind="prefix-mlp", change=None, has_embedding=True, **changes):
        weights = heads.hydra_tensors(target.config, kind)
        if has_embedding:
            table = np.asarray(target.params["embed_tokens_kernel"])
            weights["input_embed_fn.weight"] = table
        if change is not None:
            change(weights)
        config = heads.hydra_config(kind, **changes)
        return heads.write(tmp_path / "hydra", config, weights)

    return make


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_prefix(weights, states, c):
    """A Llama layer and norm over states, causally, in float64."""
    w = lambda name: np.asarray(weights[f"prefix_embeding_layer.{name}.weight"], float)
    norm = lambda x, gain: (
        x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.rms_norm_eps) * gain
    )
    x, length = norm(states, w("layers.0.input_layernorm")), len(states)
    take = lambda name: (x @ w(f"layers.0.self_attn.{name}_proj").T).reshape(
        length, -1, c.head_dim
    )
    frequency = c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
    angle = np.tile(np.outer(np.arange(length), frequency), 2)[:, None]

    def turned(x):
        half = np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1)
        half[..., : c.head_dim // 2] *= -1
        return x * np.cos(angle) + half * np.sin(angle)

    group = c.num_heads // c.num_kv_heads
    q, k = turned(take("q")), np.repeat(turned(take("k")), group, axis=1)
    scores = np.einsum("ihe,jhe->hij", q, k) / np.sqrt(c.head_dim)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("hij,jhe->ihe", shares, np.repeat(take("v"), group, axis=1))
    out = states + out.reshape(length, -1) @ w("layers.0.self_attn.o_proj").T
    x = norm(out, w("layers.0.post_attention_layernorm"))
    inner = silu(x @ w("layers.0.mlp.gate_proj").T) * (x @ w("layers.0.mlp.up_proj").T)
    return norm(out + inner @ w("layers.0.mlp.down_proj").T, w("norm"))


def numpy_logits(weights, kind, states, tokens, embedding, c):
    """The reference's `forward`: what each head says at each token, in float64."""
    has_prefix = kind == "prefix-mlp"
    dense = lambda name, x: (
        x @ np.asarray(weights[f"{name}.weight"], float).T
        + (np.asarray(weights[f"{name}.bias"], float))
    )
    read = numpy_prefix(weights, states, c) if has_prefix else states
    inputs, found = [read], []
    for head in range(DEPTH):
        inputs.append(np.roll(embedding[tokens], -head - 1, axis=0))
        x = np.concatenate(inputs, axis=-1)
        for number in range(3):
            name = f"hydra_mlp.{head}.{1 + 2 * number if has_prefix else number}"
            rest = dense(f"{name}.res_connection", x) if number == 0 else x
            x = rest + silu(dense(f"{name}.linear", x))
        found.append(dense(f"hydra_lm_head.{head}" + ".1" * has_prefix, x))
    return found


@pytest.mark.parametrize(
    # Either head stands behind the other's blocks, too.
    "kind",
    [pytest.param("mlp", marks=pytest.mark.thorough), "prefix-mlp"],
)
def test_heads_compute_what_the_reference_does(target, folder, kind, tmp_path):
    """Read, kept as a checkpoint, read again: in training and in drafting."""
    source = folder(kind)
    draft, meta = load_folder(source, target)
    checkpoint.save(tmp_path / "kept", 0, meta, draft)
    kept = checkpoint.load(tmp_path / "kept", target)
    draft, config = kept.draft, kept.meta.draft
    assert (config.depth, config.num_blocks) == (DEPTH, 3)
    drafter, shared = build_hydra(config, TreeConfig(num_steps=DEPTH)), shared_tables(
        target.params
    )  # fmt: skip
    rng = np.random.default_rng(1)
    states = rng.normal(size=(NUM_TOKENS, 32)).astype(np.float32)
    tokens = rng.integers(0, 259, NUM_TOKENS).astype(np.int32)
    weights = load_file(source / "model.safetensors")
    table = np.asarray(target.params["embed_tokens_kernel"], float)
    expected = numpy_logits(
        weights, kind, states.astype(float), tokens, table, target.config
    )
    feedback = Feedback(
        tokens=jnp.asarray(tokens)[None], taps=jnp.asarray(states)[None],
        hidden=jnp.asarray(states)[None], logsumexp=jnp.zeros((1, NUM_TOKENS)),
    )  # fmt: skip
    zero = jnp.zeros(1, jnp.int32)
    unroll = jax.jit(functools.partial(drafter.unroll, num_context=0, num_steps=DEPTH))
    args = draft.params, draft.token_ids, shared, feedback, zero
    found = unroll(*args)
    some = unroll(*args, candidates=jnp.asarray([7, 3]))
    num_pairs = NUM_TOKENS - DEPTH
    for depth in range(DEPTH):
        wanted = expected[depth][:num_pairs]
        np.testing.assert_allclose(found[depth][0], wanted, atol=2e-4)
        np.testing.assert_allclose(some[depth][0], wanted[:, [7, 3]], atol=2e-4)
    pairs = lambda x: jnp.asarray(x)[None]
    _, context = jax.jit(drafter.extend)(
        draft, shared, drafter.init_cache(1, 64),
        Pairs(
            pairs(tokens[:-1]), pairs(tokens[1:]), pairs(states[:-1]), zero,
            zero + NUM_TOKENS - 1,
        ),
    )  # fmt: skip
    np.testing.assert_allclose(context.logits[0], expected[0][-2], atol=2e-4)


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
def test_a_folder_drafts_as_it_is(target, folder):
    source = folder()
    plain = [r.token_ids for r in Session(target).generate(["one", "two"], 24)]
    for tree in (TreeConfig(num_steps=3), TreeConfig("static", 2, branching=(3, 2))):
        session = Session(target, load_draft(source, target), tree=tree)
        assert [r.token_ids for r in session.generate(["one", "two"], 24)] == plain
        assert session.stats.num_draft_tokens > 0


def test_heads_that_are_never_right_are_refused(target, folder):
    """Biases outweigh all else: one byte is drafted that is never said."""

    def silence(weights):
        for name in weights:
            if name.startswith("hydra_lm_head") and name.endswith("bias"):
                weights[name] = np.eye(1, 259, 1, dtype=np.float32)[0] * 1e4

    draft, meta = load_folder(folder(change=silence), target)
    with pytest.raises(CheckpointError, match="it is never right"):
        self_check(target, LoadedDraft(draft, meta), num_prompts=1, max_new_tokens=8)


def test_pickles_are_read_and_optimizers_beside_them_are_not(target, folder):
    torch = pytest.importorskip("torch")
    source = folder()
    expected = load_folder(source, target)[0]
    file = source / "model.safetensors"
    tensors = {name: torch.from_numpy(x) for name, x in load_file(file).items()}
    file.unlink()
    torch.save({"state": {}}, source / "optimizer.pt")
    with pytest.raises(WeightsError, match=r"neither .*nor hydra_lm_head.pt"):
        load_folder(source, target)
    torch.save(tensors, source / hydra.WEIGHTS)
    found = load_folder(source, target)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(("change", "message"), [
    (drop("hydra_lm_head.1.1.bias"), "lacks the tensors hydra_lm_head.1.1.bias"),
    (drop("hydra_mlp.2.1.res_connection.weight"),
     "lacks the tensors hydra_mlp.2.1.res_connection.weight"),
    (drop("prefix_embeding_layer.norm.weight"), "prefix_embeding_layer.norm.weight"),
    (put("hydra_mlp.3.1.linear.bias", np.zeros(32, np.float32)),
     "that 3 Hydra heads of 3 blocks have not: hydra_mlp.3.1.linear.bias"),
    (put("hydra_mlp.1.1.linear.weight", np.zeros((32, 64), np.float32)),
     r"hydra_mlp.1.1.linear.weight .* has shape \(32, 64\).* give \(32, 96\)"),
    (put("hydra_mlp.0.5.linear.bias", np.ones(32, np.float32)),
     r"hydra_mlp.0.5.linear.bias .* is not hydra_mlp.0.3.linear.bias: .* share"),
])  # fmt: skip
def test_wrong_tensors_are_named(target, folder, change, message):
    with pytest.raises(WeightsError, match=message):
        load_folder(folder(change=change), target)


def test_shared_blocks_may_be_stored_once(target, folder):
    expected = load_folder(folder(), target)[0]
    once = lambda weights: [
        weights.pop(name) for name in list(weights) if ".5.linear." in name
    ]
    found = load_folder(folder(change=once), target)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("changes", "message"), [
    ({"grounded_heads": False}, "grounded_heads False; only True"),
    ({"hydra_head_arch": "eagle-attn"}, "only 'mlp' and 'prefix-mlp'"),
    ({"hidden_state_offset": 1}, "hidden_state_offset 1; only 0"),
])  # fmt: skip
def test_unsupported_heads_are_refused(target, folder, changes, message):
    source = folder()
    (source / "config.json").write_text(json.dumps(heads.hydra_config(**changes)))
    with pytest.raises(ConfigError, match=message):
        load_folder(source, target)


def test_heads_need_their_own_target(target, folder):
    with pytest.raises(ConfigError, match="pass --target"):
        load_folder(folder(), None)
    with pytest.raises(ConfigError, match="no tap layers to choose"):
        load_folder(folder(), target, (1, 2, 3))
    with pytest.raises(CheckpointError, match="for lmsys/vicuna-7b-v1.3"):
        load_folder(folder(), tiny_target(seed=3))
    with pytest.raises(WeightsError, match="and its target give"):
        load_folder(folder(), tiny_target(hidden_size=48, head_dim=12))
    assert load_folder(folder(has_embedding=False), target)[1].draft.has_prefix
