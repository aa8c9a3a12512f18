# SPDX-License-Identifier: Apache-2.0
"""A drafter of your own: it guesses that the last token comes again, and again.

draft = load_draft(REPEAT, target)
session = Session(target, draft, tree=TreeConfig(num_steps=3))
"""

import jax.numpy as jnp

from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, Family, stateless
from ospec_jax.types import DraftTree


def repeat(config, tree, numerics, stop_fn=None) -> Drafter:
    """Builds it for chains; it has no parameters, no cache and nothing to train."""
    if not tree.is_chain:
        raise ValueError(f"this drafter makes chains, not a {tree.kind} tree")
    parents = topology.static_parents(tree)

    def propose(draft, shared, cache, roots, hints=None):
        num_rows = roots.token.shape[0]
        spread = lambda x: jnp.broadcast_to(x, (num_rows, *x.shape))
        shape = (num_rows, 1 + tree.num_steps)
        drafted = DraftTree(
            # Node 0 is the root: the last committed token. The others are our guess.
            tokens=jnp.broadcast_to(roots.token[:, None], shape),
            parents=spread(parents),
            depths=spread(topology.static_depths(parents)),
            ancestor_mask=spread(topology.static_ancestor_mask(parents)),
            is_valid=jnp.ones(shape, bool),
            log_probs=jnp.zeros(shape),
            # The guess uses no random numbers: any target accepts it exactly.
            children="topk",
            max_depth=tree.num_steps,
            is_chain=True,
        )
        return drafted, cache

    return stateless(propose)


REPEAT = Family(
    name="repeat",
    description="the last token, again and again",
    build=repeat,
)
