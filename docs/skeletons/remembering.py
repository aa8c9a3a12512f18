# SPDX-License-Identifier: Apache-2.0
"""A drafter that remembers: what followed a token last time follows it again.

draft = load_draft(FOLLOWER, target)
session = Session(target, draft, tree=TreeConfig(num_steps=3), ngrams=False)

Its cache is a table of the request's tokens, by what came before them.
"""

import jax.numpy as jnp

from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, Family, stateless
from ospec_jax.types import DraftContext, DraftTree

NUM_BUCKETS = 8192
"""Tokens that share one overwrite each other: such a draft is merely worse."""


def follower(config, tree, numerics, stop_fn=None) -> Drafter:
    """Builds it for chains."""
    if not tree.is_chain:
        raise ValueError(f"this drafter makes chains, not a {tree.kind} tree")
    parents = topology.static_parents(tree)

    def init_cache(num_rows, capacity):
        # Any tree of arrays, the row first. `capacity` is for a slot a position.
        return jnp.full((num_rows, NUM_BUCKETS), -1, jnp.int32)

    def extend(draft, shared, cache, pairs):
        num_rows, length = pairs.inputs.shape
        row = jnp.arange(num_rows)[:, None]
        is_real = jnp.arange(length) < pairs.num_valid[:, None]
        # Beyond the table nothing is written: so junk is dropped.
        bucket = jnp.where(is_real, pairs.inputs % NUM_BUCKETS, NUM_BUCKETS)
        cache = cache.at[row, bucket].set(pairs.tokens, mode="drop")

        # It has no state to hand on to `propose` but the cache.
        nothing = jnp.zeros((num_rows, 1))
        return cache, DraftContext(hidden=nothing, logits=nothing)

    def propose(draft, shared, cache, roots, hints=None):
        num_rows = roots.token.shape[0]
        spread = lambda x: jnp.broadcast_to(x, (num_rows, *x.shape))
        tokens = [roots.token]
        is_valid = [jnp.ones(num_rows, bool)]
        for _ in range(tree.num_steps):
            bucket = tokens[-1] % NUM_BUCKETS
            follows = jnp.take_along_axis(cache, bucket[:, None], axis=1)[:, 0]
            is_valid.append(is_valid[-1] & (follows >= 0))  # else the chain ends here
            tokens.append(follows)

        drafted = DraftTree(
            tokens=jnp.stack(tokens, axis=1),
            parents=spread(parents),
            depths=spread(topology.static_depths(parents)),
            ancestor_mask=spread(topology.static_ancestor_mask(parents)),
            is_valid=jnp.stack(is_valid, axis=1),
            log_probs=jnp.zeros((num_rows, 1 + tree.num_steps)),
            # The guess uses no random numbers: any target accepts it exactly.
            children="topk",
            max_depth=tree.num_steps,
            is_chain=True,
        )
        return drafted, cache

    return stateless(propose, init_cache=init_cache, extend=extend)


FOLLOWER = Family(
    name="follower",
    description="what followed the last token before",
    build=follower,
)
