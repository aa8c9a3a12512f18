# SPDX-License-Identifier: Apache-2.0
"""How deep to draft: the depth that yields most tokens a second, chosen every step.

A step that drafts K tokens emits `1 + a_1 + a_1 a_2 + ... + a_1 ... a_K` tokens in
expectation, where `a_d` is the chance that the d-th token is accepted if those before
it were, and costs what was measured once, before serving. Where drafts are wrong, or
verification is dear, K = 0 is best: plain decoding.

The chances are counted and forgotten at a constant rate, whether anything was drafted
or not, and where nothing is remembered they are hopeful. So K = 0 is left again, for a
step, every so many steps, the more seldom the surer it was.

Everything is a function of what was accepted before: of stored state, never of the
clock nor of what the step in question drafts. So output stays exact.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ospec_jax.control.base import Action, Controller, Outcome
from ospec_jax.control.contexts import Parts

_HOPE = 0.9
"""Chance of a first drafted token of which nothing is known."""
_HOPE_TRIALS = (1.0, 4.0)
"""Trials that the hope weighs, for the first token and for later ones. Later tokens
are hoped to be accepted as often as those before them."""
_WORTH = 16.0
"""First tokens tried that what a request's kind begins with is worth at most."""
_MANY_TRIALS = 1e6


@dataclasses.dataclass(frozen=True)
class DepthState:
    """What is known of costs and chances; JSON holds it exactly.

    Attributes:
      depths: To choose from.
      num_rows: Of the batches that are decoded.
      costs: Seconds of a step of each depth; empty until measured.
      hits: Times that the first, second, ... drafted token was accepted.
      trials: Times that it was verified, all before it having been accepted.
    """

    depths: tuple[int, ...]
    num_rows: int
    costs: tuple[float, ...] = ()
    hits: tuple[float, ...] = ()
    trials: tuple[float, ...] = ()


def most_tokens_a_second(
    actions: tuple[Action, ...], num_steps_remembered: float = 200.0
) -> Controller:
    """Builds the rule described above.

    Args:
      actions: Chains of ascending depth.
      num_steps_remembered: After so many steps evidence weighs 1 / e of what it did.
    """
    depths = tuple(action.tree.num_steps for action in actions)
    kept = float(np.exp(-1.0 / num_steps_remembered))

    def init(num_rows: int) -> DepthState:
        nothing = (0.0,) * max(depths)
        return DepthState(depths, num_rows, hits=nothing, trials=nothing)

    def choose(state: DepthState, rows) -> Action:
        if not state.costs:
            return actions[-1]

        # `[d + 1]` by depth, of which some are on the menu.
        emitted = expected_emitted(chances(state))[list(depths)]
        # A clock may say anything, even that a step takes nothing.
        with np.errstate(all="ignore"):
            rates = emitted / np.asarray(state.costs)

        return actions[int(np.argmax(rates))]

    def observe(state: DepthState, action: Action, outcome: Outcome) -> DepthState:
        accepted = np.asarray(outcome.num_accepted, int)[:, None]
        depth = np.arange(1, len(state.hits) + 1)
        # A token is tried if all before it were accepted: the chances are conditional
        # ones, so that depths which are rarely reached are judged by what reached them.
        is_tried = (accepted >= depth - 1) & (depth <= action.tree.num_steps)
        is_hit = is_tried & (accepted >= depth)

        # Plain steps fade the evidence, too: that is what brings drafting back.
        def book(old, new):
            return tuple((kept * np.asarray(old) + np.sum(new, axis=0)).tolist())

        return dataclasses.replace(
            state, hits=book(state.hits, is_hit), trials=book(state.trials, is_tried)
        )

    def resume(fresh: DepthState, saved: DepthState) -> DepthState:
        # Other depths, or batches of another size, have other costs.
        is_same = (saved.depths, saved.num_rows) == (fresh.depths, fresh.num_rows)
        return saved if is_same else fresh

    def set_costs(state: DepthState, seconds: Sequence[float]) -> DepthState:
        return dataclasses.replace(state, costs=tuple(seconds))

    return Controller(
        actions=actions,
        init=init,
        choose=choose,
        observe=observe,
        set_costs=set_costs,
        has_costs=lambda state: bool(state.costs),
        resume=resume,
    )


def chances(state: DepthState) -> np.ndarray:
    """Chance of each drafted token to be accepted if those before it were, `[d]`."""
    found = []
    hope = _HOPE
    weight = _HOPE_TRIALS[0]

    for hits, trials in zip(state.hits, state.trials, strict=True):
        # Each depth's estimate is the prior of the next: late tokens are seldom tried.
        hope = (hits + weight * hope) / (trials + weight)
        found.append(hope)
        weight = _HOPE_TRIALS[1]

    return np.asarray(found)


def expected_emitted(chances: np.ndarray) -> np.ndarray:
    """Tokens that a step emits, by how many it drafts: `[d + 1]`, 1 without drafts."""
    return 1.0 + np.concatenate([[0.0], np.cumsum(np.cumprod(chances))])


def _begun(shared: DepthState) -> DepthState:
    """What a key's requests begin with: a share of what was tried on all."""
    share = min(1.0, _WORTH / max(shared.trials[0], 1.0))
    shrunk = lambda counts: tuple(share * count for count in counts)
    return dataclasses.replace(
        shared, hits=shrunk(shared.hits), trials=shrunk(shared.trials)
    )


def _together(shared: DepthState, found: Sequence[DepthState]) -> DepthState:
    """One whose expected tokens are the mean of several: a step drafts for all rows."""
    survival = np.mean([np.cumprod(chances(one)) for one in found], axis=0)
    before = np.concatenate([[1.0], survival[:-1]])
    # So many trials that nothing is left of hope.
    trials = np.full(len(survival), _MANY_TRIALS)
    hits = trials * survival / before
    return dataclasses.replace(
        shared, hits=tuple(hits.tolist()), trials=tuple(trials.tolist())
    )


PARTS_OF_DEPTHS = Parts(
    DepthState, _begun, _together, lambda outcome: bool(outcome.num_accepted)
)
"""What `control.contexts.by_key` must know of this rule's states."""
