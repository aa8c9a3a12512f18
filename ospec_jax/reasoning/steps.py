# SPDX-License-Identifier: Apache-2.0
"""Where one step of a chain of thought ends, and the next one begins."""

import dataclasses
from collections.abc import Callable, Sequence

from ospec_jax.config import ConfigError, whole_number
from ospec_jax.decoding.request import StopPoint

Decode = Callable[[list[int]], str]
"""Token ids to text."""


@dataclasses.dataclass(frozen=True)
class StepRule:
    """A step is text up to and with a separator, or a number of tokens.

    Attributes:
      separator: By default a blank line, as in Lookahead Reasoning (arXiv 2506.19830).
        White space in front of a step's text ends none.
      max_tokens: Of a step; 100 in the released code.
    """

    separator: str = "\n\n"
    max_tokens: int = 100

    def __post_init__(self):
        if not isinstance(self.separator, str) or not self.separator:
            raise ConfigError(
                f"separator is {self.separator!r}; use text that ends a step, such as "
                f"a blank line"
            )
        whole_number("max_tokens", self.max_tokens, least=1)

    def find_ends(self, decode: Decode, token_ids: Sequence[int]) -> list[int]:
        """Tokens up to the end of each complete step, ascending.

        It follows from the tokens alone, not from how many came at once.
        """
        ids = list(token_ids)
        ends: list[int] = []
        start = 0
        for end in range(1, len(ids) + 1):
            is_long = end - start == self.max_tokens
            if is_long or self.separator in decode(ids[start:end]).lstrip():
                ends.append(end)
                start = end

        return ends

    def cut(self, decode: Decode, token_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The steps of a text; the last one may be incomplete."""
        ids = tuple(token_ids)
        ends = self.find_ends(decode, ids)
        starts = [0, *ends]
        stops = [*ends, len(ids)]
        pieces = zip(starts, stops, strict=True)
        return [ids[start:stop] for start, stop in pieces if stop > start]

    def stop_after(
        self, decode: Decode, num_steps: int
    ) -> Callable[[list[int]], StopPoint | None]:
        """Ends an answer behind so many steps; see `Request.find_stop`."""

        def find_stop(token_ids: list[int]) -> StopPoint | None:
            # The usual case by far, after each token: no step has ended.
            is_long = len(token_ids) >= self.max_tokens
            if not is_long and self.separator not in decode(token_ids):
                return None

            ends = self.find_ends(decode, token_ids)
            return StopPoint(ends[num_steps - 1]) if len(ends) >= num_steps else None

        return find_stop
