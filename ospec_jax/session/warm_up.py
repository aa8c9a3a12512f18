# SPDX-License-Identifier: Apache-2.0
"""Before the first answer: compiling what a session needs, and measuring its costs."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax

from ospec_jax import sharding
from ospec_jax._platform import release_memory
from ospec_jax.config import SamplingConfig
from ospec_jax.control.base import SUGGESTIONS
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.timing import seconds_of_steps

if TYPE_CHECKING:
    from ospec_jax.session import Session


def warm_up(
    session: Session, capacities: Iterable[int | None], sampling: SamplingConfig,
    has_predictions: bool,
) -> float:  # fmt: skip
    """See `Session.warm_up`."""
    start = time.perf_counter()
    probe = session.probe_request(24, sampling)
    predicted = dataclasses.replace(probe, prediction_ids=probe.prompt_ids)
    kinds = [predicted, probe] if has_predictions and session.is_drafting else [probe]
    completions, served = [], session.served_draft
    for capacity in capacities:
        if session.tree.depths:
            measure_costs(session, capacity, sampling)
        for kind in kinds:
            completions = _rehearse(session, kind, capacity)
        if session.learning is not None and served is not None:
            session.learning.rehearse(completions[-1], served)
    if session.learning is not None and served is not None:
        session.learning.calibrate(
            completions[-1], session.draft, served, session.batch_size
        )
    release_memory()
    return time.perf_counter() - start


def _rehearse(
    session: Session, request: Request, capacity: int | None
) -> list[Completion]:
    """Serves a request twice, and takes a longer step where one may come."""
    requests = [request] * session.batch_size
    draft_fn = lambda: session.served_draft
    # A copy: the controller shall not hear of rehearsals.
    chooser = dataclasses.replace(session.chooser)
    serve = lambda: list(
        session.engine.serve(
            requests, draft_fn, session.batch_size, capacity, chooser=chooser
        )
    )
    serve()
    completions = serve()
    _rehearse_longer(session, request, capacity)
    return completions


def _rehearse_longer(session: Session, request: Request, capacity: int | None) -> None:
    """Compiles the step for sure suggestions, if anybody is ever sure of them."""
    engine = session.engine
    longer = [action for action in engine.actions if action.drafter == SUGGESTIONS]
    if not longer:
        return

    slots = engine.capacity_for([request], capacity)
    row, output = engine.prefill(session.served_draft, request, slots)
    if output.is_sure is None:
        return

    state = engine.place(None, row, 0, session.batch_size, slots)
    is_greedy = request.sampling.temperature == 0
    for action in longer:
        state, output = engine.step(action, is_greedy, session.served_draft, state)
    jax.block_until_ready(output)


def measure_costs(
    session: Session, capacity: int | None, sampling: SamplingConfig
) -> None:
    """Compiles the steps to choose from, and times them for who weighs time."""
    engine, draft = session.engine, session.served_draft
    is_timed = not session.chooser.has_costs
    request = session.probe_request(48, sampling)
    slots = engine.capacity_for([request], capacity)
    state = engine.start(draft, request, session.batch_size, slots)
    is_greedy = sampling.temperature == 0
    steps = {
        action: functools.partial(engine.step, action, is_greedy, draft)
        for action in session.chooser.controller.actions
    }
    seconds, _ = seconds_of_steps(steps, state, num_rounds=5 if is_timed else 0)
    if is_timed:
        session.chooser.set_costs(
            {action: float(sharding.agreed(x)) for action, x in seconds.items()}
        )
