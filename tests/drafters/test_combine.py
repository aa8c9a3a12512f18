# SPDX-License-Identifier: Apache-2.0
"""Two chains in one tree, and drafters asked in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.verify import verify_chosen
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.combine import combine, inner_tree, merge_chains, mixed_tree
from ospec_jax.drafters.hints import hinted_chain
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.drafters.sources import DRAFT, MEMORY, NGRAMS
from ospec_jax.types import DraftTree, Roots


def chain(tokens, num_valid=None):
    """A batch of one chain."""
    n = len(tokens)
    parents = np.arange(-1, n - 1, dtype=np.int32)
    return DraftTree(
        tokens=jnp.asarray([tokens], jnp.int32),
        parents=jnp.asarray([parents]),
        depths=jnp.arange(n, dtype=jnp.int32)[None],
        is_valid=(jnp.arange(n) < (n if num_valid is None else num_valid))[None],
        log_probs=jnp.zeros((1, n)),
        ancestor_mask=jnp.asarray([topology.static_ancestor_mask(parents)]),
        max_depth=n - 1,
        is_chain=True,
    )


def paths(tree):
    """The token paths from the root to every valid node."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    found = []
    for node in np.flatnonzero(np.asarray(tree.is_valid[0])):
        path = []
        while node > 0:
            path.insert(0, tokens[node])
            node = parents[node]
        found.append(tuple(path))
    return sorted(found)


@pytest.mark.parametrize(
    ("second", "num_valid", "expected"),
    [
        ([9, 5, 6, 7], 4, [(1,), (1, 2), (1, 2, 3), (5,), (5, 6), (5, 6, 7)]),
        ([9, 1, 6, 7], 4, [(1,), (1, 2), (1, 2, 3), (1, 6), (1, 6, 7)]),
        ([9, 1, 2, 7], 4, [(1,), (1, 2), (1, 2, 3), (1, 2, 7)]),
        ([9, 1, 2, 3], 4, [(1,), (1, 2), (1, 2, 3)]),
        ([9, 5, 6, 7], 2, [(1,), (1, 2), (1, 2, 3), (5,)]),
        ([9, 5, 2, 3], 4, [(1,), (1, 2), (1, 2, 3), (5,), (5, 2), (5, 2, 3)]),
    ],
)
def test_chains_share_what_they_agree_on(second, num_valid, expected):
    tree = jax.jit(merge_chains)(chain([9, 1, 2, 3]), chain(second, num_valid))
    assert paths(tree) == [(), *expected]
    parents, depths = np.asarray(tree.parents[0]), np.asarray(tree.depths[0])
    assert parents[0] == -1
    assert np.all(parents[1:] < np.arange(1, 7))
    np.testing.assert_array_equal(depths[1:], depths[parents[1:]] + 1)
    mask = topology.static_ancestor_mask(parents)
    np.testing.assert_array_equal(tree.ancestor_mask[0], mask)


def test_the_branch_that_the_target_follows_is_accepted():
    tree = merge_chains(chain([9, 1, 2, 3]), chain([9, 1, 6, 7]))
    after = {9: 1, 1: 6, 6: 7, 7: 4}
    best = [[after.get(token, 0) for token in tree.tokens[0].tolist()]]
    verdict = verify_chosen(tree, jnp.asarray(best, jnp.int32))
    assert int(verdict.num_accepted[0]) == 3
    assert int(verdict.next_token[0]) == 4


def test_what_both_chains_have_is_the_draft_s():
    second = chain([9, 1, 6, 7]).replace(sources=jnp.full((1, 4), MEMORY))
    tree = merge_chains(chain([9, 1, 2, 3]), second)
    kept = np.asarray(tree.is_valid[0])
    found = zip(tree.tokens[0].tolist(), tree.sources[0].tolist(), strict=True)
    named = [pair for pair, is_kept in zip(found, kept, strict=True) if is_kept]
    of_draft = [(token, DRAFT) for token in (1, 2, 3)]
    assert sorted(named[1:]) == [*of_draft, (6, MEMORY), (7, MEMORY)]


@pytest.mark.parametrize("mix", ["fallback", "longer"])
@pytest.mark.parametrize(("rate", "asked"), [(0.9, False), (0.3, True)])
def test_the_other_drafter_runs_only_where_suggestions_are_unlikely(rate, asked, mix):
    tree = mixed_tree(mix, TreeConfig(num_steps=2))
    calls = []
    neural = hinted_chain(inner_tree(mix, tree))._replace(
        propose=lambda *args: (
            jax.debug.callback(lambda: calls.append(1)),
            (chain([9, 1, 2]), ()),
        )[1]
    )
    suggest = lambda recent, depth: (
        recent[..., -1] + 10,
        jnp.full(recent.shape[:2], jnp.log(rate)),
        jnp.full(recent.shape[:2], NGRAMS),
    )
    root = jnp.full((1,), 9, jnp.int32)
    hints = Hints(root[:, None], suggest)
    args = None, None, (), Roots(root, root, None, None, None), hints
    drafted, _ = jax.jit(lambda: combine(mix, neural, tree).propose(*args))()
    jax.effects_barrier()
    assert bool(calls) == asked
    suggested = [9, 19, 29] if mix == "fallback" else [9, 19, 29, 39, 49, 59]
    is_valid = np.asarray(drafted.is_valid[0])
    expected = [9, 1, 2] if asked else suggested
    assert drafted.tokens[0][is_valid].tolist() == expected
    proposer = DRAFT if asked else NGRAMS
    sources = drafted.sources[0][is_valid].tolist()
    assert sources[1:] == [proposer] * (len(expected) - 1)


def test_longer_chains_have_one_length_and_twice_its_rows():
    tree = TreeConfig(num_steps=3, min_path_probability=0.1)
    both = mixed_tree("longer", tree)
    assert (both.num_steps, both.sizes) == (7, (3, 7))
    assert inner_tree("longer", both) == tree
    assert mixed_tree("longer", TreeConfig(num_steps=0)).num_nodes == 1
    for other in (TreeConfig.auto(), TreeConfig(num_steps=2, sizes=(1, 2))):
        with pytest.raises(ConfigError, match="give it one length"):
            mixed_tree("longer", other)


def test_only_chains_are_mixed():
    for tree in (
        TreeConfig(num_steps=2, children="sampled"),
        TreeConfig("static", 1, branching=(2,)),
    ):
        with pytest.raises(ConfigError, match="mixed as chains"):
            inner_tree("mixed", tree)


def test_one_drafter_makes_no_parallel_tree():
    with pytest.raises(ConfigError, match="needs two drafters"):
        build_drafter("eagle3", None, TreeConfig("parallel", 2))
