# SPDX-License-Identifier: Apache-2.0
"""How long every drafter's drafts would have been accepted, from what was emitted.

At each emitted token two numbers are known of each drafter, whoever drafted: the
*chance*, over what may be drafted and emitted there, that its token is accepted, and
the *coupling*, that it is, given the token that was emitted. A draft that had begun at
some position meets the chances of that position and of those that follow: a *window*.

Windows become known late, when their last token is emitted. A window that the end of
an answer cuts short says nothing: whoever took it for a short draft would prefer
drafters whose drafts are short.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

Estimator = Literal["coupled", "product"]


class Windows(NamedTuple):
    """Evidence on drafts that might have begun at some positions of answers.

    Attributes:
      chances: `[w, k, n]` of each window's tokens, by depth of the draft, for each
        drafter.
      couplings: `[w, k, n]` likewise.
    """

    chances: np.ndarray
    couplings: np.ndarray

    @property
    def num_windows(self) -> int:
        """Windows, each of them as good as a draft of every drafter."""
        return len(self.chances)


def join(parts: list[Windows]) -> Windows:
    """The windows of several answers, one behind the other."""
    return Windows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def expected_lengths(windows: Windows, estimator: Estimator = "coupled") -> np.ndarray:
    """Tokens that a draft of each depth would have yielded, `[w, n, k + 1]`.

    A draft of depth 0 yields one token, the target's own, as any draft does beside
    those that are accepted.

    Args:
      estimator: `coupled` is exactly unbiased: its terms multiply couplings up to a
        token, and the chance of that token, so that each has the mean `P(so many are
        accepted)` over answers of the target. `product` multiplies chances, as
        HedgeSpec (arXiv 2510.20064). Tokens of which all before were accepted are not
        distributed as the target's, though, so its mean is another one unless chances
        are the same after every prefix: where two tokens are accepted every other time
        it may say every fourth. With greedy targets both are the same.
    """
    chances, couplings = windows
    before = couplings if estimator == "coupled" else chances
    # `[w, k, n]`: all tokens before the one at this depth were accepted.
    survival = np.cumprod(before, axis=1)
    survival = np.concatenate([np.ones_like(survival[:, :1]), survival[:, :-1]], axis=1)
    accepted = np.cumsum(survival * chances, axis=1)
    accepted = np.concatenate([np.zeros_like(accepted[:, :1]), accepted], axis=1)

    return 1.0 + np.moveaxis(accepted, 1, 2)


@dataclasses.dataclass
class Pending:
    """The end of one answer's evidence, of which windows are not complete.

    It belongs to the answer: with that, what is not complete is dropped.
    """

    chances: np.ndarray | None = None
    couplings: np.ndarray | None = None

    def add(self, chances: np.ndarray, couplings: np.ndarray) -> Windows:
        """Takes in newly emitted tokens; returns the windows that they complete.

        Args:
          chances: `[t, k, n]` of each token, if it were at that depth of a draft.
          couplings: `[t, k, n]` likewise.
        """
        if self.chances is not None:
            assert self.couplings is not None
            chances = np.concatenate([self.chances, chances])
            couplings = np.concatenate([self.couplings, couplings])

        depth = chances.shape[1]
        num_windows = max(0, len(chances) - depth + 1)
        # The rest are starts of windows to come.
        self.chances = chances[num_windows:]
        self.couplings = couplings[num_windows:]
        # Window i meets position i + d at depth d.
        rows = np.arange(num_windows)[:, None] + np.arange(depth)
        columns = np.arange(depth)

        return Windows(chances[rows, columns], couplings[rows, columns])
