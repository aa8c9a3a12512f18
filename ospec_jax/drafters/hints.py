# SPDX-License-Identifier: Apache-2.0
"""Suggestions of several sources, and drafting with nothing but suggestions."""

from typing import Any

import jax.numpy as jnp

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, Family, Hints, stateless
from ospec_jax.drafters.children import extend_path
from ospec_jax.drafters.sources import TARGET
from ospec_jax.drafters.stopping import Progress, StopFn, is_stopped, rules_of
from ospec_jax.models.layers import Numerics
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Pairs,
    Retraced,
    Roots,
    SharedTables,
    Suggested,
)


def either(first: Hints, second: Hints | None) -> Hints:
    """Suggests what the more confident of two sources suggests.

    Both must be able to read the `recent` tokens of `first`, and say who suggests.
    """
    if second is None:
        return first

    def suggest(recent, depth):
        token, rate, source = first.suggest(recent, depth)
        other, other_rate, other_source = second.suggest(recent, depth)
        is_first = rate >= other_rate
        return (
            jnp.where(is_first, token, other),
            jnp.maximum(rate, other_rate),
            jnp.where(is_first, source, other_source),
        )

    return Hints(first.recent, suggest)


def likelier(first: Suggested, second: Suggested | None) -> Suggested:
    """Likewise, of what was suggested in the place of verified tokens."""
    if second is None:
        return first

    is_first = first.log_rates >= second.log_rates
    return Suggested(
        tokens=jnp.where(is_first, first.tokens, second.tokens),
        log_rates=jnp.maximum(first.log_rates, second.log_rates),
    )


def _suggest_nothing(recent, depth):
    token = recent[..., -1]
    return token, jnp.full(token.shape, -jnp.inf), None


def hinted_chain(tree: TreeConfig, stop_fn: StopFn | None = None) -> Drafter:
    """A drafter with no opinion of its own: it makes chains of suggestions.

    Args:
      stop_fn: When a chain grows no longer; see `drafters.stopping`.

    Raises:
      ConfigError: The tree is not a chain.
    """
    if not tree.is_chain:
        raise ConfigError(
            f"suggestions alone draft chains, not a {tree.kind} tree; use --tree chain"
        )

    rules = rules_of(tree, stop_fn)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, Any]:
        known = hints
        if known is None:
            known = Hints(roots.token[:, None], _suggest_nothing)

        return _chain_of(known, tree, rules, roots), cache

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[Any, DraftContext, Retraced]:
        if suggested is None:
            nothing = jnp.full(pairs.tokens.shape, -jnp.inf)
            suggested = Suggested(pairs.tokens, nothing)

        return cache, context, Retraced(suggested, None, None)

    return stateless(propose, retrace=retrace)


def _chain_of(
    known: Hints, tree: TreeConfig, rules: tuple[StopFn, ...], roots: Roots
) -> DraftTree:
    """The chain of what is suggested behind each root, until a rule ends it."""
    root = roots.token
    recent = known.recent[:, None]
    tokens = [root]
    rates = [jnp.zeros(root.shape)]
    sources = [jnp.full((*root.shape, 1), TARGET)]
    is_valid = [jnp.ones(root.shape, bool)]
    path = jnp.zeros(root.shape)
    stopped = jnp.zeros(root.shape, bool)

    for depth in range(tree.num_steps):
        token, rate, source = known.suggest(recent, depth)
        recent = extend_path(recent, token)
        # A path without a suggestion has probability 0 from there on, and is no longer
        # valid.
        path = path + rate[:, 0]
        tokens.append(token[:, 0])
        rates.append(rate[:, 0])
        if source is not None:
            sources.append(source)
        is_valid.append((path > -jnp.inf) & ~stopped)
        # The token that stopped the chain is kept: a rule decides about the next one.
        if rules:
            progress = Progress(
                depth + 1,
                path[:, None],
                is_active=roots.is_active,
                steering=roots.steering,
            )
            stopped |= is_stopped(rules, progress)

    parents = topology.static_parents(tree)
    spread = lambda x: jnp.broadcast_to(x, (root.shape[0], *x.shape))

    return DraftTree(
        tokens=jnp.stack(tokens, axis=1),
        parents=spread(parents),
        depths=spread(topology.static_depths(parents)),
        is_valid=jnp.stack(is_valid, axis=1),
        log_probs=jnp.stack(rates, axis=1),
        ancestor_mask=spread(topology.static_ancestor_mask(parents)),
        sources=jnp.concatenate(sources, axis=1) if sources[1:] else None,
        max_depth=tree.num_steps,
        is_chain=True,
    )


def suggested_chain(
    config: None, tree: TreeConfig, numerics: Numerics, stop_fn: StopFn | None = None
) -> Drafter:
    """`hinted_chain` as families build it: there is no architecture, nor arithmetic."""
    del config, numerics
    return hinted_chain(tree, stop_fn)


PREDICTION = Family(
    name="prediction",
    description=("no parameters: only what a request's user expects the answer to be"),
    build=suggested_chain,
    ngrams="never",
)
