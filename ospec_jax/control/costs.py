# SPDX-License-Identifier: Apache-2.0
"""What steps of one tree take, by depth and size: a table from a few measured ones."""

from collections.abc import Sequence

import numpy as np

from ospec_jax.config import TreeConfig
from ospec_jax.control.clock import Timed, fit_clock


def rows_of(tree: TreeConfig, depth: int, size: int) -> int:
    """Rows that the target runs over, the root included: a depth may have fewer."""
    if not depth:
        return 1

    return 1 + min(size, tree.topk + (depth - 1) * tree.topk**2)


def kinds_of(tree: TreeConfig) -> list[tuple[int, int]]:
    """Depths and sizes to measure: all depths at one size, all sizes at one depth."""
    # At a size that all depths have, and the deepest one is measured with, too.
    most = max(tree.topk, tree.sizes[0])
    common = max(size for size in tree.sizes if size <= most)
    deepest = [(tree.num_steps, size) for size in tree.sizes]
    return [
        (0, tree.sizes[0]),
        *((depth, common) for depth in range(1, tree.num_steps)),
        *deepest,
    ]


def table_of(tree: TreeConfig, seconds: Sequence[float]) -> np.ndarray:
    """Seconds of all steps, `[k + 1, s]`, from those of `kinds_of`.

    More work that seems to take less is noise, and is taken out.
    """
    timed = [
        Timed(depth, rows_of(tree, depth, size), 0, taken)
        for (depth, size), taken in zip(kinds_of(tree), seconds, strict=True)
    ]
    clock = fit_clock(timed, tree.topk)
    depths = range(tree.num_steps + 1)
    rows = [[rows_of(tree, depth, size) for size in tree.sizes] for depth in depths]
    table = np.asarray(clock.seconds(np.arange(len(rows))[:, None], rows, 0))

    return _rising(_rising(table, axis=0), axis=1)


def _rising(table: np.ndarray, axis: int) -> np.ndarray:
    """The table without falls along an axis."""
    above = np.maximum.accumulate(table, axis)
    below = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
    return (above + below) / 2


def kind_like(
    tree: TreeConfig, seconds: Sequence[float], depth: int, size: int
) -> tuple[int, float] | None:
    """The kind of `kinds_of` that a step is most like, and what it was to take.

    Args:
      seconds: Of all steps, by depth from 0 on and within it by size.
      size: Nodes that were verified; of a plain step any.

    Returns:
      None while nothing was measured.
    """
    if not seconds:
        return None

    number = tree.sizes.index(size) if depth else 0
    table = np.asarray(seconds).reshape(tree.num_steps + 1, len(tree.sizes))
    # Of less deep trees one size alone is measured.
    deepest = tree.num_steps
    kind = deepest + number if depth == deepest else depth

    return kind, float(table[depth, number])
