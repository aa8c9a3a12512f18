# SPDX-License-Identifier: Apache-2.0
"""Drafts with parameters: caches change nothing, and training is as they are used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.registry import FAMILIES, build_drafter
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config
from ospec_jax.types import Feedback, Pairs, Roots, SamplingParams

VOCAB, CAPACITY, LENGTH, STEPS = 16, 64, 24, 4
TREES = {
    "chain": TreeConfig("chain", STEPS),
    "static": TreeConfig("static", 3, branching=(3, 2, 1)),
    "dynamic": TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12),
}
VARIANTS = {
    "eagle3": {},
    "eagle3-own": {"has_norm_before_residual": True, "has_own_embedding": True},
    "eagle1": {"has_fc_bias": True},
    "hydra": {"has_prefix": False, "num_blocks": 1},
    "hydra-prefix": {},
    "eagle3-window": {"sliding_window": 6},
    "eagle1-window": {"sliding_window": STEPS},
    "hydra-window": {"sliding_window": 6},
    "dflash": {"bigram_rank": 0},
    "dflash-bigram": {"bigram_rank": 3, "has_qk_norm": True, "num_layers": 1},
    "dflash-window": {"sliding_window": 6},
    "peagle": {"has_own_embedding": True},
    "peagle-alone": {"num_layers": 1, "has_norm_before_residual": True},
    "peagle-window": {"sliding_window": 6},
}
"""Families, with what sets variants of them apart. (`exit`: test_early_exit.py.)"""


@pytest.fixture(scope="module")
def shared():
    return shared_tables(random_params(tiny_model_config(VOCAB)))


def greedy(rows):
    zeros = jnp.zeros((rows,))
    return SamplingParams(
        temperature=zeros, top_k=zeros.astype(jnp.int32), top_p=zeros + 1
    )


class Rig:
    """A random draft, compiled, and random target features for it."""

    def __init__(self, name, tree, draft_vocab_size, rows=1):
        family = name.split("-")[0]
        self.config = tiny_draft_config(
            tiny_model_config(VOCAB), draft_vocab_size, family, **VARIANTS[name]
        )
        self.drafter = build_drafter(family, self.config, tree)
        self.draft = tiny_draft(self.drafter, self.config)
        self.extend = jax.jit(self.drafter.extend)
        self.propose = jax.jit(self.drafter.propose)
        self.unroll = jax.jit(
            self.drafter.unroll, static_argnames=("num_context", "num_steps")
        )
        rng, taps = np.random.default_rng(0), len(self.config.taps)
        width = taps * self.config.target_hidden_size
        self.tokens = jnp.asarray(rng.integers(0, VOCAB, (rows, LENGTH)), jnp.int32)
        self.taps = jnp.asarray(rng.normal(size=(rows, LENGTH, width)), jnp.float32)
        self.rows = rows

    def feedback(self, num_tokens):
        """Random features; those that read the final state find it in both places."""
        taps = self.taps[:, :num_tokens]
        return Feedback(
            tokens=self.tokens[:, :num_tokens],
            taps=taps,
            hidden=taps[..., : self.config.target_hidden_size],
            logsumexp=jnp.zeros((self.rows, num_tokens)),
        )

    def fed(self, shared, cache, start, count, width):
        """Feeds `count` pairs from `start` on in a pass of `width`; junk beyond."""
        pairs = slice(start, start + count)
        junk = ((0, 0), (0, width - count))
        fed = np.asarray(self.tokens)[:, start + 1 : start + 1 + count]
        tokens = np.pad(fed, junk, constant_values=3)
        taps = np.asarray(self.taps)[:, pairs]
        taps = np.pad(taps, (*junk, (0, 0)), constant_values=7.0)
        fill = lambda value: np.full(self.rows, value, np.int32)
        pairs = Pairs(tokens, tokens, taps, fill(start), fill(count))
        return self.extend(self.draft, shared, cache, pairs)

    def proposed(self, shared, cache, context, start, sampling=None):
        roots = Roots(
            token=self.tokens[:, start],
            position=jnp.full((self.rows,), start, jnp.int32),
            keys=jax.random.split(jax.random.key(5), self.rows),
            context=context,
            sampling=sampling or greedy(self.rows),
        )
        return self.propose(self.draft, shared, cache, roots)


# Windows of some families suffice: `test_sliding_window.py` has all of them.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.thorough)
        if name.endswith("-window") and name != "eagle3-window"
        else name
        for name in VARIANTS
    ],
)
def family(request):
    return request.param


# What sets a variant apart is how its logits come about, which the tests of cached
# logits and of unrolled ones look at in all of them. For other laws one of each family
# will do.
one_of_each_family = pytest.mark.parametrize(
    "family",
    [
        name
        if name in ("eagle3", "eagle1", "hydra-prefix", "dflash", "peagle")
        else pytest.param(name, marks=pytest.mark.thorough)
        for name in VARIANTS
    ],
    indirect=True,
)


@pytest.fixture(scope="module", params=[12, 0], ids=["reduced", "full"])
def draft_vocab_size(request):
    return request.param


def test_no_trained_family_is_left_out():
    trained = {name for name, family in FAMILIES.items() if family.is_trained}
    assert {name.split("-")[0] for name in VARIANTS} | {"exit"} == trained


@pytest.mark.crossed
@pytest.mark.parametrize("name", list(TREES))
def test_cached_logits_equal_uncached_ones(shared, family, draft_vocab_size, name):
    """However many tokens were accepted, and whatever was drafted in between."""
    rig = Rig(family, TREES[name], draft_vocab_size)
    width = TREES[name].num_steps + 1
    cache, context = rig.fed(shared, rig.drafter.init_cache(1, CAPACITY), 0, 4, 4)
    start = 4
    for count in (2, 1, width, 1, width, 3):  # 1 rejects all, `width` accepts all
        _, cache = rig.proposed(shared, cache, context, start)
        cache, context = rig.fed(shared, cache, start, count, width)
        start += count
        fresh = rig.drafter.init_cache(1, CAPACITY)
        fresh, expected = rig.fed(shared, fresh, 0, start, LENGTH - 1)
        found, _ = rig.proposed(shared, cache, context, start)
        again, _ = rig.proposed(shared, fresh, expected, start)
        np.testing.assert_array_equal(found.tokens, again.tokens)
        np.testing.assert_allclose(found.log_probs, again.log_probs, atol=1e-5)
        np.testing.assert_allclose(context.logits, expected.logits, atol=1e-5)
        np.testing.assert_allclose(context.hidden, expected.hidden, atol=1e-5)
    assert start == 4 + 7 + 2 * width


@one_of_each_family
def test_idle_extension_keeps_committed_entries(shared, family):
    """A row with nothing to add, being finished, must not touch what it has."""
    rig = Rig(family, TREES["chain"], 12)
    cache, _ = rig.fed(shared, rig.drafter.init_cache(1, CAPACITY), 0, 6, 6)
    later, _ = rig.fed(shared, cache, 6, 0, STEPS + 1)
    np.testing.assert_array_equal(cache.keys[0][..., :6], later.keys[0][..., :6])
    np.testing.assert_array_equal(cache.values[0][:, :, :6], later.values[0][:, :, :6])


@pytest.mark.crossed
@pytest.mark.parametrize("children", ["topk", "sampled"])
def test_unroll_reproduces_what_propose_computed(
    shared, family, draft_vocab_size, children
):
    tree = dataclasses.replace(TREES["chain"], children=children)
    rig, start = Rig(family, tree, draft_vocab_size), 12
    cache, context = rig.fed(shared, rig.drafter.init_cache(1, CAPACITY), 0, start, 12)
    hot = greedy(1).replace(temperature=jnp.ones((1,)))
    proposal, _ = rig.proposed(shared, cache, context, start, hot)
    drafted = proposal.tokens[:, 1:]
    # The features of drafted tokens must not matter.
    feedback = rig.feedback(start + STEPS).replace(
        tokens=jnp.concatenate([rig.tokens[:, : start + 1], drafted[:, :-1]], axis=1)
    )
    for num_context in (0, start - 1):
        unrolled = rig.unroll(
            rig.draft.params, rig.draft.token_ids, shared, feedback,
            jnp.zeros((1,), jnp.int32), num_context=num_context, num_steps=STEPS,
        )  # fmt: skip
        assert len(unrolled) == STEPS
        for depth, logits in enumerate(unrolled):
            log_probs = jax.nn.log_softmax(logits[0, -1])
            if children == "sampled":
                found = proposal.draft_probs[0, depth]
                np.testing.assert_allclose(jnp.exp(log_probs), found, atol=1e-4)
            ids = jnp.arange(VOCAB) if draft_vocab_size == 0 else rig.draft.token_ids
            column = int(jnp.argmax(ids == drafted[0, depth]))
            np.testing.assert_allclose(
                log_probs[column], proposal.log_probs[0, depth + 1], atol=1e-4
            )
            if children == "topk":
                assert int(jnp.argmax(log_probs)) == column
    if family.split("-")[0] != "dflash":  # its logits are made when it drafts
        np.testing.assert_allclose(context.logits[0], unrolled[0][0, -1], atol=1e-4)


@one_of_each_family
def test_padding_before_the_first_token_is_not_seen(shared, family):
    rig = Rig(family, TREES["chain"], 12)
    num_pairs, pad = 10, 3
    feedback = rig.feedback(num_pairs + STEPS)
    junk = lambda x: jnp.pad(
        x, ((0, 0), (pad, 0)) + ((0, 0),) * (x.ndim - 2), constant_values=5
    )
    args = rig.draft.params, rig.draft.token_ids, shared
    zero = jnp.zeros((1,), jnp.int32)
    expected = rig.unroll(*args, feedback, zero, num_context=4, num_steps=STEPS)
    padded = rig.unroll(
        *args, jax.tree.map(junk, feedback), zero - pad,
        num_context=4 + pad, num_steps=STEPS,
    )  # fmt: skip
    for x, y in zip(padded, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@one_of_each_family
@pytest.mark.crossed
@pytest.mark.parametrize("name", list(TREES))
def test_rows_are_independent(shared, family, name):
    rig = Rig(family, TREES[name], 12, rows=3)
    cache, context = rig.fed(shared, rig.drafter.init_cache(3, CAPACITY), 0, 8, 8)
    tree, _ = rig.proposed(shared, cache, context, 8)
    other = Rig(family, TREES[name], 12, rows=3)
    other.tokens = other.tokens.at[0].set(1).at[2].set(2)
    other.taps = other.taps.at[0].mul(-1.0).at[2].add(1.0)
    cache, changed = other.fed(shared, other.drafter.init_cache(3, CAPACITY), 0, 8, 8)
    other_tree, _ = other.proposed(shared, cache, changed, 8)
    np.testing.assert_array_equal(context.logits[1], changed.logits[1])
    np.testing.assert_array_equal(tree.tokens[1], other_tree.tokens[1])
    np.testing.assert_array_equal(tree.log_probs[1], other_tree.log_probs[1])
    assert not np.array_equal(tree.log_probs[0], other_tree.log_probs[0])


@one_of_each_family
@pytest.mark.crossed
@pytest.mark.parametrize("name", list(TREES))
def test_proposals_keep_to_the_draft_vocabulary(shared, family, name):
    rig = Rig(family, TREES[name], 12, rows=3)
    cache, context = rig.fed(shared, rig.drafter.init_cache(3, CAPACITY), 0, 8, 8)
    tree, _ = rig.proposed(shared, cache, context, 8)
    assert tree.tokens.shape[1] == TREES[name].num_nodes
    assert set(np.unique(tree.tokens[:, 1:])) <= set(rig.draft.token_ids.tolist())
    np.testing.assert_array_equal(tree.tokens[:, 0], rig.tokens[:, 8])
    parents, depths = np.asarray(tree.parents), np.asarray(tree.depths)
    for row in range(3):
        assert np.all(parents[row, 1:] < np.arange(1, parents.shape[1]))
        assert np.all(depths[row, 1:] == depths[row, parents[row, 1:]] + 1)
        siblings = list(zip(parents[row, 1:], np.asarray(tree.tokens)[row, 1:],
                            strict=True))  # fmt: skip
        assert len(set(siblings)) == len(siblings)
    assert np.all(np.diff(depths, axis=1) >= 0)


def unrolled_logits(rig, shared, num_pairs=1):
    """Logits at the last of the first pairs, by depth, and what they were made of."""
    feedback = rig.feedback(num_pairs + STEPS)
    logits = rig.unroll(
        rig.draft.params, rig.draft.token_ids, shared, feedback,
        jnp.zeros((1,), jnp.int32), num_context=num_pairs - 1, num_steps=STEPS,
    )  # fmt: skip
    table = np.asarray(shared.embedding["kernel"], np.float64)
    state = np.asarray(feedback.hidden[0, num_pairs - 1], np.float64)
    return [x[0, -1] for x in logits], state, table[feedback.tokens[0, num_pairs:]]


def wide(params, *names):
    """A parameter in float64."""
    for name in names:
        params = params[name]
    return np.asarray(params, np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def test_hydra_heads_are_the_papers(shared):
    """`R x + silu(W x)` of the state and all tokens so far, one after the other."""
    rig = Rig("hydra", TREES["chain"], 12)
    logits, state, tokens = unrolled_logits(rig, shared)
    for depth in range(STEPS):
        head = rig.draft.params[f"heads_{depth}"]
        x = np.concatenate([state, *tokens[: depth + 1]])
        dense = lambda name, x, head=head: (
            wide(head, name, "kernel") @ x + wide(head, name, "bias")
        )
        x = dense("residual", x) + silu(dense("first", x))
        expected = wide(rig.draft.params, "lm_head", "kernel") @ x
        np.testing.assert_allclose(logits[depth], expected, atol=1e-4)


def test_blocks_of_a_hydra_head_share_weights(shared):
    config = tiny_draft_config(tiny_model_config(VOCAB), family="hydra", num_blocks=4)
    drafter = build_drafter("hydra", config, TREES["chain"])
    params = jax.eval_shape(drafter.init_params, jax.random.key(0))
    assert set(params["heads_0"]) == {"residual", "first", "block"}
    assert set(params["prefix"]) == {
        "input_layernorm", "qkv_proj", "o_proj", "post_attention_layernorm", "mlp",
        "norm",
    }  # fmt: skip


def test_an_eagle1_head_is_the_papers(shared):
    """One projection of embedding and state, a layer without norm, the frozen head."""
    rig = Rig("eagle1", TREES["chain"], 0)
    logits, state, tokens = unrolled_logits(rig, shared)
    params, c = rig.draft.params, rig.config
    x = wide(params, "fc", "kernel") @ np.concatenate([tokens[0], state])
    x = x + wide(params, "fc", "bias")
    qkv = wide(params, "qkv_proj", "kernel") @ x
    # A lone pair attends to itself: its output is its value.
    values = qkv[-c.num_kv_heads * c.head_dim :].reshape(c.num_kv_heads, -1)
    spread = np.repeat(values, c.num_heads // c.num_kv_heads, axis=0).reshape(-1)
    x = x + wide(params, "o_proj", "kernel") @ spread
    gain = wide(params, "post_attention_layernorm", "scale")
    normed = x / np.sqrt(np.mean(x * x) + c.rms_norm_eps) * gain
    gate, up = np.split(wide(params, "mlp", "gate_up_proj", "kernel") @ normed, 2)
    x = x + wide(params, "mlp", "down_proj", "kernel") @ (silu(gate) * up)
    expected = wide(shared.head, "kernel") @ x
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def test_heads_draft_no_deeper_than_there_are_heads(shared):
    rig = Rig("hydra-prefix", TREES["chain"], 12)
    with pytest.raises(ConfigError, match="5 heads, .* too few for 6"):
        build_drafter("hydra", rig.config, TreeConfig(num_steps=6))
    with pytest.raises(ConfigError, match="cannot train 6 steps deep"):
        rig.unroll(
            rig.draft.params, rig.draft.token_ids, shared, rig.feedback(12),
            jnp.zeros((1,), jnp.int32), num_context=2, num_steps=6,
        )  # fmt: skip
