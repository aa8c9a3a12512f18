# SPDX-License-Identifier: Apache-2.0
"""Topologies of draft trees: parents, depths and ancestors, and the best tree."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.typing import typed

NO_PARENT = -1


def static_parents(config: TreeConfig) -> np.ndarray:
    """Parents of the nodes of a chain or static tree, `[n]`, by depth."""
    if config.parents:
        return np.asarray(config.parents, np.int32)

    # Level by level, so that nodes stand in depth order and siblings side by side.
    branching = config.branching if config.kind == "static" else (1,) * config.num_steps
    parents = [NO_PARENT]
    level = [0]

    for branches in branching:
        first = len(parents)
        parents += [node for node in level for _ in range(branches)]
        level = list(range(first, len(parents)))

    return np.asarray(parents, np.int32)


def static_depths(parents: np.ndarray | tuple[int, ...]) -> np.ndarray:
    """Depth of each node, `[n]`."""
    depths = np.zeros(len(parents), np.int32)
    # Parents stand before their children: one pass is enough.
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1

    return depths


def static_ancestor_mask(parents: np.ndarray) -> np.ndarray:
    """Whether node j is node i or one of its ancestors, `[n, n]`."""
    mask = np.eye(len(parents), dtype=bool)
    for node in range(1, len(parents)):
        mask[node] |= mask[parents[node]]

    return mask


def first_place(topk: int, depth: int) -> int:
    """Place of a depth's first node, among all that a uniform tree has seen."""
    return 0 if depth <= 1 else topk + (depth - 2) * topk**2


def depths_of_places(topk: int, num_steps: int) -> np.ndarray:
    """Depth of each node that a tree of uniform width may see, `[p]`, in depth order.

    Args:
      topk: Nodes of each depth that are expanded, and children of each of them.
    """
    later = np.repeat(np.arange(2, num_steps + 1, dtype=np.int32), topk**2)
    return np.concatenate([np.ones(topk, np.int32), later])


@typed
def ancestor_mask(parents: Int[Array, "b n"], max_depth: int) -> Bool[Array, "b n n"]:
    """As `static_ancestor_mask`, for topologies known only on the device."""
    n = parents.shape[1]
    own = jnp.eye(n, dtype=bool)
    inherit = jax.vmap(lambda mask, index: mask[index])
    above = jnp.maximum(parents, 0)
    is_child = (parents >= 0)[:, :, None]
    mask = jnp.broadcast_to(own, (parents.shape[0], n, n))

    # Each turn hands masks one generation down; after `max_depth` of them everyone has
    # all its ancestors'.
    for _ in range(max_depth):
        mask = own | (inherit(mask, above) & is_child)

    return mask


def best_parents(
    rates: tuple[float, ...], num_draft_tokens: int, max_depth: int
) -> tuple[int, ...]:
    """Sequoia's tree: the one of most accepted tokens (arXiv 2402.12374).

    A node is accepted with the product of the rates on its path, so the best tree of n
    nodes is that of the n largest products. Where later children have lower rates, as
    they do, that is what Sequoia's dynamic programme finds.

    Args:
      rates: Chances that a node's first, second, ... child is the accepted one.

    Raises:
      ConfigError: The rates grow, are no probabilities, or the tree is too large.
    """
    if list(rates) != sorted(rates, reverse=True) or not 0 < sum(rates) <= 1 + 1e-6:
        raise ConfigError(
            f"the rates {rates} of a node's children must fall, and add up to at most 1"
        )
    if rates[-1] <= 0 or num_draft_tokens < 1 or max_depth < 1:
        raise ConfigError(
            f"a tree needs positive rates, nodes and depth, not {rates}, "
            f"{num_draft_tokens} and {max_depth}"
        )

    # Best first. A path is a tuple of child ranks. When a node is taken, its first
    # child and its next sibling become candidates; all others are less probable than
    # one of these, so the largest products come out in order, and parents before
    # children.
    chosen: list[tuple[int, ...]] = []
    queue: list[tuple[float, tuple[int, ...]]] = [(-rates[0], (0,))]

    while queue and len(chosen) < num_draft_tokens:
        value, path = heapq.heappop(queue)
        chosen.append(path)
        if len(path) < max_depth:
            heapq.heappush(queue, (value * rates[0], (*path, 0)))
        if (rank := path[-1] + 1) < len(rates):
            sibling = value / rates[rank - 1] * rates[rank]
            heapq.heappush(queue, (sibling, (*path[:-1], rank)))

    if len(chosen) < num_draft_tokens:
        raise ConfigError(
            f"a tree of depth {max_depth} and {len(rates)} children a node has "
            f"{len(chosen)} nodes, not {num_draft_tokens}"
        )

    # Trees are numbered in depth order.
    ordered = [(), *sorted(chosen, key=lambda path: (len(path), path))]
    place = {path: i for i, path in enumerate(ordered)}

    return (-1, *(place[path[:-1]] for path in ordered[1:]))
