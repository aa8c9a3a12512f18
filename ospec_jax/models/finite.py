# SPDX-License-Identifier: Apache-2.0
"""Numbers that are none: infinities and NaNs among parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def is_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers of parameters, or of an optimizer's state, are finite.

    One reduction, to be part of a compiled function. Single numbers may be infinite:
    some optimizers begin with such a best loss or bound. They must not be NaN.
    """
    flags = [
        jnp.all(jnp.isfinite(x)) if x.ndim else ~jnp.isnan(x)
        for x in map(jnp.asarray, jax.tree.leaves(tree))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def find_not_finite(tree: Any) -> str:
    """The first tensor of a tree that holds an infinity or a NaN, by its path.

    Returns:
      Empty if all are finite.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    floats = [(path, x) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    flags = jax.device_get([_all_finite(x) for _, x in floats])

    for (path, _), is_good in zip(floats, flags, strict=True):
        if not is_good:
            return jax.tree_util.keystr(path, simple=True, separator="/")

    return ""


@jax.jit
def _all_finite(array: jax.Array) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(array))
