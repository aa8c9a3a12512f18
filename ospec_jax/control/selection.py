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
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.control.base import Action, Context, Controller, Outcome
from ospec_jax.control.contexts import Parts
from ospec_jax.control.lengths import Estimator, Windows, expected_lengths
from ospec_jax.control.weighting import Meta

_KEPT = float(np.exp(-1 / 500))
"""Of what drafting has shown of depths, at each step."""
_PRIOR = 8.0
"""Tokens accepted as they were judged, with which each depth of a drafter begins."""

WORTH = 8
"""Windows that what a request's kind begins with is worth at most. Replayed with 0 to
512: where drafters differ much the fewer the better, where they hardly do 32 and more.
"""

SETTLED = 128
"""Windows after which a selection knows enough to look seldom. Replayed with seven
experts by domain, 128 and more come to the same, 64 and less to fewer tokens a pass."""
ONE_IN = 16
"""Answers, of which a selection that looks seldom has one judged."""

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
    is_seldom: bool = False,
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
      is_seldom: Once there are `SETTLED` windows, have one answer in `ONE_IN` judged,
        and the others run over by the drafter alone that is chosen when they begin.
      seed: Of the draws. They have nothing to do with those of answers.

    Raises:
      ConfigError: There is nothing to choose from, or depths without their costs.
    """
    check_choice(actions, loss)
    num_actions = len(actions)
    measure = _Measure(actions, loss, estimator)
    first = rule.init(num_actions)

    def begin(state: SelectionState) -> SelectionState:
        even = (1.0 / num_actions,) * num_actions
        return dataclasses.replace(state, weights=even, learner=_flat(first))

    def init(num_rows: int) -> SelectionState:
        nothing = SelectionState(tuple(map(str, actions)), num_rows, (), ())
        counts = (0.0,) * (measure.table[0] * measure.table[1])
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

    def observe(
        state: SelectionState, action: Action, outcome: Outcome
    ) -> SelectionState:
        taken = actions.index(action) if action in actions else state.last
        state = _switched(state, taken)
        if corrects and action in actions:
            state = _book_depths(state, measure.table, action.drafter, outcome)
        windows = outcome.windows
        if windows is not None and windows.num_windows:
            if corrects:
                windows = _corrected(state, measure.table, windows)
            values = measure.values(state, windows).astype(float)
            state = _booked(state, values, taken)
            state = _reweighted(state, rule, first, values / measure.most(state))
        if outcome.num_ended and begins_anew:
            state = begin(state)

        return state

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
        report=_report,
        rests=_is_settled if is_seldom else None,
    )


def _is_settled(state: SelectionState, context: Context, ordinal: int) -> bool:
    """Whether an answer need not be judged."""
    return state.num_windows >= SETTLED and ordinal % ONE_IN != 0


@dataclasses.dataclass(frozen=True)
class _Measure:
    """What evidence says that actions are worth."""

    actions: tuple[Action, ...]
    loss: Loss
    estimator: Estimator

    @property
    def drafters(self) -> list[int]:
        """The actions' drafters, by number."""
        return [action.drafter for action in self.actions]

    @property
    def depths(self) -> list[int]:
        """The actions' depths."""
        return [action.tree.num_steps for action in self.actions]

    @property
    def table(self) -> tuple[int, int]:
        """Shape of figures by drafter and depth."""
        return max(self.drafters) + 1, max(self.depths)

    def values(self, state: SelectionState, windows: Windows) -> np.ndarray:
        """What each window says that each action is worth, `[w, num_actions]`."""
        if self.loss == "acceptance":
            return windows.chances[:, 0, self.drafters]

        lengths = expected_lengths(windows, self.estimator)
        return self._weighed(state, lengths[:, self.drafters, self.depths])

    def most(self, state: SelectionState) -> float:
        """The most that a window could say."""
        if self.loss == "acceptance":
            return 1.0

        return float(np.max(self._weighed(state, np.asarray(self.depths) + 1.0)))

    def _weighed(self, state: SelectionState, lengths: np.ndarray) -> np.ndarray:
        """Lengths by action, in the units of the loss."""
        if self.loss == "time":
            return lengths / relative_costs(state.costs)

        return lengths


def _flat(tree: Any) -> tuple[float, ...]:
    """Arrays' numbers one behind the other: a checkpoint keeps flat tuples."""
    return tuple(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).tolist()
    )


def _unflat(numbers: Sequence[float], like: Any) -> Any:
    """The arrays of such numbers, in the shapes of others."""
    leaves, structure = jax.tree.flatten(like)
    shapes = [np.shape(leaf) for leaf in leaves]
    places = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(np.asarray(numbers), places)
    found = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    return jax.tree.unflatten(structure, found)


def _switched(state: SelectionState, taken: int) -> SelectionState:
    """Counts a step, and whether another action was taken than before."""
    is_switch = taken != state.last and state.last >= 0
    return dataclasses.replace(
        state,
        num_steps=state.num_steps + 1,
        last=taken,
        num_switches=state.num_switches + is_switch,
    )


def _book_depths(
    state: SelectionState, table: tuple[int, int], drafter: int, outcome: Outcome
) -> SelectionState:
    """Counts what was accepted of a drafter's drafts, and what should have been."""
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


def _corrected(
    state: SelectionState, table: tuple[int, int], windows: Windows
) -> Windows:
    """Evidence, judged down by what drafting has shown."""
    hits = np.reshape(state.hits, table)
    expected = np.reshape(state.expected, table)
    kept = np.minimum((hits + _PRIOR) / (expected + _PRIOR), 1.0)
    # The first token is judged as it is drafted.
    kept[:, :1] = 1.0
    return Windows(*(values * kept.T for values in windows))


def _booked(state: SelectionState, values: np.ndarray, taken: int) -> SelectionState:
    """Adds up what windows said that actions are worth, `[w, num_actions]`."""
    # Suggestions alone may have come first, which are none of the actions.
    own = values[:, taken] if taken >= 0 else values.mean(axis=1)
    total = np.asarray(state.values) + values.sum(axis=0)
    return dataclasses.replace(
        state,
        num_windows=state.num_windows + len(values),
        values=tuple(total.tolist()),
        own_value=state.own_value + float(own.sum()),
    )


def _reweighted(
    state: SelectionState, rule: Meta, first: Any, shares: np.ndarray
) -> SelectionState:
    """Weights actions anew, a round of the rule for each window.

    Args:
      first: What the rule remembers at first.
      shares: `[w, num_actions]` of what is possible at best.
    """
    learner = _unflat(state.learner, first)
    weights = np.asarray(state.weights)

    for row in np.clip(1.0 - shares, 0.0, 1.0):
        learner, weights = rule.observe(learner, row, weights)

    return dataclasses.replace(
        state, weights=tuple(weights.tolist()), learner=_flat(learner)
    )


def _report(state: SelectionState) -> dict[str, Any]:
    return {
        "weights": list(state.weights),
        "action": state.last,
        "switches": state.num_switches,
        "windows": state.num_windows,
        "regret": max(state.values) - state.own_value,
    }


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


def parts_of_selections(worth: float = WORTH) -> Parts:
    """What `control.contexts.by_key` must know of selections.

    Where rows of several keys are decoded together, their weights' mean decides: one
    drafter drafts for all rows.

    Args:
      worth: Windows that what a key begins with is worth at most.
    """
    return Parts(
        SelectionState,
        functools.partial(begun, worth=worth),
        _with_mean_weights,
        lambda outcome: outcome.windows is not None and outcome.windows.num_windows > 0,
    )


def begun(shared: SelectionState, worth: float) -> SelectionState:
    """The selection that a key begins with.

    What rules remember are sums over windows, so a share of them is what fewer windows
    would have left. NormalHedge's weights are the same for any share.
    """
    share = min(1.0, worth / max(shared.num_windows, 1))
    return dataclasses.replace(
        shared,
        learner=tuple(share * number for number in shared.learner),
        num_windows=0,
        values=(0.0,) * len(shared.values),
        own_value=0.0,
        num_steps=0,
        last=-1,
        num_switches=0,
    )


def _with_mean_weights(
    shared: SelectionState, found: Sequence[SelectionState]
) -> SelectionState:
    """The shared selection, with the weights on which those of several keys agree."""
    weights = np.mean([one.weights for one in found], axis=0)
    return dataclasses.replace(shared, weights=tuple(weights.tolist()))
