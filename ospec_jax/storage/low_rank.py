# SPDX-License-Identifier: Apache-2.0
"""A draft stored as its low-rank difference to the one that it was trained from.

Experts for single domains differ little from their base. The difference of a matrix is
kept as the product of its leading singular vectors, which no approximation of that rank
is closer to (Eckart-Young), that of a norm or bias as it is. The two are added when the
draft is loaded, so that drafting knows nothing of it.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.types import Draft


def fingerprint(draft: Draft) -> str:
    """Hash of a draft's parameters and vocabulary: what a difference belongs to."""
    digest = hashlib.sha256()

    for path, leaf in jax.tree_util.tree_leaves_with_path(draft.params):
        # The path, too: leaves of equal shapes could change places otherwise.
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())

    if draft.token_ids is not None:
        digest.update(np.ascontiguousarray(draft.token_ids, np.int32).tobytes())

    return digest.hexdigest()[:16]


def empty(params, rank: int):
    """The difference of nothing: shapes of what `subtract` returns."""

    def node(name: str, value):
        if isinstance(value, dict):
            return {name: empty(value, rank)}
        if name != "kernel":
            return {name: jnp.zeros_like(value)}

        # A matrix has no more singular vectors than its smaller side.
        kept = min(rank, *value.shape)
        return {
            "left": {"kernel": jnp.zeros((value.shape[0], kept))},
            "right": {"kernel": jnp.zeros((kept, value.shape[1]))},
        }

    return {k: v for name in params for k, v in node(name, params[name]).items()}


def subtract(params, base, rank: int):
    """`params` less `base`, float32 trees of one structure, up to `rank`.

    A kernel `[out, in]` becomes `left`, `[out, rank]`, and `right`, `[rank, in]`.
    """
    found: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found[name] = subtract(value, base[name], rank)
        elif name == "kernel":
            change = np.asarray(value, np.float32) - np.asarray(base[name], np.float32)
            left, sizes, right = np.linalg.svd(change, full_matrices=False)
            # Each row of `right` gets its own scale in int8.
            right = sizes[:rank, None] * right[:rank]
            found["left"] = {"kernel": jnp.asarray(left[:, :rank])}
            found["right"] = {"kernel": jnp.asarray(right)}
        else:
            found[name] = jnp.asarray(value) - jnp.asarray(base[name])

    return found


def add(base, change):
    """The draft's parameters, from those of its base and the difference to them."""
    whole = {}
    for name, value in base.items():
        if isinstance(value, dict):
            whole[name] = add(value, change[name])
        elif name == "kernel":
            whole[name] = value + change["left"]["kernel"] @ change["right"]["kernel"]
        else:
            whole[name] = value + change[name]

    return whole
