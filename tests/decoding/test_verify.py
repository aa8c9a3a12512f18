# SPDX-License-Identifier: Apache-2.0
"""Verification is exact: what it emits follows the target's law, whatever the draft.

A toy target is a table p[next | last], a toy draft another one. Trees are grown by the
functions that real drafters use. The tokens that a verification emits, completed by the
target itself to a fixed length, must follow the product law of the table. This holds
drawing and accepting together, from samples; `test_laws.py` the rules alone, exactly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.verify import verify_chosen, verify_drawn
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.growth import grow as grow_tree
from ospec_jax.drafters.hints import hinted_chain
from ospec_jax.drafters.stopping import below_gain, below_probability
from ospec_jax.drafters.topology import best_parents
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import Numerics
from ospec_jax.sampling import sample
from ospec_jax.types import DraftContext, DraftTree, Roots, SamplingParams

VOCAB, ROOT = 5, 0
NUM_SAMPLES = 20_000

CHAIN = TreeConfig("chain", 3)
WIDE = TreeConfig("static", 2, branching=(3, 2))
DYNAMIC = TreeConfig("dynamic", 3, topk=3, num_draft_tokens=8)
FLAT = TreeConfig("dynamic", 1, topk=3, num_draft_tokens=2)
SHY = {"chain": 0.3, "dynamic": 0.2}
"""Path probabilities below which these trees grow no deeper, in some of the tests."""


def with_children(config, children, verification="token"):
    return dataclasses.replace(config, children=children, verification=verification)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def target_table(seed=0):
    """`p[last, next]`, with some zeros."""
    rng = np.random.default_rng(seed)
    probs = softmax(rng.normal(size=(VOCAB, VOCAB)))
    probs[1, 2] = probs[3, 0] = 0.0
    return np.float32(probs / probs.sum(axis=-1, keepdims=True))


def draft_logits(kind, target):
    """Logits `[last, draft vocabulary]` and the ids of the draft vocabulary."""
    rng = np.random.default_rng(7)
    if kind == "equal":
        return np.log(np.maximum(target, 1e-30)), None
    if kind == "far":  # confident in what the target finds unlikely
        return -2.0 * np.log(np.maximum(target, 1e-3)), None
    if kind == "narrow":  # two possible tokens, fewer than some nodes have children
        logits = np.full((VOCAB, VOCAB), -np.inf)
        logits[:, [1, 4]] = [0.0, 1.0]
        return logits, None
    assert kind == "reduced"
    return 2 * rng.normal(size=(VOCAB, 3)), np.asarray([1, 2, 4], np.int32)


def sampling_params(rows, temperature=1.0):
    return SamplingParams(
        temperature=jnp.full((rows,), temperature),
        top_k=jnp.zeros((rows,), jnp.int32),
        top_p=jnp.ones((rows,)),
    )


def suggest(recent, depth):
    """Tokens that the reduced draft vocabulary lacks; none after token 2."""
    last = recent[..., -1]
    rate = jnp.where(last == 2, -jnp.inf, jnp.log(0.6))
    return jnp.where(last == 3, 0, 3), rate, None


@functools.partial(jax.jit, static_argnames=("config", "hints", "stop_fn"))
def grow(config, logits, token_ids, keys, hints=None, root=ROOT, stop_fn=None):
    """A tree for each key, drafted by a table of logits, from the root."""
    rows = len(keys)
    root = jnp.broadcast_to(jnp.asarray(root, jnp.int32), (rows,))

    def step(cache, nodes):
        return nodes.hidden, logits[nodes.tokens], cache

    roots = Roots(
        token=root,
        position=jnp.zeros((rows,), jnp.int32),
        keys=keys,
        context=DraftContext(hidden=jnp.zeros((rows, 1)), logits=logits[root]),
        sampling=sampling_params(rows),
    )
    cache = kv.init_cache(1, rows, 1, 1, 1, jnp.float32)
    hints = hints and Hints(root[:, None], hints)
    args = step, config, cache, roots, token_ids, hints, stop_fn
    tree, _ = grow_tree(*args, numerics=Numerics())
    return tree


def as_drawn(tree, children, logits):
    """Claims that a tree's children were drawn from the draft's distributions."""
    probs = jax.nn.softmax(logits, axis=-1)[tree.tokens]
    return tree.replace(children=children, draft_probs=probs)


def verdict_of(keys, tree, probs, rule="token"):
    """As a step verifies: by the target's draws, or by a rule for the draft's."""
    if tree.children != "topk":
        return verify_drawn(keys, tree, probs, rule)
    # The numbers of a position, whichever node stands there.
    of_row = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    own = jax.vmap(of_row)(keys, tree.depths).reshape(-1)
    chosen = sample(own, probs.reshape(-1, VOCAB))
    return verify_chosen(tree, chosen.reshape(tree.tokens.shape))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def emitted(config, target, logits, token_ids, claimed=None, hints=None, stop_fn=None):
    """Counts of each sequence of depth + 1 tokens, and of accepted tokens."""
    length = config.num_steps + 1
    key_draft, key_verify, key_rest = (
        jax.random.split(k, NUM_SAMPLES) for k in jax.random.split(jax.random.key(3), 3)
    )
    tree = grow(config, logits, token_ids, key_draft, hints, stop_fn=stop_fn)
    if claimed is not None:
        tree = as_drawn(tree, claimed, logits)
    rule = "token" if claimed else config.verification
    verdict = verdict_of(key_verify, tree, target[tree.tokens], rule)
    tokens = jnp.take_along_axis(tree.tokens, verdict.path, axis=1)
    last, sequence = tokens[:, 0], jnp.zeros((NUM_SAMPLES,), jnp.int32)
    for i in range(length):
        own = jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(key_rest)
        drawn = jax.vmap(jax.random.categorical)(own, jnp.log(target[last]))
        accepted = tokens[:, min(i + 1, length - 1)]
        last = jnp.where(
            i < verdict.num_accepted, accepted,
            jnp.where(i == verdict.num_accepted, verdict.next_token, drawn),
        )  # fmt: skip
        sequence = sequence * VOCAB + last
    counts = jnp.bincount(sequence, length=VOCAB**length)
    return counts.reshape((VOCAB,) * length), verdict.num_accepted.sum()


@functools.cache
def emitted_counts(config, kind, claimed=None, hints=None, stop_fn=None):
    """How often each sequence came out, its law, and the number of accepted tokens."""
    target = target_table()
    logits, token_ids = draft_logits(kind, target)
    if token_ids is not None:
        token_ids = jnp.asarray(token_ids)
    logits = jnp.asarray(logits, jnp.float32)
    counts, accepted = emitted(
        config, jnp.asarray(target), logits, token_ids, claimed, hints, stop_fn
    )
    counts, law = np.asarray(counts), product_law(target, config.num_steps + 1)
    assert counts.sum() == NUM_SAMPLES
    return counts, law, int(accepted)


def product_law(target, length):
    """The target's own law of `length` tokens after the root."""
    law = target[ROOT].astype(np.float64)
    for _ in range(length - 1):
        law = law[..., None] * target.astype(np.float64)
    return law


def largest_deviation(counts, law):
    """In standard deviations of a count, over the laws of all prefixes."""
    worst = 0.0
    while law.ndim:
        sigma = np.sqrt(NUM_SAMPLES * law * (1 - law)) + 1.0
        worst = max(worst, np.max(np.abs(counts - NUM_SAMPLES * law) / sigma))
        counts, law = counts.sum(axis=-1), law.sum(axis=-1)
    return worst


# Rare sequences are counted by a Poisson law, whose tails are longer than a normal
# law's: 5 sigma hold for single tokens and pairs, 6.5 for some 600 sequences.
_TOLERANCE = 6.5


CASES = [
    *((CHAIN, children) for children in ("topk", "sampled", "without_replacement")),
    *((WIDE, children) for children in ("topk", "sampled", "without_replacement")),
    (DYNAMIC, "topk"),
    (FLAT, "topk"),
    (dataclasses.replace(CHAIN, min_path_probability=SHY["chain"]), "topk"),
    (dataclasses.replace(CHAIN, min_path_probability=SHY["chain"]), "sampled"),
    (dataclasses.replace(DYNAMIC, min_path_probability=SHY["dynamic"]), "topk"),
]
# What others of these cases hold between them is for `make test-all`: the laws of the
# most probable children, and of distinct ones, are exactly those of `test_laws.py`.
BETWEEN = (
    *("chain-3-without_replacement", "dynamic-1-topk", "shy-chain-3-topk"),
    *("static-2-sampled", "shy-chain-3-sampled"),
    *("chain-3-topk", "static-2-topk", "static-2-without_replacement"),
)
IDS = [
    f"{'shy-' if c.min_path_probability else ''}{c.kind}-{c.num_steps}-{children}"
    for c, children in CASES
]


@pytest.mark.parametrize(
    ("config", "children", "kind"),
    [
        *(
            pytest.param(
                *case,
                "reduced",
                id=name,
                marks=[pytest.mark.thorough] if name in BETWEEN else [],
            )
            for case, name in zip(CASES, IDS, strict=True)
        ),
        # A node may have more children than the draft finds possible.
        pytest.param(WIDE, "sampled", "narrow", marks=pytest.mark.thorough),
        (WIDE, "without_replacement", "narrow"),
    ],
)
def test_emitted_law_is_the_targets(config, children, kind):
    counts, law, accepted = emitted_counts(with_children(config, children), kind)
    assert np.all(counts[law == 0] == 0), "a token of probability zero came out"
    assert largest_deviation(counts, law) < _TOLERANCE
    assert accepted > 0.01 * NUM_SAMPLES


UNEVEN = TreeConfig("static", 3, parents=best_parents((0.5, 0.2, 0.1), 8, 3))
PAIRS = TreeConfig("static", 2, branching=(2, 2))
BY_PATHS = {
    "block": with_children(CHAIN, "sampled", "block"),
    "block-shy": dataclasses.replace(
        with_children(CHAIN, "sampled", "block"), min_path_probability=SHY["chain"]
    ),
    "traversal": with_children(WIDE, "sampled", "traversal"),
    "traversal-distinct": with_children(WIDE, "without_replacement", "traversal"),
    "topk-sampled": with_children(WIDE, "topk_sampled"),
    "hub": with_children(PAIRS, "hub"),
    "uneven": with_children(UNEVEN, "without_replacement"),
    "uneven-traversal": with_children(UNEVEN, "without_replacement", "traversal"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough)
        # By traversal `test_laws.py` has each tree's exact law.
        if name == "uneven" or "shy" in name or "traversal" in name
        else name
        for name in BY_PATHS
    ],
)
def test_every_rule_emits_the_targets_law(name):
    counts, law, accepted = emitted_counts(BY_PATHS[name], "reduced")
    assert np.all(counts[law == 0] == 0), "a token of probability zero came out"
    assert largest_deviation(counts, law) < _TOLERANCE
    assert accepted > 0.01 * NUM_SAMPLES


@pytest.mark.parametrize(
    ("config", "children", "kind", "gain"),
    [
        pytest.param(CHAIN, "sampled", "far", 1.03, marks=pytest.mark.thorough),
        pytest.param(WIDE, "sampled", "reduced", 1.02, marks=pytest.mark.thorough),
        (WIDE, "without_replacement", "far", 1.02),
    ],
)
def test_whole_paths_are_accepted_more_often(config, children, kind, gain):
    by_token = emitted_counts(with_children(config, children), kind)[2]
    rule = "block" if config.is_chain else "traversal"
    by_path = emitted_counts(with_children(config, children, rule), kind)[2]
    assert by_path > gain * by_token


@pytest.mark.thorough
def test_hub_pairs_beat_independent_draws():
    by_pair = emitted_counts(with_children(PAIRS, "hub"), "far")[2]
    assert by_pair > 1.02 * emitted_counts(with_children(PAIRS, "sampled"), "far")[2]


def test_one_draw_beside_the_likeliest_is_accepted_as_often_as_can_be():
    """With probability p(top) + sum over the others of min(p, q), at the root."""
    config = with_children(TreeConfig("static", 1, branching=(3,)), "topk_sampled")
    target, (logits, _) = target_table(), draft_logits("far", target_table())
    _, _, accepted = emitted_counts(config, "far")
    p, q = target[ROOT], softmax(logits)[ROOT]
    top = np.argsort(-q)[:2]
    rest = np.delete(q, top) / np.delete(q, top).sum()
    best = p[top].sum() + np.minimum(np.delete(p, top), rest).sum()
    assert accepted / NUM_SAMPLES == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(verification="block"), "children that are drawn"),
        (
            dict(kind="static", num_steps=1, branching=(2,), verification="block"),
            "block verification is for chains",
        ),
        (dict(children="topk_sampled"), "for static trees"),
        (dict(children="hub"), "branching 2, not chain"),
        (
            dict(kind="static", num_steps=1, branching=(3,), children="hub"),
            "branching 2, not static",
        ),
    ],
)
def test_rules_are_refused_where_they_are_not_exact(values, message):
    with pytest.raises(ConfigError, match=message):
        TreeConfig(**values)


@pytest.mark.parametrize(
    "config",
    [pytest.param(CHAIN, marks=pytest.mark.thorough), WIDE, DYNAMIC],
    ids=lambda c: c.kind,
)
def test_suggestions_leave_the_law_as_it_is(config):
    counts, law, _ = emitted_counts(config, "reduced", hints=suggest)
    assert np.all(counts[law == 0] == 0), "a token of probability zero came out"
    assert largest_deviation(counts, law) < _TOLERANCE
    logits, token_ids = draft_logits("reduced", target_table())
    args = (
        jnp.asarray(logits),
        jnp.asarray(token_ids),
        jax.random.split(jax.random.key(0)),
    )
    suggested = grow(config, *args, hints=suggest).tokens
    assert not np.array_equal(suggested, grow(config, *args).tokens)


@functools.partial(jax.jit, static_argnums=0)
def emitted_by_steps(children, target, logits):
    """Counts of four tokens of steps whose depth follows from what came before."""

    def one_step(depth, root, key):
        if depth == 0:
            drawn = jax.random.categorical(key, jnp.log(target[root]))
            return jnp.full(4, drawn), jnp.int32(0)
        config = TreeConfig(num_steps=depth, children=children)
        key_draft, key_verify = jax.random.split(key)
        tree = grow(config, logits, None, key_draft[None], root=root)
        verdict = verdict_of(key_verify[None], tree, target[tree.tokens])
        accepted = verdict.num_accepted[0]
        tokens = jnp.resize(tree.tokens[0, verdict.path[0]][1:], 4)
        return tokens.at[accepted].set(verdict.next_token[0]), accepted

    def one_sequence(key):
        found, place, index = jnp.zeros(8, jnp.int32), jnp.int32(0), 0
        for key_step in jax.random.split(key, 4):
            root = jnp.where(place, found[place - 1], ROOT)
            runs = [one_step(depth, root, key_step) for depth in (0, 1, 3)]
            tokens, accepted = jax.tree.map(
                lambda *x, index=index: jnp.stack(x)[index], *runs
            )
            found = jnp.where(
                place < 4, jax.lax.dynamic_update_slice(found, tokens, (place,)), found
            )
            place = jnp.minimum(place + accepted + 1, 4)
            # By what was accepted, and by the newest token itself.
            index = (accepted + found[place - 1]) % 3
        return jnp.sum(found[:4] * VOCAB ** jnp.arange(3, -1, -1)), index == 0

    keys = jax.random.split(jax.random.key(5), NUM_SAMPLES)
    sequences, is_plain = jax.vmap(one_sequence)(keys)
    return jnp.bincount(sequences, length=VOCAB**4), jnp.mean(is_plain)


@pytest.mark.thorough
@pytest.mark.parametrize("children", ["topk", "sampled"])
def test_depths_that_follow_the_past_leave_the_law_as_it_is(children):
    target = target_table()
    logits = jnp.asarray(draft_logits("far", target)[0], jnp.float32)
    counts, plain = emitted_by_steps(children, jnp.asarray(target), logits)
    counts, law = np.asarray(counts).reshape((VOCAB,) * 4), product_law(target, 4)
    assert counts.sum() == NUM_SAMPLES
    assert np.all(counts[law == 0] == 0), "a token of probability zero came out"
    assert largest_deviation(counts, law) < _TOLERANCE
    assert 0.1 < plain < 0.9


@pytest.mark.parametrize(("children", "lowest"), [("topk", 0.7), ("sampled", 0.3)])
def test_improbable_paths_are_not_continued(children, lowest):
    target, keys = target_table(), jax.random.split(jax.random.key(0), 500)
    logits = jnp.asarray(draft_logits("far", target)[0], jnp.float32)
    config = with_children(CHAIN, children)
    whole = grow(config, logits, None, keys)
    shy = dataclasses.replace(config, min_path_probability=lowest)
    shy = grow(shy, logits, None, keys)
    path = np.exp(np.cumsum(np.asarray(whole.log_probs), axis=1))
    # The root and its child are there in any case.
    is_kept = np.concatenate([np.full((500, 2), True), path[:, 1:-1] >= lowest], 1)
    kept = np.cumprod(is_kept, axis=1).astype(bool)
    np.testing.assert_array_equal(shy.is_valid, kept)
    assert kept.sum() < kept.size
    np.testing.assert_array_equal(
        np.asarray(shy.tokens)[kept], np.asarray(whole.tokens)[kept]
    )


def by_chance(progress):
    """Stops by a hash of what was drafted: as wild as a rule can be."""
    return jnp.sin(jnp.max(progress.log_probs, axis=-1) * 1e4) > 0


def by_entropy(progress):
    """Stops where the draft is not sure of the next token."""
    return progress.entropies[:, 0] > 1.0


@pytest.mark.crossed
@pytest.mark.parametrize("stop_fn", [by_chance, by_entropy])
@pytest.mark.parametrize(
    "name",
    [pytest.param("sampled", marks=pytest.mark.thorough), "block", "dynamic"],
)
def test_a_depth_rule_that_looks_leaves_the_law_as_it_is(name, stop_fn):
    """At drawn tokens, too: those that are there are all verified."""
    if (name, stop_fn) == ("dynamic", by_entropy):
        pytest.skip("one rule suffices for trees")
    config = DYNAMIC if name == "dynamic" else with_children(CHAIN, "sampled")
    if name == "block":
        config = BY_PATHS["block"]
    counts, law, accepted = emitted_counts(config, "far", stop_fn=stop_fn)
    assert np.all(counts[law == 0] == 0), "a token of probability zero came out"
    assert largest_deviation(counts, law) < _TOLERANCE
    assert accepted > 0.01 * NUM_SAMPLES
    assert accepted != emitted_counts(config, "far")[2]


@pytest.mark.parametrize(
    ("own", "rule"),
    [
        ({"min_path_probability": 0.6}, below_probability(0.6)),
        ({"min_gain": 0.95}, below_gain(0.95)),
    ],
    ids=["probability", "gain"],
)
def test_a_trees_own_rules_are_rules_like_any_other(own, rule):
    keys = jax.random.split(jax.random.key(0), 50)
    root = jnp.arange(50) % VOCAB
    logits = jnp.asarray(draft_logits("far", target_table())[0], jnp.float32)
    config = dataclasses.replace(DYNAMIC, **own)
    ours = grow(config, logits, None, keys, root=root)
    given = grow(DYNAMIC, logits, None, keys, root=root, stop_fn=rule)
    jax.tree.map(np.testing.assert_array_equal, ours, given)
    whole = grow(DYNAMIC, logits, None, keys, root=root)
    assert np.sum(ours.depths) < np.sum(whole.depths)


def test_a_tree_that_cannot_stop_early_takes_no_rule():
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ConfigError, match="a static tree always has its full depth"):
        grow(WIDE, jnp.zeros((VOCAB, VOCAB)), None, keys, stop_fn=by_chance)


def test_suggestions_have_no_entropy():
    root = jnp.zeros((1,), jnp.int32)
    params = sampling_params(1)
    roots = Roots(root, root, jax.random.split(jax.random.key(0), 1), None, params)
    chain = hinted_chain(CHAIN, by_entropy)
    with pytest.raises(ConfigError, match="which suggestions do not have"):
        chain.propose(None, None, (), roots)


@pytest.mark.parametrize(
    ("config", "children", "claimed"),
    [
        (CHAIN, "topk", "sampled"),
        (WIDE, "topk", "without_replacement"),
        (WIDE, "without_replacement", "sampled"),
    ],
)
def test_wrong_rules_are_noticed(config, children, claimed):
    """The acceptance rule must be that of how children were drawn.

    And so many samples tell it from a wrong one.

    (The rule for `topk` would be right for all: it takes the tree as given.)
    """
    counts, law, _ = emitted_counts(with_children(config, children), "far", claimed)
    assert largest_deviation(counts, law) > 2 * _TOLERANCE


@pytest.mark.parametrize("children", ["sampled", "without_replacement"])
def test_equal_draft_is_always_accepted(children):
    counts, law, accepted = emitted_counts(with_children(CHAIN, children), "equal")
    assert accepted > 0.999 * NUM_SAMPLES * CHAIN.num_steps
    assert largest_deviation(counts, law) < _TOLERANCE


def hand_made(parents, tokens, **changes):
    """A batch of one tree."""
    parents = np.asarray(parents, np.int32)
    depths = topology.static_depths(parents)
    values = dict(
        tokens=jnp.asarray(tokens, jnp.int32)[None],
        parents=jnp.asarray(parents)[None],
        depths=jnp.asarray(depths)[None],
        is_valid=jnp.ones((1, len(parents)), bool),
        log_probs=jnp.zeros((1, len(parents))),
        ancestor_mask=jnp.asarray(topology.static_ancestor_mask(parents))[None],
        max_depth=int(depths.max()),
        max_children=int(np.bincount(parents + 1)[1:].max(initial=1)),
    )
    return DraftTree(**(values | changes))


@pytest.mark.parametrize("token", range(3))
def test_rounding_that_leaves_no_residual(token):
    """p below q everywhere, as rounding may have it: the next token follows p."""
    q = jnp.asarray([0.5, 0.3, 0.2, 0.0], jnp.float32)
    tree = hand_made(
        [-1, 0], [0, token], children="sampled",
        draft_probs=jnp.stack([q, jnp.zeros(4)])[None],
    )  # fmt: skip
    probs = jnp.stack([0.7 * q, jnp.full((4,), 0.25)])[None]
    keys = jax.random.split(jax.random.key(0), 2000)
    one = lambda key: verify_drawn(key[None], tree, probs)
    verdict = jax.jit(jax.vmap(one))(keys)
    is_rejected = np.asarray(verdict.num_accepted[:, 0] == 0)
    found = np.bincount(np.asarray(verdict.next_token[:, 0])[is_rejected], minlength=4)
    assert 400 < is_rejected.sum() < 800
    np.testing.assert_allclose(found / is_rejected.sum(), q, atol=0.1)
    assert found[3] == 0


# Node:     0  1  2  3  4  5  6   tokens below, the root's token is 9
PARENTS = [-1, 0, 0, 1, 1, 2, 4]
TOKENS = [9, 1, 2, 3, 4, 3, 5]


@pytest.mark.parametrize(
    ("best", "path", "next_token"),
    [
        # argmax after each node; -1 marks those that are never looked at
        ([7, -1, -1, -1, -1, -1, -1], [0, 0, 0, 0], 7),
        ([2, -1, 8, -1, -1, -1, -1], [0, 2, 2, 2], 8),
        ([2, -1, 3, -1, -1, 6, -1], [0, 2, 5, 5], 6),
        ([1, 4, -1, -1, 5, -1, 0], [0, 1, 4, 6], 0),
        ([1, 3, -1, 7, -1, -1, -1], [0, 1, 3, 3], 7),
        # a match below a mismatch does not count
        ([7, 4, 3, 7, 5, 7, 7], [0, 0, 0, 0], 7),
    ],
)
def test_greedy_by_hand(best, path, next_token):
    tree = hand_made(PARENTS, TOKENS)
    verdict = verify_chosen(tree, jnp.asarray(best, jnp.int32)[None])
    assert verdict.path[0].tolist() == path
    assert int(verdict.num_accepted[0]) == len(set(path)) - 1
    assert int(verdict.next_token[0]) == next_token


def test_greedy_skips_invalid_nodes():
    is_valid = jnp.asarray([[True, False, True, True, True, True, True]])
    tree = hand_made(PARENTS, TOKENS, is_valid=is_valid)
    best = jnp.asarray([[1, 4, 0, 0, 5, 0, 0]], jnp.int32)
    verdict = verify_chosen(tree, best)
    assert int(verdict.num_accepted[0]) == 0
    assert int(verdict.next_token[0]) == 1


def test_greedy_with_equal_siblings():
    """Independent draws may repeat a token."""
    tree = hand_made([-1, 0, 0, 1, 2], [9, 1, 1, 2, 3], children="sampled")
    best = jnp.asarray([[1, 3, 3, 0, 4]], jnp.int32)
    verdict = verify_chosen(tree, best)
    assert verdict.path[0].tolist() == [0, 2, 4]
    assert int(verdict.next_token[0]) == 4


def test_sampled_equals_greedy_for_one_hot_targets():
    tree = hand_made(PARENTS, TOKENS)
    best = jnp.asarray([[1, 4, 0, 0, 5, 0, 0]], jnp.int32)
    probs = jax.nn.one_hot(best, 10)
    keys = jax.random.split(jax.random.key(0), 7)
    np.testing.assert_array_equal(sample(keys, probs[0]), best[0])
    drawn = tree.replace(children="sampled", draft_probs=jax.nn.one_hot(best, 10))
    greedy, sampled = verify_chosen(tree, best), verify_drawn(keys[:1], drawn, probs)
    np.testing.assert_array_equal(greedy.num_accepted, sampled.num_accepted)
    np.testing.assert_array_equal(greedy.next_token, sampled.next_token)


def test_children_that_are_no_draws_have_no_rule_of_draws():
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="use verify_chosen"):
        verify_drawn(keys, hand_made(PARENTS, TOKENS), jnp.full((1, 7, 10), 0.1))


@pytest.mark.parametrize("children", ["sampled", "without_replacement"])
def test_reranked_draws_are_refused(children):
    tree = hand_made(
        PARENTS, TOKENS, children=children, is_reranked=True,
        draft_probs=jnp.full((1, 7, 10), 0.1),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="reranked"):
        verify_drawn(keys, tree, jnp.full((1, 7, 10), 0.1))
