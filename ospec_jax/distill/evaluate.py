# SPDX-License-Identifier: Apache-2.0
"""How well a draft does on answers that it was not trained on, and a plot of it."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Group

from ospec_jax import atomic
from ospec_jax.learners.base import Learner
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.reports.tables import records_table


@dataclasses.dataclass(frozen=True)
class HeldOutScore:
    """Greedy drafting on held-out answers, teacher-forced.

    Attributes:
      loss: Mean over domains; None when there are too few held-out windows.
      mean_acceptance_length: By domain, for a chain of `num_steps` tokens whose depths
        are right independently of each other; not what decoding counts.
    """

    loss: float | None
    mean_acceptance_length: dict[str, float]

    @property
    def rounded(self) -> dict[str, float]:
        """The lengths, for people."""
        return {k: round(v, 3) for k, v in self.mean_acceptance_length.items()}


def is_held_out(request_id: str, share: float) -> bool:
    """A request's side of the split; by its id, so that it never changes sides."""
    number = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:4])
    return number < share * 2**32


def evaluate_held_out(
    learner: Learner,
    params,
    store: FeedbackStore,
    config,
    shared,
    token_ids,
    max_windows: int = 32,
) -> HeldOutScore:
    """Scores at most `max_windows` held-out windows of each domain.

    Args:
      config: The `DistillConfig` of the run.
    """
    evaluate = jax.jit(learner.evaluate)
    domains: dict[str, list] = {}

    for i, entry in enumerate(store.entries):
        if is_held_out(entry.id, config.holdout_share):
            windows = store.windows([i], config.window)
            domains.setdefault(entry.domain, []).extend(windows)

    losses = []
    lengths = {}

    for domain, windows in sorted(domains.items()):
        infos = [
            evaluate(
                params,
                store.segments(
                    windows[i : i + config.batch_size],
                    config.num_context,
                    config.window,
                    config.num_steps,
                ),
                shared,
                token_ids,
            )[0]
            for i in range(0, min(len(windows), max_windows), config.batch_size)
            if len(windows) >= i + config.batch_size
        ]
        if not infos:
            continue
        losses += [float(info.loss) for info in infos]
        agreement = np.mean([np.asarray(info.agreement) for info in infos], axis=0)
        lengths[domain] = float(1 + np.cumprod(agreement).sum())

    return HeldOutScore(float(np.mean(losses)) if losses else None, lengths)


def describe_score(row: dict) -> str:
    """A row of the history as a line."""
    shown = lambda value: "-" if value is None else f"{value:.3f}"
    lengths = row["mean_acceptance_length"]
    domains = [f"{name or 'all'} {value:.2f}" for name, value in lengths.items()]
    found = f"; acceptance length {', '.join(domains)}" if domains else ""

    return (
        f"update {row['step']}: loss {shown(row['train_loss'])}, held out "
        f"{shown(row['held_out_loss'])}{found}"
    )


def history_table(history: list[dict], width: int | None = None) -> Group:
    """How training went: a column a look at it."""
    lengths = [row["mean_acceptance_length"] for row in history]
    domains = sorted({name for one in lengths for name in one})
    labels = ["update", "training loss", "held-out loss"]
    labels += [f"acceptance length, {name or 'all'}" for name in domains]
    keys = ("train_loss", "held_out_loss")
    shown = lambda value: "-" if value is None else f"{value:.3f}"
    records = [
        [str(row["step"]), *(shown(row[key]) for key in keys)]
        + [shown(length.get(name)) for name in domains]
        for row, length in zip(history, lengths, strict=True)
    ]

    return records_table(labels, records, "Training", width)


def plot_history(history: list[dict], path: Path) -> Path:
    """Draws loss and held-out acceptance length over the updates into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained", sharex=True
    )
    steps = [row["step"] for row in history]
    column = lambda name: np.array([row[name] for row in history], float)
    left.plot(steps, column("train_loss"), ".-", color="#8a8f98", label="training")
    left.plot(steps, column("held_out_loss"), ".-", color="#1f6feb", label="held out")
    left.set(title="Loss, weighted over depths", xlabel="update", ylabel="loss")
    domains = sorted({d for row in history for d in row["mean_acceptance_length"]})

    for domain in domains:
        lengths: Any = [row["mean_acceptance_length"].get(domain) for row in history]
        right.plot(steps, np.array(lengths, float), ".-", label=domain)

    right.set(
        title="Acceptance on held-out answers, teacher-forced",
        xlabel="update",
        ylabel="tokens a target pass",
    )

    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            # Below the axes, where it hides no curve.
            axes.legend(
                frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4
            )

    return atomic.write_figure(figure, path)
