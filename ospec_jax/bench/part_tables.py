# SPDX-License-Identifier: Apache-2.0
"""Tables of a benchmark by domain, by prompt length, and as Spec-Bench publishes them.

They are made of JSON rows: those of a run, or read back from a file.
"""

import dataclasses
from collections.abc import Sequence

from rich.console import Group

from ospec_jax.bench.parts import OVERALL, PLAIN
from ospec_jax.data.conversations import TASKS
from ospec_jax.reports.tables import records_table

_FASTEST = "speedup_over_fastest_plain"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a mode did on a part of the prompts.

    Attributes:
      value: Speed-up, or tokens/s; None where batches hide the time.
      length: Acceptance length; None of other decoders.
    """

    value: float | None
    length: float | None

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.2f}"
        return value if self.length is None else f"{value} ({self.length:.2f})"


@dataclasses.dataclass(frozen=True)
class PartTable:
    """Modes on parts of the prompts.

    Attributes:
      what: The parts are.
      unit: Of the cells' values.
      labels: Of the parts.
      sizes: Of the parts, in prompts.
      plain: Tokens/s of plain decoding, which the cells are relative to; None where
        they are tokens/s themselves.
      cells: Of each mode, one a part.
    """

    what: str
    unit: str
    labels: list[str]
    sizes: list[int]
    plain: list[float] | None
    cells: dict[str, list[Cell]]

    @property
    def title(self) -> str:
        """What stands above the table."""
        begin = "" if self.plain is None else "plain tokens/s, "
        return f"By {self.what}: {begin}{self.unit} (acceptance length)"

    @property
    def columns(self) -> dict[str, list[str]]:
        """Texts by heading, a line a part."""
        columns = {self.what: self.labels, "prompts": [f"{n}" for n in self.sizes]}
        if self.plain is not None:
            columns["plain"] = [f"{speed:.1f}" for speed in self.plain]

        return columns | {mode: [*map(str, own)] for mode, own in self.cells.items()}


def part_tables(rows: Sequence[dict]) -> list[PartTable]:
    """Those by domain and by prompt length, where there are several."""
    tables = [
        _part_table(rows, "domain", "domain"),
        _part_table(rows, "prompt_length", "prompt tokens"),
    ]
    return [table for table in tables if table is not None]


def _part_table(rows: Sequence[dict], key: str, what: str) -> PartTable | None:
    parts = {row["mode"]: row.get(f"by_{key}") or [] for row in rows}
    first = next(iter(parts.values()), [])
    if len(first) < 2:
        return None

    every = [part for own in parts.values() for part in own]
    value, unit = "tokens_per_second_with_learning", "tokens/s"
    plain = None
    # Without another mode, or where batches hide the times, nothing is relative.
    is_relative = PLAIN in parts and len(parts) > 1
    if is_relative and all(part.get("speedup") is not None for part in every):
        value, unit = "speedup", "speed-up"
        plain = [part["tokens_per_second"] for part in parts.pop(PLAIN)]
        if all(_FASTEST in part for part in every):
            value, unit = _FASTEST, "speed-up over the fastest plain"

    return PartTable(
        what,
        unit,
        [part[key] for part in first],
        [part["num_prompts"] for part in first],
        plain,
        {
            mode: [Cell(part[value], part["mean_acceptance_length"]) for part in own]
            for mode, own in parts.items()
        },
    )


def terminal_part_tables(rows: Sequence[dict], width: int | None = None) -> Group:
    """For people: all tables of parts, a line a part."""
    tables = []

    for part in part_tables(rows):
        (what, labels), *columns = part.columns.items()
        records = [[heading, *texts] for heading, texts in columns]
        tables.append(records_table([what, *labels], records, part.title, width))

    if published := _published(rows):
        headings, lines, caption = published
        # A column a mode, as eight columns do not fit.
        tables.append(records_table(headings, lines, caption, width))

    return Group(*tables)


def markdown_part_tables(rows: Sequence[dict]) -> str:
    """For documents; Spec-Bench's has a column a task, as it is published."""
    texts = []

    for part in part_tables(rows):
        columns = part.columns
        lines = list(zip(*columns.values(), strict=True))
        texts.append(f"{part.title}\n\n{_markdown(list(columns), lines)}")

    if published := _published(rows):
        headings, lines, caption = published
        texts.append(f"{caption}\n\n{_markdown(headings, lines)}")

    return "\n\n".join(texts)


def _published(rows: Sequence[dict]):
    """Headings, lines and caption of Spec-Bench's table; None of other prompts."""
    found = {row["mode"]: row["spec_bench"] for row in rows if "spec_bench" in row}
    if not found:
        return None

    first = next(iter(found.values()))
    baseline = first["baseline"]
    tasks = [task for task in TASKS if task in first["by_task"]]
    headings = ["Models", *(TASKS[task] for task in tasks)]
    headings += ["#Mean Accepted Tokens", "Overall"]
    form = lambda value, unit: "-" if value is None else f"{value:.2f}{unit}"
    lines = []

    for mode, row in found.items():
        ratios = [form(row["by_task"][task]["speedup"], "x") for task in tasks]
        whole = row["by_task"][OVERALL]
        length = form(whole["mean_accepted_tokens"], "")
        lines.append([mode, *ratios, length, form(whole["speedup"], "x")])

    number = first["by_task"][OVERALL]["num_questions"]
    over = f", speed-up over {baseline}" if baseline else ""
    left_out = rows[0].get("left_out")
    short = f" ({len(left_out)} left out)" if left_out else ""
    return headings, lines, f"Spec-Bench, {number} questions{short}{over}"


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)
