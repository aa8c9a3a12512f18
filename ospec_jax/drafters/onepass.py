# SPDX-License-Identifier: Apache-2.0
"""Trees of drafts made in one pass: logits of all depths are known at once.

Growth then only draws. All nodes of a depth have the same distribution of children, up
to a bias by the node's own token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import TreeConfig
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.growth import Nodes, grow
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models.layers import Numerics
from ospec_jax.types import DraftContext, DraftTree, Roots


def grow_marginals(
    logits: Float[Array, "b k q"],
    states: Float[Array, "b k d"],
    tree: TreeConfig,
    cache: Any,
    roots: Roots,
    token_ids: Int[Array, " q"] | None = None,
    hints: Hints | None = None,
    stop_fn: StopFn | None = None,
    *,
    add_bias: Callable | None = None,
    numerics: Numerics,
) -> tuple[DraftTree, Any]:
    """Drafts a tree under every root from the logits of each depth.

    Args:
      logits: Of the tokens at depths 1 to k, whatever stands before them.
      states: What they were made of.
      cache: As the pass has left it; it is handed on.
      add_bias: `(logits [b, w, q], tokens [b, w]) -> logits`: of the children of nodes
        with these tokens, as target ids.

    The other arguments are those of `growth.grow`.
    """
    add_bias = add_bias or (lambda logits, tokens: logits)

    def step(cache, nodes: Nodes):
        num_nodes = nodes.tokens.shape[1]

        def of_depth(values):
            row = jax.lax.dynamic_index_in_dim(values, nodes.depth, 1)
            return jnp.repeat(row, num_nodes, axis=1)

        found = add_bias(of_depth(logits), nodes.tokens)
        return of_depth(states), found, cache

    first = add_bias(logits[:, :1], roots.token[:, None])
    context = DraftContext(hidden=states[:, 0], logits=first[:, 0])
    return grow(
        step,
        tree,
        cache,
        roots.replace(context=context),
        token_ids,
        hints,
        stop_fn,
        numerics=numerics,
    )
