# SPDX-License-Identifier: Apache-2.0
"""Whose text is kept: names of scopes, the numbers that arrays know them by, and room.

A scope is a key's name, or `key/tenant`. There are few numbers, so that arrays over
them are small and what is kept of endless tenants has a bound: where none is free, the
scope that was not heard of for longest is forgotten, one of the asking key's own if
that key has its share of numbers. Number 0 is nobody in particular: scripts, and
requests without a key.

What is kept has bounded room. A key may fill as much of it as if there were only as
many others as have been heard of, up to three; likewise a tenant, of its key's room. So
one alone has all of it, and a flood of one leaves three quarters to others at least.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.types import Owner

MAX_SCOPES = 256
"""Scopes that are told apart at once, beside nobody in particular."""
NOBODY = 0
"""Number of nobody in particular."""
_MAX_SHARERS = 4
"""Parts that room is divided into, at most."""


def key_of(name: str) -> str:
    """The key that a scope belongs to."""
    return name.split("/", 1)[0]


def is_within(name: str, scope: str) -> bool:
    """Whether a scope is another one, or a tenant of that."""
    return name == scope or name.startswith(f"{scope}/")


class Scope(NamedTuple):
    """A scope that was heard of.

    Attributes:
      has_taught: Learning that is shared by all has learned from it.
    """

    name: str
    number: int
    has_taught: bool = False


class Enrolled(NamedTuple):
    """A scope that has a number now.

    Attributes:
      scopes: All that are known with it.
      dropped: One that was forgotten for it: what was kept of its text must go, too.
    """

    scopes: "Scopes"
    number: int
    dropped: Scope | None = None


@dataclasses.dataclass(frozen=True)
class Scopes:
    """Scopes by name.

    Attributes:
      known: The one that was not heard of for longest comes first.
    """

    known: tuple[Scope, ...] = ()

    @classmethod
    def from_json(cls, values: Iterable) -> "Scopes":
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: It is nothing of that kind.
        """
        try:
            known = tuple(Scope(str(a), int(b), bool(c)) for a, b, c in values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{values!r:.60} are no names of scopes") from error

        numbers = [one.number for one in known]
        names = {one.name for one in known}
        is_one_to_one = len(set(numbers)) == len(names) == len(known)
        if not is_one_to_one or not all(0 < n <= MAX_SCOPES for n in numbers):
            raise ConfigError(
                f"scopes have the numbers {numbers[:8]}; each has one of its own, from "
                f"1 to {MAX_SCOPES}"
            )

        return cls(known)

    def to_json(self) -> list[list]:
        """For a checkpoint."""
        return [list(one) for one in self.known]

    def find(self, name: str) -> Scope | None:
        """The scope of a name, if it was heard of."""
        return next((one for one in self.known if one.name == name), None)

    def within(self, scope: str) -> tuple[Scope, ...]:
        """A scope and its tenants, as far as they were heard of."""
        return tuple(one for one in self.known if is_within(one.name, scope))

    def enroll(self, name: str, busy: Collection[int] = ()) -> Enrolled:
        """Gives a scope a number, or finds the one that it has.

        Args:
          name: Empty is nobody in particular, who has number 0.
          busy: Numbers that rows are decoded under, which nobody else may get.
        """
        if not name:
            return Enrolled(self, NOBODY)

        found = self.find(name)
        if found is not None:
            others = tuple(one for one in self.known if one is not found)
            return Enrolled(Scopes((*others, found)), found.number)

        taken = {one.number for one in self.known}
        free = [n for n in range(1, MAX_SCOPES + 1) if n not in taken and n not in busy]
        dropped = None
        known = self.known
        if not free:
            dropped = self._least_missed(name, busy)
            known = tuple(one for one in known if one is not dropped)
            free = [dropped.number]

        return Enrolled(Scopes((*known, Scope(name, free[0]))), free[0], dropped)

    def _least_missed(self, name: str, busy: Collection[int]) -> Scope:
        """Who makes room for a new scope."""
        idle = [one for one in self.known if one.number not in busy]
        if not idle:
            raise ConfigError(
                f"all {MAX_SCOPES} scopes are being answered; decode fewer at once"
            )

        key = key_of(name)
        own = [one for one in idle if key_of(one.name) == key]
        has_share = len(own) >= MAX_SCOPES * _share(self._keys | {key})
        return own[0] if has_share else idle[0]

    @property
    def _keys(self) -> set[str]:
        return {key_of(one.name) for one in self.known}

    def without(self, gone: Collection[Scope]) -> "Scopes":
        """All but some."""
        return Scopes(tuple(one for one in self.known if one not in gone))

    def having_taught(self, number: int) -> "Scopes":
        """Notes that what all share has learned from a scope."""
        return Scopes(
            tuple(
                one._replace(has_taught=True) if one.number == number else one
                for one in self.known
            )
        )

    def owner_of(self, number: int) -> Owner:
        """Whose an answer is, and its room."""
        # Who has no key belongs with the tenants of those who have none, either.
        name = next((one.name for one in self.known if one.number == number), "")
        key = key_of(name)
        kin = {one.number for one in self.known if key_of(one.name) == key}
        if not key:
            kin.add(NOBODY)

        kin_share = _share(self._keys | {key})
        return make_owner(number, {*kin, number}, kin_share * _share(kin), kin_share)


def _share(sharers: Collection) -> float:
    """What one of them may take."""
    return 1.0 / min(max(len(sharers), 1), _MAX_SHARERS)


def make_owner(
    number: int, kin: Collection[int], share: float = 1.0, kin_share: float = 1.0
) -> Owner:
    """An `Owner`; see there."""
    # The host's: whatever is jitted takes them as they are.
    values: Any = (
        np.int32(number),
        as_mask(kin),
        np.float32(share),
        np.float32(kin_share),
    )
    return Owner(*values)


def nobody() -> Owner:
    """Nobody in particular, with all room."""
    return make_owner(NOBODY, {NOBODY})


def as_mask(numbers: Collection[int]) -> np.ndarray:
    """Which scopes, `[MAX_SCOPES + 1]`, by their numbers."""
    mask = np.zeros(MAX_SCOPES + 1, bool)
    mask[list(numbers)] = True
    return mask
