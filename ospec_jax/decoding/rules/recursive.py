# SPDX-License-Identifier: Apache-2.0
"""Token by token: recursive rejection sampling down the tree.

The children of each node are tried in order. A child x is accepted with probability
min(1, p(x) / q(x)); after a rejection p becomes the residual max(p - q, 0),
renormalised, and q what the next child was drawn from:

- `sampled` children are independent draws: q stays (SpecInfer, arXiv 2305.09781);
- `without_replacement`: x leaves q, which is renormalised (Yang et al., recursive
  rejection sampling; Sequoia, arXiv 2402.12374);
- `topk_sampled`: the first child was drawn, the others are the most probable ones: no
  draws, so that such a child is accepted with probability p(x) and then leaves p.
  Trying the drawn one first accepts with probability p(top) + sum min(p, q) over the
  others, the most that any rule can (arXiv 2502.18779, greedy drafting).

When no child is accepted the next token is drawn from the last residual. A chain is a
tree with one child a node, and gives the usual rule (Leviathan et al., 2211.17192).
"""

import jax
import jax.numpy as jnp

from ospec_jax.types import DraftTree


def recursive(uniforms, tree: DraftTree, rank, target_probs):
    """Walks one row's tree from the root down.

    Args:
      uniforms: `[n]`, by which each node is accepted.
      rank: `[n]` earlier siblings of each node.
      target_probs: `[n, v]`, after each node.

    Returns:
      The last accepted node, and weights `[v]` of the token after it.
    """
    draft_probs = tree.draft_probs
    assert draft_probs is not None, "children were drawn"

    # One level: `p` is the target's law at `node`, or what rejections have left of it.
    # After a level without acceptance the walk is closed, and further turns change
    # nothing.
    def descend(_, carry):
        node, p, is_open = carry

        def try_child(j, attempt):
            accepted, p, q = attempt
            is_child = (tree.parents == node) & (rank == j) & tree.is_valid
            child = jnp.argmax(is_child)
            token = tree.tokens[child]
            is_tried = jnp.any(is_child) & (accepted < 0) & is_open
            is_drawn = jnp.bool_(tree.children != "topk_sampled") | (j == 0)
            q_token = jnp.where(is_drawn, draft_prob(tree, q, token), 1.0)
            # When q's support is used up, what comes next was not drawn from it.
            is_tried &= q_token > 0
            # u < p / q without the division.
            is_accepted = is_tried & (uniforms[child] * q_token < p[token])
            is_rejected = is_tried & ~is_accepted
            left = residual(tree, p, q, token)
            if tree.children == "topk_sampled":
                left = jnp.where(is_drawn, left, residual(tree, p, None, token))

            p = jnp.where(is_rejected, left, p)
            # The rejected child cannot be drawn again.
            if tree.children == "without_replacement":
                without = jnp.where(is_token(tree, q, token), 0.0, q)
                q = jnp.where(
                    is_rejected, without / jnp.maximum(jnp.sum(without), 1e-30), q
                )

            return jnp.where(is_accepted, child, accepted), p, q

        accepted, p, _ = jax.lax.fori_loop(
            0, tree.max_children, try_child, (jnp.int32(-1), p, draft_probs[node])
        )

        has_moved = accepted >= 0
        node = jnp.where(has_moved, accepted, node)

        # Below an accepted child the target's law is its own, without any residual.
        return node, jnp.where(has_moved, target_probs[node], p), has_moved

    start = (jnp.int32(0), target_probs[0], jnp.bool_(True))
    node, p, _ = jax.lax.fori_loop(0, tree.max_depth, descend, start)
    return node, p


def draft_prob(tree: DraftTree, q, token):
    """Probability that the child was drawn, from `[q]`."""
    return jnp.sum(jnp.where(is_token(tree, q, token), q, 0.0))


def is_token(tree: DraftTree, q, token):
    """Which entries of the draft vocabulary `[q]` are a target's token: one or none."""
    ids = jnp.arange(q.shape[-1]) if tree.token_ids is None else tree.token_ids
    return ids == token


def residual(tree: DraftTree, p, q, token):
    """max(p - q, 0), renormalised; p itself when rounding leaves nothing.

    Args:
      p: `[v]` of the target.
      q: `[q]` of the draft; None for all of it at `token`.
    """
    if q is None:
        rest = p.at[token].set(0.0)
    elif tree.token_ids is None:
        rest = jnp.maximum(p - q, 0.0)
    # The draft's vocabulary is a part of the target's: q is subtracted at its ids.
    else:
        rest = jnp.maximum(p.at[tree.token_ids].add(-q), 0.0)

    total = jnp.sum(rest)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


def on_target(tree: DraftTree, q, num_tokens: int):
    """The draft's distribution `[q]` over the target's vocabulary, `[v]`."""
    if tree.token_ids is None:
        return q

    return jnp.zeros(num_tokens).at[tree.token_ids].set(q)
