# SPDX-License-Identifier: Apache-2.0
"""Trees: which are the best, which are none."""

import functools
import itertools

import numpy as np
import pytest

from ospec_jax.cli.notation import parse_tree
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.topology import best_parents


def promised(parents, rates):
    """Expected accepted tokens when a node's i-th child is accepted at `rates[i]`."""
    values, seen = [1.0], {}
    for parent in parents[1:]:
        rank = seen.get(parent, 0)
        seen[parent] = rank + 1
        values.append(values[parent] * rates[rank])
    return sum(values[1:])


def most_promised(rates, num_tokens, max_depth):
    """Sequoia's dynamic programme over sizes, depths and children."""

    @functools.cache
    def forest(size, depth, rank):
        """The best children, from `rank` on, of one node, with `size` nodes in all."""
        if size == 0:
            return 0.0
        if depth == 0 or rank == len(rates):
            return -np.inf
        return max(
            rates[rank] * (1 + forest(own, depth - 1, 0))
            + forest(size - 1 - own, depth, rank + 1)
            for own in range(size)
        )

    return forest(num_tokens, max_depth, 0)


@pytest.mark.parametrize("rates", [(0.6, 0.15, 0.05), (0.3, 0.3), (0.8,)])
def test_best_trees_promise_as_much_as_the_dynamic_programme(rates):
    for size, depth in itertools.product((1, 4, 7), (2, 4, 7)):
        most = sum(len(rates) ** d for d in range(1, depth + 1))
        if size > most:
            with pytest.raises(ConfigError, match=f"has {most} nodes, not {size}"):
                best_parents(rates, size, depth)
            continue
        parents = best_parents(rates, size, depth)
        assert len(parents) == size + 1
        best = most_promised(rates, size, depth)
        assert promised(parents, rates) == pytest.approx(best)
        config = parse_tree(f"sequoia:{size},{','.join(map(str, rates))}", depth)
        assert config.num_nodes == size + 1
        assert topology.static_depths(topology.static_parents(config)).max() <= depth


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(parents=(-1, 0, 2, 1)), "node 2 of the tree has parent 2"),
        (dict(parents=(-1, 0, -1)), "node 2 of the tree has parent -1"),
        (dict(parents=(-1, 0, 1, 0)), "siblings stand side by side"),
        (dict(parents=(0, 0)), "begins with its root"),
        (dict(parents=(-1,)), "has more nodes"),
        (dict(parents=(-1, 0, 1), num_steps=3), "has depth 2; num_steps is 3"),
        (dict(parents=(-1, 0), branching=(1,)), "in place of branching"),
        (dict(parents=(-1, 0), kind="chain"), "describe a static tree"),
        (dict(parents=(-1, 0), num_steps=1, children="hub"), "branching 2"),
        (dict(kind="chain", min_gain=0.1), "for dynamic trees"),
    ],
)
def test_ill_formed_trees_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TreeConfig(**({"kind": "static", "num_steps": 2} | values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opt:12", "cannot read the tree"),
        ("sequoia:x,0.5", "cannot read the tree"),
        ("sequoia:4,0.2,0.5", "must fall"),
        ("sequoia:4,0.9,0.5", "add up to at most 1"),
        ("sequoia:0,0.5", "positive rates, nodes"),
        ("bush", "unknown tree 'bush'"),
    ],
)
def test_unreadable_trees_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_tree(text, 3)


@pytest.mark.parametrize("text", ["dynamic:4,12", "opt:12,0.2"])
def test_settings_of_a_tree_are_kept_or_refused(text):
    found = parse_tree(text, 3, min_path_probability=0.3)
    assert found.min_path_probability == 0.3
    with pytest.raises(ConfigError):
        parse_tree(text, 3, children="sampled", verification="traversal")
