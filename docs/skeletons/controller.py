# SPDX-License-Identifier: Apache-2.0
"""A controller of your own: copy this file, and change `choose` and `observe`.

    session = Session(
        target, draft, tree=TreeConfig.auto(depths=(0, 1, 3)), controller=back_off
    )

The rule drafts one depth deeper once it reads of a step of which every row accepted
all, and one shallower for one of which no row accepted anything. (The host runs one
step ahead: by then another one was chosen.) From plain decoding, which tells nothing of
the draft, it tries the next depth again after a while.

What a controller chooses changes the speed, never the tokens: it sees what was accepted
before, and nothing of the step that it chooses.
"""

import dataclasses
from collections.abc import Sequence

from ospec_jax.control.base import Action, Controller, Outcome, Row


@dataclasses.dataclass(frozen=True)
class BackOffState:
    """What the rule remembers; a checkpoint keeps it as JSON.

    Attributes:
      position: Of the action to take next, among those that the rule was built for.
      num_plain: Plain steps since something was drafted.
    """

    position: int
    num_plain: int = 0


def back_off(actions: tuple[Action, ...], patience: int = 8) -> Controller:
    """Builds the rule.

    Args:
      actions: Chains of ascending depth, from the session's tree.
      patience: Plain steps before something is drafted again.
    """
    deepest = len(actions) - 1

    def init(num_rows: int) -> BackOffState:
        return BackOffState(position=deepest)

    def choose(state: BackOffState, rows: Sequence[Row]) -> Action:
        return actions[state.position]

    def observe(state: BackOffState, action: Action, outcome: Outcome) -> BackOffState:
        # Rows that the step ended are not in the outcome: it may be empty.
        if not outcome.num_accepted:
            return state

        depth = action.tree.num_steps
        if depth == 0:
            num_plain = state.num_plain + 1
            if num_plain < patience:
                return dataclasses.replace(state, num_plain=num_plain)
            return BackOffState(min(state.position + 1, deepest))

        if min(outcome.num_accepted) == depth:
            return BackOffState(min(state.position + 1, deepest))
        if max(outcome.num_accepted) == 0:
            return BackOffState(max(state.position - 1, 0))
        return state

    def resume(fresh: BackOffState, saved: BackOffState) -> BackOffState:
        # The checkpoint may be of a session with more actions than this one has.
        return saved if saved.position <= deepest else fresh

    return Controller(actions, init, choose, observe, resume=resume)
