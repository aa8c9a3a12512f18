# SPDX-License-Identifier: Apache-2.0
"""From what a user asks to what an engine is asked."""

import functools
from collections.abc import Iterable, Iterator

from ospec_jax.config import SamplingConfig
from ospec_jax.data.prompts import Prompt, encode, encode_prediction, parse_prompt
from ospec_jax.decoding.request import Request


def as_prompt(prompt: Prompt | str | dict, number: int) -> Prompt:
    """A prompt of any form; its number names one that has no id."""
    if isinstance(prompt, Prompt):
        return prompt

    row = {"prompt": prompt} if isinstance(prompt, str) else prompt
    return parse_prompt(row, f"prompt-{number}")


def tokenized(
    prompts: Iterable[Prompt],
    tokenizer,
    max_new_tokens: int,
    sampling: SamplingConfig,
    is_raw: bool = False,
    stop: tuple[str, ...] = (),
    has_predictions: bool = True,
) -> Iterator[tuple[Prompt, Request]]:
    """Prompts with their requests.

    Args:
      is_raw: Without the chat template.
      stop: Strings that end an answer.
      has_predictions: Verify what answers are expected to be, where prompts say that.
    """
    find_stop = functools.partial(_find_stop, tokenizer.decode, stop) if stop else None
    for prompt in prompts:
        predicted = encode_prediction(prompt, tokenizer) if has_predictions else ()
        yield (
            prompt,
            Request(
                id=prompt.id,
                prompt_ids=encode(prompt, tokenizer, is_raw),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                find_stop=find_stop,
                prediction_ids=predicted,
                prediction_confidence=prompt.prediction_confidence,
                seed=prompt.seed,
                choice=prompt.choice,
            ),
        )


def _find_stop(decode, stop: tuple[str, ...], token_ids: list[int]) -> int | None:
    """Tokens to keep when the answer's text holds a stop string."""
    if not any(s in decode(token_ids) for s in stop):
        return None

    keep = len(token_ids)

    while keep and any(s in decode(token_ids[:keep]) for s in stop):
        keep -= 1

    return keep
