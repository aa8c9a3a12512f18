# SPDX-License-Identifier: Apache-2.0
"""Drafts of one pass: what is drawn is drawn from what they say that it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.distill.adopting import adopted
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.layers import Numerics
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import (
    tiny_draft,
    tiny_draft_config,
    tiny_model_config,
    tiny_target,
)
from ospec_jax.types import Pairs, Roots, SamplingParams

VOCAB, CAPACITY, LENGTH = 16, 64, 12
MODEL = tiny_model_config(VOCAB)


@pytest.fixture(scope="module")
def shared():
    return shared_tables(random_params(MODEL))


def proposed(drafter, config, draft, shared, tree_rows=1, temperature=0.0):
    """Trees behind the same text in every row, each drawn with a key of its own."""
    rng = np.random.default_rng(0)
    width = len(config.taps) * config.target_hidden_size
    rows = lambda x: jnp.broadcast_to(x, (tree_rows, *x.shape))
    tokens = rows(rng.integers(0, VOCAB, LENGTH + 1).astype(np.int32))
    taps = rows(rng.normal(size=(LENGTH, width)).astype(np.float32))
    fill = lambda value: jnp.full((tree_rows,), value, jnp.int32)
    pairs = Pairs(tokens[:, :-1], tokens[:, 1:], taps, fill(0), fill(LENGTH))
    cache = drafter.init_cache(tree_rows, CAPACITY)
    cache, context = jax.jit(drafter.extend)(draft, shared, cache, pairs)
    roots = Roots(
        token=tokens[:, -1],
        position=fill(LENGTH),
        keys=jax.random.split(jax.random.key(5), tree_rows),
        context=context,
        sampling=SamplingParams(
            jnp.full((tree_rows,), temperature), fill(0), jnp.ones((tree_rows,))
        ),
    )
    return jax.jit(drafter.propose)(draft, shared, cache, roots)[0]


@pytest.mark.parametrize(
    "family", ["dflash", pytest.param("peagle", marks=pytest.mark.thorough)]
)
def test_chains_are_drawn_from_what_they_say(shared, family):
    """The law of each token given those before it, bias included."""
    tree = TreeConfig("chain", 2, children="sampled")
    config = tiny_draft_config(MODEL, 5, family)
    # One scatter writes the entries of so many rows.
    drafter = build_drafter(family, config, tree, Numerics(is_row_invariant=False))
    draft = tiny_draft(drafter, config)
    rows = 3000
    found = proposed(drafter, config, draft, shared, rows, temperature=1.0)
    ids = np.asarray(draft.token_ids)
    places = np.searchsorted(ids, np.asarray(found.tokens[:, 1:]))
    first = np.asarray(found.draft_probs[0, 0])
    # Rows agree on the first token's law, and on the second's behind the same token.
    assert np.abs(found.draft_probs[:, 0] - first).max() < 1e-5
    second = np.zeros((len(ids), len(ids)))
    for place in range(len(ids)):
        laws = np.asarray(found.draft_probs[places[:, 0] == place, 1])
        assert len(laws)
        assert np.abs(laws - laws[0]).max() < 1e-5
        second[place] = laws[0]
    joint = first[:, None] * second
    np.testing.assert_allclose(joint.sum(), 1.0, atol=1e-5)
    counts = np.zeros_like(joint)
    np.add.at(counts, (places[:, 0], places[:, 1]), 1)
    # Five deviations of each count.
    assert np.all(np.abs(counts - rows * joint) < 5 * np.sqrt(rows * joint + 1))
    # The bias makes the second law depend on the first token; marginals do not.
    spread = np.abs(second - second[0]).max()
    assert spread > 0.05 if family == "dflash" else spread < 1e-5


def test_the_bias_is_a_product_of_a_row_for_each_of_both_tokens(shared):
    tree = TreeConfig("static", 1, branching=(12,))
    config = tiny_draft_config(MODEL, 12, "dflash", bigram_rank=3)
    draft = tiny_draft(build_drafter("dflash", config, tree), config)
    ids = draft.token_ids.tolist()

    def laws(config):
        """Log-probabilities of all tokens that can be drafted behind the root."""
        found = proposed(build_drafter("dflash", config, tree), config, draft, shared)
        order = [found.tokens[0, 1:].tolist().index(token) for token in ids]
        return np.asarray(found.log_probs[0, 1:])[order], int(found.tokens[0, 0])

    biased, root = laws(config)
    plain, _ = laws(dataclasses.replace(config, bigram_rank=0))
    columns = np.asarray(draft.params["bigram_out"]["kernel"])
    expected = plain + columns @ np.asarray(draft.params["bigram_in"]["kernel"])[root]
    expected -= np.log(np.exp(expected).sum())
    np.testing.assert_allclose(biased, expected, atol=1e-4)
    assert np.abs(biased - plain).max() > 0.1


def test_more_tokens_than_a_draft_was_made_for_are_refused():
    config = tiny_draft_config(MODEL, 12, "dflash")
    with pytest.raises(ConfigError, match="cannot draft 6 tokens at once: .* of 6"):
        build_drafter("dflash", config, TreeConfig(num_steps=6))
    config = tiny_draft_config(MODEL, 12, "peagle")
    with pytest.raises(ConfigError, match="cannot draft 6 tokens at once: .* for 5"):
        build_drafter("peagle", config, TreeConfig(num_steps=6))
    with pytest.raises(ConfigError, match="block_size is 1; use 2 or more"):
        tiny_draft_config(MODEL, 12, "dflash", block_size=1)
    with pytest.raises(ConfigError, match="num_layers is 0; use 1 or more"):
        tiny_draft_config(MODEL, 12, "peagle", num_layers=0)
    with pytest.raises(ConfigError, match="reads its target's embedding"):
        tiny_draft_config(MODEL, 12, "dflash", has_own_embedding=True)


@pytest.mark.parametrize("family", ["dflash", "peagle"])
def test_a_window_shorter_than_the_draft_is_refused(family):
    config = tiny_draft_config(MODEL, 12, family, sliding_window=3)
    with pytest.raises(ConfigError, match="sees 3 tokens"):
        build_drafter(family, config, TreeConfig(num_steps=4))


@pytest.mark.parametrize("own", [False, True])
def test_an_eagle3_head_is_a_start_for_a_parallel_one(shared, own):
    """Its first tokens are the head's own, to the bit; the masks' are others."""
    target = tiny_target(VOCAB)
    tree = TreeConfig(num_steps=3)
    config = tiny_draft_config(MODEL, 12, "eagle3", has_own_embedding=own)
    eagle = build_drafter("eagle3", config, tree)
    made = LoadedDraft(tiny_draft(eagle, config), Meta.create(target, config, "eagle3"))
    found = adopted(made, "peagle", target, 4)
    assert found.family.name == "peagle"
    assert found.architecture.depth == 4
    parallel = build_drafter("peagle", found.architecture, tree)
    args = (shared,)
    first = proposed(eagle, config, made.draft, *args)
    second = proposed(parallel, found.architecture, found.draft, *args)
    np.testing.assert_array_equal(first.tokens[:, 1], second.tokens[:, 1])
    np.testing.assert_array_equal(first.log_probs[:, 1], second.log_probs[:, 1])
    assert not np.array_equal(first.log_probs[:, 2], second.log_probs[:, 2])
    assert np.all(np.isfinite(second.log_probs))
    # Others bring their own family.
    assert adopted(made, "dflash", target, 4) is made
    assert adopted(made, "eagle3", target, 4) is made
