# SPDX-License-Identifier: Apache-2.0
"""How much of a prediction came true: counted on the host, from what passes emitted."""

from collections.abc import Sequence

import numpy as np

from ospec_jax.drafters.prediction import MAX_MATCH, MIN_MATCH


class Followed:
    """A prediction held against an answer, as `drafters.prediction.follow` does."""

    def __init__(self, token_ids: Sequence[int]):
        self._tokens = np.asarray(token_ids, np.int64)
        self._is_accepted = np.zeros(len(token_ids), bool)
        self._has_come = np.zeros(len(token_ids), bool)
        self._place = 0
        self._num_skipped = 0
        self._recent: list[int] = []

    def num_accepted(self, without: Sequence[int] = ()) -> int:
        """Predicted tokens that a step drafted and the target accepted, along it.

        Args:
          without: Tokens that do not count, such as one that stands for the end.
        """
        return self._count(self._is_accepted, without)

    def num_missing(self, without: Sequence[int] = ()) -> int:
        """Predicted tokens that the answer does not have; see `num_accepted`."""
        return self._count(~self._has_come, without)

    def _count(self, is_counted: np.ndarray, without: Sequence[int]) -> int:
        return int(np.sum(is_counted & ~np.isin(self._tokens, list(without))))

    @property
    def place(self) -> tuple[int, int]:
        """See `types.Prediction`: its `place` and `num_skipped`."""
        return self._place, self._num_skipped

    def add(self, tokens: Sequence[int], num_drafted: int) -> None:
        """Goes on with what a pass emitted.

        Args:
          num_drafted: Of its tokens, from the first one on, were drafted.
        """
        if not tokens:
            return

        expected = self._place + self._num_skipped
        ahead = self._tokens[expected : expected + len(tokens)]
        is_true = ahead == np.asarray(tokens[: len(ahead)])
        num_true = int(np.sum(np.cumprod(is_true)))
        self._has_come[expected : expected + num_true] = True
        num_accepted = min(num_true, num_drafted)
        self._is_accepted[expected : expected + num_accepted] = True
        self._recent = [*self._recent, *tokens][-MAX_MATCH:]

        came_off = expected + num_true if num_true else self._place
        self._place = came_off
        self._num_skipped = expected + len(tokens) - came_off
        if num_true == len(tokens):
            return

        found, length = self._nearest_match(came_off)
        if length >= MIN_MATCH:
            self._has_come[found - length : found] = True
            self._place = found
            self._num_skipped = 0

    def _nearest_match(self, place: int) -> tuple[int, int]:
        """See `drafters.prediction.nearest_match`."""
        count = len(self._tokens)
        index = np.arange(count)
        is_same = np.ones(count, bool)
        lengths = np.zeros(count, int)

        for back, wanted in enumerate(reversed(self._recent)):
            is_same &= (index > back) & (np.roll(self._tokens, back + 1) == wanted)
            lengths += is_same

        if not lengths.any():
            return 0, 0

        ahead = index - place
        distance = np.where(ahead >= 0, ahead, count - ahead)
        distance[lengths < lengths.max()] = np.iinfo(int).max
        found = int(np.argmin(distance))
        return found, int(lengths[found])
