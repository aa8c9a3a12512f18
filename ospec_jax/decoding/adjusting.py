# SPDX-License-Identifier: Apache-2.0
"""Logits as a request wants them: bias and penalties, exact along every path of a tree.

The order is vLLM's: bias, repetition penalty, frequency penalty, presence penalty; then
what `sampling.processed_probs` does. Which tokens an answer has differs from node to
node: at each it has those emitted so far and those on the path from the root to it. So
every node's logits are what plain decoding would find there, and verification is exact.
Drafts are not adjusted: whatever they propose, what is emitted follows the target.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import SamplingConfig
from ospec_jax.types import DraftTree, Extras
from ospec_jax.typing import typed


def as_extras(
    sampling: SamplingConfig,
    prompt_ids: Sequence[int],
    can_speculate: bool,
    vocab_size: int,
) -> Extras:
    """One request's, `[1, ...]`, before anything was answered; in the host's memory."""
    bias: Any = np.zeros((1, vocab_size), np.float32)
    for token, value in sampling.logit_bias:
        bias[0, token] = value

    is_in_prompt: Any = np.zeros((1, vocab_size), bool)
    is_in_prompt[0, list(prompt_ids)] = True
    counts: Any = np.zeros((1, vocab_size), np.int32)
    can_draft: Any = np.full(1, can_speculate)
    one: Any = lambda value: np.full(1, value, np.float32)

    return Extras(
        min_p=one(sampling.min_p),
        presence_penalty=one(sampling.presence_penalty),
        frequency_penalty=one(sampling.frequency_penalty),
        repetition_penalty=one(sampling.repetition_penalty),
        bias=bias,
        is_in_prompt=is_in_prompt,
        counts=counts,
        can_speculate=can_draft,
    )


def neutral_extras(batch_size: int, vocab_size: int) -> Extras:
    """Of rows that ask for nothing."""
    one = as_extras(SamplingConfig(), (), True, vocab_size)
    return jax.tree.map(lambda x: jnp.repeat(x, batch_size, axis=0), one)


@typed
def adjust(
    logits: Float[Array, "b n v"], extras: Extras, counts: Int[Array, "b n v"]
) -> Float[Array, "b n v"]:
    """Bias and penalties; the logits of a row that asks for none keep their bits.

    Args:
      counts: How often the answer has each token, before each place.
    """
    of_row = lambda value: value[:, None, None]
    logits = _rounded(logits, counts) + extras.bias[:, None]
    has_any = counts > 0

    # By a product with the reciprocal, as in vLLM: of a division by a row's number XLA
    # makes one in some programs and not in others.
    penalty = extras.repetition_penalty
    factor = jnp.where(logits > 0, of_row(1.0 / penalty), of_row(penalty))
    repeated = logits * factor
    is_seen = has_any | extras.is_in_prompt[:, None]
    logits = jnp.where(is_seen, _rounded(repeated, counts), logits)

    frequency = of_row(extras.frequency_penalty) * counts.astype(jnp.float32)
    logits = logits - _rounded(frequency, counts)

    return logits - jnp.where(has_any, of_row(extras.presence_penalty), 0.0)


def _rounded(
    values: Float[Array, "b n v"], counts: Int[Array, "b n v"]
) -> Float[Array, "b n v"]:
    """The values, as float32 has them, before anything else is done with them.

    A compiler may do a product and the sum behind it in one, with one rounding instead
    of two, and in one program and not in another; XLA does, through barriers and
    selections, too. Then the last bit would depend on the shape of the pass. It does
    not look through an operation on the bits, with a zero that it cannot know to be
    one: counts are never negative.
    """
    zero = jnp.minimum(counts, 0)
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jax.lax.bitcast_convert_type(bits ^ zero, jnp.float32)


@typed
def count_on_paths(extras: Extras, tree: DraftTree) -> Int[Array, "b n v"]:
    """How often the answer has each token at each node of a tree."""
    # The root is emitted already, and counted.
    drafted = tree.tokens[:, 1:]
    is_on_path = tree.ancestor_mask[:, :, 1:]
    return _added(extras.counts, drafted, is_on_path)


@typed
def count_between(
    extras: Extras, tokens: Int[Array, "b w"], num_valid: Int[Array, " b"]
) -> Int[Array, "b w v"]:
    """How often the answer had each token before each of its newest ones.

    Args:
      tokens: The newest, which `extras` has counted, up to `num_valid`.
    """
    place = jnp.arange(tokens.shape[1])
    is_valid = place < num_valid[:, None]
    # Whatever has come since does not count: the token of the place itself, too.
    is_later = (place[:, None] <= place) & is_valid[:, None, :]
    return _added(extras.counts, tokens, is_later, -1)


@typed
def count_emitted(
    extras: Extras, tokens: Int[Array, "b m"], num_emitted: Int[Array, " b"]
) -> Extras:
    """Counts new tokens of the answers.

    Args:
      tokens: Valid up to `num_emitted`.
    """
    is_emitted = jnp.arange(tokens.shape[1]) < num_emitted[:, None]
    counts = _added(extras.counts, tokens, is_emitted[:, None])[:, 0]
    return extras.replace(counts=counts)


def _added(
    counts: Int[Array, "b v"],
    tokens: Int[Array, "b t"],
    is_added: Bool[Array, "b n t"],
    sign: int = 1,
) -> Int[Array, "b n v"]:
    """Counts with some of the tokens added, or taken off."""

    def row(counts, tokens, is_added):
        each = jnp.broadcast_to(counts, (is_added.shape[0], counts.shape[0]))
        return each.at[:, tokens].add(sign * is_added.astype(counts.dtype))

    return jax.vmap(row)(counts, tokens, is_added)
