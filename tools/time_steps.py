# SPDX-License-Identifier: Apache-2.0
"""Times single steps of one request by who drafts and how much, all in turns.

    python tools/time_steps.py --depths 1 3

As the engine runs them: each step is sent before the one before it is read. Medians
over the rounds, and what they are relative to plain steps.
"""

import dataclasses
import functools
import statistics

import tyro

from ospec_jax import Session, load_draft, load_target
from ospec_jax.decoding.timing import time_steps

_STEPS = 16
"""Of each kind in a round."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
      depths: Tokens that a step drafts.
      num_rounds: In which all kinds take turns; the first one compiles, and is left
        out.
    """

    target: str = "smollm2-135m"
    draft: str = "shipped"
    depths: tuple[int, ...] = (1, 3)
    num_rounds: int = 40


def open_kinds(settings: Settings) -> dict[str, Session]:
    """A session for each kind of step."""
    target = load_target(settings.target)
    draft = load_draft(settings.draft, target)
    kinds = {"plain": Session(target)}

    for depth in settings.depths:
        how = dict(num_speculative_tokens=depth)
        kinds[f"n-grams alone, K = {depth}"] = Session(target, "ngram", **how)
        kinds[f"draft, K = {depth}"] = Session(target, draft, ngrams=False, **how)
        kinds[f"draft and n-grams, K = {depth}"] = Session(target, draft, **how)

    return kinds


def main() -> None:
    """Times, and prints a table."""
    settings = tyro.cli(Settings, description=__doc__)
    runs = {}
    for name, session in open_kinds(settings).items():
        engine = session.engine
        request = session.probe_request()
        capacity = engine.capacity_for([request])
        state, _ = engine.prefill(session.served_draft, request, capacity)
        step = functools.partial(
            engine.step, engine.action, "greedy", session.served_draft
        )
        runs[name] = step, state

    seconds = {name: [] for name in runs}
    for number in range(settings.num_rounds + 1):
        for name, (step, state) in runs.items():
            found, state = time_steps(step, state, _STEPS)
            runs[name] = step, state
            if number:
                seconds[name].append(found)

    plain = statistics.median(seconds["plain"])
    print(f"{'step':30} milliseconds  in plain ones")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:30} {1e3 * median:12.2f} {median / plain:14.2f}")


if __name__ == "__main__":
    main()
