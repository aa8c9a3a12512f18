# SPDX-License-Identifier: Apache-2.0
"""Which drafter of a pool drafts: the one whose drafts would have been worth most.

HedgeSpec ("Not-a-Bandit", arXiv 2510.20064). What the target said about the emitted
tokens tells of every drafter how its draft would have been accepted, not only of the
one that was asked. So nothing need be explored, and regret grows with the logarithm of
the number of drafters.

Each window of evidence (`control.lengths`) is one round of a rule for weights
(`control.weighting`), in the order in which they become complete: the reduction that
Joulani et al. (arXiv 1306.0686) give for delays where losses are drawn alike. The paper
leaves open whether to draw from the weights or take the largest; here that is an
option. Its experts are drafters; here an expert is an action, a drafter and a depth, so
that both can be chosen at once, by time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.control.base import Action, Controller, Outcome
from ospec_jax.control.lengths import Estimator, Windows, expected_lengths
from ospec_jax.control.weighting import Meta

_KEPT = float(np.exp(-1 / 500))
"""Of what drafting has shown of depths, at each step."""
_PRIOR = 8.0
"""Tokens accepted as they were judged, with which each depth of a drafter begins."""

Loss = Literal["length", "time", "acceptance"]
"""Tokens that a draft yields; the same a second; whether its first token is right."""


@dataclasses.dataclass(frozen=True)
class SelectionState:
    """What is known of each action; JSON holds it exactly.

    Attributes:
      names: Of the actions.
      num_rows: Of the batches that are decoded.
      weights: Of the actions.
      learner: All numbers that the rule for weights remembers.
      costs: Seconds of a step of each action; empty until measured.
      num_windows: Of evidence.
      values: Each action's, summed over them: tokens, or for `time` tokens in units of
        the cheapest action's seconds.
      own_value: Likewise of those that were taken.
      num_steps: That were heard of.
      last: Number of the action that was taken last; -1 before the first.
      num_switches: From one action to another.
      hits: Tokens that were accepted of each drafter's drafts, by depth, one drafter
        behind the other.
      expected: Likewise those that should have been, by how they were judged.
    """

    names: tuple[str, ...]
    num_rows: int
    weights: tuple[float, ...]
    learner: tuple[float, ...]
    costs: tuple[float, ...] = ()
    num_windows: int = 0
    values: tuple[float, ...] = ()
    own_value: float = 0.0
    num_steps: int = 0
    last: int = -1
    num_switches: int = 0
    hits: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()


def select(
    actions: tuple[Action, ...],
    rule: Meta,
    *,
    loss: Loss = "length",
    estimator: Estimator = "coupled",
    draws: bool = False,
    corrects: bool = True,
    begins_anew: bool = False,
    seed: int = 0,
) -> Controller:
    """Builds the controller.

    Args:
      rule: For the weights, of losses in [0, 1].
      loss: What is minimised: one less the share of what is possible at best.
      estimator: See `control.lengths.expected_lengths`.
      draws: Draw actions from the weights, rather than take the one of the largest.
      corrects: Judge deeper tokens down by what drafting has shown them to lose: each
        position is judged as the first of a draft, and drafters that go on from their
        own states are worse than that. Who has not drafted is not judged down.
      begins_anew: Forget everything at the end of an answer.
      seed: Of the draws. They have nothing to do with those of answers.

    Raises:
      ConfigError: There is nothing to choose from, or depths without their costs.
    """
    check_choice(actions, loss)
    num_actions = len(actions)
    drafters = [action.drafter for action in actions]
    depths = [action.tree.num_steps for action in actions]
    table = max(drafters) + 1, max(depths)
    # Its arrays are laid out one behind the other: a checkpoint keeps flat tuples.
    first, structure = jax.tree.flatten(rule.init(num_actions))
    shapes = [np.shape(leaf) for leaf in first]
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = lambda tree: tuple(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).tolist()
    )

    def begin(state: SelectionState) -> SelectionState:
        even = (1.0 / num_actions,) * num_actions
        return dataclasses.replace(state, weights=even, learner=flat(first))

    def init(num_rows: int) -> SelectionState:
        nothing = SelectionState(tuple(map(str, actions)), num_rows, (), ())
        counts = (0.0,) * (table[0] * table[1])
        return begin(
            dataclasses.replace(
                nothing, values=(0.0,) * num_actions, hits=counts, expected=counts
            )
        )

    def choose(state: SelectionState, rows) -> Action:
        if not draws:
            return actions[int(np.argmax(state.weights))]

        # Drawn anew with new evidence, not at each step: another drafter must first be
        # brought up to date. The number of the draw is a function of the state.
        rng = np.random.default_rng((seed, state.num_windows))
        weights = np.asarray(state.weights)
        return actions[rng.choice(num_actions, p=weights / weights.sum())]

    def value_of(state: SelectionState, windows: Windows) -> np.ndarray:
        """What each window says that each action is worth, `[w, num_actions]`."""
        if loss == "acceptance":
            return windows.chances[:, 0, drafters]

        lengths = expected_lengths(windows, estimator)[:, drafters, depths]
        return lengths / relative_costs(state.costs) if loss == "time" else lengths

    def most(state: SelectionState) -> float:
        """The most that a window could say."""
        if loss == "acceptance":
            return 1.0

        longest = np.asarray(depths) + 1.0
        return float(
            np.max(longest / relative_costs(state.costs) if loss == "time" else longest)
        )

    def observe(
        state: SelectionState, action: Action, outcome: Outcome
    ) -> SelectionState:
        taken = actions.index(action) if action in actions else state.last
        is_switch = taken != state.last and state.last >= 0
        state = dataclasses.replace(
            state,
            num_steps=state.num_steps + 1,
            last=taken,
            num_switches=state.num_switches + is_switch,
        )
        if corrects and action in actions:
            state = book_depths(state, action.drafter, outcome)
        windows = outcome.windows
        if windows is not None and windows.count:
            state = learn(state, taken, windows)
        if outcome.num_ended and begins_anew:
            state = begin(state)

        return state

    def book_depths(state, drafter: int, outcome: Outcome) -> SelectionState:
        hits = _KEPT * np.reshape(state.hits, table)
        expected = _KEPT * np.reshape(state.expected, table)

        pairs = zip(outcome.num_accepted, outcome.expected, strict=False)
        for accepted, chances in pairs:
            tried = np.arange(len(chances))
            hits[drafter, tried] += tried < accepted
            expected[drafter, tried] += chances

        return dataclasses.replace(
            state,
            hits=tuple(hits.ravel().tolist()),
            expected=tuple(expected.ravel().tolist()),
        )

    def corrected(state: SelectionState, windows: Windows) -> Windows:
        hits = np.reshape(state.hits, table)
        expected = np.reshape(state.expected, table)
        kept = np.minimum((hits + _PRIOR) / (expected + _PRIOR), 1.0)
        # The first token is judged as it is drafted.
        kept[:, :1] = 1.0
        return Windows(*(values * kept.T for values in windows))

    def learn(state: SelectionState, taken: int, windows: Windows) -> SelectionState:
        if corrects:
            windows = corrected(state, windows)
        values = value_of(state, windows).astype(float)
        losses = np.clip(1.0 - values / most(state), 0.0, 1.0)
        places = np.cumsum(sizes)[:-1]
        parts = np.split(np.asarray(state.learner), places)
        leaves = [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]
        learner = jax.tree.unflatten(structure, leaves)
        weights = np.asarray(state.weights)

        for row in losses:
            learner, weights = rule.observe(learner, row, weights)

        # Suggestions alone may have come first, which are none of the actions.
        own = values[:, taken] if taken >= 0 else values.mean(axis=1)
        total = np.asarray(state.values) + values.sum(axis=0)
        return dataclasses.replace(
            state,
            weights=tuple(weights.tolist()),
            learner=flat(learner),
            num_windows=state.num_windows + windows.count,
            values=tuple(total.tolist()),
            own_value=state.own_value + float(own.sum()),
        )

    def report(state: SelectionState) -> dict[str, Any]:
        return {
            "weights": list(state.weights),
            "action": state.last,
            "switches": state.num_switches,
            "windows": state.num_windows,
            "regret": max(state.values) - state.own_value,
        }

    return Controller(
        actions=actions,
        init=init,
        choose=choose,
        observe=observe,
        set_costs=set_costs if loss == "time" else None,
        has_costs=lambda state: bool(state.costs),
        resume=resume,
        is_judging=True,
        hears_ends=begins_anew,
        report=report,
    )


def check_choice(actions: tuple[Action, ...], loss: Loss) -> None:
    """Refuses actions that cannot be compared.

    Raises:
      ConfigError: There is one drafter, or there are several depths of them and no
        costs to weigh them by.
    """
    drafters = {action.drafter for action in actions}
    if len(drafters) < 2:
        raise ConfigError(
            "there is one drafter, and nothing to select; give several, as in --draft "
            "pool:shipped+ngram"
        )
    if len(actions) > len(drafters) and loss != "time":
        raise ConfigError(
            f"the loss {loss!r} cannot choose among depths, of which the deepest "
            f"always yields most; give one number of speculative tokens, or weigh "
            f"time, as in --select normalhedge:time"
        )


def relative_costs(seconds: Sequence[float]) -> np.ndarray:
    """What each takes, the cheapest one 1; all take 1 if no clock says so."""
    costs = np.asarray(seconds, float)
    least = costs.min()
    if not np.isfinite(costs).all() or least <= 0:
        return np.ones_like(costs)

    return costs / least


def set_costs(state: Any, seconds: Sequence[float]) -> Any:
    """The state that knows what actions take."""
    return dataclasses.replace(state, costs=tuple(map(float, seconds)))


def resume(fresh: Any, saved: Any) -> Any:
    """Goes on with what was learned of the same actions.

    Batches of another size cost something else, so costs are measured again.
    """
    sizes = lambda state: {
        name: len(value)
        for name, value in vars(state).items()
        if name != "costs" and isinstance(value, tuple)
    }
    if saved.names != fresh.names or sizes(saved) != sizes(fresh):
        return fresh
    if saved.num_rows != fresh.num_rows or len(saved.costs) != len(saved.names):
        return dataclasses.replace(saved, num_rows=fresh.num_rows, costs=fresh.costs)

    return saved
