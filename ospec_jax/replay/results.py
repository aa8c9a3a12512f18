# SPDX-License-Identifier: Apache-2.0
"""Results of replayed learners: as JSON that resumes, as a table, as a plot."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group

from ospec_jax import atomic
from ospec_jax.config import ConfigError
from ospec_jax.learners.config import LearnerConfig, optimizer_of
from ospec_jax.replay.hindsight import dynamic_regret_proxy
from ospec_jax.replay.replayer import Run
from ospec_jax.reports.summary import running_length
from ospec_jax.reports.tables import records_table

WINDOW = 40
"""Answers over which plots take the mean acceptance length."""
_MAX_LINES = 40
_COUNTS = ("num_drafts", "num_accepted_tokens")


def stream_key(ids: Sequence[str], contents: Sequence[str] = ()) -> str:
    """Tells streams apart by their prompts and order.

    Args:
      contents: Hashes of the prompts, empty where they were not kept: another file may
        have prompts of the same names.
    """
    text = "\n".join([*ids, *filter(None, contents)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settings_of(
    learner: str,
    config: LearnerConfig | None,
    draft: str,
    num_steps: int,
    stream: str,
    content: str,
) -> dict:
    """What a run's result is a function of, as JSON.

    Args:
      content: Tells recordings, and drafts of the same name, apart.
    """
    return {
        "learner": learner,
        "seed": config.seed if config else 0,
        "draft": draft,
        "num_speculative_tokens": num_steps,
        "stream": stream,
        "content": content,
        "config": config.to_json() if config else None,
    }


def to_row(run: Run, settings: dict, is_finished: bool) -> dict:
    """One run as a JSON object; `answers` holds a list for each column."""
    columns: dict[str, list] = {
        name: [getattr(a, name) for a in run.answers]
        for name in ("id", "domain", "num_tokens", "version", "learning_seconds")
    }
    columns |= {name: [getattr(a.stats, name) for a in run.answers] for name in _COUNTS}
    if run.answers and run.answers[0].loss is not None:
        columns["loss"] = [a.loss for a in run.answers]

    config = run.learner
    decisions = [report.decision for report in run.reports]
    seconds = [report.seconds for report in run.reports]

    return settings | {
        "is_finished": is_finished,
        **optimizer_of(config),
        "mean_acceptance_length": mean_length(columns),
        "mean_acceptance_length_last_quarter": mean_length(columns, 0.75),
        "num_updates": len(decisions),
        "num_promotions": decisions.count("promote"),
        "num_rollbacks": decisions.count("rollback"),
        "median_update_seconds": float(np.median(seconds)) if seconds else 0.0,
        "learning_seconds": sum(columns["learning_seconds"]),
        "seconds": run.seconds,
        "answers": columns,
    }


def mean_length(answers: dict[str, list], begin: float = 0.0) -> float:
    """Mean acceptance length of the answers behind a share of the stream."""
    first = int(len(answers["num_drafts"]) * begin)
    drafts, accepted = (sum(answers[name][first:]) for name in _COUNTS)
    return 1 + accepted / max(drafts, 1)


@dataclasses.dataclass
class Results:
    """A JSON file of runs, rewritten after each of them.

    Attributes:
      file: None keeps nothing.
      hindsight: Losses in hindsight, by draft, chain and stream.
    """

    file: Path | None
    runs: list[dict] = dataclasses.field(default_factory=list)
    hindsight: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, file: Path | None) -> "Results":
        """Reads what is there.

        Raises:
          ConfigError: The file holds something else.
        """
        if file is None or not file.exists():
            return cls(file)

        try:
            found = json.loads(file.read_text("utf-8"))
            return cls(file, found["runs"], found["hindsight"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} holds no replays; choose another file"
            ) from error

    def find(self, settings: dict, has_losses: bool = False) -> dict | None:
        """The finished run with these settings."""
        # Through JSON, as the stored ones went: tuples become lists there.
        wanted = json.loads(json.dumps(settings))
        for row in self.runs:
            is_same = all(row.get(name) == value for name, value in wanted.items())
            is_whole = row["is_finished"] and (
                not has_losses or "loss" in row["answers"]
            )
            if is_same and is_whole:
                return row

        return None

    def put(self, row: dict) -> None:
        """Adds a run in the place of one with the same settings, and writes."""
        keys = (
            "learner",
            "seed",
            "draft",
            "num_speculative_tokens",
            "stream",
            "content",
            "config",
        )
        row = json.loads(json.dumps(row))
        is_other = lambda old: any(old.get(key) != row[key] for key in keys)
        # An interrupted run, or one without losses, gives way to the newer one.
        self.runs = [old for old in self.runs if is_other(old)] + [row]
        self.write()

    def write(self) -> None:
        """Replaces the file, whole or not at all."""
        if self.file is None:
            return

        content = {"runs": self.runs, "hindsight": self.hindsight}
        atomic.write_text(self.file, json.dumps(content, indent=1))


def add_regret(rows: list[dict], hindsight: list[float] | None) -> None:
    """Adds `regret` (against hindsight) and `regret_static` to rows with losses."""
    losses = {id(row): row["answers"].get("loss") for row in rows}
    static = next((losses[id(r)] for r in rows if r["config"] is None), None)
    for row in rows:
        own = losses[id(row)]
        for name, other in (("regret", hindsight), ("regret_static", static)):
            if own and other:
                size = min(len(own), len(other))
                series = dynamic_regret_proxy(own[:size], other[:size])
                row[name] = float(series[-1])


_COLUMNS = {
    "learner": ("learner", "{}"),
    "optimizer": ("optimizer", "{}"),
    "rate": ("learning_rate", "{:g}"),
    "seed": ("seed", "{}"),
    "acceptance length": ("mean_acceptance_length", "{:.3f}"),
    "last quarter": ("mean_acceptance_length_last_quarter", "{:.3f}"),
    "regret": ("regret", "{:.1f}"),
    "over static": ("regret_static", "{:+.1f}"),
    "updates": ("num_updates", "{}"),
    "learning, s": ("learning_seconds", "{:.1f}"),
    "ms an update": ("median_update_seconds", "{:.0f}"),
}


def markdown_table(rows: list[dict]) -> str:
    """One line a run; regrets are summed losses in nats, of which less is better."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]

    return "\n".join(lines)


def terminal_table(rows: list[dict], width: int | None = None) -> Group:
    """The same for people: a column a run."""
    cells = [_cells(row) for row in rows]
    return records_table([*_COLUMNS], cells, "Learners on the recording", width)


def _cells(row: dict) -> list[str]:
    """A run, as its table shows it."""
    cells = []

    for name, form in _COLUMNS.values():
        value: Any = row.get(name)
        if name not in row:  # an older version's, which has it in its settings
            value = (row["config"] or {}).get(name) or None
        if name == "median_update_seconds":
            value = 1e3 * value
        cells.append("-" if value is None else form.format(value))

    cells[0] += "" if row["is_finished"] else " (interrupted)"

    return cells


def plot_replays(rows: list[dict], path: Path) -> Path:
    """Draws each run's acceptance along the stream; with losses, its regret."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    static = next((r for r in rows if r["config"] is None), None)
    has_regret = static is not None and all("loss" in r["answers"] for r in rows)
    figure, grid = plt.subplots(
        1 + has_regret,
        1,
        figsize=(9, 4 + 3 * has_regret),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    seeds = {row["seed"] for row in rows}

    for row in rows:
        label = row["learner"] + (f", seed {row['seed']}" if len(seeds) > 1 else "")
        counts = [row["answers"][name] for name in _COUNTS]
        series = running_length(*counts, window=WINDOW)
        numbers = np.arange(1, len(series) + 1)
        grid[0, 0].plot(numbers, series, label=label, lw=1.5)
        if has_regret and static is not None:
            own = row["answers"]["loss"]
            base = static["answers"]["loss"]
            grid[1, 0].plot(numbers, dynamic_regret_proxy(own, base[: len(own)]))

    # Of the longest run, since an interrupted one has seen only a part of the stream.
    domains: Any = max((row["answers"]["domain"] for row in rows), key=len)
    changes = [i for i in range(1, len(domains)) if domains[i] != domains[i - 1]]

    for axes in grid[:, 0]:
        # Streams that change all the time would be all lines.
        for i in changes if len(changes) <= _MAX_LINES else []:
            axes.axvline(i + 0.5, color="#8a8f98", ls=":", lw=0.8)
        axes.grid(alpha=0.3)

    grid[0, 0].set(
        title="Tokens per target pass, replayed with each learner",
        ylabel=f"tokens a target pass (last {WINDOW} answers)",
    )
    if has_regret:
        grid[1, 0].set(
            title="Loss summed over answers, less that of the static draft",
            ylabel="nats; below 0 is better",
        )

    figure.legend(loc="outside lower center", ncols=min(4, len(rows)), frameon=False)

    grid[-1, 0].set(xlabel="answer")

    return atomic.write_figure(figure, path)
