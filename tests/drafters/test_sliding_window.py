# SPDX-License-Identifier: Apache-2.0
"""A draft with a sliding window sees its last tokens, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.config.model import DraftConfig, draft_config_from
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.registry import FAMILIES, build_drafter
from ospec_jax.loading import LoadedDraft, new_draft, with_sliding_window
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import (
    tiny_draft,
    tiny_draft_config,
    tiny_model_config,
    tiny_target,
)
from ospec_jax.types import Feedback, Pairs, Roots, SamplingParams

VOCAB, CAPACITY, LENGTH, WINDOW = 16, 64, 30, 6
MODEL = tiny_model_config(VOCAB)
TREES = {
    "chain": TreeConfig("chain", 4),
    "static": TreeConfig("static", 3, branching=(3, 2, 1)),
    "dynamic": TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12),
}


# EAGLE-1 attends as EAGLE-3 does, and has a window in `test_trained.py`, too. P-EAGLE
# has layers as EAGLE-3 has, and drafts in one pass as DFlash does.
ALL = [
    "eagle3",
    pytest.param("eagle1", marks=pytest.mark.thorough),
    "hydra",
    "dflash",
    pytest.param("peagle", marks=pytest.mark.thorough),
]


@pytest.fixture(scope="module")
def shared():
    return shared_tables(random_params(MODEL))


def text(config, seed=0):
    """Random tokens and features of a whole row."""
    rng = np.random.default_rng(seed)
    width = len(config.taps) * config.target_hidden_size
    tokens = rng.integers(0, VOCAB, (1, LENGTH)).astype(np.int32)
    return tokens, rng.normal(size=(1, LENGTH, width)).astype(np.float32)


def made(family, tree, **changes):
    if family == "peagle":  # a second layer sees a window behind the first one's
        changes = {"num_layers": 1} | changes
    config = tiny_draft_config(MODEL, 12, family, **changes)
    drafter = build_drafter(family, config, tree)
    return drafter, config, tiny_draft(drafter, config)


def drafted(drafter, draft, shared, tokens, taps, root):
    """What is proposed behind the first `root` pairs: context and tree."""
    followers = jnp.asarray(tokens[:, 1 : root + 1])
    count = lambda value: jnp.full((1,), value, jnp.int32)
    pairs = Pairs(
        followers, followers, jnp.asarray(taps[:, :root]), count(0), count(root)
    )
    cache = drafter.init_cache(1, CAPACITY)
    cache, context = jax.jit(drafter.extend)(draft, shared, cache, pairs)
    args = drafter, draft, shared, cache, context
    return context, proposed(*args, tokens[:, root], root)


def proposed(drafter, draft, shared, cache, context, token, position):
    """The tree under a token."""
    count = lambda value: jnp.full((1,), value, jnp.int32)
    zero = jnp.zeros((1,))
    roots = Roots(
        token=jnp.asarray(token),
        position=count(position),
        keys=jax.random.split(jax.random.key(5), 1),
        context=context,
        sampling=SamplingParams(zero, count(0), zero + 1),
    )
    tree, _ = jax.jit(drafter.propose)(draft, shared, cache, roots)
    return tree


@pytest.mark.parametrize("family", ["eagle3", "eagle1", "hydra"])
def test_what_nobody_will_see_of_a_prompt_is_not_run(shared, family):
    drafter, config, draft = made(family, TREES["chain"], sliding_window=WINDOW)
    tokens, taps = text(config)
    root, chunk = 20, 5
    count = lambda value: jnp.full((1,), value, jnp.int32)
    extend = jax.jit(drafter.extend)
    keys = []
    trees = []

    for is_told in (True, False):
        cache = drafter.init_cache(1, CAPACITY)
        for start in range(0, root, chunk):
            span = slice(start + 1, start + chunk + 1)
            ahead = jnp.int32(root - start - chunk) if is_told else None
            followers = jnp.asarray(tokens[:, span])
            read = jnp.asarray(taps[:, start : start + chunk])
            pairs = Pairs(followers, followers, read, count(start), count(chunk), ahead)
            cache, context = extend(draft, shared, cache, pairs)
        keys.append(np.asarray(cache.keys[0]))
        args = drafter, draft, shared, cache, context
        trees.append((context, proposed(*args, tokens[:, root], root)))

    assert_same(*trees)
    told, whole = keys
    # Behind the second chunk there are ten tokens, behind the third five.
    np.testing.assert_array_equal(told[..., 10:], whole[..., 10:])
    assert whole[..., :10].any()
    assert not told[..., :10].any()


def unrolled(drafter, config, draft, shared, tokens, taps, num_context):
    feedback = Feedback(
        tokens=jnp.asarray(tokens),
        taps=jnp.asarray(taps),
        hidden=jnp.asarray(taps[..., : config.target_hidden_size]),
        logsumexp=jnp.zeros(tokens.shape),
    )
    unroll = jax.jit(drafter.unroll, static_argnames=("num_context", "num_steps"))
    return unroll(
        draft.params, draft.token_ids, shared, feedback, jnp.zeros((1,), jnp.int32),
        num_context=num_context, num_steps=3,
    )  # fmt: skip


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.crossed
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", list(TREES))
def test_nothing_before_the_window_matters(shared, family, name):
    """Nor for a single bit: the last W pairs alone decide, at their positions."""
    drafter, config, draft = made(family, TREES[name], sliding_window=WINDOW)
    tokens, taps = text(config)
    others, other_taps = text(config, seed=1)
    root = 20
    # The oldest pair that the newest one sees; a block's root is one of those seen.
    first = root - WINDOW + (family == "dflash")
    replaced = taps.copy()
    replaced[:, :first] = 100 * other_taps[:, :first]
    renamed = tokens.copy()
    renamed[:, : first + 1] = others[:, : first + 1]
    found = drafted(drafter, draft, shared, tokens, taps, root)
    assert_same(found, drafted(drafter, draft, shared, renamed, replaced, root))
    replaced[:, first] = other_taps[:, first]
    _, tree = drafted(drafter, draft, shared, renamed, replaced, root)
    assert not np.array_equal(tree.log_probs, found[1].log_probs)


@pytest.mark.crossed
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", list(TREES))
def test_a_window_as_long_as_the_text_changes_nothing(shared, family, name):
    drafter, config, draft = made(family, TREES[name])
    tokens, taps = text(config)
    windowed, *_ = made(family, TREES[name], sliding_window=LENGTH)
    args = draft, shared, tokens, taps, 20
    assert_same(drafted(drafter, *args), drafted(windowed, *args))
    short, *_ = made(family, TREES[name], sliding_window=19)
    _, tree = drafted(short, *args)
    assert not np.array_equal(tree.log_probs, drafted(drafter, *args)[1].log_probs)


@pytest.mark.parametrize("family", ALL)
def test_training_does_not_look_beyond_the_window(shared, family):
    """What is trained is decided by the window behind it; more context is not read."""
    drafter, config, draft = made(family, TREES["chain"], sliding_window=WINDOW)
    tokens, taps = text(config)
    num_context = 15
    args = drafter, config, draft, shared
    found = unrolled(*args, tokens, taps, num_context)
    replaced = taps.copy()
    replaced[:, : num_context - WINDOW + 1] = 7.0
    again = unrolled(*args, tokens, replaced, num_context)
    assert_same(found, again)
    # A block's last mask stands behind the text's last token.
    whole = made(family, TREES["chain"], sliding_window=LENGTH + 1)[0]
    every = unrolled(whole, *args[1:], tokens, taps, num_context)
    assert not np.array_equal(found[0], every[0])
    plain = made(family, TREES["chain"])[0]
    assert_same(every, unrolled(plain, *args[1:], tokens, taps, num_context))


def test_records_of_before_have_no_window():
    config = tiny_draft_config(MODEL, 12)
    values = dataclasses.asdict(config)
    del values["sliding_window"]
    assert draft_config_from(DraftConfig, values) == config
    assert config.sliding_window == 0
    seeing = draft_config_from(DraftConfig, values | {"sliding_window": 9})
    assert seeing == dataclasses.replace(config, sliding_window=9)


@pytest.mark.parametrize("family", ["eagle3", "eagle1"])
def test_a_path_longer_than_the_window_is_refused(shared, family):
    with pytest.raises(ConfigError, match="sees 3 tokens .* fewer than the 4"):
        made(family, TREES["chain"], sliding_window=3)
    drafter, config, draft = made(family, TREES["static"], sliding_window=3)
    drafted(drafter, draft, shared, *text(config), 20)
    short = TreeConfig(num_steps=2)
    drafter, config, draft = made(family, short, sliding_window=2)
    with pytest.raises(ConfigError, match="sees 2 tokens"):
        unrolled(drafter, config, draft, shared, *text(config), 4)


def test_drafts_that_attend_to_nothing_have_no_window():
    with pytest.raises(ConfigError, match="sliding_window is -1"):
        tiny_draft_config(MODEL, 12, sliding_window=-1)
    with pytest.raises(ConfigError, match="early exit attends as its target does"):
        tiny_draft_config(MODEL, 12, "exit", sliding_window=9)
    with pytest.raises(ConfigError, match="without a prefix layer"):
        tiny_draft_config(MODEL, 12, "hydra", has_prefix=False, sliding_window=9)


def test_a_loaded_draft_may_see_less():
    target = tiny_target()
    drafter, config, draft = made("eagle3", TREES["chain"])
    loaded = LoadedDraft(draft, Meta.create(target, config))
    seeing = with_sliding_window(loaded, 9)
    assert seeing.architecture == dataclasses.replace(config, sliding_window=9)
    assert seeing.draft is loaded.draft
    assert with_sliding_window(seeing, 0).architecture == config
    with pytest.raises(ConfigError, match="'ngram' has no attention of its own"):
        with_sliding_window(new_draft(FAMILIES["ngram"], target), 9)
