# SPDX-License-Identifier: Apache-2.0
"""Policies that go on learning, replayed on a trace in the order of its answers.

The controller is that of decoding (`control.taught`), and what it hears of a cycle is
what a step would have reported. It is told as late as there: a step's outcome once the
next step was chosen, that of an answer's last one never; it learns between answers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import TreeConfig
from ospec_jax.control.base import Action, Outcome, Row
from ospec_jax.control.lessons import Cycle, LessonConfig
from ospec_jax.control.policy import Policies
from ospec_jax.control.taught import TaughtState, learning
from ospec_jax.replay import rules
from ospec_jax.replay.cycles import Cycles, costs_at
from ospec_jax.replay.episodes import choices_of, shape_of

_choices = jax.jit(choices_of)


class Trail(NamedTuple):
    """What learning did on a trace.

    Attributes:
      score: Of all answers, the time of updates left out.
      tokens: Of each answer; likewise the seconds, by the clock.
      state: Where the controller stands in the end.
    """

    score: rules.Score
    tokens: np.ndarray
    seconds: np.ndarray
    state: TaughtState


def run_learning(
    cycles: Cycles,
    policies: Policies,
    config: LessonConfig = LessonConfig(),
    interval: int = 128,
    state: TaughtState | None = None,
    name: str = "LTD, going on",
) -> Trail:
    """Replays all answers with policies that learn from them.

    Args:
      interval: Cycles between two updates.
      state: To go on from; by default nothing was learned.
    """
    shape = shape_of(cycles)
    tree = TreeConfig(
        "dynamic", shape.depth, shape.topk, max(shape.sizes), sizes=shape.sizes
    )
    if shape.topk == 1:
        tree = TreeConfig(num_steps=shape.depth, sizes=shape.sizes)
    action = Action(tree)
    # Its interval is given here: what an update takes is not measured.
    controller = learning(policies, (action,), 0.5, config)
    context = round(float(np.mean(np.asarray(cycles.contexts))))
    table = np.asarray(costs_at(cycles, jnp.int32(context)).seconds)
    begun: TaughtState = state or controller.init(1)
    now = dataclasses.replace(
        begun,
        seconds=tuple(table.ravel().tolist()),
        interval=interval,
    )
    known = rules.tables_of(cycles)
    host = jax.device_get(cycles.replace(clock=None))
    ends = np.cumsum(np.diff([*host.starts, cycles.num_positions]))
    spent = np.zeros(len(ends))
    choices = np.zeros(cycles.rows.shape, int)
    asked = None
    chosen = _choices(policies, cycles)
    waiting = None
    position = 0

    while position < cycles.num_positions:
        left = int(known.left[position])
        row = Row(False, int(host.contexts[position]), left)
        assert controller.steer is not None
        told = controller.steer(now, (row,))
        if told.policies is not asked:
            asked = told.policies
            chosen = jax.device_get(_choices(asked, cycles))
        if waiting is not None:
            now = controller.observe(now, action, waiting)

        depth = int(told.depth) or int(chosen.depth[position])
        size = int(chosen.size[position]) if told.size < 0 else int(told.size)
        accepted = int(known.accepted[position, depth, size])
        answer = int(np.searchsorted(ends, position, "right"))
        spent[answer] += float(known.seconds[position, depth, size])
        choices[depth, size] += 1
        is_last = accepted + 1 >= left
        found = cycle_at(host, position, depth, size)
        waiting = None if is_last else Outcome((accepted,), evidence=found)
        position += min(accepted + 1, left)
        learns = controller.learning
        assert learns is not None
        if is_last and learns.is_due(now):
            now = learns.update(now)

    return Trail(
        rules.score_of(name, cycles, float(np.sum(spent)), choices),
        np.diff([0, *ends]),
        spent,
        now,
    )


def cycle_at(cycles: Cycles, position: int, depth: int, size: int) -> np.ndarray:
    """What a step would have reported of a choice, `[1, e]`; see `lessons.Cycle`.

    Args:
      cycles: With arrays of NumPy.
      size: Number into the menu.
    """
    first = lambda depth: cycles.topk + (depth - 2) * cycles.topk**2 if depth > 1 else 0
    places = np.arange(cycles.scores.shape[1])
    is_drafted = places < first(depth + 1)
    scores = np.where(is_drafted, cycles.scores[position], -np.inf)
    # No more is verified than was drafted.
    sizes = np.asarray(cycles.sizes)
    enough = np.searchsorted(sizes, np.sum(scores > -np.inf))
    count = int(sizes[min(size, enough)])
    accepted = int(np.sum(cycles.is_right[position, depth - 1, :count]))
    right = np.full(cycles.depth, -1)

    # One right node a depth at most; what was emitted tells of one more than accepted.
    for d in range(1, min(depth, accepted + 1) + 1):
        level = slice(first(d), first(d + 1))
        found = np.flatnonzero(cycles.right[position, level])
        right[d - 1] = first(d) + found[0] if len(found) else -1

    one = lambda x: np.asarray([x])
    context = int(cycles.contexts[position])
    return Cycle(one(count), one(context), right[None], scores[None]).packed()
