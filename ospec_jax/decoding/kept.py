# SPDX-License-Identifier: Apache-2.0
"""Caches of rows whose answers ended, for requests that begin with the same tokens.

A conversation's next turn repeats all that was said before. What the row of the turn
before holds of these tokens need not be computed again.

Each scope finds its own rows alone: how soon an answer comes would else tell one user
what another has asked.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ospec_jax.models.cache import KVCache
from ospec_jax.types import DecodeState, Draft, Feedback
from ospec_jax.typing import struct

# A draft's own output projection, which writes nothing into its cache.
_HEAD = "lm_head"


@struct
class RowCaches:
    """What rows hold of their tokens, slot by slot; see `types.DecodeState`."""

    cache: KVCache
    draft_cache: Any
    feedback: Feedback | None

    @classmethod
    def of(cls, state: DecodeState) -> "RowCaches":
        """Those of a state."""
        return cls(state.cache, state.draft_cache, state.feedback)

    @property
    def num_bytes(self) -> int:
        """That they take."""
        return sum(array.nbytes for array in jax.tree.leaves(self))


class KeptRow(NamedTuple):
    """A row whose answer has ended.

    Attributes:
      ids: Its prompt and answer. The caches hold all but the last one.
      caches: Of one row, in as few slots as are compiled for.
      only: The member of a pool that alone has run over it; None for all.
    """

    scope: int
    ids: np.ndarray
    caches: RowCaches
    num_bytes: int
    only: int | None = None


class Found(NamedTuple):
    """A row, kept or running, that begins as a prompt does.

    Attributes:
      num_tokens: That both have, less the last of these: a draft's entry for a token
        follows from the next one, too.
    """

    caches: RowCaches
    num_tokens: int


class KeptRows:
    """The newest rows, up to a number of bytes; who was not used for longest goes.

    Target and draft are kept together or not at all. A row is good as long as the
    parameters are served that its draft's entries were written with, from its first
    token on: learning a draft's output projection leaves them as they are, learning
    anything else of it drops all rows.

    Args:
      max_bytes: 0 keeps none; which drafts differ is told all the same.
      capacities: Cache slots of kept rows, ascending, of those that are compiled for.
    """

    def __init__(self, max_bytes: int, capacities: Sequence[int]):
        self.max_bytes = max_bytes
        self.capacities = tuple(capacities)
        # By age: the one that was used last stands last.
        self._rows: list[KeptRow] = []
        self._bytes_of: dict[int, int] = {}
        self._draft: Draft | None = None
        self._writers: list[Any] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_keeping(self) -> bool:
        """Whether any row is ever kept."""
        return self.max_bytes > 0

    @property
    def num_bytes(self) -> int:
        """That all rows take."""
        return sum(row.num_bytes for row in self._rows)

    def draft_number(self, draft: Draft | None) -> int:
        """Tells apart the drafts whose entries in a cache differ, for `add`.

        Called with every draft that is served, in order; drops rows that are good no
        more.
        """
        if draft is self._draft:
            return self._number

        # By identity: who learns makes new arrays of what changes, and of nothing else.
        writers = _writers_of(draft)
        pairs = itertools.zip_longest(writers, self._writers)
        is_same = all(new is old for new, old in pairs)
        self._draft = draft
        self._writers = writers
        if is_same:
            return self._number

        self._number += 1
        self._rows.clear()
        return self._number

    def find(
        self, scope: int, ids: Sequence[int], only: int | None = None
    ) -> Found | None:
        """The row of a scope that has most of a prompt's first tokens.

        Args:
          only: The member of a pool that will run over the rest; None for all, who must
            have run over the row.
        """
        prompt = np.asarray(ids, np.int32)
        wanted = (None, only)
        own = [row for row in self._rows if row.scope == scope and row.only in wanted]
        # Of equal ones the newest.
        best = max(
            own[::-1], key=lambda row: _num_common(row.ids, prompt), default=None
        )
        if best is None:
            return None

        num_tokens = _num_common(best.ids, prompt) - 1
        return Found(best.caches, num_tokens) if num_tokens > 0 else None

    def use(self, found: Found) -> None:
        """Notes that a row was gone on from: it stays the longer."""
        for row in self._rows:
            if row.caches is found.caches:
                self._use(row)
                return

    def add(
        self,
        scope: int,
        ids: Sequence[int],
        draft_number: int,
        copy: Callable[[int], RowCaches],
        only: int | None = None,
    ) -> None:
        """Keeps a row.

        Args:
          ids: Its prompt and answer.
          draft_number: As it was when the row began.
          copy: Given a number of slots, the row's caches in so many.
          only: The member of a pool that alone has run over it; None for all.
        """
        fitting = [size for size in self.capacities if size >= len(ids) - 1]
        if draft_number != self._number or not fitting or not self.max_bytes:
            return

        own = np.asarray(ids, np.int32)
        whose = scope, only
        for row in [row for row in self._rows if (row.scope, row.only) == whose]:
            num_common = _num_common(row.ids, own)
            if num_common == len(own):
                self._use(row)
                return
            # The turn before: whoever goes on from there may do so from this one.
            if num_common == len(row.ids):
                self._drop(row)

        # Known from the first copy of this size on.
        if self._bytes_of.get(fitting[0], 0) > self.max_bytes:
            return

        caches = copy(fitting[0])
        self._bytes_of[fitting[0]] = caches.num_bytes
        self._rows.append(KeptRow(scope, own, caches, caches.num_bytes, only))
        while self.num_bytes > self.max_bytes:
            del self._rows[0]

    def forget(self, scope: int | None = None) -> None:
        """Drops the rows of a scope, or all; what is under way is not kept either."""
        # Whosever it is: a scope's number may be another's when the answer ends.
        self._number += 1
        self._rows = [row for row in self._rows if scope not in (None, row.scope)]

    def _use(self, row: KeptRow) -> None:
        self._drop(row)
        self._rows.append(row)

    def _drop(self, row: KeptRow) -> None:
        self._rows = [other for other in self._rows if other is not row]


def start_behind(num_kept: int, num_prompt: int, capacity: int, chunk: int) -> int:
    """Tokens of a prompt that need not be run; 0 if no chunk less would be run.

    Args:
      num_kept: That a kept row has, fewer than the prompt.
      capacity: Cache slots of the new row.
      chunk: Tokens that are run at once.
    """
    num_chunks = lambda start: -(-(num_prompt - start) // chunk)
    start = num_kept
    # The last chunk is padded to its full length. Where that would reach beyond the
    # cache, chunks begin where they would without a kept row.
    if start + num_chunks(start) * chunk > capacity:
        start -= start % chunk

    return start if num_chunks(start) < num_chunks(0) else 0


def _writers_of(draft: Draft | None) -> list[Any]:
    """The parameters that what a draft caches follows from."""
    params = None if draft is None else draft.params
    if isinstance(params, Mapping):
        params = {name: part for name, part in params.items() if name != _HEAD}

    return jax.tree.leaves(params)


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(np.argmax(differs)) if differs.any() else length
