# SPDX-License-Identifier: Apache-2.0
"""Before the first answer: compiling what a session needs, and measuring its costs."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ospec_jax import sharding
from ospec_jax._platform import release_memory
from ospec_jax.config import SamplingConfig
from ospec_jax.decoding.engine import step_of_depth
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.timing import seconds_of_steps

if TYPE_CHECKING:
    from ospec_jax.session.session import Session


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
        if session.depths is not None:
            measure_depths(session, capacity, sampling)
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
    args = (lambda: session.served_draft), session.batch_size, capacity
    depths = session.depths and dataclasses.replace(session.depths)
    requests = [request] * session.batch_size
    serve = lambda: list(session.engine.serve(requests, *args, depths=depths))
    serve()
    completions = serve()
    session.engine.rehearse_longer(request, *args)
    return completions


def measure_depths(
    session: Session, capacity: int | None, sampling: SamplingConfig
) -> None:  # fmt: skip
    """Compiles the steps of every depth; measures their costs if none are known."""
    assert session.depths is not None
    is_known = bool(session.depths.state.costs)
    engine, draft = session.engine, session.served_draft
    request = session.probe_request(48, sampling)
    slots = capacity or engine.capacity_for([request])
    state = engine.start(draft, request, session.batch_size, slots)
    is_greedy = sampling.temperature == 0
    steps = {
        depth: functools.partial(
            engine.compiled(step_of_depth(depth), is_greedy),
            engine.target_params, draft,
        )
        for depth in session.tree.depths
    }  # fmt: skip
    costs, _ = seconds_of_steps(steps, state, num_rounds=0 if is_known else 5)
    if not is_known:
        costs = tuple(float(sharding.agreed(costs[d])) for d in session.tree.depths)
        state = dataclasses.replace(session.depths.state, costs=costs)
        session.depths.state = state
