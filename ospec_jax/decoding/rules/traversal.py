# SPDX-License-Identifier: Apache-2.0
"""Whole paths, from the leaves up: traversal and block verification.

Going depth first, a node x below u gets the rate min(1, r(u) p_u(x) / q_u(x)): how
probable the whole path to it may still be. A leaf is accepted with its path at its
rate. If it is not, it is removed, and its parent goes on with the residual

    p_u <- normalised max(r(u) p_u - q_u, 0),  r(u) <- S / (S + 1 - r(u)),

S being the residual's mass, until it is a leaf itself; the root's rate is one. A token
that the rule for single tokens would reject may so be saved by those below it
(traversal verification, arXiv 2505.12398; on a chain it is block verification,
arXiv 2403.10444, which no rule for a chain surpasses).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ospec_jax.decoding.rules.recursive import draft_prob, is_token, on_target
from ospec_jax.types import DraftTree


def traversal(uniforms, tree: DraftTree, rank, target_probs):
    """Visits one row's nodes depth first, children in order.

    Args:
      uniforms: `[n]`, by which each node is accepted.
      rank: `[n]` earlier siblings of each node.
      target_probs: `[n, v]`, after each node.

    Returns:
      The last accepted node, and weights `[v]` of the token after it.
    """
    num_nodes = tree.tokens.shape[0]

    def visit(walk: _Walk) -> _Walk:
        # Children are visited in the order in which they were drawn.
        is_child = (tree.parents == walk.node) & walk.is_left
        child = jnp.argmin(jnp.where(is_child, rank, num_nodes))
        return jax.lax.cond(
            jnp.any(is_child),
            lambda walk, child: _enter(tree, walk, child),
            lambda walk, _: _leave(tree, uniforms, walk),
            walk,
            child,
        )

    start = _Walk(
        node=jnp.int32(0),
        probs=target_probs,
        draft=tree.draft_probs,
        rates=jnp.ones((num_nodes,)),
        is_left=tree.is_valid.at[0].set(False),
        is_accepted=jnp.bool_(False),
    )
    end = jax.lax.while_loop(lambda walk: ~walk.is_accepted, visit, start)

    return end.node.astype(jnp.int32), end.probs[end.node]


class _Walk(NamedTuple):
    """Where a visit of a row's tree stands.

    Attributes:
      node: Where it is.
      probs: `[n, v]`, p of the formulas above; `draft` `[n, q]` is q, and `rates` `[n]`
        the rates. They change at a node whenever one of its children is removed.
      is_left: `[n]` nodes that are not visited yet.
      is_accepted: Whether `node` was: the walk ends.
    """

    node: Any
    probs: Any
    draft: Any
    rates: Any
    is_left: Any
    is_accepted: Any


def _enter(tree: DraftTree, walk: _Walk, child) -> _Walk:
    """Goes down; a child that nothing can have drawn is passed over."""
    node = walk.node
    token = tree.tokens[child]
    q = draft_prob(tree, walk.draft[node], token)
    ratio = walk.rates[node] * walk.probs[node, token] / jnp.where(q > 0, q, 1.0)
    rates = walk.rates.at[child].set(jnp.minimum(1.0, ratio))
    is_left = walk.is_left.at[child].set(False)

    return walk._replace(
        node=jnp.where(q > 0, child, node),
        rates=rates,
        is_left=is_left,
        is_accepted=jnp.bool_(False),
    )


def _leave(tree: DraftTree, uniforms, walk: _Walk) -> _Walk:
    """Accepts a leaf, or removes it and goes up."""
    node = walk.node
    above = jnp.maximum(tree.parents[node], 0)
    # The root is accepted for certain once all below it are removed.
    is_accepted = (uniforms[node] < walk.rates[node]) | (node == 0)
    q = walk.draft[above]
    rest, rate = _residual(tree, walk, above, q)

    if tree.children == "without_replacement":
        # The removed child was drawn from q; the next sibling was drawn from what is
        # left.
        others = jnp.where(is_token(tree, q, tree.tokens[node]), 0.0, q)
        q = others / jnp.maximum(jnp.sum(others), 1e-30)

    # Nothing changes for a node that was accepted: it ends the walk.
    put = lambda x, new: x.at[above].set(jnp.where(is_accepted, x[above], new))

    return walk._replace(
        node=jnp.where(is_accepted, node, above),
        probs=put(walk.probs, rest),
        draft=put(walk.draft, q),
        rates=put(walk.rates, rate),
        is_accepted=is_accepted,
    )


def _residual(tree: DraftTree, walk: _Walk, above, q) -> tuple[Any, Any]:
    """What a node goes on with without its last child: its p, and its rate.

    The child's own are not needed any more.
    """
    probs = walk.probs
    rates = walk.rates
    rest = jnp.maximum(
        rates[above] * probs[above] - on_target(tree, q, probs.shape[-1]), 0.0
    )
    mass = jnp.sum(rest)
    # Rounding may leave nothing where p equals q.
    rest = jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1.0), probs[above])
    total = mass + 1.0 - rates[above]
    rate = jnp.where(total > 0, mass / jnp.where(total > 0, total, 1.0), 0.0)

    return rest, rate
