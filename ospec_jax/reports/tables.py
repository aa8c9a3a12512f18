# SPDX-License-Identifier: Apache-2.0
"""Tables for terminals, however narrow: what does not fit beside stands below."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table

from ospec_jax.reports.progress import console

_BORDERS = 3
"""Characters that a column takes beside its text."""


def records_table(
    labels: Sequence[str],
    records: Sequence[Sequence[str]],
    title: str = "",
    width: int | None = None,
) -> Group:
    """Records side by side, a column each, and a line for each of their labels.

    Labels are many and records few: so nothing is cut off on 80 columns, where a line
    a record would have been. More records than fit begin another table below.

    Args:
      labels: What the lines are; the first one names the records.
      records: Of each, a text a label; lines without any in all of them are left out.
      width: Of the terminal; by default what standard error has.
    """
    width = width or console.width
    filled = [i for i in range(len(labels)) if {r[i] for r in records} != {"-"}]
    first = max((len(labels[i]) for i in filled), default=0) + _BORDERS + 1
    blocks: list[list[Sequence[str]]] = []
    room = 0

    # As many columns a table as fit beside the labels.
    for record in records:
        needed = max((len(record[i]) for i in filled), default=0) + _BORDERS
        if not blocks or needed > room:
            blocks.append([])
            room = width - first
        blocks[-1].append(record)
        room -= needed

    tables = []

    for number, block in enumerate(blocks):
        table = Table(title=title if number == 0 else None, title_style="bold")
        name, *lines = filled
        table.add_column(labels[name])
        for record in block:
            table.add_column(record[name], justify="right", overflow="fold")
        for i in lines:
            table.add_row(labels[i], *(record[i] for record in block))
        tables.append(table)

    return Group(*tables)


def print_table(table: Group) -> None:
    """Prints to standard output; what is in brackets is no markup."""
    Console(markup=False, highlight=False).print(table)
