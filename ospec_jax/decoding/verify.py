# SPDX-License-Identifier: Apache-2.0
"""Exact verification of draft trees: pure, lossless for any draft.

Of children that follow from the past alone those are kept that the target itself would
have chosen: its most probable tokens, or those that it draws. Drawn children are
accepted by a rule of `decoding.rules`: token by token (`recursive`), by whole paths
(`traversal`, on a chain block verification), or two children at a time (`hub`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ospec_jax.config import Verification
from ospec_jax.decoding.rules.hub import hub
from ospec_jax.decoding.rules.recursive import recursive
from ospec_jax.decoding.rules.traversal import traversal
from ospec_jax.sampling import draw
from ospec_jax.types import DraftTree, Verdict
from ospec_jax.typing import typed


@typed
def verify_chosen(tree: DraftTree, chosen: Int[Array, "b n"]) -> Verdict:
    """Accepts the longest path of tokens that the target itself chooses.

    Whatever is drafted, the emitted tokens are the target's choices, so this is exact
    for any tree. One of several children is accepted as often as the target chooses
    one of them: as often as any rule may accept children that are no draws, and no
    more often than `verify_drawn` accepts those that are.

    Args:
      chosen: The target's token after each node: the most probable one, or one that is
        drawn with numbers that do not depend on the tree.
    """
    # Each node is held against the choice after its parent; the root has been emitted
    # already and matches by definition.
    expected = jnp.take_along_axis(chosen, jnp.maximum(tree.parents, 0), axis=1)
    is_match = tree.is_valid & ((tree.tokens == expected) | (tree.parents < 0))
    # Drawn siblings may be copies of one token. Then several paths match, and any of
    # the longest will do: they have the same tokens.
    is_alive = jnp.all(~tree.ancestor_mask | is_match[:, None, :], axis=-1)
    last = jnp.argmax(jnp.where(is_alive, tree.depths, -1), axis=1)
    path = _path_to(tree, last)

    return Verdict(
        path=path,
        num_accepted=_take(tree.depths, last),
        next_token=_take(chosen, last),
    )


def _path_to(tree: DraftTree, last: Int[Array, " b"]) -> Int[Array, "b m"]:
    """Nodes from the root to `last`, which fills the rest."""
    # A node's row of the ancestor mask is its path; `[b, m, n]` says which of its nodes
    # is the one at each depth.
    on_path = jnp.take_along_axis(tree.ancestor_mask, last[:, None, None], axis=1)[:, 0]
    depths = jnp.arange(tree.max_depth + 1)
    is_step = on_path[:, None, :] & (tree.depths[:, None, :] == depths[:, None])
    return jnp.where(
        jnp.any(is_step, axis=-1), jnp.argmax(is_step, axis=-1), last[:, None]
    ).astype(jnp.int32)


def _take(values, index):
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0].astype(jnp.int32)


@typed
def verify_drawn(
    keys: Key[Array, " b"],
    tree: DraftTree,
    target_probs: Float[Array, "b n v"],
    verification: Verification = "token",
) -> Verdict:
    """Accepts drawn tokens so that what is emitted follows the target's law exactly.

    Args:
      keys: One for each row, consumed.
      target_probs: Processed by the same rules as the draft's.
      verification: `token` walks down, `block` and `traversal` weigh whole paths.

    Raises:
      ValueError: Children were dropped after a look at their values, for which no
        acceptance rule is exact, this rule is not exact for these children, or they
        were not drawn at all.
    """
    if tree.children == "topk":
        raise ValueError(
            "children='topk' are no draws; draw the target's tokens and use "
            "verify_chosen"
        )
    if tree.is_reranked:
        raise ValueError(
            f"a tree that was reranked after drawing {tree.children!r} children cannot "
            f"be verified exactly; use children='topk' or a static tree"
        )

    rule = recursive
    if verification != "token":
        if tree.children not in ("sampled", "without_replacement"):
            raise ValueError(
                f"{verification} verification is exact for drawn children only, not "
                f"for {tree.children!r}"
            )
        rule = traversal
    elif tree.children == "hub":
        rule = hub

    rank = _sibling_rank(tree)
    # The draft vocabulary and the depth have no batch axis.
    rows = tree.replace(token_ids=None, drafted_depth=None)

    def row(key, tree_row, rank_row, probs):
        # What accepts and what draws the next token must be independent.
        key_accept, key_next = jax.random.split(key)
        # One number a node, whether it is looked at or not: what accepts a node does
        # not depend on the order in which a rule visits them.
        uniforms = jax.random.uniform(key_accept, rank_row.shape)
        tree_row = tree_row.replace(token_ids=tree.token_ids)
        last, rest = rule(uniforms, tree_row, rank_row, probs)
        return last, draw(key_next, rest)

    last, next_token = jax.vmap(row)(keys, rows, rank, target_probs)

    return Verdict(
        path=_path_to(tree, last),
        num_accepted=_take(tree.depths, last),
        next_token=next_token,
    )


def _sibling_rank(tree: DraftTree) -> Int[Array, "b n"]:
    """How many earlier siblings each node has."""
    # Nodes stand in the order in which their siblings were drawn.
    same = tree.parents[:, :, None] == tree.parents[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return jnp.sum(same & earlier, axis=-1)
