# SPDX-License-Identifier: Apache-2.0
"""What steps take, as the engine runs them: the next one sent before one is read."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ospec_jax.decoding.batch import fetch
from ospec_jax.types import DecodeState, StepOutput

Step = Callable[[DecodeState], tuple[DecodeState, StepOutput]]


def time_steps(
    step: Step, state: DecodeState, num_steps: int = 8
) -> tuple[float, DecodeState]:
    """Seconds a step, one ahead; and the state, as long as it was before.

    Its newest tokens are those of the last step that was timed.
    """
    # Copies: the step donates its state, and with it these arrays.
    lengths = state.lengths + 0
    remaining = state.num_remaining + 0
    is_finished = state.is_finished | False

    # As in the engine's loop each step is sent before the one before it is read. The
    # clock starts when one has been read and the next is under way, and stops at such a
    # moment, too: between them are as many steps as were read.
    state, unread = step(state)
    state, ahead = step(state)
    fetch(unread)
    unread = ahead
    start = time.perf_counter()

    for _ in range(num_steps):
        state, output = step(state)
        fetch(unread)
        unread = output

    seconds = (time.perf_counter() - start) / num_steps
    fetch(unread)

    # Every round begins at the same length, so that all time the same work. Tokens and
    # caches are those of the last step, which does not matter for their time.
    return seconds, state.replace(
        lengths=lengths, num_remaining=remaining, is_finished=is_finished
    )


def seconds_of_steps(
    steps: Mapping[Any, Step], state: DecodeState, num_rounds: int
) -> tuple[dict[Any, float], DecodeState]:
    """The least time of each kind of step over rounds in which they take turns.

    Another round, the first, compiles them and does not count.
    """
    least = dict.fromkeys(steps, float("inf"))
    for round_number in range(num_rounds + 1):
        # Kinds take turns, and the least time counts: other load on the machine then
        # strikes all of them alike, and the rounds without it decide.
        for name, step in steps.items():
            seconds, state = time_steps(step, state, 3 if round_number else 1)
            if round_number:
                least[name] = min(least[name], seconds)

    return least, state
