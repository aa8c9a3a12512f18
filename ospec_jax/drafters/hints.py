# SPDX-License-Identifier: Apache-2.0
"""Suggestions of several sources, and drafting with nothing but suggestions."""

import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, Family, Hints, stateless
from ospec_jax.drafters.growth import extend_path
from ospec_jax.models.layers import Numerics
from ospec_jax.types import DraftTree


def either(first: Hints, second: Hints | None) -> Hints:
    """Suggests what the more confident of two sources suggests.

    Both must be able to read the `recent` tokens of `first`.
    """
    if second is None:
        return first

    def suggest(recent, depth):
        token, rate = first.suggest(recent, depth)
        other, other_rate = second.suggest(recent, depth)
        is_first = rate >= other_rate
        return jnp.where(is_first, token, other), jnp.maximum(rate, other_rate)

    return Hints(first.recent, suggest)


def _suggest_nothing(recent, depth):
    return recent[..., -1], jnp.full(recent.shape[:2], -jnp.inf)


def hinted_chain(tree: TreeConfig) -> Drafter:
    """A drafter with no opinion of its own: it makes chains of suggestions.

    Raises:
      ConfigError: The tree is not a chain.
    """
    if not tree.is_chain:
        raise ConfigError(
            f"suggestions alone draft chains, not a {tree.kind} tree; use --tree chain"
        )
    parents = topology.static_parents(tree)
    depths = topology.static_depths(parents)
    mask = topology.static_ancestor_mask(parents)

    def propose(draft, shared, cache, context, root, starts, keys, sampling, hints):
        tokens, rates = [root], [jnp.zeros(root.shape)]
        known = Hints(root[:, None], _suggest_nothing) if hints is None else hints
        recent = known.recent[:, None]
        for depth in range(tree.num_steps):
            token, rate = known.suggest(recent, depth)
            recent = extend_path(recent, token)
            tokens.append(token[:, 0])
            rates.append(rate[:, 0])
        spread = lambda x: jnp.broadcast_to(x, (root.shape[0], *x.shape))
        log_probs = jnp.stack(rates, axis=1)
        path = jnp.cumsum(log_probs, axis=1)
        # A node needs a suggestion, and a parent that is probable enough.
        shy = tree.min_path_probability
        lowest = float(np.log(shy)) if shy else -np.inf
        above = jnp.pad(path[:, 1:-1], ((0, 0), (2, 0)))
        return DraftTree(
            tokens=jnp.stack(tokens, axis=1),
            parents=spread(parents),
            depths=spread(depths),
            is_valid=(path > -jnp.inf) & (above >= lowest),
            log_probs=log_probs,
            ancestor_mask=spread(mask),
            max_depth=tree.num_steps,
            is_chain=True,
        ), cache

    return stateless(propose)


def suggested_chain(config: None, tree: TreeConfig, numerics: Numerics) -> Drafter:
    """`hinted_chain` as families build it: there is no architecture, nor arithmetic."""
    del config, numerics
    return hinted_chain(tree)


PREDICTION = Family(
    name="prediction",
    description=("no parameters: only what a request's user expects the answer to be"),
    build=suggested_chain,
    ngrams="never",
)
