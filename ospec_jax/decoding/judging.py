# SPDX-License-Identifier: Apache-2.0
"""How every drafter's tokens would have been accepted, where the target has spoken.

Verification has said what the target's law was at every emitted position. What a
drafter would have drafted there costs its own pass over the emitted tokens, which it
makes anyway to be up to date, and its output projection. So one pass of the target
judges all drafters, whoever drafted.

Each position is judged as the first of a draft: from what was verified before it. Where
a drafter goes on from its own states it is worse than that at greater depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.children import Children, consider, most_probable
from ospec_jax.models.layers import Numerics
from ospec_jax.sampling import processed_probs
from ospec_jax.types import Judged, Retraced, SamplingParams

JUDGE_EVERY = 8
"""Steps after which a pool's drafters are judged, unless somebody says otherwise."""


def check_judged(tree: TreeConfig) -> None:
    """Refuses trees for which nobody has said how a draft would be accepted.

    Raises:
      ConfigError: It is such a tree.
    """
    if tree.children not in ("topk", "sampled"):
        raise ConfigError(
            f"children are {tree.children!r}, whose chances depend on what was drawn "
            f"before them, so drafters cannot be judged by them; use 'topk' or "
            f"'sampled', or choose drafters by ucb, exp3, thompson or epsilon, which "
            f"look at what was accepted"
        )
    if tree.parents:
        raise ConfigError(
            "a tree of listed parents has nodes of one depth with different numbers of "
            "children, so drafters cannot be judged by it; use static:N,N,... or a "
            "chain"
        )


def widths_of(tree: TreeConfig) -> tuple[int, ...]:
    """Children of a node, by depth."""
    if tree.kind == "static":
        return tree.branching

    # A dynamic tree keeps the best of all nodes: not every one of these.
    return (tree.topk if tree.kind == "dynamic" else 1,) * tree.num_steps


def judge_all(
    found: Any,
    tree: TreeConfig,
    emitted: Int[Array, "b m"],
    probs: Float[Array, "b m v"] | None,
    sampling: SamplingParams,
    numerics: Numerics,
) -> Any:
    """`Judged` in the place of every `Retraced`; see `judge`."""
    return jax.tree.map(
        lambda one: judge(one, tree, emitted, probs, sampling, numerics),
        found,
        is_leaf=lambda node: isinstance(node, Retraced),
    )


def judge(
    one: Retraced,
    tree: TreeConfig,
    emitted: Int[Array, "b m"],
    probs: Float[Array, "b m v"] | None,
    sampling: SamplingParams,
    numerics: Numerics | None = None,
) -> Judged:
    """How one drafter's tokens would have been accepted at each emitted position.

    Args:
      tree: That would have been drafted.
      probs: What the tokens were drawn from; None for the most probable ones.
      numerics: What the children would have been chosen with.
    """
    numerics = numerics or Numerics()
    widths = widths_of(tree)
    # Draws of a greedy row are all the draft's most probable token.
    is_drawn = tree.children == "sampled" and one.logits is not None
    by_width = {}

    for width in sorted(set(widths)):
        if is_drawn and probs is not None:
            args = one, width, emitted, probs, sampling, numerics
            by_width[width] = _judge_draws(*args)
        else:
            by_width[width] = _judge_most_probable(one, width, emitted, probs, numerics)

    by_depth = [by_width[width] for width in widths]
    chances, couplings = zip(*by_depth, strict=True)

    return Judged(jnp.stack(chances, axis=-1), jnp.stack(couplings, axis=-1))


def _judge_most_probable(one: Retraced, width, emitted, probs, numerics):
    """Children that follow from what was known: one of them is emitted, or none."""
    tokens, is_valid = _children(one, width, numerics)
    is_same = jnp.any((tokens == emitted[..., None]) & is_valid, axis=-1)
    coupling = is_same.astype(jnp.float32)
    if probs is None:
        return coupling, coupling

    # All children are tried: one is accepted as often as the target draws one.
    mass = jnp.take_along_axis(probs, jnp.where(is_valid, tokens, 0), axis=-1)
    chance = jnp.sum(jnp.where(is_valid, mass, 0.0), axis=-1)

    return jnp.minimum(chance, 1.0).astype(jnp.float32), coupling


def _children(one: Retraced, width: int, numerics: Numerics):
    """Target ids `[b, m, width]` of the children, and which of them there are."""
    suggested = one.suggested
    if one.logits is None:
        # Suggestions alone make chains.
        assert suggested is not None, "a drafter has predictions, or suggestions"
        return suggested.tokens[..., None], suggested.log_rates[..., None] > -jnp.inf

    log_probs, tokens = most_probable(one.logits, width, numerics)
    if one.token_ids is not None:
        tokens = one.token_ids[tokens]
    children = Children(tokens, log_probs, None)
    if suggested is not None:
        told = suggested.tokens, suggested.log_rates, None
        hints = Hints(suggested.tokens, lambda recent, depth: told)
        children = consider(hints, None, 0, children)

    return children.tokens, children.log_probs > -jnp.inf


def _judge_draws(one: Retraced, count, emitted, probs, sampling, numerics):
    """Independent draws, which recursive rejection accepts.

    After a draw was rejected the target's law is `max(p - q, 0)`, renormalised,
    whichever token it was. So the chances of all draws are known beforehand.
    """
    b, m, v = probs.shape
    logits = one.logits
    assert logits is not None
    flat = jax.tree.map(lambda x: jnp.repeat(x, m), sampling)
    q = processed_probs(logits.reshape(b * m, -1), flat, numerics.is_row_invariant)
    q = q.reshape(b, m, -1)
    if one.token_ids is not None:
        q = jnp.zeros((b, m, v), q.dtype).at[..., one.token_ids].set(q)

    at_token = lambda x: jnp.take_along_axis(x, emitted[..., None], axis=-1)[..., 0]
    left = probs
    is_left = jnp.ones((b, m))  # the chance that no draw was accepted yet
    emitted_chance = jnp.zeros((b, m))

    for _ in range(count):
        both = jnp.minimum(left, q)
        emitted_chance += is_left * at_token(both)
        is_left *= jnp.maximum(1.0 - jnp.sum(both, axis=-1), 0.0)
        rest = jnp.maximum(left - q, 0.0)
        total = jnp.sum(rest, axis=-1, keepdims=True)
        left = rest / jnp.where(total > 0, total, 1.0)

    coupling = emitted_chance / jnp.maximum(at_token(probs), 1e-30)

    return 1.0 - is_left, jnp.clip(coupling, 0.0, 1.0)
