# SPDX-License-Identifier: Apache-2.0
"""Samples for output projections, from what drafting left behind of an answer.

An answer is looked at in parts of one shape, so that one program serves all lengths.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from ospec_jax.config import SamplingConfig
from ospec_jax.decoding.request import Completion
from ospec_jax.learners.projection import HeadSamples, HeadSampling

HEAD = "lm_head"
"""The output projection, among a draft's parameters."""
CHUNK = 64
"""Positions of an answer that a part has."""


def samples_of(
    head_inputs: Callable,
    vocab_size: int,
    params,
    token_ids,
    feedback,
    tokens,
    start,
    end,
) -> HeadSamples:
    """`CHUNK` positions of an answer from `start` on; without logits.

    Args:
      head_inputs: The drafter's.
      vocab_size: The target's.
      params: Of the draft.
      token_ids: `[q]` its vocabulary, None for the target's.
      feedback: Of one row, `[1, s, ...]`, with the draft's states.
      tokens: `[s + 1]` of prompt and answer, -1 behind them.
      end: Where the answer's samples end.
    """
    positions = start + jnp.arange(CHUNK)
    take = lambda x: jnp.take(x, positions, axis=0, mode="clip")
    # What the state at position i predicts is the token at i + 1.
    labels = take(tokens[1:])
    choices = None
    if feedback.choices is not None:
        choices = take(feedback.choices[0])
    if token_ids is not None:
        # Target ids to entries of the draft vocabulary, -1 for tokens outside.
        entry_of = jnp.full((vocab_size,), -1, jnp.int32)
        entry_of = entry_of.at[token_ids].set(jnp.arange(token_ids.shape[0]))
        labels = entry_of[labels]
        if choices is not None:
            choices = jnp.where(choices < 0, -1, entry_of[choices])

    inputs = head_inputs(params, take(feedback.states[0]).astype(jnp.float32))
    is_real = take(feedback.has_state[0]) & (positions < end)

    return HeadSamples(inputs, jnp.zeros((CHUNK, 0)), labels, is_real, choices=choices)


def parts_of(
    params, token_ids, completion: Completion, is_greedy_only: bool = False
) -> Iterator[tuple]:
    """Arguments of `samples_of`, from `params` on, for each part of an answer.

    Args:
      is_greedy_only: A sampled answer has no samples.
    """
    # One place more than the cache has slots: labels are read one behind the states.
    ids = [*completion.request.prompt_ids, *completion.token_ids]
    tokens = np.full(completion.capacity + 1, -1, np.int32)
    tokens[: len(ids)] = ids
    first, last = span_of(completion, is_greedy_only)

    for start in range(first, last, CHUNK):
        yield (
            params,
            token_ids,
            completion.feedback,
            tokens,
            np.int32(start),
            np.int32(last),
        )


def span_of(completion: Completion, is_greedy_only: bool = False) -> tuple[int, int]:
    """Where an answer's samples begin and end.

    Its first token came from prefill, and was never drafted. An answer whose logits
    were adjusted has no samples: its tokens follow another law than the target's own,
    which is the one to learn.

    Args:
      is_greedy_only: A sampled answer has no samples, either.
    """
    sampling = completion.request.sampling
    is_left_out = is_greedy_only and not _is_greedy(sampling)
    if sampling.is_adjusted or is_left_out:
        return completion.num_recorded, completion.num_recorded

    return len(completion.request.prompt_ids), completion.num_recorded


def num_chunks_of(completion: Completion, is_greedy_only: bool = False) -> int:
    """Parts that an answer has."""
    return len(range(*span_of(completion, is_greedy_only), CHUNK))


def as_drawn(sampling: SamplingConfig) -> HeadSampling | None:
    """How an answer's tokens were drawn, as `HeadSamples` says it.

    An executable each for greedy answers and those of the unchanged law, for those of
    another temperature, and for those of which top-k or top-p cut something off.
    """
    is_cut = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    if _is_greedy(sampling) or (sampling.temperature == 1 and not is_cut):
        return None

    drawn = HeadSampling(jnp.float32(sampling.temperature))
    if not is_cut:
        return drawn

    return drawn.replace(
        top_k=jnp.int32(sampling.top_k),
        top_p=jnp.float32(sampling.top_p),
        min_p=jnp.float32(sampling.min_p) if sampling.min_p else None,
    )


def _is_greedy(sampling: SamplingConfig) -> bool:
    """Whether tokens are the most probable ones, not draws."""
    return sampling.temperature == 0 or sampling.top_k == 1
