# SPDX-License-Identifier: Apache-2.0
"""The marginal rule while decoding: how deep, how many nodes, or nothing at all.

Whether anything is drafted is chosen between steps, from what earlier ones came to. How
deep, and how many of the nodes are verified, is chosen within the step, by what was
drafted: `drafters.stopping.unless_worth_more_now` and
`drafters.sizing.most_tokens_a_second`, which are told (`marginal.Steering`) what steps
cost and what the draft's probabilities have been worth.

The costs are measured once, before serving; a checkpoint keeps them. What is learned
goes on with every verified step. Both are arguments of the compiled step, and change
how fast tokens come, never which.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ospec_jax.config import TreeConfig
from ospec_jax.control.base import Action, Controller, Outcome, Row, fixed
from ospec_jax.control.costs import kind_like, kinds_of, table_of
from ospec_jax.control.marginal import (
    SIZES,
    Calibration,
    Costs,
    Evidence,
    Steering,
    factors,
    is_worth_drafting,
    learn,
    odds_below,
)

DEEPEST = 5
"""Depth of the deepest draft, unless another one is asked for."""
_NUM_GRADES = 8


@dataclasses.dataclass(frozen=True)
class MarginalState:
    """What is known of costs and of the draft; JSON holds it exactly.

    Attributes:
      depth: Of the deepest tree.
      sizes: Nodes to verify, the root left out.
      num_rows: Of the batches that are decoded.
      seconds: What steps take, by depth from 0 on and within it by size; empty until
        measured.
      hits: As in `marginal.Calibration`, likewise the next four.
      depth_counts: Steps that drafted so deep, from 0 on.
      size_counts: Steps that verified so many nodes, by number.
    """

    depth: int
    sizes: tuple[int, ...]
    num_rows: int
    hits: tuple[float, ...]
    trials: tuple[float, ...]
    mass: tuple[float, ...]
    hits_below: tuple[float, ...] = (0.0,) * _NUM_GRADES
    trials_below: tuple[float, ...] = (0.0,) * _NUM_GRADES
    seconds: tuple[float, ...] = ()
    depth_counts: tuple[int, ...] = ()
    size_counts: tuple[int, ...] = ()

    @property
    def known(self) -> Calibration:
        """What verified nodes said, as arrays."""
        names = ("hits", "trials", "mass", "hits_below", "trials_below")
        return Calibration(*(np.asarray(getattr(self, name)) for name in names))

    @property
    def costs(self) -> Costs:
        """What steps take, as arrays."""
        shape = self.depth + 1, len(self.sizes)
        return Costs(np.asarray(self.seconds).reshape(shape), np.asarray(self.sizes))


def menu_of(num_nodes: int) -> tuple[int, ...]:
    """Sizes to choose from, for a tree of so many nodes, the root left out."""
    return (*(size for size in SIZES if size < num_nodes), num_nodes)


def steerable(tree: TreeConfig) -> TreeConfig:
    """The tree, as the rule chooses from it: all of it, a part, or nothing.

    Raises:
      ConfigError: It is neither a chain nor a dynamic tree.
    """
    if not tree.num_steps:
        return tree

    whole = dataclasses.replace(tree, depths=())
    sizes = tree.sizes or menu_of(whole.num_nodes - 1)
    # The sizes are looked at first: they say what is wrong with a static tree.
    sized = dataclasses.replace(whole, sizes=sizes)

    return dataclasses.replace(sized, depths=(0, tree.num_steps))


def marginal_rule(
    actions: tuple[Action, ...], num_steps_remembered: float = 200.0
) -> Controller:
    """Builds the rule described above.

    Args:
      actions: Plain decoding, and a tree with `sizes`; the latter alone always drafts.
        A tree without `sizes` leaves nothing to choose: it is what every step runs.
      num_steps_remembered: After so many steps evidence weighs 1 / e of what it did.
    """
    deep = actions[-1]
    tree = deep.tree
    if not tree.sizes:
        return fixed(actions)

    plain = next((a for a in actions if not a.tree.num_steps), deep)
    kept = float(np.exp(-1.0 / num_steps_remembered))
    last = len(tree.sizes) - 1

    def init(num_rows: int) -> MarginalState:
        nothing = (0.0,) * tree.num_steps
        return MarginalState(
            tree.num_steps,
            tree.sizes,
            num_rows,
            nothing,
            nothing,
            nothing,
            depth_counts=(0,) * (tree.num_steps + 1),
            size_counts=(0,) * len(tree.sizes),
        )

    def choose(state: MarginalState, rows: Sequence[Row]) -> Action:
        if not state.seconds or is_worth_drafting(state.costs, state.known):
            return deep

        return plain

    def steer(state: MarginalState, rows: Sequence[Row]) -> np.ndarray:
        # Before costs are known all that is drafted is verified. So it is where two
        # rows share their random numbers: what is chosen for both of them must not
        # follow from what one has drafted.
        if not state.seconds or not rows:
            return _told(state, depth=tree.num_steps, size=last)

        return _told(state)

    def observe(
        state: MarginalState, action: Action, outcome: Outcome
    ) -> MarginalState:
        if outcome.evidence is None and action.tree.num_steps:
            return state

        return _booked(state, outcome, kept)

    def set_costs(state: MarginalState, seconds: Sequence[float]) -> MarginalState:
        table = table_of(tree, seconds)
        return dataclasses.replace(state, seconds=tuple(table.ravel().tolist()))

    def kind_of(state: MarginalState, action: Action, outcome: Outcome):
        if not action.tree.num_steps:
            return kind_like(tree, state.seconds, 0, 0)
        if outcome.evidence is None:
            return None

        depth, size, *_ = Evidence.unpacked(outcome.evidence)
        return kind_like(tree, state.seconds, depth, size)

    kinds = kinds_of(tree)
    # As if depth and size had been chosen, whatever is drafted.
    told = [
        None if not depth else _told(init(1), depth=depth, size=tree.sizes.index(size))
        for depth, size in kinds
    ]
    timed_actions = [plain if not depth else deep for depth, _ in kinds]

    return Controller(
        actions=actions,
        init=init,
        choose=choose,
        observe=observe,
        set_costs=set_costs,
        has_costs=lambda state: bool(state.seconds),
        resume=_resume,
        steer=steer,
        kind_of=kind_of,
        timed=tuple(zip(timed_actions, told, strict=True)),
        report=_report,
    )


def _booked(state: MarginalState, outcome: Outcome, kept: float) -> MarginalState:
    """Counts a step, and what it says of the draft.

    Args:
      kept: Share of its weight that earlier evidence keeps.
    """
    accepted = np.asarray(outcome.num_accepted)
    found = outcome.evidence
    if found is None:
        found = np.zeros((len(accepted), 2 + 2 * state.depth))
    depth, size, mass, sure = Evidence.unpacked(found)
    booked = learn(state.known, accepted, mass, sure, depth, kept)
    fields: dict[str, Any] = {
        name: tuple(x.tolist()) for name, x in vars(booked).items()
    }

    depths = _counted(state.depth_counts, depth)
    # Plain steps verify no node.
    sizes = state.size_counts
    if size:
        sizes = _counted(sizes, state.sizes.index(size))

    return dataclasses.replace(state, **fields, depth_counts=depths, size_counts=sizes)


def _resume(fresh: MarginalState, saved: MarginalState) -> MarginalState:
    # Of other trees all is otherwise; batches of another size have other costs.
    shape = lambda state: (state.depth, state.sizes, len(state.hits))
    if shape(saved) != shape(fresh):
        return fresh
    if saved.num_rows != fresh.num_rows:
        return dataclasses.replace(saved, num_rows=fresh.num_rows, seconds=())

    return saved


def _told(state: MarginalState, depth: int = 0, size: int = -1) -> np.ndarray:
    """What the step is told, packed; by default to choose for itself."""
    known = state.known
    shape = state.depth + 1, len(state.sizes)
    seconds = state.costs.seconds if state.seconds else np.ones(shape)

    told = Steering(
        seconds=seconds,
        sizes=state.sizes,
        factor=factors(known),
        odds=odds_below(known),
        depth=depth,
        size=size,
    )
    return told.packed()


def _counted(counts: tuple[int, ...], place: int) -> tuple[int, ...]:
    return tuple(n + (i == place) for i, n in enumerate(counts))


def _report(state: MarginalState) -> dict:
    """What it thinks, for telemetry."""
    return {
        "depths": list(state.depth_counts),
        "sizes": list(state.size_counts),
        "factors": np.asarray(factors(state.known)).tolist(),
        "odds": np.asarray(odds_below(state.known)).tolist(),
        "step_seconds": list(state.seconds),
    }
