# SPDX-License-Identifier: Apache-2.0
"""How the children of a tree's nodes are drawn; `decoding.rules` accepts them.

Each way of drawing belongs to an acceptance rule that is exact for it alone, so a tree
says which one it was (`DraftTree.children`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ospec_jax.config import ChildrenKind
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.sources import DRAFT
from ospec_jax.kernels import native
from ospec_jax.models.layers import Numerics
from ospec_jax.sampling import (
    argmax,
    processed_probs,
    sample,
    sample_without_replacement,
)
from ospec_jax.types import SamplingParams

UNKNOWN = -1
"""In the place of a most probable token that nobody looked for."""


class Children(NamedTuple):
    """Drawn children of `w` nodes a row.

    Attributes:
      tokens: `[b, w, c]`.
      log_probs: `[b, w, c]` of each token, given its parent.
      probs: `[b, w, q]` distributions that they were drawn from; None for `topk`.
      choices: `[b, w]` the draft's most probable tokens, whatever was suggested; None
        unless they are asked for.
      sources: `[b, w, c]` who proposed each; None where nothing was suggested.
    """

    tokens: Int[Array, "b w c"]
    log_probs: Float[Array, "b w c"]
    probs: Float[Array, "b w q"] | None
    choices: Int[Array, "b w"] | None = None
    sources: Int[Array, "b w c"] | None = None


def draw(
    keys: Key[Array, " b"],
    depth: int | Int[Array, ""],
    logits: Float[Array, "b w q"],
    count: int,
    kind: ChildrenKind,
    sampling: SamplingParams,
    numerics: Numerics,
) -> Children:
    """Draws `count` children of each node, as ids of the draft's vocabulary.

    Args:
      keys: Of the rows at their positions.
      depth: Of the nodes.
    """
    b, w, q = logits.shape
    if kind == "topk":
        log_probs, ids = most_probable(logits, count, numerics)
        return Children(ids, log_probs, None)

    # The same processing as the target's: drawing from other distributions than those
    # that acceptance reads would not be exact.
    flat = jax.tree.map(lambda x: jnp.repeat(x, w), sampling)
    probs = processed_probs(logits.reshape(b * w, q), flat, numerics.is_row_invariant)

    # Numbers follow from the request, the position and the depth: every level draws
    # with its own. Each node and each of its children has a key, `[b, w, c]`.
    def keys_of(key):
        return jax.random.split(jax.random.fold_in(key, depth), (w, count))

    split = jax.vmap(keys_of)(keys)
    if kind == "topk_sampled":
        ids, probs = _draw_topk_sampled(
            split[:, :, :2].reshape(b * w, -1), probs, count
        )
    elif kind == "hub":
        ids, probs = _draw_hub(split[:, :, :2].reshape(b * w, -1), probs, count)
    elif kind == "without_replacement":
        ids = sample_without_replacement(split[:, :, 0].reshape(b * w), probs, count)
    else:
        repeated = jnp.repeat(probs, count, axis=0)
        ids = sample(split.reshape(b * w * count), repeated)

    ids = ids.reshape(b, w, count)
    probs = probs.reshape(b, w, q)

    return Children(ids, jnp.log(jnp.take_along_axis(probs, ids, axis=-1)), probs)


def most_probable(logits, count, numerics: Numerics):
    """Log-probabilities `[b, w, c]` of the `count` largest entries, and their ids."""
    if numerics.is_native:
        return native.most_probable(logits.astype(jnp.float32), count)

    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # The usual chain: `argmax` and a maximum are cheaper than `top_k`.
    if count == 1:
        best = argmax(logits)[..., None]
        return jnp.max(logits, axis=-1, keepdims=True) - total, best

    values, ids = jax.lax.top_k(logits, count)
    return values - total, ids.astype(jnp.int32)


def _draw_topk_sampled(keys, probs, count):
    """One draw from all but the `count - 1` most probable tokens, then these."""
    top = jax.lax.top_k(probs, count - 1)[1].astype(jnp.int32)
    is_top = jnp.any(top[..., None] == jnp.arange(probs.shape[-1]), axis=1)
    others = jnp.where(is_top, 0.0, probs)
    others = others / jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1e-30)
    # Where the top tokens hold all the mass nothing is left to draw from; what is drawn
    # then has probability 0, and the acceptance rule never tries it.
    drawn = sample(keys[:, 0], others)

    return jnp.concatenate([drawn[:, None], top], axis=1), others


def _draw_hub(keys, probs, count):
    """SpecHub's pairs: a draw and the most probable token, or the other way round."""
    assert count == 2, "TreeConfig lets pairs through only"
    top = jnp.argmax(probs, axis=-1).astype(jnp.int32)
    first = sample(keys[:, 0], probs)
    others = jnp.where(jnp.arange(probs.shape[-1]) == top[:, None], 0.0, probs)
    other = sample(keys[:, 1], others)

    return jnp.stack([first, jnp.where(first == top, other, top)], axis=1), probs


def consider(
    hints: Hints | None,
    recent: Int[Array, "b w m"] | None,
    depth: int | Int[Array, ""],
    children: Children,
) -> Children:
    """Puts likelier suggestions in the place of the least probable children.

    Args:
      recent: The last tokens of the nodes' paths, None without hints.
      depth: Of the nodes.
    """
    if hints is None:
        return children

    tokens = children.tokens
    log_probs = children.log_probs
    hint, rate, source = hints.suggest(recent, depth)
    hint = hint[..., None]
    rate = rate[..., None]

    # A suggestion that was drafted anyway makes that child likelier; another one takes
    # the last child's place if it is likelier. Where a token comes from does not matter
    # to the rule for `topk` children.
    is_drafted = tokens == hint
    is_taken = (rate > log_probs[..., -1:]) & ~jnp.any(is_drafted, -1, keepdims=True)
    is_last = jnp.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
    is_hint = is_taken & is_last
    tokens = jnp.where(is_hint, hint, tokens)
    log_probs = jnp.where(is_hint, rate, log_probs)
    log_probs = jnp.where(is_drafted, jnp.maximum(log_probs, rate), log_probs)
    # What the draft would have proposed by itself remains its own.
    sources = None
    if source is not None:
        sources = jnp.where(is_hint, source[..., None], DRAFT)

    return children._replace(tokens=tokens, log_probs=log_probs, sources=sources)


def extend_path(
    recent: Int[Array, "b w m"], tokens: Int[Array, "b w"]
) -> Int[Array, "b w m"]:
    """The last tokens of the children's paths."""
    return jnp.concatenate([recent[..., 1:], tokens[..., None]], axis=-1)
