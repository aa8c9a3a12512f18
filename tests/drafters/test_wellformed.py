# SPDX-License-Identifier: Apache-2.0
"""Whatever a drafter of one's own says of its trees, output is the target's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Family, stateless
from ospec_jax.drafters.ngram import init_memory
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.testing import tiny_target
from ospec_jax.types import Draft, DraftTree

CHAIN = TreeConfig(num_steps=3)
STATIC = TreeConfig("static", 2, branching=(3, 2))
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def target():
    return tiny_target(NUM_TOKENS, num_layers=1)


def family(change):
    """Drafts tokens at random, in a tree that `change` has spoilt."""

    def build(config, tree, numerics, stop_fn=None):
        def propose(draft, shared, cache, roots, hints=None):
            b = roots.token.shape[0]
            parents = topology.static_parents(tree)
            spread = lambda x: jnp.broadcast_to(x, (b, *x.shape))
            tokens = jax.vmap(
                lambda key: jax.random.randint(key, (tree.num_nodes,), 0, NUM_TOKENS)
            )(roots.keys)
            good = DraftTree(
                tokens=tokens.at[:, 0].set(roots.token),
                parents=spread(parents),
                depths=spread(topology.static_depths(parents)),
                is_valid=jnp.ones((b, tree.num_nodes), bool),
                log_probs=jnp.zeros((b, tree.num_nodes)),
                ancestor_mask=spread(topology.static_ancestor_mask(parents)),
                max_depth=tree.num_steps,
                max_children=3,
                is_chain=tree.is_chain,
            )
            return change(good, roots), cache

        return stateless(propose)

    return Family(name="mine", description="mine", build=build)


def wild_parents(tree, roots):
    draw = lambda key: jax.random.randint(key, tree.parents.shape[1:], -3, 12)
    return tree.replace(parents=jax.vmap(draw)(roots.keys))


SLIPS = {
    "none": lambda tree, roots: tree,
    "no max_depth": lambda tree, roots: tree.replace(max_depth=0),
    "depths too low": lambda tree, roots: tree.replace(depths=tree.depths - 1),
    "no depths": lambda tree, roots: tree.replace(depths=None),
    "no mask": lambda tree, roots: tree.replace(ancestor_mask=None),
    "mask of all": lambda tree, roots: tree.replace(
        ancestor_mask=jnp.ones_like(tree.ancestor_mask)
    ),
    "another root": lambda tree, roots: tree.replace(
        tokens=(tree.tokens + 1) % NUM_TOKENS
    ),
    "the root is not valid": lambda tree, roots: tree.replace(
        is_valid=jnp.zeros_like(tree.is_valid)
    ),
    "not said to be a chain": lambda tree, roots: tree.replace(is_chain=False),
    "no such tokens": lambda tree, roots: tree.replace(tokens=tree.tokens - 7),
    "far too large": lambda tree, roots: tree.replace(tokens=tree.tokens + 9),
    "wild parents": wild_parents,
    "proposed by nobody": lambda tree, roots: tree.replace(
        sources=tree.tokens * 100 - 700
    ),
}


def answers(
    target,
    drafter,
    tree,
    temperature=0.0,
    num_requests=1,
    num_tokens=32,
    batch_size=2,
):
    step = StepConfig(target.config, target.numerics, tree)
    engine = Engine(step, target.params, drafter)
    asked = [
        Request(str(i), ids, num_tokens, SamplingConfig(temperature=temperature))
        for i, ids in enumerate([(1, 2, 3), (5, 4, 5, 4)] * num_requests)
    ]
    draft = Draft({}, memory=init_memory(16))
    done = list(engine.serve(asked, lambda: draft, batch_size))
    return [c.token_ids for c in sorted(done, key=lambda c: int(c.request.id))], done


@pytest.fixture(scope="module")
def plain(target):
    return answers(target, None, TreeConfig(num_steps=0))[0]


@pytest.mark.crossed
@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("tree", [CHAIN, STATIC], ids=lambda tree: tree.kind)
def test_a_slip_changes_no_output(target, plain, tree, slip):
    drafter = build_drafter(family(SLIPS[slip]), None, tree)
    found, done = answers(target, drafter, tree)
    assert found == plain
    if slip == "none":
        assert sum(c.stats.num_accepted_tokens for c in done) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.replace(tokens=tree.tokens[:, 1:]), "tokens .* of shape"),
        (lambda tree: tree.replace(tokens=tree.tokens[0]), "tokens .* of shape"),
        (lambda tree: tree.replace(is_valid=tree.tokens), "is_valid .* is int32"),
        (lambda tree: tree.replace(children="sampled"), "draft_probs .* is missing"),
        (lambda tree: tree.replace(sources=tree.tokens[0]), "sources .* of shape"),
        (lambda tree: tree.tokens, "returned tuple; return"),
    ],
)
def test_what_is_no_tree_is_refused(target, change, message):
    spoilt = family(lambda tree, roots: change(tree))
    with pytest.raises(ConfigError, match=message):
        answers(target, build_drafter(spoilt, None, CHAIN), CHAIN)


def test_what_is_no_drafter_is_refused():
    builds_nothing = Family("mine", "mine", lambda *_: None)
    with pytest.raises(ConfigError, match="returned NoneType, not a Drafter"):
        build_drafter(builds_nothing, None, CHAIN)


def test_an_extension_without_a_context_is_refused(target):
    good = family(SLIPS["none"])
    for spoil in (lambda cache, context: cache, lambda cache, context: (cache, None)):

        def build(*given, spoil=spoil):
            drafter = good.build(*given)
            extend = lambda *args: spoil(*drafter.extend(*args))
            return drafter._replace(extend=extend)

        drafter = build_drafter(good._replace(build=build), None, CHAIN)
        with pytest.raises(ConfigError, match=r"`extend` .* \(cache, DraftContext\)"):
            answers(target, drafter, CHAIN)


def test_draws_of_another_kind_are_refused(target):
    tree = dataclasses.replace(CHAIN, children="sampled")
    drafter = build_drafter(family(SLIPS["none"]), None, tree)
    with pytest.raises(ConfigError, match="says that its children are 'topk'"):
        answers(target, drafter, tree)


def test_the_packages_own_are_taken_at_their_word():
    own = build_drafter("ngram", None, CHAIN)
    assert "wellformed" not in own.propose.__module__
    theirs = build_drafter(family(SLIPS["none"]), None, CHAIN)
    assert "wellformed" in theirs.propose.__module__


# A tree is mended before anything looks at how it is verified.
@pytest.mark.thorough
@pytest.mark.parametrize("slip", ["wild parents", "no such tokens", "far too large"])
def test_sampled_output_follows_the_target_through_a_spoilt_tree(target, slip):
    """Second tokens of many answers, against plain decoding's."""
    count = functools.partial(np.bincount, minlength=NUM_TOKENS)
    spoilt = build_drafter(family(SLIPS[slip]), None, STATIC)
    tables = []
    for drafter, tree in ((spoilt, STATIC), (None, TreeConfig(num_steps=0))):
        found, _ = answers(target, drafter, tree, 1.0, 60, 3, batch_size=20)
        assert all(0 <= token < NUM_TOKENS for ids in found for token in ids)
        tables.append(count([ids[1] for ids in found if len(ids) > 1]))
    ours, expected = tables
    total = ours + expected
    seen = total > 0
    chi = np.sum((ours - expected)[seen] ** 2 / total[seen])
    degrees = seen.sum() - 1
    assert chi < degrees + 4 * np.sqrt(2 * degrees)
