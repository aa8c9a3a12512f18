# SPDX-License-Identifier: Apache-2.0
"""What each side takes by itself, measured on the devices where they are."""

import time
from collections.abc import Callable
from typing import Any

import jax

from ospec_jax.decoding.batch import fetch
from ospec_jax.decoding.request import Request
from ospec_jax.parallel.costs import SideTimes
from ospec_jax.parallel.pearl import Parallel

_NUM_ROUNDS = 4
"""The first of each compiles; the least of the others counts, as in
`decoding.timing`."""


def measure_sides(parallel: Parallel, request: Request) -> SideTimes:
    """Times a pass over one row and over a block, drafting, and handing over.

    Each side is waited for before the other is asked, which decoding never does.

    Args:
      request: Behind whose prompt it is measured.
    """
    output = parallel.begin(request)
    first = int(fetch(output.tokens)[0, 0])
    newest = (request.prompt_ids[-1], first)
    position = len(request.prompt_ids)
    num_tokens = parallel.num_speculative_tokens
    target = parallel.target
    drafting = parallel.drafting
    assert drafting is not None

    def draft() -> Any:
        drafting.ask(newest, position)
        return drafting.take()

    def score(previous) -> Any:
        target.score(previous)
        return target.scored

    seconds_drafting, drafted = _least(draft)
    chunk = parallel.places.target.put(drafted)
    seconds_block, _ = _least(lambda: score(chunk if num_tokens > 1 else None))
    seconds_row, _ = _least(lambda: score(None))
    # It moves on by what is accepted, which does not change what it takes.
    seconds_judging, _ = _least(lambda: fetch(parallel.judge(None, drafted)))

    rows = (1, num_tokens) if num_tokens > 1 else (1,)
    return SideTimes(
        rows=rows,
        verifying=(seconds_row, seconds_block)[: len(rows)],
        drafting=seconds_drafting / num_tokens,
        hand_over=seconds_judging,
    )


def _least(run: Callable[[], Any]) -> tuple[float, Any]:
    """The least time of several turns, and what the last one returned."""
    least = float("inf")
    result = None
    for number in range(_NUM_ROUNDS):
        begin = time.perf_counter()
        result = jax.block_until_ready(run())
        if number:
            least = min(least, time.perf_counter() - begin)

    return least, result
