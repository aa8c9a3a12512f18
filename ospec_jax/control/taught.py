# SPDX-License-Identifier: Apache-2.0
"""Policies that were taught how much to draft, while decoding.

They are asked within the step (`drafters.stopping.taught_now` and
`drafters.sizing.taught_size_now`), and are arguments of it: others of the same shape
take their place between two steps, and nothing is compiled anew.

They may go on learning. Every verified cycle is kept for a while, and every so many
cycles `control.lessons` goes through what is kept, between two answers: as often as a
share of decoding's time allows, which is measured once. All else is a function of the
state, so what is resumed from a checkpoint chooses as if nothing had happened.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.control.base import Action, Controller, Learning, Outcome, Row
from ospec_jax.control.costs import kind_like, kinds_of, table_of
from ospec_jax.control.lessons import (
    Cycle,
    LessonConfig,
    build_optimizer,
    build_update,
    lessons_of,
)
from ospec_jax.control.policy import Policies, PolicyShape, Told

_LEAST_INTERVAL = 32
"""Cycles between two updates, however cheap these are: fewer tell nothing new."""


@dataclasses.dataclass(frozen=True)
class TaughtState:
    """Policies that learn, and what they learn from.

    Attributes:
      origin: Of the policies that it began with, a fingerprint.
      num_rows: Of the batches that are decoded.
      policies: As they are now.
      optimizer: Adam's state.
      cycles: The newest verified ones, oldest first, each `lessons.Cycle` packed.
      seconds: What steps take, by depth from 0 on and within it by size; empty until
        measured.
      interval: Cycles between two updates; 0 until measured.
      num_steps: That were observed.
      num_waiting: Cycles since the last update.
      num_updates: So far.
      rate: Tokens a second that the last update expected, by the clock.
    """

    origin: str
    num_rows: int
    policies: Policies
    optimizer: Any
    cycles: tuple[np.ndarray, ...] = ()
    seconds: tuple[float, ...] = ()
    interval: int = 0
    num_steps: int = 0
    num_waiting: int = 0
    num_updates: int = 0
    rate: float = 0.0


def told(policies: Policies, depth: int = 0, size: int = -1) -> Told:
    """What a step is told; by default to ask the policies."""
    return Told(policies, np.int32(depth), np.int32(size))


def asked(policies: Policies, actions: tuple[Action, ...]) -> Controller:
    """Asks policies at every step, and leaves them as they are."""
    deep = _of_first(actions)
    ask = told(_placed(policies))

    return Controller(
        actions=(deep,),
        init=lambda num_rows: None,
        choose=lambda state, rows: deep,
        observe=lambda state, action, outcome: state,
        steer=lambda state, rows: ask,
    )


def learning(
    policies: Policies,
    actions: tuple[Action, ...],
    budget: float,
    config: LessonConfig = LessonConfig(),
) -> Controller:
    """Asks policies at every step, and teaches them on by what it came to.

    Args:
      budget: Share of decoding's time that updates may take.

    Raises:
      ConfigError: Other trees are drafted than those that the policies know.
    """
    deep = _of_first(actions)
    tree = deep.tree
    shape = policies.shape
    check_fits(shape, tree)
    origin = _fingerprint(policies)
    optimizer = build_optimizer(config)
    teach = _teacher(shape, config)

    def init(num_rows: int) -> TaughtState:
        first = _placed(policies)
        params: Any = first
        return TaughtState(origin, num_rows, first, optimizer.init(params))

    def steer(state: TaughtState, rows: Sequence[Row]) -> Told:
        # By count alone, so that it follows from nothing that the step drafts.
        if state.num_steps % config.deep_every == 0:
            return told(state.policies, tree.num_steps)

        return told(state.policies)

    def observe(state: TaughtState, action: Action, outcome: Outcome) -> TaughtState:
        found = outcome.evidence
        if found is None:
            return state

        cycles = (*state.cycles, *np.asarray(found))[-config.num_cycles :]
        return dataclasses.replace(
            state,
            cycles=cycles,
            num_steps=state.num_steps + 1,
            num_waiting=state.num_waiting + len(found),
        )

    def set_costs(state: TaughtState, seconds: Sequence[float]) -> TaughtState:
        # Nothing is ever decoded plainly: what a plain step takes makes no difference
        # to the others.
        table = table_of(tree, (min(seconds), *seconds))
        return dataclasses.replace(state, seconds=tuple(table.ravel().tolist()))

    def set_cost(state: TaughtState, seconds: float) -> TaughtState:
        return dataclasses.replace(state, interval=_interval(state, seconds, budget))

    placed = _placed(policies)
    forced = [
        told(placed, depth, tree.sizes.index(size)) for depth, size in kinds_of(tree)
    ]

    return Controller(
        actions=(deep,),
        init=init,
        choose=lambda state, rows: deep,
        observe=observe,
        set_costs=set_costs,
        has_costs=lambda state: bool(state.seconds),
        resume=_resume,
        steer=steer,
        kind_of=lambda state, action, outcome: _kind_of(shape, tree, state, outcome),
        timed=tuple((deep, one) for one in forced[1:]),
        report=_report,
        learning=Learning(
            is_due=lambda state: 0 < state.interval <= state.num_waiting,
            update=teach,
            rehearse=lambda state: None if teach(state) else None,
            set_cost=set_cost,
            is_ready=lambda state: state.interval > 0,
        ),
        pack=_pack,
        unpack=lambda saved: _unpack(saved, init(1), _width(shape)),
    )


def _width(shape: PolicyShape) -> int:
    """Numbers of a packed cycle."""
    return 2 + shape.depth + shape.num_places


def _teacher(
    shape: PolicyShape, config: LessonConfig
) -> Callable[[TaughtState], TaughtState]:
    """Builds an update of policies by what is kept of cycles, compiled once."""
    lessons = jax.jit(lambda rows, weight: lessons_of(shape, rows, weight))
    update = jax.jit(build_update(config))

    def teach(state: TaughtState) -> TaughtState:
        rows = np.zeros((config.num_cycles, _width(shape)), np.float32)
        weight = np.zeros(config.num_cycles, np.float32)
        count = len(state.cycles)
        if count:
            rows[:count] = state.cycles
            weight[:count] = 1.0
        table = np.asarray(state.seconds, np.float32)
        table = table.reshape(shape.depth + 1, len(shape.sizes))[1:]
        found = update(state.policies, state.optimizer, lessons(rows, weight), table)
        taught, moved, rate = jax.block_until_ready(found)
        state = dataclasses.replace(state, num_waiting=0)
        # Of costs that are none nothing can be learned.
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(taught)):
            return state

        return dataclasses.replace(
            state,
            policies=taught,
            optimizer=moved,
            num_updates=state.num_updates + 1,
            rate=float(np.exp(rate)),
        )

    return teach


def _interval(state: TaughtState, seconds: float, budget: float) -> int:
    """Cycles between two updates of so many seconds.

    An update is due after so many cycles that it takes its share of their time. Of the
    cheapest ones: with dearer ones it takes less.
    """
    allowed = budget / (1.0 - budget) * min(state.seconds) / state.num_rows
    return max(_LEAST_INTERVAL, int(np.ceil(seconds / allowed)))


def _kind_of(
    shape: PolicyShape, tree: TreeConfig, state: TaughtState, outcome: Outcome
) -> tuple[int, float] | None:
    """Which of the timed steps one is like, by number, and what that one takes."""
    if outcome.evidence is None:
        return None

    # As deep as the deepest row was drafted.
    found = Cycle.unpacked(outcome.evidence, shape.depth)
    is_there = np.any(found.scores > -np.inf, axis=0)
    depth = int(np.max(np.where(is_there, shape.place_depths, 1)))
    like = kind_like(tree, state.seconds, depth, int(found.size[0]))
    # Plain steps are no kind here.
    return None if like is None else (like[0] - 1, like[1])


def _resume(fresh: TaughtState, saved: TaughtState) -> TaughtState:
    """Goes on with the same policies; batches of another size cost something else."""
    if saved.origin != fresh.origin:
        return fresh
    if saved.num_rows != fresh.num_rows:
        changes: dict = {"num_rows": fresh.num_rows, "seconds": (), "interval": 0}
        return dataclasses.replace(saved, **changes)

    return saved


def _pack(state: TaughtState) -> dict:
    """A state as JSON can hold it."""
    arrays = jax.tree.leaves((state.policies, state.optimizer))
    changes: dict = {
        "policies": _text([np.asarray(x) for x in arrays]),
        "optimizer": None,
        "cycles": _text(list(state.cycles)),
    }
    flat = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return flat | changes | {"num_cycles": len(state.cycles)}


def _unpack(saved: dict[str, Any], like: TaughtState, width: int) -> TaughtState:
    """The state that `_pack` gave; of other policies, one that `_resume` refuses.

    Args:
      like: A state of the policies that these may be.
      width: Numbers of a packed cycle.
    """
    saved = dict(saved)
    count = saved.pop("num_cycles")
    if saved["origin"] != like.origin:
        return dataclasses.replace(like, origin=saved["origin"])

    wanted, structure = jax.tree.flatten((like.policies, like.optimizer))
    arrays = _arrays(saved["policies"], [(x.shape, x.dtype) for x in wanted])
    taught, moved = jax.tree.unflatten(structure, map(jnp.asarray, arrays))
    cycles = _arrays(saved["cycles"], [((width,), np.float32)] * count)
    fields: dict[str, Any] = saved | {
        "policies": taught,
        "optimizer": moved,
        "cycles": tuple(cycles),
        "seconds": tuple(saved["seconds"]),
    }

    return TaughtState(**fields)


def check_fits(shape: PolicyShape, tree: TreeConfig) -> None:
    """Refuses to teach on other trees than those that policies know.

    Raises:
      ConfigError: They differ, or their children are drawn.
    """
    if tree.children != "topk":
        raise ConfigError(
            f"policies learn from trees of most probable children, not of children "
            f"{tree.children!r}, of which smaller trees tell nothing; use 'topk', or "
            f"leave out learn_control"
        )
    found = PolicyShape(tree.topk, tree.num_steps, tree.sizes)
    if found != shape:
        raise ConfigError(
            f"policies learn from the trees that they were taught on, width "
            f"{shape.topk}, depth {shape.depth}, sizes {shape.sizes}, not {tree.topk}, "
            f"{tree.num_steps}, {tree.sizes}; leave out the tree, or learn_control"
        )


def _of_first(actions: tuple[Action, ...]) -> Action:
    """The deepest action of the first drafter."""
    return [action for action in actions if action.drafter == 0][-1]


def _placed(policies: Policies) -> Policies:
    """Policies where steps read them: on the device, once and for all."""
    # Processes of one mesh hand in what each of them has, which must not lie on a
    # device already.
    place: Any = jnp.asarray if jax.process_count() == 1 else np.asarray
    return jax.tree.map(place, policies)


def _fingerprint(policies: Policies) -> str:
    arrays = [np.asarray(x) for x in jax.tree.leaves(policies)]
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]


def _text(arrays: Sequence[np.ndarray]) -> str:
    """Arrays' numbers as JSON can hold them, bit by bit."""
    return base64.b64encode(b"".join(x.tobytes() for x in arrays)).decode()


def _arrays(text: str, shapes: Sequence[tuple]) -> list[np.ndarray]:
    """Arrays of known shapes and types from their text.

    Raises:
      ConfigError: It has another length.
    """
    data = base64.b64decode(text)
    counts = [int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes]
    if len(data) != sum(counts):
        raise ConfigError(
            f"the checkpoint has {len(data)} bytes of policies where {sum(counts)} are "
            f"wanted; go on without learn_control, or begin anew"
        )

    ends = np.cumsum([0, *counts])
    return [
        np.frombuffer(data[a:b], kind).reshape(shape)
        for a, b, (shape, kind) in zip(ends[:-1], ends[1:], shapes, strict=True)
    ]


def _report(state: TaughtState) -> dict:
    """Where learning stands, for telemetry."""
    return {
        "cycles": state.num_steps,
        "updates": state.num_updates,
        "interval": state.interval,
        "expected_rate": state.rate,
        "step_seconds": list(state.seconds),
    }
