# SPDX-License-Identifier: Apache-2.0
"""Bandits over a pool's drafters: they look only at what the one that drafted achieved.

The baselines of `control.selection`, under the same interface. A step's reward is the
share of its draft that was accepted, in [0, 1], or with the loss `time` its tokens a
second as a share of the most that any action could yield; in a batch the mean over
rows. They need no judging, so they choose among drafters of any kind.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ospec_jax.control.base import Action, Controller, Outcome
from ospec_jax.control.selection import (
    Loss,
    check_choice,
    relative_costs,
    resume,
    set_costs,
)


@dataclasses.dataclass(frozen=True)
class BanditState:
    """What is known of each action; JSON holds it exactly.

    Attributes:
      names: Of the actions.
      num_rows: Of the batches that are decoded.
      counts: Steps that each of them ran.
      rewards: Their sum, for each action.
      losses: Likewise of what they lost, each divided by the chance that the action
        had to be taken; for rules that draw.
      chances: That the actions had before the newest outcome was known, with which the
        step that is heard of next was drawn: the host is one step ahead. Empty at
        first.
      costs: Seconds of a step of each action; empty until measured.
      num_steps: That were heard of.
      last: Number of the action that was taken last; -1 before the first.
      num_switches: From one action to another.
    """

    names: tuple[str, ...]
    num_rows: int
    counts: tuple[float, ...]
    rewards: tuple[float, ...]
    losses: tuple[float, ...]
    chances: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()
    num_steps: int = 0
    last: int = -1
    num_switches: int = 0

    @property
    def num_heard(self) -> int:
        """Steps since it began, or began anew."""
        return int(sum(self.counts))


Law = Callable[[BanditState, np.random.Generator], np.ndarray]
"""The chance of each action to be taken next; a rule that is sure gives one of them
all."""


def ucb(state: BanditState, rng: np.random.Generator) -> np.ndarray:
    """UCBSpec (BanditSpec, arXiv 2505.15141, algorithm 4), with its confidence 1/2.

    Rewards are the paper's less one, over the draft's depth L, so the bonus is the
    paper's over L. The notes that it was implemented from restored its root, which was
    lost in the text that they were made from.
    """
    counts = np.asarray(state.counts)
    if not counts.all():
        return _one(counts.argmin(), len(counts))

    rounds = len(counts) * (state.num_heard + 1.0) ** 2
    spread = 1 + 2 * np.log(rounds * np.sqrt(1 + counts) / 0.5)
    bonus = 0.5 * np.sqrt((1 + counts) / counts**2 * spread)

    return _one(np.argmax(state.rewards / counts + bonus), len(counts))


def exp3(state: BanditState, rng: np.random.Generator) -> np.ndarray:
    """EXP3Spec (the same paper, algorithm 5)."""
    count = len(state.counts)
    rate = np.sqrt(np.log(count) / ((state.num_heard + 1) * count))
    losses = np.asarray(state.losses)
    weights = np.exp(-rate * (losses - losses.min()))

    return weights / weights.sum()


def thompson(state: BanditState, rng: np.random.Generator) -> np.ndarray:
    """The largest of means drawn from normal laws (Agrawal and Goyal, 1209.3353)."""
    counts = np.asarray(state.counts)
    drawn = rng.normal(state.rewards / (counts + 1), 1 / np.sqrt(counts + 1))
    return _one(np.argmax(drawn), len(counts))


def meta_sd(
    state: BanditState, rng: np.random.Generator, beta: float = 1.0
) -> np.ndarray:
    """MetaSD-UCB (arXiv 2604.05417): UCB1 on how well draft and target agree.

    Its reward is `agreement`, not the share that was accepted.

    Args:
      beta: Times UCB1's bonus. The paper's own was in no text at hand; this is UCB1's.
    """
    counts = np.asarray(state.counts)
    if not counts.all():
        return _one(counts.argmin(), len(counts))

    bonus = np.sqrt(2 * np.log(state.num_heard + 1.0) / counts)
    return _one(np.argmax(state.rewards / counts + beta * bonus), len(counts))


def epsilon_greedy(
    state: BanditState, rng: np.random.Generator, epsilon: float = 0.1
) -> np.ndarray:
    """The largest mean so far, and every tenth step any action."""
    counts = np.asarray(state.counts)
    if not counts.all():
        return _one(counts.argmin(), len(counts))

    best = _one(np.argmax(state.rewards / counts), len(counts))
    return (1 - epsilon) * best + epsilon / len(counts)


def _one(index: Any, count: int) -> np.ndarray:
    return (np.arange(count) == index).astype(float)


Reward = Callable[[np.ndarray, float], np.ndarray]
"""What drafts of a depth are worth in [0, 1], by how much of them was accepted."""


def share_accepted(accepted: np.ndarray, depth: float) -> np.ndarray:
    """BanditSpec's reward: the accepted share of each draft, `[rows]`.

    MetaSD calls it block efficiency.
    """
    return accepted / max(depth, 1.0)


def agreement(accepted: np.ndarray, depth: float) -> np.ndarray:
    """The share of right tokens among those that each draft got to, `[rows]`.

    It stands for MetaSD's reward, the mean of `1 - TV(p, q)` over a draft's tokens: of
    each token that the draft got to, its acceptance is one draw with that chance. What
    lies behind the first wrong token is not looked at here; the paper's reward is.
    """
    reached = np.minimum(accepted + 1.0, max(depth, 1.0))
    return accepted / reached


def bandit(
    actions: tuple[Action, ...],
    law: Law,
    *,
    reward: Reward = share_accepted,
    loss: Loss = "length",
    begins_anew: bool = False,
    seed: int = 0,
) -> Controller:
    """Builds the controller.

    Args:
      law: `ucb`, `exp3`, `meta_sd`, `thompson`, `epsilon_greedy`.
      reward: What a draft is worth, for the loss `length`.
      loss: `length` or `time`.
      begins_anew: Forget everything at the end of an answer, as BanditSpec does.
      seed: Of the draws. They have nothing to do with those of answers.

    Raises:
      ConfigError: There is nothing to choose from, or depths without their costs.
    """
    check_choice(actions, loss)
    num_actions = len(actions)
    depths = np.asarray([action.tree.num_steps for action in actions], float)
    nothing = (0.0,) * num_actions

    def init(num_rows: int) -> BanditState:
        names = tuple(map(str, actions))
        return BanditState(names, num_rows, nothing, nothing, nothing)

    def chances_of(state: BanditState) -> np.ndarray:
        return law(state, np.random.default_rng((seed, state.num_steps, 0)))

    def choose(state: BanditState, rows) -> Action:
        rng = np.random.default_rng((seed, state.num_steps, 1))
        return actions[rng.choice(num_actions, p=chances_of(state))]

    def reward_of(state: BanditState, number: int, outcome: Outcome) -> float:
        if loss == "length":
            counts = np.asarray(outcome.num_accepted, float)
            return float(np.mean(reward(counts, depths[number])))

        accepted = float(np.mean(outcome.num_accepted))
        costs = relative_costs(state.costs)
        return (1 + accepted) / costs[number] / np.max((depths + 1) / costs)

    def observe(state: BanditState, action: Action, outcome: Outcome) -> BanditState:
        # A step of suggestions alone says nothing about the drafters.
        if outcome.num_accepted and action in actions:
            number = actions.index(action)
            earned = reward_of(state, number, outcome)
            state = _booked(state, number, earned, chances_of(state))
        if outcome.num_ended and begins_anew:
            state = dataclasses.replace(
                state, counts=nothing, rewards=nothing, losses=nothing, chances=()
            )

        return state

    return Controller(
        actions=actions,
        init=init,
        choose=choose,
        observe=observe,
        set_costs=set_costs if loss == "time" else None,
        has_costs=lambda state: bool(state.costs),
        resume=_resume,
        hears_ends=begins_anew,
        report=_report,
    )


def _booked(
    state: BanditState, number: int, reward: float, chances: np.ndarray
) -> BanditState:
    """Counts a step and its reward.

    Args:
      number: Of the action that was taken.
      chances: That the actions have before this is known.
    """
    drawn_with = np.asarray(state.chances or chances)[number]
    is_it = _one(number, len(chances))
    lost = is_it * (1.0 - reward) / max(drawn_with, 1e-3)
    added = lambda old, new: tuple((np.asarray(old) + new).tolist())
    is_switch = number != state.last and state.last >= 0

    return dataclasses.replace(
        state,
        counts=added(state.counts, is_it),
        rewards=added(state.rewards, is_it * reward),
        losses=added(state.losses, lost),
        chances=tuple(chances.tolist()),
        num_steps=state.num_steps + 1,
        last=number,
        num_switches=state.num_switches + is_switch,
    )


def _report(state: BanditState) -> dict[str, Any]:
    counts = np.maximum(state.counts, 1)
    means = (np.asarray(state.rewards) / counts).tolist()
    return {
        "means": means,
        "action": state.last,
        "switches": state.num_switches,
    }


def _resume(fresh: BanditState, saved: BanditState) -> BanditState:
    # Chances are empty at first, and their number says nothing about the actions.
    state = resume(fresh, dataclasses.replace(saved, chances=()))
    return (
        state if state is fresh else dataclasses.replace(state, chances=saved.chances)
    )
