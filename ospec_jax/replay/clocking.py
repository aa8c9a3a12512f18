# SPDX-License-Identifier: Apache-2.0
"""Measuring what steps take, by depth and size: the clock of a machine.

Steps are those that the engine runs, one sent ahead of the one that is read. Kinds take
turns, so that other load on the machine strikes all of them alike.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ospec_jax._platform import device_name
from ospec_jax.config import TreeConfig
from ospec_jax.control.base import Action
from ospec_jax.control.clock import Clock, Timed, fit_clock
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.decoding.timing import time_steps
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.replay.trees import TraceShape
from ospec_jax.session.build import serving

Statistic = Literal["median", "least"]
_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "least": min,
}
_STEPS = 4
"""Steps of one timing."""


def kinds_of(shape: TraceShape, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Depths and sizes to measure: all depths at one size, all sizes at one depth."""
    room = lambda depth: shape.first_place(depth + 1)
    deepest = [(shape.depth, size) for size in sizes if size <= room(shape.depth)]
    # At a size that all depths have, and the deepest one was measured with, too.
    common = max(size for size in sizes if size <= room(1))
    return [*[(d, common) for d in range(1, shape.depth)], *deepest]


def measure_clock(
    target: Target,
    loaded: LoadedDraft,
    shape: TraceShape,
    sizes: Sequence[int],
    contexts: Sequence[int] = (64, 192),
    num_rounds: int = 12,
    statistic: Statistic = "median",
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Clock:
    """Measures plain steps and those of the menu, and fits a clock to them.

    Each kind of step is compiled. On a machine that others use, too, `least` is what
    the rounds without them took; the median is what a step takes beside them.

    Args:
      sizes: Nodes to verify, the root left out; one of them `shape.topk` or less.
      contexts: Tokens in the cache to measure with.
      num_rounds: Turns of each kind.
      on_round: Called with the rounds that are done, and all of them.
    """
    plain = Action(TreeConfig(num_steps=0))
    kinds = kinds_of(shape, sizes)
    actions = [plain, *(Action(shape.tree(*kind)) for kind in kinds)]
    # The state is that of any of the trees: they differ in what they need behind it.
    largest = max((action.tree for action in actions), key=lambda tree: tree.num_nodes)
    build = functools.partial(
        build_drafter, loaded.family, loaded.architecture, numerics=target.numerics
    )
    config = StepConfig(target.config, target.numerics, largest, loaded.taps)
    menu: dict[Action, Any] = {
        action: build(tree=action.tree) for action in actions[1:]
    }
    menu[plain] = build(tree=largest)
    engine = Engine(config, target.params, build(tree=largest), menu=menu)
    draft = serving(target, loaded, loaded.memory_orders)(loaded.draft)

    requests = [_request(count) for count in contexts]
    capacity = engine.capacity_for([max(requests, key=lambda r: len(r.prompt_ids))])
    states = [engine.start(draft, request, 1, capacity) for request in requests]
    found: dict[tuple[int, int], list[float]] = {}

    # The first round compiles.
    for number in range(num_rounds + 1):
        for kind, action in enumerate(actions):
            step = functools.partial(engine.step, action, "greedy", draft)
            for i, state in enumerate(states):
                count = _STEPS if number else 1
                seconds, states[i] = time_steps(step, state, count)
                if number:
                    found.setdefault((kind, i), []).append(seconds)
        on_round(number, num_rounds)

    reduce = _STATISTICS[statistic]
    timed = []

    for (kind, i), seconds in found.items():
        tree = actions[kind].tree
        # Steps that are timed go a few tokens further.
        timed.append(
            Timed(tree.num_steps, tree.num_nodes, contexts[i], reduce(seconds))
        )

    return fit_clock(
        timed,
        shape.topk,
        device=device_name(),
        method=f"{statistic} of {num_rounds} interleaved rounds of {_STEPS} steps",
    )


def _request(num_tokens: int) -> Request:
    """One whose prompt fills a cache so far; which tokens does not matter."""
    ids = tuple(int(i) for i in np.arange(num_tokens) % 7 + 5)
    return Request(f"probe-{num_tokens}", ids, max_new_tokens=48)
