# SPDX-License-Identifier: Apache-2.0
"""Pytrees of any kind as items of a checkpoint, in NumPy's arrays."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_item(tree: Any) -> dict[str, np.ndarray]:
    """A tree's leaves by number; keys of random numbers as what they are made of."""
    leaves = [
        jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)
    ]
    # Orbax has no room for a tree without leaves.
    found = {f"{i:04d}": np.asarray(x) for i, x in enumerate(leaves)}
    return found | {"count": np.asarray(len(leaves))}


def from_item(found: dict[str, Any], like: Any, folder: str | Path) -> Any:
    """The tree that such an item was made of.

    Args:
      like: A tree of its structure, shapes and dtypes.
      folder: That holds it, for errors.

    Raises:
      ConfigError: It was made of another tree.
    """
    wanted, structure = jax.tree.flatten(like)
    if int(found["count"]) != len(wanted):
        raise ConfigError(
            f"{folder} holds {int(found['count'])} arrays where {len(wanted)} are "
            f"wanted: it was made with other settings; choose another folder"
        )

    leaves = []
    for i, one in enumerate(wanted):
        leaf = jnp.asarray(found[f"{i:04d}"])
        if _is_key(one):
            leaf = jax.random.wrap_key_data(leaf)
        if (leaf.shape, leaf.dtype) != (one.shape, one.dtype):
            raise ConfigError(
                f"{folder} holds {leaf.dtype} of the shape {leaf.shape} where "
                f"{one.dtype} of {one.shape} is wanted: it was made with other "
                f"settings; choose another folder"
            )
        leaves.append(leaf)

    return jax.tree.unflatten(structure, leaves)
