# SPDX-License-Identifier: Apache-2.0
"""From what a user asks to what an engine is asked."""

import functools
from collections.abc import Callable, Iterable, Iterator

from ospec_jax.config import SamplingConfig
from ospec_jax.data.prompts import Prompt, encode_prediction, parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.request import Request, StopPoint
from ospec_jax.models.tokenizer import first_stop


def as_prompt(prompt: Prompt | str | dict, number: int) -> Prompt:
    """A prompt of any form; its number names one that has no id."""
    if isinstance(prompt, Prompt):
        return prompt

    row = {"prompt": prompt} if isinstance(prompt, str) else prompt
    return parse_prompt(row, f"prompt-{number}")


def is_default_name(name: str) -> bool:
    """Whether a prompt may have been named by its number."""
    return name.removeprefix("prompt-").isdecimal()


def tokenized(
    prompts: Iterable[Prompt],
    tokenizer,
    max_new_tokens: int,
    sampling: SamplingConfig,
    is_raw: bool = False,
    stop: tuple[str, ...] = (),
    has_predictions: bool = True,
    num_log_probs: int | None = None,
) -> Iterator[tuple[Prompt, Request]]:
    """Prompts with their requests.

    Args:
      is_raw: Without the chat template.
      stop: Strings that end an answer.
      has_predictions: Verify what answers are expected to be, where prompts say that.
      num_log_probs: See `Request`.
    """
    find = functools.partial(find_stop, tokenizer.decode, stop) if stop else None
    for prompt in prompts:
        predicted = encode_prediction(prompt, tokenizer) if has_predictions else ()
        yield (
            prompt,
            Request(
                id=prompt.id,
                prompt_ids=encode(prompt, tokenizer, is_raw),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                find_stop=find,
                prediction_ids=predicted,
                prediction_confidence=prompt.prediction_confidence,
                seed=prompt.seed,
                choice=prompt.choice,
                num_log_probs=num_log_probs,
                domain=prompt.domain,
            ),
        )


def find_stop(
    decode: Callable[[list[int]], str], stop: tuple[str, ...], token_ids: list[int]
) -> StopPoint | None:
    """Where the answer ends once its text holds a stop string.

    That is in front of the string which is complete first, token by token: so it does
    not matter how many tokens one pass has brought.
    """
    # The usual case by far: one search in the text, and nothing else.
    if first_stop(decode(token_ids), stop) is None:
        return None

    # Back to the shortest answer that holds a stop string.
    end = len(token_ids)
    while first_stop(decode(token_ids[: end - 1]), stop) is not None:
        end -= 1

    text = decode(token_ids[:end])
    before = text[: first_stop(text, stop)]
    # And to the fewest tokens whose text holds all in front of it.
    keep = end
    while keep and decode(token_ids[: keep - 1]).startswith(before):
        keep -= 1

    return StopPoint(keep, decode(token_ids[:keep]).removeprefix(before))
