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
    # A state is (node, p `[n, v]`, q `[n, q]`, rates `[n]`, nodes not yet visited
    # `[n]`, whether a node was accepted); p, q and rates are those of the formulas
    # above, and change at a node whenever one of its children is removed.
    num_nodes = tree.tokens.shape[0]

    def enter(state, child):
        """Goes down; a child that nothing can have drawn is passed over."""
        node, probs, draft, rate, is_left, _ = state
        token = tree.tokens[child]
        q = draft_prob(tree, draft[node], token)
        ratio = rate[node] * probs[node, token] / jnp.where(q > 0, q, 1.0)
        rate = rate.at[child].set(jnp.minimum(1.0, ratio))
        is_left = is_left.at[child].set(False)

        return (
            jnp.where(q > 0, child, node),
            probs,
            draft,
            rate,
            is_left,
            jnp.bool_(False),
        )

    def leave(state):
        """Accepts a leaf, or removes it and goes up."""
        node, probs, draft, rate, is_left, _ = state
        above = jnp.maximum(tree.parents[node], 0)
        # The root is accepted for certain once all below it are removed.
        is_accepted = (uniforms[node] < rate[node]) | (node == 0)
        q = draft[above]

        # The parent's residual. The node's own rate and p are not needed any more.
        rest = jnp.maximum(
            rate[above] * probs[above] - on_target(tree, q, probs.shape[-1]), 0.0
        )
        mass = jnp.sum(rest)
        # Rounding may leave nothing where p equals q.
        rest = jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1.0), probs[above])
        total = mass + 1.0 - rate[above]
        new_rate = jnp.where(total > 0, mass / jnp.where(total > 0, total, 1.0), 0.0)
        if tree.children == "without_replacement":
            # The removed child was drawn from q; the next sibling was drawn from what
            # is left.
            others = jnp.where(is_token(tree, q, tree.tokens[node]), 0.0, q)
            q = others / jnp.maximum(jnp.sum(others), 1e-30)

        # Nothing changes for a node that was accepted: it ends the walk.
        put = lambda x, new: x.at[above].set(jnp.where(is_accepted, x[above], new))

        return (
            jnp.where(is_accepted, node, above),
            put(probs, rest),
            put(draft, q),
            put(rate, new_rate),
            is_left,
            is_accepted,
        )

    def visit(state):
        node = state[0]
        is_left = state[4]

        # Children are visited in the order in which they were drawn.
        is_child = (tree.parents == node) & is_left
        child = jnp.argmin(jnp.where(is_child, rank, num_nodes))
        return jax.lax.cond(
            jnp.any(is_child), enter, lambda state, _: leave(state), state, child
        )

    start = (
        jnp.int32(0),
        target_probs,
        tree.draft_probs,
        jnp.ones((num_nodes,)),
        tree.is_valid.at[0].set(False),
        jnp.bool_(False),
    )
    node, probs, *_ = jax.lax.while_loop(lambda state: ~state[5], visit, start)

    return node.astype(jnp.int32), probs[node]
