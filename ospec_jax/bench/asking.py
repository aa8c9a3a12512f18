# SPDX-License-Identifier: Apache-2.0
"""What a benchmark asks: prompts, and conversations turn by turn, that fit."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

from ospec_jax.bench.runs import BenchConfig, ModeRun
from ospec_jax.config import ConfigError
from ospec_jax.data.conversations import Conversation
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.request import PromptTooLongError, Request
from ospec_jax.session import Session

_SLACK = 16
"""Tokens by which an answer may grow as its text is encoded again, in a later turn."""


def num_turns(prompts: Sequence[Prompt | Conversation]) -> int:
    """Answers that prompts and conversations ask for."""
    return sum(len(x.turns) if isinstance(x, Conversation) else 1 for x in prompts)


def first_turn(item: Prompt | Conversation) -> Prompt:
    """A prompt, or what a conversation begins with."""
    return item.ask(()) if isinstance(item, Conversation) else item


def rounds_of(
    items: Sequence[Prompt | Conversation],
    plain: ModeRun,
    sessions: Sequence[Session],
    config: BenchConfig,
    left_out: list[str],
) -> Iterator[tuple[str | None, list[Prompt]]]:
    """What is answered together, with the name of the conversation it belongs to.

    Each turn of a conversation is asked for once plain decoding has answered the one
    before.

    Args:
      left_out: Takes names of turns that turn out not to fit.
    """
    for begin in range(0, len(items), config.batch_size):
        group = items[begin : begin + config.batch_size]
        first = group[0]
        if not isinstance(first, Conversation):
            yield None, [item for item in group if isinstance(item, Prompt)]
            continue

        answers: list[str] = []
        while len(answers) < len(first.turns):
            prompt = first.ask(answers)
            try:
                for session in sessions:
                    session.engine.capacity_for(requests_of([prompt], session, config))
            except PromptTooLongError:
                # Answers that are not a language's may grow as they are encoded again.
                left_out.append(prompt.id)
                warnings.warn(f"{prompt.id} is left out: too long", stacklevel=3)
                break
            yield first.id, [prompt]
            # Spec-Bench, too, goes on with an answer's text without space around it.
            answers.append(plain.results[-1].text.strip())


def fitting_items(
    items: Sequence[Prompt | Conversation],
    sessions: Sequence[Session],
    config: BenchConfig,
) -> tuple[list[Prompt | Conversation], list[str]]:
    """What fits into the context in all modes, and names of the rest.

    Raises:
      ConfigError: Nothing fits.
    """
    fitting = []
    left_out = []

    for item in items:
        try:
            for session in sessions:
                session.engine.capacity_for(request_bounds(item, session, config))
            fitting.append(item)
        except PromptTooLongError:
            left_out.append(item.id)

    if left_out:
        told = (
            f"{len(left_out)} of {len(items)} do not fit into the target's context "
            f"with {config.max_new_tokens} new tokens"
        )
        if not fitting:
            raise ConfigError(f"{told}; shorten them, or lower --max-new-tokens")
        warnings.warn(f"{told}, and are left out: {', '.join(left_out)}", stacklevel=3)

    return fitting, left_out


def request_bounds(
    item: Prompt | Conversation, session: Session, config: BenchConfig
) -> list[Request]:
    """A prompt's request; or the shortest and longest that a conversation may need."""
    if not isinstance(item, Conversation):
        return requests_of([item], session, config)

    bounds = []

    for number in range(len(item.turns)):
        (shortest,) = requests_of([item.ask([""] * number)], session, config)
        room = number * (config.max_new_tokens + _SLACK)
        ids = shortest.prompt_ids + shortest.prompt_ids[-1:] * room
        bounds += [shortest, dataclasses.replace(shortest, prompt_ids=ids)]

    return bounds


def requests_of(
    prompts: Sequence[Prompt], session: Session, config: BenchConfig
) -> list[Request]:
    """Prompts as a session is asked them, in their order."""
    pairs = session.requests(
        prompts, config.max_new_tokens, config.sampling, config.is_raw
    )
    return [request for _, request in pairs]
