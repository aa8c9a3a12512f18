# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as terminal tables, Markdown and plots."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Group

from ospec_jax import atomic
from ospec_jax.bench.part_tables import (
    PartTable,
    markdown_part_tables,
    part_tables,
    terminal_part_tables,
)
from ospec_jax.bench.parts import add_speedups
from ospec_jax.bench.passes import Machine, PassCost
from ospec_jax.bench.runs import BenchRun
from ospec_jax.reports.tables import records_table

_MAX_CHANGES = 24
"""Of domain, that a plot along a stream shows."""

_COLUMNS = (
    ("mode", "mode", "{}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("with learning", "tokens_per_second_with_learning", "{:.1f}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("over the fastest plain", "speedup_over_fastest_plain", "{:.2f}"),
    ("quartiles", "quartiles", "{}"),
    ("predicted", "predicted_speedup", "{:.2f}"),
    ("acceptance length", "mean_acceptance_length", "{:.2f}"),
    ("drafted", "mean_draft_length", "{:.2f}"),
    ("acceptance rate", "draft_acceptance_rate", "{:.0%}"),
    # Loops flatter n-grams: what these gain is to be read beside it.
    ("repeated tokens", "repeated_token_share", "{:.0%}"),
    ("learner", "learner", "{}"),
    ("optimizer", "optimizer", "{}"),
    ("rate", "learning_rate", "{:g}"),
    ("updates", "num_updates", "{}"),
    ("identical", "identical", "{}"),
)


def with_ratios(rows: Sequence[dict]) -> list[dict]:
    """Adds speed-ups (see `parts.add_speedups`), and what else columns show."""
    extended = []

    for row in add_speedups(rows):
        extra = {}
        spread = row["paired_speedup_quartiles"]
        extra["quartiles"] = f"{spread[0]:.2f} - {spread[2]:.2f}" if spread else None
        if row.get("num_mismatched_outputs") is not None:
            is_identical = row["num_mismatched_outputs"] == 0
            extra["identical"] = "yes" if is_identical else "NO"
        extended.append(row | extra)

    return extended


def _cell(row: dict, key: str, form: str) -> str:
    return "-" if row.get(key) is None else form.format(row[key])


def _columns_of(rows: Sequence[dict]):
    """All columns, but a second speed-up only where there is a second baseline."""
    optional = "speedup_over_fastest_plain"
    has_second = any(optional in row for row in rows)
    return [column for column in _COLUMNS if has_second or column[1] != optional]


def terminal_table(rows: Sequence[dict], title: str, width: int | None = None) -> Group:
    """For people: a column a mode."""
    extended = with_ratios(rows)
    columns = _columns_of(extended)
    labels = [name for name, _, _ in columns]
    records = [[_cell(row, key, form) for _, key, form in columns] for row in extended]

    return records_table(labels, records, title, width)


def markdown_table(rows: Sequence[dict]) -> str:
    """For documents."""
    extended = with_ratios(rows)
    columns = _columns_of(extended)
    lines = ["| " + " | ".join(name for name, _, _ in columns) + " |"]
    lines.append("|" + "---|" * len(columns))

    for row in extended:
        cells = (_cell(row, key, form) for _, key, form in columns)
        lines.append("| " + " | ".join(cells) + " |")

    return "\n".join(lines)


def terminal_report(
    rows: Sequence[dict], title: str, width: int | None = None
) -> Group:
    """All tables, for people."""
    return Group(terminal_table(rows, title, width), terminal_part_tables(rows, width))


def markdown_report(rows: Sequence[dict]) -> str:
    """All tables, for documents."""
    texts = [markdown_table(rows), markdown_part_tables(rows)]
    return "\n\n".join(text for text in texts if text)


def plot_modes(rows: Sequence[dict], path: Path) -> Path:
    """Draws tokens a second, learning time included, as bars.

    Below, speed-ups by domain and by prompt length, where there are several.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = part_tables(rows)
    # A bar's thickness is the same in all of them.
    num_bars = [len(part.labels) * (len(part.cells) + 1) for part in parts]
    heights = [0.45 * len(rows) + 1.2, *(0.16 * count + 1.1 for count in num_bars)]
    figure, panels = plt.subplots(
        len(heights),
        figsize=(7, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    axes, *others = panels[:, 0]
    for part, panel in zip(parts, others, strict=True):
        _draw_part(panel, part)

    speeds = [row["tokens_per_second_with_learning"] for row in rows]
    colors = ["#1f6feb" if "target" in row else "#8a8f98" for row in rows]
    bars = axes.barh([row["mode"] for row in rows], speeds, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    has_others = any("target" not in row for row in rows)
    axes.set(
        title="Speed of each mode on the same prompts"
        + (" (grey: other decoders)" if has_others else ""),
        xlabel="tokens a second, learning time included",
    )
    axes.margins(x=0.12)  # room for the labels behind the longest bar
    axes.spines[["top", "right"]].set_visible(False)

    return atomic.write_figure(figure, path)


def plot_part(part: PartTable, path: Path, title: str) -> Path:
    """Draws one table alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 0.16 * len(part.labels) * (len(part.cells) + 1) + 1.1
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    _draw_part(axes, part)
    axes.set_title(title)

    return atomic.write_figure(figure, path)


def _draw_part(axes, part: PartTable) -> None:
    """Grouped bars: a group each domain or length, a bar each mode."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"].colors
    thickness = 0.8 / len(part.cells)
    middles = np.arange(len(part.labels))

    for number, (mode, cells) in enumerate(part.cells.items()):
        bars = axes.barh(
            middles + (number + 0.5) * thickness - 0.4,
            [cell.value or 0 for cell in cells],
            height=thickness,
            label=mode,
            color=colors[number % len(colors)],
        )
        texts = ["-" if cell.value is None else f"{cell.value:.2f}" for cell in cells]
        axes.bar_label(bars, texts, padding=2, fontsize=7)

    if part.plain is not None:
        axes.axvline(1, color="#57606a", ls=":", lw=1, zorder=0, label="plain")

    axes.set_yticks(middles, part.labels)
    axes.invert_yaxis()
    axes.set(title=f"By {part.what}", xlabel=part.unit)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def acceptance_series(run: BenchRun, mode: str, window: int = 8) -> np.ndarray:
    """Mean acceptance length over the last `window` prompts, `[num_prompts]`."""
    results = run.modes[mode].results
    drafts = np.array([r.stats.num_drafts for r in results], float)
    accepted = np.array([r.stats.num_accepted_tokens for r in results], float)
    sums = lambda x: np.array(
        [x[max(0, i - window + 1) : i + 1].sum() for i in range(len(x))]
    )
    return 1 + sums(accepted) / np.maximum(sums(drafts), 1)


def roofline_table(costs: Sequence[PassCost], machine: Machine) -> str:
    """Markdown: each pass against what memory and arithmetic allow."""
    lines = [
        f"Memory gives {machine.bytes_per_second / 1e9:.1f} GB/s, products "
        f"{machine.operations_per_second / 1e9:.0f} billion operations/s.",
        "",
        "| rows | ms | GB/s | billion operations/s | bound, ms | of the bound |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs:
        lines.append(
            f"| {cost.num_rows} | {1e3 * cost.seconds:.1f} "
            f"| {cost.num_bytes / cost.seconds / 1e9:.1f} "
            f"| {cost.num_operations / cost.seconds / 1e9:.0f} "
            f"| {1e3 * cost.bound:.1f} | {cost.fraction:.0%} |"
        )

    return "\n".join(lines)


def plot_stream(run: BenchRun, path: Path) -> Path:
    """Draws acceptance over the stream for each drafting mode, domains shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    styles = {
        "static": ("#8a8f98", "the draft as it is"),
        "ngrams": ("#bf8700", "with n-grams of the request"),
        "learned": ("#1f6feb", "with what was learned from earlier requests"),
    }

    for mode, (color, label) in styles.items():
        if mode in run.modes:
            series = acceptance_series(run, mode)
            axes.plot(
                np.arange(1, len(series) + 1), series, color=color, label=label, lw=2
            )

    _shade_domains(axes, [p.domain for p in run.prompts])
    axes.set(
        xlabel="prompt",
        ylabel="tokens a target pass (last 8 prompts)",
        title=_title_of([p.domain for p in run.prompts]),
    )
    axes.set_xlim(1, max(2, len(run.prompts)))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(styles), frameon=False)

    return atomic.write_figure(figure, path)


def _title_of(domains: Sequence[str]) -> str:
    """What a plot along a stream shows."""
    is_drifting = len(set(domains)) > 1
    end = "that changes its domain" if is_drifting else "of prompts"
    return f"Tokens per target pass along a stream {end}"


def _shade_domains(axes, domains: list[str]) -> None:
    """Names each stretch of a domain, unless they are too many to be read."""
    changes = sum(a != b for a, b in itertools.pairwise(domains))
    if changes > _MAX_CHANGES:
        return

    begin = 0
    for i in range(1, len(domains) + 1):
        if i == len(domains) or domains[i] != domains[begin]:
            if begin:
                axes.axvline(begin + 0.5, color="#8a8f98", ls=":", lw=1)
            axes.annotate(
                domains[begin],
                ((begin + i + 1) / 2, 0.02),
                ha="center",
                color="#57606a",
                xycoords=("data", "axes fraction"),
            )
            begin = i
