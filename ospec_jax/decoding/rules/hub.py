# SPDX-License-Identifier: Apache-2.0
"""SpecHub: two children that share the most probable token (arXiv 2411.05289).

Of the pair one is always the *hub* a, the draft's most probable token: the first is
drawn from q; if it is the hub, the second is drawn from the others, else it is the hub.
So few pairs occur, (i, a) with probability q(i) and (a, i) with q(a) q(i) / (1 - q(a)),
that nearly all the target's mass can be transported onto them in closed form.
"""

import jax
import jax.numpy as jnp

from ospec_jax.decoding.rules.recursive import on_target
from ospec_jax.types import DraftTree


def hub(uniforms, tree: DraftTree, rank, target_probs):
    """Walks one row's tree from the root down, pair by pair.

    Args:
      uniforms: `[n]`, by which each node is accepted.
      rank: `[n]` earlier siblings of each node.
      target_probs: `[n, v]`, after each node.

    Returns:
      The last accepted node, and weights `[v]` of the token after it.
    """
    assert tree.draft_probs is not None, "pairs are drawn"
    draft_probs = tree.draft_probs

    def descend(_, carry):
        node, p, is_open = carry
        is_child = lambda j: (tree.parents == node) & (rank == j) & tree.is_valid
        has_pair = jnp.any(is_child(0)) & is_open
        pair = jnp.stack([jnp.argmax(is_child(0)), jnp.argmax(is_child(1))])
        has_second = jnp.any(is_child(1))

        q = on_target(tree, draft_probs[node], p.shape[-1])
        accepted, rest = _transport(p, q, tree.tokens[pair], has_second, uniforms[pair])
        has_moved = has_pair & (accepted >= 0)
        child = pair[jnp.maximum(accepted, 0)]
        # If the pair is rejected, the next token is drawn from what it could not cover.
        stays = jnp.where(has_pair, rest, p)

        return (
            jnp.where(has_moved, child, node),
            jnp.where(has_moved, target_probs[child], stays),
            has_moved,
        )

    start = (jnp.int32(0), target_probs[0], jnp.bool_(True))
    node, p, _ = jax.lax.fori_loop(0, tree.max_depth, descend, start)

    return node.astype(jnp.int32), p


def _transport(p, q, pair, has_second, uniforms):
    """Which of the pair is accepted, -1 for none, and p of the next token then."""
    top = jnp.argmax(q)
    is_top = jnp.arange(q.shape[-1]) == top
    p_top = p[top]
    q_top = q[top]

    # `after_top` is the probability of the pair (a, i), `others` that of (i, a).
    others = jnp.where(is_top, 0.0, q)
    after_top = others * q_top / jnp.maximum(1.0 - q_top, 1e-30)
    # Tokens other than the hub: first from the pairs (i, a), then from (a, i).
    by_first = jnp.minimum(p, others)
    left = jnp.where(is_top, 0.0, p - by_first)
    by_second = jnp.minimum(left, after_top)
    # The hub: from what is left of the pairs (a, i), then of (i, a).
    rest_second = q_top - jnp.sum(by_second)
    rest_first = jnp.sum(others) - jnp.sum(by_first)
    top_second = jnp.minimum(p_top, rest_second)
    top_first = jnp.minimum(p_top - top_second, rest_first)

    # Given the pair that was drawn, each of its tokens is taken with the share of the
    # pair's mass that was transported onto it.
    is_hub_first = pair[0] == top
    other = jnp.where(is_hub_first, pair[1], pair[0])
    share = lambda part, whole: part / jnp.maximum(whole, 1e-30)
    rate_other = jnp.where(
        is_hub_first,
        share(by_second[other], after_top[other]) * has_second,
        share(by_first[other], others[other]),
    )
    rate_top = jnp.where(
        is_hub_first, share(top_second, rest_second), share(top_first, rest_first)
    )
    place_of_hub = jnp.where(is_hub_first, 0, 1)
    # At most one is taken. The hub is asked for second, and its rate is over what the
    # other token has left.
    is_other = uniforms[1 - place_of_hub] < rate_other
    is_hub = uniforms[place_of_hub] < rate_top
    is_hub &= ~is_other & (is_hub_first | has_second)
    accepted = jnp.where(is_other, 1 - place_of_hub, place_of_hub)
    # What the pairs did not cover of p is the law of the next token.
    rest = jnp.where(is_top, p_top - top_second - top_first, left - by_second)
    rest = jnp.maximum(rest, 0.0)
    total = jnp.sum(rest)
    # Rounding may leave nothing.
    rest = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)

    return jnp.where(is_other | is_hub, accepted, -1), rest
