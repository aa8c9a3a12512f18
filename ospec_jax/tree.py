# SPDX-License-Identifier: Apache-2.0
"""Topologies of draft trees: parents, depths and who is whose ancestor."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ospec_jax.config import TreeConfig
from ospec_jax.typing import typed

NO_PARENT = -1


def static_parents(config: TreeConfig) -> np.ndarray:
    """Parents of the nodes of a chain or static tree, `[n]`, by depth."""
    if config.parents:
        return np.asarray(config.parents, np.int32)
    branching = config.branching if config.kind == "static" else (1,) * config.num_steps
    parents, level = [NO_PARENT], [0]
    for branches in branching:
        first = len(parents)
        parents += [node for node in level for _ in range(branches)]
        level = list(range(first, len(parents)))
    return np.asarray(parents, np.int32)


def static_depths(parents: np.ndarray) -> np.ndarray:
    """Depth of each node, `[n]`."""
    depths = np.zeros(len(parents), np.int32)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    return depths


def static_ancestor_mask(parents: np.ndarray) -> np.ndarray:
    """Whether node j is node i or one of its ancestors, `[n, n]`."""
    mask = np.eye(len(parents), dtype=bool)
    for node in range(1, len(parents)):
        mask[node] |= mask[parents[node]]
    return mask


@typed
def ancestor_mask(
    parents: Int[Array, "b n"], max_depth: int
) -> Bool[Array, "b n n"]:  # fmt: skip
    """As `static_ancestor_mask`, for topologies known only on the device."""
    n = parents.shape[1]
    own = jnp.eye(n, dtype=bool)
    inherit = jax.vmap(lambda mask, index: mask[index])
    above = jnp.maximum(parents, 0)
    is_child = (parents >= 0)[:, :, None]
    mask = jnp.broadcast_to(own, (parents.shape[0], n, n))
    for _ in range(max_depth):
        mask = own | (inherit(mask, above) & is_child)
    return mask
