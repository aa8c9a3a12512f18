# SPDX-License-Identifier: Apache-2.0
"""Who proposed a token: a number a node on the device, a name for people."""

import typing
from collections.abc import Sequence
from typing import Literal

import numpy as np

Source = Literal["target", "draft", "ngrams", "memory", "prediction"]
"""Nobody but the target; the draft; n-grams of the request, or remembered from earlier
ones; what the request's user expects. What several propose alike is the draft's if it
is one of them, else the likelier one's."""

SOURCES: tuple[Source, ...] = typing.get_args(Source)
"""By their numbers."""

# Of one type everywhere, so that no operation is spent on making them alike.
TARGET, DRAFT, NGRAMS, MEMORY, PREDICTION = np.arange(len(SOURCES), dtype=np.int32)


def names_of(
    numbers: Sequence[int] | None, num_accepted: int, num_tokens: int
) -> list[Source]:
    """Who proposed each token of a pass.

    Args:
      numbers: Of the accepted tokens; None where all are the draft's own.
      num_accepted: Tokens that were proposed; behind them stands the target's own.
      num_tokens: Of the pass that count; it may be cut within the accepted ones.
    """
    known = [int(DRAFT)] * num_accepted if numbers is None else numbers
    names: list[Source] = [SOURCES[number] for number in known[:num_accepted]]
    of_target: list[Source] = ["target"] * (num_tokens - num_accepted)

    return (names + of_target)[:num_tokens]
