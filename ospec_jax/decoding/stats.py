# SPDX-License-Identifier: Apache-2.0
"""What is counted while decoding, with vLLM's names and definitions.

`mean_acceptance_length` includes the bonus token: it is the mean number of tokens that
one target pass yields.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class DecodingStats:
    """Counters of speculative steps; they add up over requests.

    Attributes:
      num_spec_tokens: Depth of the tree, K; of the deepest one that ran, if that is
        more: a prediction that holds is followed further.
      num_drafts: Verification passes.
      num_draft_tokens: Tokens drafted.
      num_accepted_tokens: Drafted tokens that were accepted and emitted.
      acceptance_histogram: Passes that accepted 0, 1, ... tokens.
    """

    num_spec_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance_histogram: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if not self.acceptance_histogram:
            self.acceptance_histogram = [0] * (self.num_spec_tokens + 1)

    def add_step(self, num_drafted: int, num_accepted: int, depth: int = 0) -> None:
        """Counts one verification pass.

        Args:
          depth: Of its tree.
        """
        # A deeper tree than any before makes the histogram longer; its earlier passes
        # had no chance at the new depths.
        self.num_spec_tokens = max(self.num_spec_tokens, depth)
        num_missing = self.num_spec_tokens + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram += [0] * num_missing
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        self.acceptance_histogram[num_accepted] += 1

    def __add__(self, other: "DecodingStats") -> "DecodingStats":
        size = max(len(self.acceptance_histogram), len(other.acceptance_histogram))
        pad = lambda h: h + [0] * (size - len(h))
        pairs = zip(
            pad(self.acceptance_histogram), pad(other.acceptance_histogram), strict=True
        )
        return DecodingStats(
            num_spec_tokens=max(self.num_spec_tokens, other.num_spec_tokens),
            num_drafts=self.num_drafts + other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens + other.num_accepted_tokens,
            acceptance_histogram=[a + b for a, b in pairs],
        )

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, the bonus token included; 1 without drafts."""
        return 1.0 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def mean_draft_length(self) -> float:
        """Tokens drafted a target pass: the mean K, for chains of full depth."""
        return self.num_draft_tokens / max(self.num_drafts, 1)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted over drafted tokens."""
        return self.num_accepted_tokens / max(self.num_draft_tokens, 1)

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of passes that accepted at least i + 1 tokens (unconditional)."""
        survived = self.num_drafts
        shares = []

        # Who accepted more than i tokens is who is left after those that accepted 0 to
        # i.
        for count in self.acceptance_histogram[:-1]:
            survived -= count
            shares.append(survived / max(self.num_drafts, 1))

        return shares

    def to_json(self) -> dict[str, Any]:
        """vLLM's `speculative_decoding` object."""
        return {
            "mean_acceptance_length": self.mean_acceptance_length,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_histogram": self.acceptance_histogram,
            "num_spec_steps": self.num_drafts,
            "num_accepted_draft_tokens": self.num_accepted_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "num_spec_tokens": self.num_spec_tokens,
            "mean_draft_length": self.mean_draft_length,
        }


def repeated_share(answers: Sequence[list[int]]) -> float:
    """`repeated_token_share` of all tokens of some answers together."""
    shares = [repeated_token_share(answer) for answer in answers]
    lengths = [len(answer) for answer in answers]
    repeated = sum(s * n for s, n in zip(shares, lengths, strict=True))
    return repeated / max(sum(lengths), 1)


def repeated_token_share(token_ids: list[int], length: int = 16) -> float:
    """Share of tokens inside a run of `length` tokens seen before in the answer.

    Small greedy models loop, and loops flatter speculation, n-grams most of all.
    """
    seen: set[tuple] = set()
    is_repeated = [False] * len(token_ids)

    for end in range(length, len(token_ids) + 1):
        gram = tuple(token_ids[end - length : end])
        # Overlapping repeats are marked once each, so a loop counts every token but
        # those of its first turn.
        if gram in seen:
            is_repeated[end - length : end] = [True] * length
        seen.add(gram)

    return sum(is_repeated) / max(len(token_ids), 1)
