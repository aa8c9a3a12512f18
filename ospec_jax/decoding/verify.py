# SPDX-License-Identifier: Apache-2.0
"""Exact verification of draft trees: pure, key-consuming, lossless for any draft.

Greedy verification keeps the path along which every token is the target's argmax.
Sampled verification walks down from the root and tries the children of each node in
order. A child x is accepted with probability min(1, p(x) / q(x)); after a rejection p
becomes the residual max(p - q, 0), renormalised, and q what the next child was drawn
from:

- `sampled` children are independent draws: q stays (SpecInfer, arXiv 2305.09781);
- `without_replacement`: x leaves q, which is renormalised (Yang et al., recursive
  rejection sampling; Sequoia, arXiv 2402.12374);
- `topk` children are no draws at all: q is one at the child and zero elsewhere, so a
  child is accepted with probability p(x) and then leaves p (EAGLE's rule).

When no child is accepted the next token is drawn from the last residual. A chain is a
tree with one child a node, and gives the usual rule (Leviathan et al., 2211.17192).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ospec_jax.types import DraftTree, Verdict
from ospec_jax.typing import typed


@typed
def verify_greedy(tree: DraftTree, best: Int[Array, "b n"]) -> Verdict:
    """Accepts the longest path that the target's argmax follows.

    Args:
      best: The target's argmax after each node.
    """
    expected = jnp.take_along_axis(best, jnp.maximum(tree.parents, 0), axis=1)
    is_match = tree.is_valid & ((tree.tokens == expected) | (tree.parents < 0))
    # Siblings differ, so the nodes all of whose ancestors match form one path.
    is_alive = jnp.all(~tree.ancestor_mask | is_match[:, None, :], axis=-1)
    last = jnp.argmax(jnp.where(is_alive, tree.depths, -1), axis=1)
    path = _path_to(tree, last)
    return Verdict(
        path=path,
        num_accepted=_take(tree.depths, last),
        next_token=_take(best, last),
    )


def _path_to(tree: DraftTree, last: Int[Array, " b"]) -> Int[Array, "b m"]:
    """Nodes from the root to `last`, which fills the rest."""
    on_path = jnp.take_along_axis(tree.ancestor_mask, last[:, None, None], axis=1)[:, 0]
    depths = jnp.arange(tree.max_depth + 1)
    is_step = on_path[:, None, :] & (tree.depths[:, None, :] == depths[:, None])
    return jnp.where(
        jnp.any(is_step, axis=-1), jnp.argmax(is_step, axis=-1), last[:, None]
    ).astype(jnp.int32)


def _take(values, index):
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0].astype(jnp.int32)


@typed
def verify_sampled(
    keys: Key[Array, " b"], tree: DraftTree, target_probs: Float[Array, "b n v"]
) -> Verdict:
    """Accepts a path so that the emitted tokens follow the target's law exactly.

    Args:
      keys: One for each row, consumed.
      target_probs: Processed by the same rules as the draft's.

    Raises:
      ValueError: Drawn children were dropped after a look at their values, for which
        no acceptance rule is exact.
    """
    if tree.is_reranked and tree.children != "topk":
        raise ValueError(
            f"a tree that was reranked after drawing {tree.children!r} children cannot "
            f"be verified exactly; use children='topk' or a static tree"
        )
    rank = _sibling_rank(tree)
    shared = {"token_ids": None}  # the draft vocabulary has no batch axis
    rows = tree.replace(**shared)
    row = lambda key, tree_row, rank_row, probs: _verify_row(
        key, tree_row.replace(token_ids=tree.token_ids), rank_row, probs
    )
    last, next_token = jax.vmap(row)(keys, rows, rank, target_probs)
    return Verdict(
        path=_path_to(tree, last),
        num_accepted=_take(tree.depths, last),
        next_token=next_token,
    )


def _sibling_rank(tree: DraftTree) -> Int[Array, "b n"]:
    """How many earlier siblings each node has."""
    same = tree.parents[:, :, None] == tree.parents[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return jnp.sum(same & earlier, axis=-1)


def _verify_row(key, tree: DraftTree, rank, target_probs):
    """Walks one row's tree; returns the last accepted node and the next token."""
    key_accept, key_next = jax.random.split(key)
    uniforms = jax.random.uniform(key_accept, (tree.max_depth, tree.max_children))
    draft_probs = lambda node: (
        None if tree.draft_probs is None else tree.draft_probs[node]
    )

    def descend(depth, carry):
        node, p, is_open = carry

        def try_child(j, attempt):
            accepted, p, q = attempt
            is_child = (tree.parents == node) & (rank == j) & tree.is_valid
            child = jnp.argmax(is_child)
            token = tree.tokens[child]
            is_tried = jnp.any(is_child) & (accepted < 0) & is_open
            q_token = _draft_prob(tree, q, token)
            # When q's support is used up, what comes next was not drawn from it.
            is_tried &= q_token > 0
            is_accepted = is_tried & (uniforms[depth, j] * q_token < p[token])
            is_rejected = is_tried & ~is_accepted
            p = jnp.where(is_rejected, _residual(tree, p, q, token), p)
            if tree.children == "without_replacement":
                without = jnp.where(_is_token(tree, q, token), 0.0, q)
                q = jnp.where(
                    is_rejected, without / jnp.maximum(jnp.sum(without), 1e-30), q
                )
            return jnp.where(is_accepted, child, accepted), p, q

        accepted, p, _ = jax.lax.fori_loop(
            0, tree.max_children, try_child, (jnp.int32(-1), p, draft_probs(node))
        )
        has_moved = accepted >= 0
        node = jnp.where(has_moved, accepted, node)
        return node, jnp.where(has_moved, target_probs[node], p), has_moved

    start = (jnp.int32(0), target_probs[0], jnp.bool_(True))
    node, p, _ = jax.lax.fori_loop(0, tree.max_depth, descend, start)
    return node, jax.random.categorical(key_next, jnp.log(p)).astype(jnp.int32)


def _draft_prob(tree: DraftTree, q, token):
    """Probability that the child was drawn; one for deterministic children."""
    if q is None:
        return jnp.float32(1.0)
    return jnp.sum(jnp.where(_is_token(tree, q, token), q, 0.0))


def _is_token(tree: DraftTree, q, token):
    ids = jnp.arange(q.shape[-1]) if tree.token_ids is None else tree.token_ids
    return ids == token


def _residual(tree: DraftTree, p, q, token):
    """max(p - q, 0), renormalised; p itself when rounding leaves nothing."""
    if q is None:
        rest = p.at[token].set(0.0)
    elif tree.token_ids is None:
        rest = jnp.maximum(p - q, 0.0)
    else:
        rest = jnp.maximum(p.at[tree.token_ids].add(-q), 0.0)
    total = jnp.sum(rest)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)
