# SPDX-License-Identifier: Apache-2.0
"""Before the first answer: compiling what a session needs, and measuring its costs."""

import dataclasses
import functools
import time
from collections.abc import Iterable

import jax

from ospec_jax import sharding
from ospec_jax.config import StepKind
from ospec_jax.control.base import SUGGESTIONS, Chooser
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.timing import seconds_of_steps
from ospec_jax.online.trainer import Trainer, TrainerState, speed_of
from ospec_jax.session.state import SessionState
from ospec_jax.types import DecodeState, Draft


def warm_up(
    engine: Engine,
    chooser: Chooser,
    served: Draft | None,
    requests: list[Request],
    capacities: Iterable[int | None],
    batch_size: int,
) -> list[Completion]:
    """Compiles what decoding needs, and tells a controller that asks for it the costs.

    Args:
      requests: One of each kind that is to come.
      capacities: Of the caches to compile for; None is the smallest one.

    Returns:
      An answer in a cache of each capacity, decoded at full speed.
    """
    answered = []
    for capacity in capacities:
        if len(chooser.controller.kinds) > 1 or not chooser.has_costs:
            measure_costs(engine, chooser, served, requests[-1], batch_size, capacity)
        completions = []
        for request in requests:
            completions = _decode_twice(
                engine, chooser, served, request, capacity, batch_size
            )
        answered.append(completions[-1])

    return answered


def warm_up_trainer(
    trainer: Trainer,
    state: SessionState,
    served: Draft,
    completions: list[Completion],
    batch_size: int,
) -> TrainerState:
    """Compiles what learning needs, and fixes its interval and its costs.

    Args:
      completions: One of each capacity; the last one was decoded at full speed.
      batch_size: Requests that were decoded beside each other.

    Returns:
      The trainer's state, which has learned nothing.
    """
    speeds = [None] * (len(completions) - 1) + [speed_of(completions[-1], batch_size)]
    trained = state.trainer

    for completion, speed in zip(completions, speeds, strict=True):
        trained = trainer.warm_up(
            trained, state.traffic, state.draft, served, completion, speed
        )

    assert trained is not None
    return trained


def rehearse(chooser: Chooser) -> None:
    """Compiles what a controller learns with between answers, and says what it takes.

    Nothing is done where that is known; costs of steps have to be.
    """
    learning = chooser.controller.learning
    if learning is None or learning.is_ready(chooser.state):
        return

    learning.rehearse(chooser.state)
    seconds = []

    # The least of a few: beside other work an update seems to take longer.
    for _ in range(3):
        start = time.perf_counter()
        learning.rehearse(chooser.state)
        seconds.append(time.perf_counter() - start)

    chooser.state = learning.set_cost(chooser.state, min(seconds))


def _decode_twice(
    engine: Engine,
    chooser: Chooser,
    served: Draft | None,
    request: Request,
    capacity: int | None,
    batch_size: int,
) -> list[Completion]:
    """Serves a request twice, and takes a longer step where one may come."""
    requests = [request] * batch_size
    # A copy: the controller shall not hear of what is no traffic.
    own = dataclasses.replace(chooser)
    serve = lambda: list(
        engine.serve(requests, lambda: served, batch_size, capacity, chooser=own)
    )
    # The first time compiles, and the second one is timed.
    serve()
    completions = serve()
    _compile_longer_steps(engine, served, request, capacity, batch_size)
    if chooser.controller.rests is not None:
        read_alone(engine, served, request, engine.capacity_for([request], capacity))

    return completions


def read_alone(
    engine: Engine,
    served: Draft | None,
    request: Request,
    capacity: int,
    has_prediction: bool | None = None,
) -> None:
    """Compiles the passes over prompts by each member of a pool alone."""
    numbers = {action.drafter for action in engine.actions} - {SUGGESTIONS}
    for number in sorted(numbers):
        engine.prefill(served, request, capacity, has_prediction, only=number)


def _compile_longer_steps(
    engine: Engine,
    served: Draft | None,
    request: Request,
    capacity: int | None,
    batch_size: int,
) -> None:
    """Compiles the step for sure suggestions, if anybody is ever sure of them."""
    longer = [action for action in engine.actions if action.drafter == SUGGESTIONS]
    if not longer:
        return

    # The steps are taken here by hand, since a controller takes them only where rows
    # are sure.
    slots = engine.capacity_for([request], capacity)
    row, output = engine.prefill(served, request, slots)
    if output.is_sure is None:
        return

    state = engine.place(None, row, 0, batch_size, slots)

    for action in longer:
        state, output = engine.step(action, request.kind, served, state)

    jax.block_until_ready(output)


def measure_costs(
    engine: Engine,
    chooser: Chooser,
    served: Draft | None,
    request: Request,
    batch_size: int,
    capacity: int | None,
) -> None:
    """Compiles the steps to choose from, and times them for who weighs time."""
    is_timed = not chooser.has_costs
    request = dataclasses.replace(request, max_new_tokens=48, prediction_ids=())
    slots = engine.capacity_for([request], capacity)
    state = engine.start(served, request, batch_size, slots)
    if engine.num_behind:
        # The other two programs of plain steps are compiled here.
        plain = next(a for a in engine.actions if not a.tree.num_steps)
        state, _ = engine.step(plain, request.kind, served, state)
        state = engine.catch_up(served, state)
    seconds = costs_of_steps(engine, chooser, served, request.kind, state, is_timed)
    if is_timed:
        chooser.set_costs(seconds)


def costs_of_steps(
    engine: Engine,
    chooser: Chooser,
    served: Draft | None,
    kind: StepKind,
    state: DecodeState,
    is_timed: bool = True,
) -> list[float]:
    """Seconds of a step of each of a controller's `kinds`, from the state on.

    Args:
      is_timed: Without, they are only compiled.
    """
    steps = {}
    for number, (action, steering) in enumerate(chooser.controller.kinds):
        # A plain step takes what it takes in a row of them.
        is_resting = engine.num_behind > 0 and not action.tree.num_steps
        steps[number] = functools.partial(
            engine.step,
            action,
            kind,
            served,
            steering=steering,
            is_resting=is_resting,
        )

    # Where small differences decide, more rounds: among them is a quiet one.
    num_rounds = 12 if chooser.controller.timed else 5
    seconds, _ = seconds_of_steps(steps, state, num_rounds if is_timed else 0)

    # Processes of one mesh must choose the same actions.
    return [float(sharding.agreed(x)) for x in seconds.values()]
