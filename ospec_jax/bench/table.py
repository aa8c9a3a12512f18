# SPDX-License-Identifier: Apache-2.0
"""Methods by targets and sets of prompts: the table of a paper.

All methods answer a set's prompts in one interleaved run, beside plain decoding. A run
is kept once it is complete, so that a table of hours goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ospec_jax import atomic
from ospec_jax.bench.live import run_live
from ospec_jax.bench.part_tables import Cell, PartTable
from ospec_jax.bench.parts import PLAIN
from ospec_jax.bench.report import plot_part
from ospec_jax.bench.rows import to_rows
from ospec_jax.bench.runs import BenchConfig, Contender
from ospec_jax.config import ConfigError, TreeConfig, check_types, whole_number
from ospec_jax.config.fields import read_json
from ospec_jax.data.prompts import Prompt, read_prompts
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import load_draft
from ospec_jax.models.hub import Target
from ospec_jax.reports.progress import Interrupt, say

_SPEED = "tokens_per_second_with_learning"


@dataclasses.dataclass(frozen=True)
class Method:
    """How a draft is made and taught.

    Attributes:
      draft: As for `load_draft`.
      learner: Trains it; None for the draft as it is.
      ngrams: Let n-grams suggest tokens.
      num_speculative_tokens: Depth of the chain.
    """

    draft: str
    learner: LearnerConfig | None = None
    ngrams: bool = False
    num_speculative_tokens: int = 3

    def __post_init__(self):
        check_types(self)
        whole_number("num_speculative_tokens", self.num_speculative_tokens, least=1)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Some rows of a file.

    Attributes:
      file: JSONL, within the folder of all sets.
      every: Take each row of so many, from the first on.
    """

    file: str
    every: int = 1

    def __post_init__(self):
        check_types(self)
        whole_number("every", self.every, least=1)


@dataclasses.dataclass(frozen=True)
class TargetPart:
    """What is measured of a target.

    Attributes:
      target: As for `load_target`.
      methods: Names of methods that have a draft for it.
      sets: Names of sets.
      num_prompts: Of each set, at most.
    """

    target: str
    methods: tuple[str, ...]
    sets: tuple[str, ...]
    num_prompts: int

    def __post_init__(self):
        check_types(self)
        whole_number("num_prompts", self.num_prompts, least=1)


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """A table of methods by targets and sets.

    Attributes:
      methods: By name, in the order of the table's lines.
      sets: By name, in the order of its columns.
      parts: One table each.
      left_out: Sets that the paper has and this table has not, with the reason.
    """

    methods: dict[str, Method]
    sets: dict[str, PromptSet]
    parts: tuple[TargetPart, ...]
    max_new_tokens: int = 64
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        whole_number("max_new_tokens", self.max_new_tokens, least=1)
        for part in self.parts:
            for what, asked, known in (
                ("methods", part.methods, self.methods),
                ("sets", part.sets, self.sets),
            ):
                if unknown := [name for name in asked if name not in known]:
                    raise ConfigError(
                        f"{part.target} asks for {what} {unknown} that the table does "
                        f"not have; it has {list(known)}"
                    )


def measure_table(
    config: TableConfig,
    folder: Path,
    out: Path,
    interrupt: Interrupt,
    load: Callable[[str], Target],
    targets: Sequence[str] = (),
    precision: str = "auto",
) -> str:
    """Measures what is missing, and returns all there is as Markdown.

    It is written into `out` after each run, too: `table.md`, and a file for each run.
    See `plot_table`, too.

    Args:
      folder: Holds the files of the sets; sets whose file is absent are left out.
      load: Loads a target by its name.
      targets: Some of the table's; by default all.
      precision: That `load` was asked for; runs of another one are not gone on with.

    Raises:
      ConfigError: `out` holds runs of other settings, or no such target is asked for.
      Interrupted: By a signal; complete runs are kept, and the same call goes on.
    """
    parts = _chosen(config, targets)
    missing = {
        name: f"{prompts.file} is not in {folder}"
        for name, prompts in config.sets.items()
        if not (folder / prompts.file).is_file()
    }
    for name, reason in missing.items():
        say(f"{name} is left out: {reason}", "yellow")

    for part in parts:
        target = None
        for name in part.sets:
            file = _run_file(out, part, name)
            settings = _settings(config, part, name, precision)
            if name in missing or _is_measured(file, settings):
                continue

            target = target or load(part.target)
            say(f"{part.target}, {name}: {', '.join(part.methods)}")
            prompts = _prompts_of(config.sets[name], folder, part.num_prompts)
            rows = _measure(config, part, target, prompts, interrupt)
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(
                file, json.dumps({"settings": settings, "rows": rows}, indent=1)
            )
            atomic.write_text(out / "table.md", table_text(config, out, missing))

        # Each target has programs of its own, which the next one has no use for.
        jax.clear_caches()

    return table_text(config, out, missing)


def _chosen(config: TableConfig, targets: Sequence[str]) -> list[TargetPart]:
    known = [part.target for part in config.parts]
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(f"the table has no target {unknown[0]!r}; it has {known}")

    return [part for part in config.parts if not targets or part.target in targets]


def _run_file(out: Path, part: TargetPart, name: str) -> Path:
    words = (part.target, name)
    folder, file = (
        "".join(c if c.isalnum() or c in "-._" else "_" for c in w) for w in words
    )
    return out / folder / f"{file}.json"


def _settings(
    config: TableConfig, part: TargetPart, name: str, precision: str
) -> dict[str, Any]:
    """What a run's figures depend on, but for the machine."""
    settings = {
        "target": part.target,
        "precision": precision,
        "set": dataclasses.asdict(config.sets[name]),
        "num_prompts": part.num_prompts,
        "max_new_tokens": config.max_new_tokens,
        "methods": {
            method: dataclasses.asdict(config.methods[method])
            for method in part.methods
        },
    }
    # Tuples are lists in the file.
    return json.loads(json.dumps(settings))


def _is_measured(file: Path, settings: dict[str, Any]) -> bool:
    """Whether a complete run of these settings is there.

    Raises:
      ConfigError: It has other settings.
    """
    if not file.is_file():
        return False

    found = read_json(file).get("settings", {})
    for name, value in settings.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{file} was measured with {name} {found.get(name)!r:.80}, not "
                f"{value!r:.80}; choose another folder, or remove the file"
            )

    return True


def _prompts_of(prompts: PromptSet, folder: Path, count: int) -> list[Prompt]:
    return read_prompts(folder / prompts.file)[:: prompts.every][:count]


def _measure(
    config: TableConfig,
    part: TargetPart,
    target: Target,
    prompts: list[Prompt],
    interrupt: Interrupt,
) -> list[dict]:
    """One interleaved run of all methods.

    Raises:
      Interrupted: By a signal; what was measured of the run is dropped.
    """
    contenders = {}
    for name in part.methods:
        method = config.methods[name]
        contenders[name] = Contender(
            load_draft(method.draft, target),
            TreeConfig(num_steps=method.num_speculative_tokens),
            method.ngrams,
            learner=method.learner,
        )

    bench = BenchConfig(modes=(PLAIN,), max_new_tokens=config.max_new_tokens)
    run = run_live(target, None, prompts, bench, interrupt, contenders=contenders)
    if not run.is_complete:
        interrupt.raise_if_set()

    return to_rows(run)


def table_text(config: TableConfig, out: Path, missing: Mapping[str, str]) -> str:
    """Markdown of all runs that are there: a table for each target."""
    texts = [_part_text(config, part, out) for part in config.parts]
    left_out = [
        f"- {name}: {why}" for name, why in (config.left_out | dict(missing)).items()
    ]
    if left_out:
        texts.append("\n".join(["Left out:", "", *left_out]))

    return "\n\n".join(text for text in texts if text)


def _part_text(config: TableConfig, part: TargetPart, out: Path) -> str:
    """A line for each method, a column for each set, the fastest in bold."""
    rows = _rows_of(config, part, out)
    if not rows:
        return ""

    cells = _part_table(part, rows).cells
    ratios = {method: _ratios(rows, method) for method in part.methods}
    best = [max(ratios, key=lambda m: ratios[m][i]) for i in range(len(rows))]
    lines = [
        f"**{part.target}**, {part.num_prompts} prompts of each set at most",
        "",
        "| method | " + " | ".join(rows) + " | mean |",
        "|" + "---|" * (len(rows) + 2),
    ]

    for method in [m for m in config.methods if m in ratios]:
        texts = [
            f"**{cell.value:.2f}** ({cell.length:.2f})"
            if first == method
            else f"{cell}"
            for cell, first in zip(cells[method], best, strict=True)
        ]
        mean = sum(ratios[method]) / len(rows)
        lines.append(f"| {method} | {' | '.join(texts)} | {mean:.2f} |")

    speeds = [f"{of_set[PLAIN][_SPEED]:.1f}" for of_set in rows.values()]
    lines.append("| plain, tokens/s | " + " | ".join(speeds) + " | |")
    different = sum(
        row["num_mismatched_outputs"] or 0
        for of_set in rows.values()
        for row in of_set.values()
    )
    lines += [
        "",
        "Speed-ups over plain decoding, learning's time included; in brackets mean "
        "acceptance lengths.",
        f"Outputs that differ from plain ones: {different}.",
    ]

    return "\n".join(lines)


def _rows_of(
    config: TableConfig, part: TargetPart, out: Path
) -> dict[str, dict[str, dict]]:
    """Of each set that was measured, each method's row."""
    files = {name: _run_file(out, part, name) for name in config.sets}
    return {
        name: {row["mode"]: row for row in read_json(file)["rows"]}
        for name, file in files.items()
        if name in part.sets and file.is_file()
    }


def _ratios(rows: dict[str, dict[str, dict]], method: str) -> list[float]:
    """A method's speed-up over plain decoding, on each set."""
    return [of_set[method][_SPEED] / of_set[PLAIN][_SPEED] for of_set in rows.values()]


def _part_table(part: TargetPart, rows: dict[str, dict[str, dict]]) -> PartTable:
    """Speed-ups over plain decoding, by set."""

    def cells(method: str) -> list[Cell]:
        lengths = [of_set[method]["mean_acceptance_length"] for of_set in rows.values()]
        return [*map(Cell, _ratios(rows, method), lengths)]

    return PartTable(
        what="set",
        unit="speed-up over plain decoding, learning's time included",
        labels=list(rows),
        sizes=[of_set[PLAIN]["num_prompts"] for of_set in rows.values()],
        plain=[of_set[PLAIN][_SPEED] for of_set in rows.values()],
        cells={method: cells(method) for method in part.methods},
    )


def plot_table(config: TableConfig, out: Path) -> list[Path]:
    """Draws what there is of each target as bars, `TARGET.png`; none of what is not."""
    found = []
    for part in config.parts:
        rows = _rows_of(config, part, out)
        if rows:
            folder = _run_file(out, part, "").parent
            file = folder.with_name(f"{folder.name}.png")
            found.append(plot_part(_part_table(part, rows), file, part.target))

    return found
