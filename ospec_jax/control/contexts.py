# SPDX-License-Identifier: Apache-2.0
"""States of their own for requests of one kind, which begin from that of all.

Which drafter is best, and how deep it should draft, depends on what is asked, and
requests say something about that before their first token: whose they are, of which
domain, how they begin. Each such key has a state of its own, that learns from its
requests alone. Before it has heard of any it is the shared one, which learns from all;
it then begins with what that has learned, worth no more than a little evidence, so that
evidence of its own soon counts.

No paper's: HedgeSpec has one learner for all, and an offline classifier of prompts to
compare with (`replay.router`), which must be trained beforehand and knows nothing else.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from ospec_jax.config import from_dict
from ospec_jax.control.base import Action, Context, Controller, Outcome, Row

MAX_KEYS = 64
"""That are told apart; the one that was not heard of for longest goes."""
OPENING = 32
"""Tokens by which openings are told apart. Chosen, not measured: a chat template's
default system prompt is shorter, that of most services longer."""
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

    shared: Any
    keys: tuple[str, ...] = ()
    own: tuple[Any, ...] = ()


class Parts(NamedTuple):
    """What `by_key` must know of a controller's states.

    Attributes:
      kind: A frozen dataclass.
      begun: `state -> state`: the one that a key begins with, by what is known of all.
      together: `(shared, states) -> state`: one to choose by, for rows of several keys.
      has_evidence: `outcome -> bool`: whether a step said something of a row.
    """

    kind: type
    begun: Callable[[Any], Any]
    together: Callable[[Any, Sequence[Any]], Any]
    has_evidence: Callable[[Outcome], bool]


def by_key(
    rule: Controller,
    parts: Parts,
    key_of: KeyOf,
    max_keys: int = MAX_KEYS,
    begin: Callable[[KeyedState, str], Any] | None = None,
) -> Controller:
    """Makes a controller one that has a state of its own for each key.

    Args:
      rule: Such as those of `control.selection.select`, or of `control.depth`.
      parts: Of its states.
      key_of: One of `KEYS`, or another; an empty key stands for none.
      max_keys: The one that was not heard of for longest goes.
      begin: What a key of which nothing is known begins with; by default the shared
        state, and `parts.begun` of that once there is evidence.
    """

    def found_for(state: KeyedState, key: str) -> Any:
        if begin is None or not key:
            return state.shared

        return begin(state, key)

    def init(num_rows: int) -> KeyedState:
        return KeyedState(rule.init(num_rows))

    def choose(state: KeyedState, rows: Sequence[Row]) -> Action:
        known = dict(zip(state.keys, state.own, strict=True))
        keys = [key_of(row.context) for row in rows]
        found = [known.get(key) or found_for(state, key) for key in keys]
        if not found:
            return rule.choose(state.shared, rows)
        if all(one is found[0] for one in found):
            return rule.choose(found[0], rows)

        return rule.choose(parts.together(state.shared, found), rows)

    def observe(state: KeyedState, action: Action, outcome: Outcome) -> KeyedState:
        own = dict(zip(state.keys, state.own, strict=True))
        for context, part in outcome.parts:
            key = key_of(context)
            if not key or (key not in own and not parts.has_evidence(part)):
                continue

            before = own.pop(key, None) or parts.begun(found_for(state, key))
            # Put in anew, so that it is the newest.
            own[key] = rule.observe(before, action, part)

        return KeyedState(
            rule.observe(state.shared, action, outcome),
            tuple(own)[-max_keys:],
            tuple(own.values())[-max_keys:],
        )

    def set_costs(state: KeyedState, seconds: Sequence[float]) -> KeyedState:
        assert rule.set_costs is not None
        told = [rule.set_costs(one, seconds) for one in (state.shared, *state.own)]
        return KeyedState(told[0], state.keys, tuple(told[1:]))

    def resume(fresh: KeyedState, saved: KeyedState) -> KeyedState:
        goes_on = lambda old: rule.resume(fresh.shared, old)
        if goes_on(saved.shared) is fresh.shared:
            return fresh

        return KeyedState(
            goes_on(saved.shared), saved.keys, tuple(map(goes_on, saved.own))
        )

    def forget(state: KeyedState, scopes: Collection[int] | None) -> KeyedState:
        if scopes is None:
            return KeyedState(state.shared)

        return without(state, {key_of(Context(scope=number)) for number in scopes})

    def rests(state: KeyedState, context: Context, ordinal: int) -> bool:
        assert rule.rests is not None
        known = dict(zip(state.keys, state.own, strict=True))
        key = key_of(context)
        # A request of no kind is one of all; a kind that nobody has seen is looked at.
        found = known.get(key) if key else state.shared
        return found is not None and rule.rests(found, context, ordinal)

    def report(state: KeyedState) -> dict[str, Any]:
        assert rule.report is not None
        return rule.report(state.shared) | {"keys": len(state.keys)}

    def unpack(saved: dict) -> KeyedState:
        read = lambda values: from_dict(parts.kind, values)
        shared = {name: saved[name] for name in saved if name not in ("keys", "own")}
        return KeyedState(
            read(shared), tuple(saved["keys"]), tuple(map(read, saved["own"]))
        )

    return rule._replace(
        init=init,
        choose=choose,
        observe=observe,
        set_costs=set_costs if rule.set_costs is not None else None,
        has_costs=lambda state: rule.has_costs(state.shared),
        resume=resume,
        report=report if rule.report is not None else None,
        forget=forget,
        rests=rests if rule.rests is not None else None,
        pack=_pack,
        unpack=unpack,
    )


def without(state: KeyedState, gone: Collection[str]) -> KeyedState:
    """What is left when some keys are forgotten."""
    pairs = zip(state.keys, state.own, strict=True)
    kept = [(key, own) for key, own in pairs if key not in gone]
    return KeyedState(
        state.shared, tuple(key for key, _ in kept), tuple(own for _, own in kept)
    )


def _pack(state: KeyedState) -> dict:
    # The shared state's fields stand on top: a checkpoint of another version of them
    # is known by their names.
    return {
        **dataclasses.asdict(state.shared),
        "keys": list(state.keys),
        "own": [dataclasses.asdict(one) for one in state.own],
    }
