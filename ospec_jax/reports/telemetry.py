# SPDX-License-Identifier: Apache-2.0
"""What a learner did along a stream: JSON lines, TensorBoard, plots.

A file has one row an answer and one an update, in order, and is only ever added to.
"""

import contextlib
import importlib
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ospec_jax import atomic
from ospec_jax.config import ConfigError
from ospec_jax.config.base import is_of_type
from ospec_jax.config.fields import Fields, parse_json
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.online.trainer import UpdateReport
from ospec_jax.types import Draft

WINDOW = 40
"""Answers over which the running acceptance length is taken, the paper's chunk."""

_TOLD = (
    "loss",
    "grad_norm",
    "agreement",
    "acceptance",
    "candidate_agreement",
    "candidate_acceptance",
    "num_samples",
)
_NO_CURVES = ("kind", "number", "id", "domain", "decision", "extra", "members")
_DRAWN = (
    *_TOLD,
    "acceptance_per_position",
    "path_length",
    "running_acceptance_length",
    "staleness",
    "stride",
    "selection_weights",
    "selection_means",
    "selection_regret",
)
"""What a plot shows of rows, beside what the learner told."""
_SELECTION = "selection_"
_SELECTED = tuple(f"{_SELECTION}{name}" for name in ("weights", "means", "regret"))
"""What a plot shows of a selection among drafts."""
_LEARNED_FROM = ("loss", "agreement", "candidate_agreement")
_TITLES = {
    "acceptance_per_position": "measured acceptance, by position",
    "agreement": "agreement, by depth",
    "candidate_agreement": "agreement among candidates only, by depth",
}
"""Of panels for which the row's name does not say it all."""
_ROWS: dict[str, dict[str, Any]] = {
    "answer": {
        "number": int,
        "num_tokens": int,
        "num_drafts": int,
        "num_accepted_tokens": int,
        "acceptance_histogram": list[int] | None,
        "version": int,
    },
    "update": {
        "number": int,
        "num_answers": int,
        "decision": str,
        "path_length": float,
        "extra": dict,
    },
}
"""What each row must have to be read back, and to be drawn."""
_LARGEST = 2**53
"""Of whole numbers."""
_WRITERS = ("tensorboardX", "torch.utils.tensorboard", "flax.metrics.tensorboard")


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_within(row: dict, num_answered: int) -> bool:
    """Whether a row tells of the first answers, or of what they taught."""
    if row["kind"] == "update":  # is written before its answer is
        return row["num_answers"] < num_answered

    return row["number"] <= num_answered


@jax.jit
def distance(before, after):
    """Euclidean distance of two trees of parameters."""
    return optax.global_norm(jax.tree.map(jnp.subtract, after, before))


class Telemetry:
    """Writes rows as things happen; each is on disk before the next answer.

    Rows of kind `answer` hold the request's and the running acceptance length, both as
    decoding counted them, likewise `acceptance_per_position` (the running share of
    steps that accepted at least one, two, ... tokens), the served `version` and its
    `staleness`: answer tokens since it changed. Where a pool's drafts are selected,
    they hold `selection_weights` (or a bandit's `selection_means`) by action,
    `selection_regret` (estimated tokens that the best single draft would have yielded
    beyond those of the chosen ones), the action last taken and the number of switches.
    Rows of kind `update` hold the loss
    before the update, `agreement` and `acceptance` by depth on the windows it learns
    from (with `num_candidates` it knows both among the candidates only, which flatters
    the draft: then they are called `candidate_agreement` and `candidate_acceptance`),
    the gradient's norm, the decision and its counts, `step_length` and `path_length`
    (how far the served parameters moved, now and in all), the `stride` of learning,
    seconds, and whatever else the learner tells (`LearnerInfo.extra`): expert weights,
    hint error. Of the learners `head` and `preference`, whose updates are answers,
    there are loss and agreement of what was drafted, and `num_samples`; of several
    steps in one answer, `step_length` is the sum.
    """

    def __init__(
        self,
        file: Path,
        tensorboard: Path | None = None,
        num_answered: int | None = None,
    ):
        """Opens the file.

        Args:
          num_answered: Of a resumed run: answers that it goes on behind. Rows of later
            ones, which it will give again, are dropped.

        Raises:
          ConfigError: It exists and is not to be resumed, or TensorBoard is missing.
        """
        self._writer = tensorboard and tensorboard_writer(tensorboard)
        self._counts: dict[str, Any] = dict.fromkeys(
            ("answers", "tokens", "updates", "promotions", "rollbacks"), 0
        )
        self._version = -1
        self._changed = 0
        self._path_length = 0.0
        self._recent: deque = deque(maxlen=WINDOW)
        if file.exists():
            if num_answered is None:
                raise ConfigError(
                    f"{file} exists, and telemetry is only added to by the same run: "
                    f"choose another file, or resume"
                )
            # The rows are read back into the counts, so that running figures go on
            # where they were.
            kept = [row for row in read_rows(file) if _is_within(row, num_answered)]
            for row in kept:
                self._recall(row)
            atomic.write_text(file, "".join(map(_line, kept)))

        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("a", encoding="utf-8")

    def close(self) -> None:
        """Ends writing."""
        with contextlib.suppress(OSError):  # was said when it was written
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def answer(
        self,
        id: str,
        domain: str,
        num_tokens: int,
        stats: DecodingStats,
        version: int = 0,
        learning_seconds: float = 0.0,
        selection: dict[str, Any] | None = None,
    ) -> None:
        """Writes one answer's row.

        Args:
          version: Of the draft that was served.
          selection: What chose among a pool's drafts thinks; see
            `control.base.Controller.report`.
        """
        row: dict[str, Any] = {
            "kind": "answer",
            "number": self._counts["answers"] + 1,
            "id": id,
            "domain": domain,
            "num_tokens": num_tokens,
            "num_drafts": stats.num_drafts,
            "num_accepted_tokens": stats.num_accepted_tokens,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "acceptance_histogram": stats.acceptance_histogram,
            "version": version,
            "learning_seconds": learning_seconds,
        }
        told = selection or {}
        row |= {f"{_SELECTION}{name}": value for name, value in told.items()}
        self._recall(row)
        # Sums over the window, not a mean of ratios: long answers weigh more.
        drafts, accepted = np.sum([counts[:2] for counts in self._recent], axis=0)
        row["running_acceptance_length"] = 1 + float(accepted) / max(float(drafts), 1)
        histograms = [histogram for _, _, histogram in self._recent]
        row["acceptance_per_position"] = _shares_by_position(histograms)
        row["staleness"] = self._counts["tokens"] - self._changed
        self._write(row, row["number"])

    def update(self, report: UpdateReport, before: Draft, after: Draft) -> None:
        """Writes one update's row.

        Args:
          before: What was served, and what is from now on (`after`).
        """
        info = report.info
        step_length = report.step_length
        if step_length is None:
            # Only what is served has moved; an iterate that waits for its verdict has
            # not.
            is_moved = report.decision == "promote"
            step_length = is_moved * float(distance(before.params, after.params))

        told = {name: _plain(x) for name, x in getattr(info, "extra", {}).items()}
        row: dict[str, Any] = {
            "kind": "update",
            "number": self._counts["updates"] + 1,
            "num_answers": self._counts["answers"],
            "num_tokens": self._counts["tokens"],
            "decision": report.decision,
            "seconds": report.seconds,
            "stride": report.stride,
            "step_length": step_length,
            "path_length": self._path_length + step_length,
            "extra": told,
        }

        for name in _TOLD:
            value = getattr(info, name, None)
            if value is not None:
                row[name] = _plain(value)

        if report.members:
            row["members"] = list(report.members)
        self._recall(row)
        row["num_promotions"] = self._counts["promotions"]
        row["num_rollbacks"] = self._counts["rollbacks"]
        self._write(row, row["number"])

    def _recall(self, row: dict) -> None:
        """Counts what a row, new or read back, says."""
        counts = self._counts
        counts[f"{row['kind']}s"] += 1
        if row["kind"] == "update":
            counts["promotions"] += row["decision"] == "promote"
            counts["rollbacks"] += row["decision"] == "rollback"
            self._path_length = row["path_length"]
            return

        # Rows of older versions have no histogram.
        histogram = row.get("acceptance_histogram", [])
        self._recent.append((row["num_drafts"], row["num_accepted_tokens"], histogram))
        if row["version"] != self._version:
            self._version = row["version"]
            # Before this answer's tokens are added: they are the first of the new
            # version.
            self._changed = counts["tokens"]

        counts["tokens"] += row["num_tokens"]

    def _write(self, row: dict, number: int) -> None:
        # Flushed at once: a killed run has a row for all that it did.
        with atomic.named_errors(Path(self._file.name)):
            self._file.write(_line(row))
            self._file.flush()
        if self._writer is None:
            return

        # flax's writer calls it otherwise than the others.
        add = getattr(self._writer, "add_scalar", None) or self._writer.scalar

        for name, value in (row | row.get("extra", {})).items():
            if name not in _NO_CURVES:
                # A curve for each entry of a list.
                for i, x in enumerate(np.ravel(value)):
                    part = f"/{i}" if np.ndim(value) else ""
                    add(f"{row['kind']}/{name}{part}", float(x), number)


def _plain(value) -> Any:
    return np.asarray(value, float).tolist()


def _shares_by_position(histograms: Sequence[list[int]]) -> list[float]:
    """Share of steps that got at least one, two, ... drafted tokens accepted."""
    total = np.zeros(max(map(len, histograms), default=0))

    for histogram in histograms:
        total[: len(histogram)] += histogram

    # From the back: steps that accepted at least so many.
    survived = np.cumsum(total[::-1])[::-1]
    return (survived[1:] / max(total.sum(), 1)).tolist()


def tensorboard_writer(folder: Path) -> Any:
    """Whichever `SummaryWriter` is installed.

    Raises:
      ConfigError: None is.
    """
    for name in _WRITERS:
        try:
            return importlib.import_module(name).SummaryWriter(str(folder))
        except ImportError:
            continue

    raise ConfigError(
        f"TensorBoard needs one of {', '.join(_WRITERS)}: pip install "
        f"'ospec-jax[tensorboard]'"
    )


def read_rows(file: Path) -> list[dict]:
    """All complete rows; a last one cut short by a crash is left out.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: A row is none of telemetry's.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no telemetry file {file}")

    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: no telemetry") from error

    rows = []

    # The last piece is empty, or a row that a crash cut short.
    for number, line in enumerate(lines[:-1], 1):
        where = f"{file}, line {number}"
        fields = Fields(parse_json(line, where), where)
        _check_row(fields)
        rows.append(fields.values)

    return rows


def _check_row(fields: Fields) -> None:
    """Refuses what is no row of telemetry.

    Raises:
      ConfigError: A value is missing, or of another type.
    """
    kind = fields.text("kind")
    if kind not in ("answer", "update"):
        raise ConfigError(f"{fields.where}: no row of telemetry, but {kind!r:.80}")

    for name, hint in _ROWS[kind].items():
        value = fields.values.get(name)
        is_good = _is_number(value) if hint is float else is_of_type(value, hint)
        if not is_good:
            raise ConfigError(
                f"{fields.where}: no row of telemetry: {name} is {value!r:.80}"
            )

    for name, value in (fields.values | fields.values.get("extra", {})).items():
        values = value if isinstance(value, list) else [value]
        # What a later version may add is none of our affair.
        is_text = isinstance(value, str | dict) and name in fields.values
        if is_text and name not in _DRAWN:
            continue
        if not all(map(_is_number, values)):
            raise ConfigError(
                f"{fields.where}: no row of telemetry: {name} is {value!r:.80}, "
                f"neither a number nor a list of numbers"
            )


def _is_number(value: Any) -> bool:
    """Whether a value is a number; of a learner that went astray, infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False

    return isinstance(value, float) or abs(value) <= _LARGEST


def _padded(rows: Sequence[Any], rest: float) -> np.ndarray:
    """Numbers, or lists of them, as rows of one width."""
    lists = [np.ravel(np.asarray(row, float)) for row in rows]
    width = max(map(len, lists), default=0)
    pad = lambda values: np.pad(values, (0, width - len(values)), constant_values=rest)
    return np.array([pad(values) for values in lists])


def plot_telemetry(rows: list[dict], path: Path) -> Path:
    """Draws acceptance, loss, movement and all that the learner told into a PNG."""
    import matplotlib

    # Without a display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    answers = [row for row in rows if row["kind"] == "answer"]
    updates = [row for row in rows if row["kind"] == "update"]
    told = sorted({name for row in updates for name in row["extra"]})
    measured = ["running_acceptance_length", "staleness"]
    if any("acceptance_per_position" in row for row in answers):
        measured.append("acceptance_per_position")
    measured += [name for name in _SELECTED if any(name in row for row in answers)]

    panels = list(measured)
    if updates:
        # Agreement over the whole vocabulary or among candidates: whichever is known.
        known = [name for name in _LEARNED_FROM if any(name in r for r in updates)]
        panels += [*known, "stride", "path_length", *told]

    figure, grid = plt.subplots(
        -(-len(panels) // 2),
        2,
        figsize=(10, 2.6 * -(-len(panels) // 2)),
        layout="constrained",
        squeeze=False,
    )

    for axes, name in zip(grid.flat, panels, strict=False):
        if name in measured:
            found = [r for r in answers if name in r]
            values = [r[name] for r in found]
            # Chains of suggestions may go deeper in some answers than in others.
            lines = axes.plot([r["number"] for r in found], _padded(values, 0.0))
        else:
            found = [r for r in updates if name in r or name in r["extra"]]
            values = [r[name] if name in r else r["extra"][name] for r in found]
            steps = [r["num_answers"] for r in found]
            lines = axes.plot(steps, _padded(values, np.nan))
        if len(lines) > 1:
            # Beside the axes, where it hides no curve.
            axes.legend(
                lines,
                [str(i) for i in range(1, len(lines) + 1)],
                loc="upper left",
                bbox_to_anchor=(1, 1),
                frameon=False,
                fontsize="x-small",
            )
        axes.set(xlabel="answer", title=_TITLES.get(name, name.replace("_", " ")))
        axes.grid(alpha=0.3)

    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)

    return atomic.write_figure(figure, path)
