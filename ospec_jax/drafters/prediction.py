# SPDX-License-Identifier: Apache-2.0
"""Predicted output: the user says beforehand what the answer will mostly be.

An edited file, a transcript, a draft that arrives whole from another model: the target
verifies it stretch by stretch. After a mismatch the answer is taken to have replaced a
token, until its last tokens are found again in the prediction: the longest match of at
least `MIN_MATCH`, of equal ones the nearest behind the place where it came off.

How far the prediction is believed follows Laplace's rule of succession: after `run`
tokens in a row came true, and `num_skipped` did not, the next one does with probability
`(run + 2 c) / (run + num_skipped + 2)`, for an initial confidence c of one half by
default. It is lent to a drafter as any other suggestion.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.sources import PREDICTION
from ospec_jax.types import Prediction, Suggested
from ospec_jax.typing import typed

MIN_MATCH = 2
"""Tokens that must occur again for the prediction to be taken up there."""
LONG_RUN = 4
"""Tokens in a row after which longer stretches are verified.

By the rule of succession, four in a row promise 6.8 tokens of thirteen verified at once
and 3.2 of four, at 1.3 times the cost.
"""
MAX_MATCH = 8
"""Tokens of which no more are compared, to tell longer matches from shorter ones."""
_MAX_RUN = 1 << 20
_NO_TOKEN = -1


def init_prediction(batch_size: int, capacity: int) -> Prediction:
    """No prediction for any row.

    Args:
      capacity: Tokens that a prediction can hold.
    """
    ints = lambda: jnp.zeros((batch_size,), jnp.int32)  # state is donated: no sharing
    return Prediction(
        tokens=jnp.zeros((batch_size, capacity), jnp.int32),
        num_tokens=ints(),
        confidence=jnp.full((batch_size,), 0.5),
        place=ints(),
        num_skipped=ints(),
        run=ints(),
        recent=jnp.full((batch_size, MAX_MATCH), _NO_TOKEN, jnp.int32),
    )


@typed
def nearest_match(
    tokens: Int[Array, "b s"],
    num_tokens: Int[Array, " b"],
    recent: Int[Array, "b r"],
    place: Int[Array, " b"],
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Where the longest suffix of `recent` occurs in `tokens`.

    Args:
      place: Of equally long matches the nearest one at or behind it wins, then the
        nearest before it.

    Returns:
      The index behind the match, and its length.
    """
    num_slots = tokens.shape[1]
    num_recent = recent.shape[1]
    # `length[b, i]` counts how many tokens right before place i equal the last ones of
    # the answer; a mismatch ends the count for good.
    index = jnp.arange(num_slots)
    is_same = index < num_tokens[:, None]
    length = jnp.zeros(tokens.shape, jnp.int32)

    for back in range(num_recent):
        before = jnp.roll(tokens, back + 1, axis=1)
        wanted = recent[:, num_recent - 1 - back, None]
        # `roll` wraps around at the beginning; places there have no token so far back.
        is_same = is_same & (before == wanted) & (index > back)
        length = length + is_same

    # Places behind `place` are all nearer than those before it: an edit mostly goes on,
    # and returns to something earlier only when it repeats itself.
    ahead = index - place[:, None]
    distance = jnp.where(ahead >= 0, ahead, num_slots - ahead)
    longest = jnp.max(length, axis=1)
    is_longest = length == longest[:, None]
    found = jnp.argmin(jnp.where(is_longest, distance, 3 * num_slots), axis=1)

    return found.astype(jnp.int32), longest


@typed
def follow(
    prediction: Prediction, tokens: Int[Array, "b m"], num_new: Int[Array, " b"]
) -> Prediction:
    """Compares the prediction with newly emitted tokens.

    Args:
      tokens: Of the answer, in order; junk from `num_new` on.
    """
    count = jnp.arange(tokens.shape[1])
    expected = prediction.place + prediction.num_skipped
    is_true = _tokens_at(prediction, expected[:, None] + count) == tokens
    is_true &= count < num_new[:, None]
    # Only the first tokens in a row count: behind a mismatch an equal token is chance.
    num_true = jnp.sum(jnp.cumprod(is_true, axis=1), axis=1).astype(jnp.int32)
    # The window of the last tokens moves on by as many as are new.
    joined = jnp.concatenate([prediction.recent, tokens], axis=1)
    width = prediction.recent.shape[1]
    recent = jnp.take_along_axis(joined, num_new[:, None] + jnp.arange(width), axis=1)

    # Where the stretch that was true ends. Without a single true token it is where it
    # was.
    came_off = jnp.where(num_true > 0, expected + num_true, prediction.place)
    found, length = nearest_match(
        prediction.tokens, prediction.num_tokens, recent, came_off
    )

    # Held: all new tokens are as predicted. Found: their end occurs elsewhere. Neither:
    # the place stays, and the skipped tokens add up.
    is_held = num_true == num_new
    is_found = length >= MIN_MATCH
    is_on = is_held | is_found
    held = jnp.minimum(prediction.run + num_new, _MAX_RUN)
    behind = jnp.where(is_found, found, came_off)
    moved = prediction.replace(
        place=jnp.where(is_held, expected + num_new, behind),
        num_skipped=jnp.where(is_on, 0, expected + num_new - came_off),
        run=jnp.where(is_held, held, jnp.where(is_found, length, 0)),
        recent=recent,
    )
    # Rows that had finished emit nothing, and must not move.
    is_moving = num_new > 0
    keep = lambda new, old: jnp.where(
        is_moving.reshape(-1, *[1] * (new.ndim - 1)), new, old
    )

    return jax.tree.map(keep, moved, prediction)


def _tokens_at(prediction: Prediction, index):
    """The predicted tokens at some places, -1 outside."""
    last = prediction.tokens.shape[1] - 1
    found = jnp.take_along_axis(prediction.tokens, jnp.clip(index, 0, last), axis=1)
    is_known = (index >= 0) & (index < prediction.num_tokens[:, None])
    return jnp.where(is_known, found, _NO_TOKEN)


@typed
def suggest(
    prediction: Prediction, recent: Int[Array, "b w r"], depth
) -> tuple[Int[Array, "b w"], Float[Array, "b w"]]:
    """The next predicted token on each path that followed the prediction so far.

    Args:
      recent: The last tokens of each path.
      depth: How many of them were drafted.
    """
    num_recent = recent.shape[-1]
    # The token behind those that were emitted and drafted since the place.
    index = (prediction.place + prediction.num_skipped + depth)[:, None]
    is_followed = jnp.ones(recent.shape[:2], bool)

    # A path has followed the prediction if all its drafted tokens did; tokens before
    # them were emitted, and `follow` has judged them already.
    for back in range(num_recent):
        drafted = recent[..., num_recent - 1 - back]
        is_same = drafted == _tokens_at(prediction, index - 1 - back)
        is_followed &= is_same | (back >= depth)

    token = _tokens_at(prediction, index)

    # Drafted tokens count as come true, since the suggestion matters only if they are
    # accepted.
    run = prediction.run + depth
    rate = (run + 2 * prediction.confidence) / (run + prediction.num_skipped + 2)
    is_suggested = is_followed & (token >= 0)
    log_rate = jnp.where(is_suggested, jnp.log(rate)[:, None], -jnp.inf)

    return jnp.broadcast_to(token, log_rate.shape), log_rate


@typed
def suggested_along(
    prediction: Prediction, tokens: Int[Array, "b t"]
) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """What would have been suggested in the place of each emitted token.

    As while drafting, the tokens before it having been drafted as they were emitted.
    """
    num_recent = prediction.recent.shape[1]
    known = jnp.concatenate([prediction.recent, tokens], axis=1)
    found = [
        suggest(prediction, known[:, None, depth : depth + num_recent], depth)
        for depth in range(tokens.shape[1])
    ]
    suggestions, rates = zip(*found, strict=True)

    return jnp.concatenate(suggestions, axis=1), jnp.concatenate(rates, axis=1)


def prediction_suggested(
    prediction: Prediction | None, tokens: Int[Array, "b t"]
) -> Suggested | None:
    """The prediction as suggestions in the place of emitted tokens."""
    if prediction is None:
        return None

    return Suggested(*suggested_along(prediction, tokens))


def prediction_hints(prediction: Prediction | None) -> Hints | None:
    """The prediction as suggestions for a drafter."""
    if prediction is None:
        return None

    def suggest_after(recent, depth):
        token, rate = suggest(prediction, recent, depth)
        return token, rate, jnp.full_like(token, PREDICTION)

    return Hints(prediction.recent, suggest_after)


def as_prediction(
    token_ids: Sequence[int], capacity: int, confidence: float
) -> Prediction:
    """One row's prediction, cut at `capacity`."""
    tokens = np.zeros((1, capacity), np.int32)
    kept = token_ids[:capacity]
    tokens[0, : len(kept)] = kept
    return init_prediction(1, capacity).replace(
        tokens=jnp.asarray(tokens),
        num_tokens=jnp.full((1,), len(kept), jnp.int32),
        confidence=jnp.full((1,), confidence, jnp.float32),
    )
