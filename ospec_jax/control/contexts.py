# SPDX-License-Identifier: Apache-2.0
"""Weights of their own for requests of one kind, which begin from those of all.

Which drafter is best depends on what is asked, and requests say something about that
before their first token: whose they are, of which domain, how they begin. Each such key
has a selection of its own, that learns from its requests alone. Before it has heard of
any it is the shared one, which learns from all; it then begins with what that has
learned, worth no more than some windows, so that evidence of its own soon counts.

No paper's: HedgeSpec has one learner for all, and an offline classifier of prompts to
compare with (`replay.router`), which must be trained beforehand and knows nothing else.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ospec_jax.config import from_dict
from ospec_jax.control.base import Action, Context, Controller, Outcome, Row
from ospec_jax.control.selection import SelectionState

MAX_KEYS = 64
"""That are told apart; the one that was not heard of for longest goes."""
OPENING = 32
"""Tokens by which openings are told apart. Chosen, not measured: a chat template's
default system prompt is shorter, that of most services longer."""
WORTH = 8
"""Windows that what a key begins with is worth at most. Replayed with 0 to 512: where
drafters differ much the fewer the better, where they hardly do 32 and more."""

KeyOf = Callable[[Context], str]

KEYS: dict[str, KeyOf] = {
    "scope": lambda context: f"scope {context.scope}" if context.scope else "",
    "domain": lambda context: f"domain {context.domain}" if context.domain else "",
    "opening": lambda context: f"opening {context.opening}" if context.opening else "",
}
"""What requests are told apart by; a request without such a key has the shared
weights."""


def opening_of(prompt_ids: Sequence[int]) -> str:
    """Names how a prompt begins: a hash of its first `OPENING` tokens."""
    first = np.asarray(prompt_ids[:OPENING], "<i4")
    return hashlib.blake2b(first.tobytes(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class KeyedState:
    """What was learned from all requests, and from those of each key.

    Attributes:
      keys: That were learned from last, the newest at the end.
      own: What was learned of each.
    """

    shared: SelectionState
    keys: tuple[str, ...] = ()
    own: tuple[SelectionState, ...] = ()


def by_key(
    selection: Controller,
    key_of: KeyOf,
    max_keys: int = MAX_KEYS,
    worth: float = WORTH,
    begin: "Callable[[KeyedState, str], SelectionState] | None" = None,
) -> Controller:
    """Makes a selection one that has weights of its own for each key.

    Where rows of several keys are decoded together, their weights' mean decides: one
    drafter drafts for all rows.

    Args:
      selection: From `control.selection.select`.
      key_of: One of `KEYS`, or another; an empty key stands for none.
      worth: Windows that what a key begins with is worth at most.
      begin: What a key of which nothing is known begins with; by default the shared
        selection, and `begun` from it once there is evidence.
    """

    def found_for(state: KeyedState, key: str) -> SelectionState:
        if begin is None or not key:
            return state.shared

        return begin(state, key)

    def init(num_rows: int) -> KeyedState:
        return KeyedState(selection.init(num_rows))

    def choose(state: KeyedState, rows: Sequence[Row]) -> Action:
        known = dict(zip(state.keys, state.own, strict=True))
        keys = [key_of(row.context) for row in rows]
        found = [known.get(key) or found_for(state, key) for key in keys]
        if not found:
            return selection.choose(state.shared, rows)
        if all(one is found[0] for one in found):
            return selection.choose(found[0], rows)

        return selection.choose(_with_mean_weights(state.shared, found), rows)

    def observe(state: KeyedState, action: Action, outcome: Outcome) -> KeyedState:
        own = dict(zip(state.keys, state.own, strict=True))
        for context, part in outcome.parts:
            key = key_of(context)
            has_evidence = part.windows is not None and part.windows.count > 0
            if not key or (key not in own and not has_evidence):
                continue

            before = own.pop(key, None) or begun(found_for(state, key), worth)
            # Put in anew, so that it is the newest.
            own[key] = selection.observe(before, action, part)

        return KeyedState(
            selection.observe(state.shared, action, outcome),
            tuple(own)[-max_keys:],
            tuple(own.values())[-max_keys:],
        )

    def set_costs(state: KeyedState, seconds: Sequence[float]) -> KeyedState:
        assert selection.set_costs is not None
        told = [selection.set_costs(one, seconds) for one in (state.shared, *state.own)]
        return KeyedState(told[0], state.keys, tuple(told[1:]))

    def resume(fresh: KeyedState, saved: KeyedState) -> KeyedState:
        goes_on = lambda old: selection.resume(fresh.shared, old)
        if goes_on(saved.shared) is fresh.shared:
            return fresh

        return KeyedState(
            goes_on(saved.shared), saved.keys, tuple(map(goes_on, saved.own))
        )

    def forget(state: KeyedState, scopes: Collection[int] | None) -> KeyedState:
        if scopes is None:
            return KeyedState(state.shared)

        return without(state, {key_of(Context(scope=number)) for number in scopes})

    def report(state: KeyedState) -> dict[str, Any]:
        assert selection.report is not None
        return selection.report(state.shared) | {"keys": len(state.keys)}

    return selection._replace(
        init=init,
        choose=choose,
        observe=observe,
        set_costs=set_costs if selection.set_costs is not None else None,
        has_costs=lambda state: selection.has_costs(state.shared),
        resume=resume,
        report=report,
        forget=forget,
        pack=_pack,
        unpack=_unpack,
    )


def _with_mean_weights(
    shared: SelectionState, found: Sequence[SelectionState]
) -> SelectionState:
    """The shared selection, with the weights on which those of several keys agree."""
    weights = np.mean([one.weights for one in found], axis=0)
    return dataclasses.replace(shared, weights=tuple(weights.tolist()))


def without(state: KeyedState, gone: Collection[str]) -> KeyedState:
    """What is left when some keys are forgotten."""
    pairs = zip(state.keys, state.own, strict=True)
    kept = [(key, own) for key, own in pairs if key not in gone]
    return KeyedState(
        state.shared, tuple(key for key, _ in kept), tuple(own for _, own in kept)
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


def _pack(state: KeyedState) -> dict:
    # The shared state's fields stand on top: a checkpoint of another version of them
    # is known by their names.
    return {
        **dataclasses.asdict(state.shared),
        "keys": list(state.keys),
        "own": [dataclasses.asdict(one) for one in state.own],
    }


def _unpack(saved: dict) -> KeyedState:
    shared = {name: saved[name] for name in saved if name not in ("keys", "own")}
    read = lambda values: from_dict(SelectionState, values)
    return KeyedState(
        read(shared), tuple(saved["keys"]), tuple(map(read, saved["own"]))
    )
