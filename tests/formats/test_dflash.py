# SPDX-License-Identifier: Apache-2.0
"""Public DFlash drafts compute what the reference does, or are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import public_heads as heads
import pytest

from ospec_jax import Session, load_draft
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.dflash import dflash as build_dflash
from ospec_jax.formats.importing import load_folder
from ospec_jax.models.weights import WeightsError
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.testing import tiny_target
from ospec_jax.types import Feedback

VOCAB, NUM_PAIRS, DEPTH = 259, 7, 3


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=4)


@pytest.fixture
def folder(tmp_path):
    """Writes a draft, with whatever is changed about it."""

    def make(change=None, **changes):
        weights = heads.dflash_tensors()
        if change is not None:
            change(weights)
        config = heads.dflash_config(VOCAB) | changes
        return heads.write(tmp_path / "dflash", config, weights)

    return make


def numpy_block(weights, taps, block):
    """The reference's `forward` of one block behind its context, in float64.

    Args:
      taps: `[s, f]` of the context.
      block: `[n, d]` embeddings of the anchor and the masks.
    """
    w = lambda name: np.asarray(weights[f"{name}.weight"], float)

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * w(name)

    def turned(x, positions):
        frequency = 1000.0 ** -(np.arange(0, heads.HEAD_DIM, 2) / heads.HEAD_DIM)
        angle = np.tile(np.outer(positions, frequency), 2)[:, None]
        first, second = np.split(x, 2, axis=-1)
        half = np.concatenate([-second, first], axis=-1)
        return x * np.cos(angle) + half * np.sin(angle)

    context = norm(taps @ w("fc").T, "hidden_norm")
    where = np.arange(len(taps) + len(block))
    x = block
    for number in range(2):
        layer = f"layers.{number}."
        own = f"{layer}self_attn."
        normed = norm(x, f"{layer}input_layernorm")
        both = np.concatenate([context, normed])
        split = lambda x: x.reshape(len(x), -1, heads.HEAD_DIM)
        q = norm(split(normed @ w(f"{own}q_proj").T), f"{own}q_norm")
        k = norm(split(both @ w(f"{own}k_proj").T), f"{own}k_norm")
        v = split(both @ w(f"{own}v_proj").T)
        q = turned(q, where[len(taps) :])
        group = heads.HEADS // heads.KV_HEADS
        k = np.repeat(turned(k, where), group, axis=1)
        scores = np.einsum("ihe,jhe->hij", q, k) / np.sqrt(heads.HEAD_DIM)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = np.einsum("hij,jhe->ihe", shares, np.repeat(v, group, axis=1))
        x = x + out.reshape(len(x), -1) @ w(f"{own}o_proj").T
        normed = norm(x, f"{layer}post_attention_layernorm")
        gate = normed @ w(f"{layer}mlp.gate_proj").T
        inner = gate / (1 + np.exp(-gate)) * (normed @ w(f"{layer}mlp.up_proj").T)
        x = x + inner @ w(f"{layer}mlp.down_proj").T

    return norm(x, "norm")


def test_a_draft_computes_what_the_reference_does(target, folder, tmp_path):
    """Read, kept as a checkpoint, read again."""
    draft, meta = load_folder(folder(), target)
    checkpoint.save(tmp_path / "kept", 0, meta, draft)
    kept = checkpoint.load(tmp_path / "kept", target)
    draft = kept.draft
    config = kept.meta.draft
    assert (kept.meta.family, config.taps) == ("dflash", heads.TAPS)
    assert (config.block_size, config.bigram_rank, draft.token_ids) == (4, 0, None)
    drafter = build_dflash(config, TreeConfig(num_steps=DEPTH))
    shared = shared_tables(target.params)
    rng = np.random.default_rng(1)
    taps = rng.normal(size=(NUM_PAIRS + DEPTH, 3 * heads.D)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, NUM_PAIRS + DEPTH).astype(np.int32)
    zeros = jnp.zeros((1, len(tokens)))
    feedback = Feedback(
        tokens=jnp.asarray(tokens)[None], taps=jnp.asarray(taps)[None],
        hidden=zeros[..., None], logsumexp=zeros,
    )  # fmt: skip
    unroll = jax.jit(functools.partial(drafter.unroll, num_context=0, num_steps=DEPTH))
    found = unroll(draft.params, None, shared, feedback, jnp.zeros(1, jnp.int32))
    table = np.asarray(target.params["embed_tokens_kernel"], float)
    head = np.asarray(shared.head["kernel"], float)
    for pair in range(NUM_PAIRS):
        block = table[[tokens[pair + 1], *[VOCAB - 1] * DEPTH]]
        states = numpy_block(
            heads.dflash_tensors(), taps[: pair + 1].astype(float), block
        )
        for depth in range(DEPTH):
            expected = states[1 + depth] @ head.T
            np.testing.assert_allclose(found[depth][0, pair], expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
def test_a_folder_drafts_as_it_is(target, folder):
    source = folder()
    plain = [r.token_ids for r in Session(target).generate(["one", "two"], 16)]
    session = Session(target, load_draft(source, target), tree=TreeConfig(num_steps=3))
    assert [r.token_ids for r in session.generate(["one", "two"], 16)] == plain
    assert session.stats.num_draft_tokens > 0


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, *shape, dtype=np.float32):
    return lambda weights: weights.update({name: np.zeros(shape, dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("layers.1.self_attn.q_norm.weight"),
            "lacks .* layers.1.self_attn.q_norm",
        ),
        (put("layers.2.mlp.up_proj.weight", 40, 32), "of 2 layers has not: layers.2"),
        (
            put("fc.weight", 32, 64),
            r"fc.weight .* shape \(32, 64\), .* gives \(32, 96\)",
        ),
        (put("fc.weight", 32, 96, dtype=np.int8), "fc.weight .* stored as int8"),
    ],
)
def test_other_tensors_are_refused(target, folder, change, message):
    with pytest.raises(WeightsError, match=message):
        load_folder(folder(change), target)


OWN = heads.dflash_config(VOCAB)["dflash_config"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_act": "gelu"}, ConfigError, "hidden_act 'gelu'; only 'silu'"),
        ({"attention_bias": True}, ConfigError, "attention_bias True; only False"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            ConfigError,
            "a layer of the type 'sliding_attention'",
        ),
        (
            {"dflash_config": OWN | {"causal": 1}},
            ConfigError,
            "has causal, which is not",
        ),
        (
            {"dflash_config": {"mask_token_id": 1}},
            ConfigError,
            "which layers .* --taps",
        ),
        (
            {"dflash_config": OWN | {"mask_token_id": 259}},
            ConfigError,
            "mask_token_id.*259",
        ),
        ({"block_size": 1}, ConfigError, "block_size is 1; use 2 or more"),
        ({"vocab_size": 300}, CheckpointError, "vocabulary size"),
        ({"hidden_size": 64}, CheckpointError, "is 64 wide .* is 32 wide"),
    ],
)
def test_other_architectures_are_refused(target, folder, changes, error, message):
    with pytest.raises(error, match=message):
        load_folder(folder(**changes), target)


def test_it_takes_a_target_and_other_taps(target, folder):
    source = folder()
    with pytest.raises(ConfigError, match="DFlash draft, .* pass --target"):
        load_folder(source, None)
    _, meta = load_folder(source, target, (0, 1, 2))
    assert meta.draft.taps == (0, 1, 2)
