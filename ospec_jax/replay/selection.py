# SPDX-License-Identifier: Apache-2.0
"""Comparing selectors on a pool's recorded acceptance: no model, thousands a second.

A controller chooses, and hears, as at batch size 1: a step is chosen before what the
one before it came to is known. Drafts are judged by the first token of a chain at each
position, as while serving; what is accepted is what the chain itself would have had.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ospec_jax import atomic
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.control.base import Action, Chooser, Context, Outcome, Row
from ospec_jax.control.lengths import Pending
from ospec_jax.control.selectors import BANDITS, JUDGING, build_selector
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta

_MAX_LINES = 40
ONCE = "once"
"""Among a selector's options: the drafter is chosen at the beginning of each answer,
and stays. What the selector learns from is the same."""
BEST = "best fixed in hindsight"
BEST_EACH = "best fixed for each answer"


@dataclasses.dataclass
class Selected:
    """What one selector came to along a stream.

    Attributes:
      steps: Of each answer.
      tokens: Of each answer, but the first one.
      seconds: Of each answer, in units of the cheapest drafter's step.
      shares: `[a, n]` of each answer's steps, by drafter.
      weights: `[a, n]` or None, at the end of each answer.
    """

    name: str
    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    shares: np.ndarray
    weights: np.ndarray | None = None
    num_switches: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a pass of the target yields."""
        return float(self.tokens.sum() / max(self.steps.sum(), 1))


def costs_of(meta: PoolMeta, costs: Sequence[float]) -> np.ndarray:
    """What a step of each drafter takes, in units of the cheapest one.

    Raises:
      ConfigError: There are not as many as drafters, or one is not above 0.
    """
    if not costs:
        return np.ones(len(meta.drafters))
    if len(costs) != len(meta.drafters) or min(costs) <= 0:
        raise ConfigError(
            f"costs are {','.join(map(str, costs))}; give one number above 0 for each "
            f"of {', '.join(meta.drafters)}"
        )

    return np.asarray(costs) / min(costs)


def chosen_once(name: str) -> tuple[str, bool]:
    """A selector's name without `ONCE`, and whether that stood in it.

    Raises:
      ConfigError: It is a bandit's.
    """
    first, *options = name.split(":")
    rest = [option for option in options if option != ONCE]
    if first in BANDITS and len(rest) < len(options):
        raise ConfigError(
            f"{name!r}: what a bandit learns depends on when it chooses; leave "
            f"{ONCE!r} out, or use one of {', '.join(JUDGING)}"
        )

    return ":".join([first, *rest]), len(rest) < len(options)


def check_context(name: str, answers: Sequence[PoolAnswer]) -> None:
    """Refuses to tell requests apart by what was not recorded of them.

    Raises:
      ConfigError: They would all have the shared weights.
    """
    options = name.split(":")[1:]
    if "scope" in options:
        raise ConfigError(
            f"{name!r} goes by whose requests are, which recordings do not say; use "
            f"domain or opening"
        )
    for option in ("domain", "opening"):
        if option in options and not any(getattr(one, option) for one in answers):
            raise ConfigError(
                f"{name!r} goes by a prompt's {option}, and no recorded answer has "
                f"one; record prompts that do, into another folder"
            )
    if "similar" in options and not any(one.embedding for one in answers):
        raise ConfigError(
            f"{name!r} goes by what the target makes of prompts, and no recorded "
            f"answer has it: the recording is of an older version; record the prompts "
            f"anew, into another folder"
        )


def replay(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    name: str,
    costs: Sequence[float] = (),
) -> Selected:
    """Lets a selector choose along recorded answers.

    Args:
      name: See `control.selectors`; with `ONCE` behind it, too.
      costs: Of a step of each drafter, in any unit; by default all cost the same.
    """
    check_context(name, answers)
    relative = costs_of(meta, costs)
    tree = TreeConfig(num_steps=meta.num_steps)
    actions = tuple(Action(tree, i) for i in range(len(meta.drafters)))
    rule, is_chosen_once = chosen_once(name)
    chooser = Chooser.start(build_selector(rule, actions), 1)
    if chooser.controller.set_costs is not None:
        chooser.state = chooser.controller.set_costs(chooser.state, relative.tolist())

    rows: list[dict[str, Any]] = []
    taken: list[int] = []
    for ordinal, answer in enumerate(answers):
        numbers = _walk(chooser, answer, meta.num_steps, is_chosen_once, ordinal)
        taken += numbers
        counts = np.bincount(numbers, minlength=len(actions))
        report = chooser.report() or {}
        rows.append(
            {
                "steps": len(numbers),
                "tokens": answer.num_tokens - 1,
                "seconds": float(relative[numbers].sum()) if numbers else 0.0,
                "shares": counts / max(len(numbers), 1),
                "weights": report.get("weights", []),
            }
        )

    column = lambda key: np.asarray([row[key] for row in rows])
    has_weights = bool(rows) and len(rows[0]["weights"]) == len(actions)
    return Selected(
        name,
        column("steps"),
        column("tokens"),
        column("seconds"),
        column("shares"),
        column("weights") if has_weights else None,
        int(np.count_nonzero(np.diff(taken))),
    )


def _walk(
    chooser: Chooser,
    answer: PoolAnswer,
    depth: int,
    is_chosen_once: bool,
    ordinal: int,
) -> list[int]:
    """Serves one answer; returns who drafted at each step."""
    pending = Pending()
    unread: tuple[Action, Outcome] | None = None
    numbers: list[int] = []
    action = chooser.controller.actions[0]
    place = 0
    num_places = len(answer.accepted)
    context = Context(0, answer.domain, answer.opening)
    read = context._replace(embedding=answer.embedding)
    only = chooser.rests(Row(False, 1, num_places, context), ordinal)
    if only is not None:
        action = Action(action.tree, only)

    while place < num_places:
        # The host is one step ahead of what it has read.
        left = num_places - place
        if only is None and not (numbers and is_chosen_once):
            action = chooser.choose((Row(False, place + 1, left, context),))
        if unread is not None:
            chooser.observe(*unread)
        numbers.append(action.drafter)
        # What the target makes of a prompt is read when a step has been chosen.
        context = read
        accepted = int(answer.accepted[place, action.drafter])
        emitted = slice(place, min(place + accepted + 1, num_places))
        # At every depth of a chain there is one child.
        hits = np.repeat(answer.hits[emitted, None].astype(float), depth, axis=1)
        place = emitted.stop
        is_end = place == num_places
        heard = () if is_end else (accepted,)
        # As deep as the draft got: to the token that was not accepted, if one was left.
        judged = answer.hits[emitted, action.drafter][:depth].astype(float)
        expected = () if is_end else (tuple(judged.tolist()),)
        # Who has not run over an answer is not judged by it, and nobody's depths are.
        windows = pending.add(hits, hits) if only is None else None
        expected = expected if only is None else ()
        outcome = Outcome(heard, windows, int(is_end), expected)
        unread = action, outcome._replace(parts=((context, outcome),))

    if unread is not None:
        chooser.observe(*unread)

    return numbers


def hindsight(fixed: Sequence[Selected]) -> list[Selected]:
    """The fixed drafter that was fastest on the stream, and that on each answer."""
    best = min(fixed, key=lambda one: one.seconds.sum())
    whole = dataclasses.replace(best, name=f"{BEST} ({best.name})")
    seconds = np.stack([one.seconds for one in fixed])

    return [whole, picked(BEST_EACH, fixed, seconds.argmin(axis=0))]


def picked(
    name: str, fixed: Sequence[Selected], numbers: Sequence[int] | np.ndarray
) -> Selected:
    """Who is drafted by another fixed drafter in each answer.

    Args:
      fixed: What each drafter came to.
      numbers: `[a]` of the drafter of each answer.
    """
    answers = np.arange(len(numbers))
    taken = np.asarray(numbers, int)
    column = lambda key: np.stack([getattr(one, key) for one in fixed])[taken, answers]

    return Selected(
        name,
        column("steps"),
        column("tokens"),
        column("seconds"),
        column("shares"),
        num_switches=int(np.count_nonzero(np.diff(taken))),
    )


def compare(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    names: Sequence[str],
    costs: Sequence[float] = (),
) -> list[Selected]:
    """Every fixed drafter, the best ones in hindsight, and the selectors."""
    if not answers:
        raise ConfigError("the recording holds no answers; record some prompts into it")

    numbers = range(len(meta.drafters))
    fixed = [replay(meta, answers, f"fixed:{i}", costs) for i in numbers]
    for one, name in zip(fixed, meta.drafters, strict=True):
        one.name = name

    chosen = [replay(meta, answers, name, costs) for name in names]
    return [*fixed, *hindsight(fixed), *chosen]


def to_row(
    one: Selected, best: Selected, answers: Sequence[PoolAnswer], meta: PoolMeta
) -> dict[str, Any]:
    """A selector's result as a JSON object.

    Args:
      best: The best fixed drafter in hindsight, which regret is against: steps, and
        time in units of the cheapest drafter's step.
    """
    domains = np.asarray([answer.domain for answer in answers])
    by_domain = {}
    for domain in sorted(set(domains)):
        own = domains == domain
        steps = max(int(one.steps[own].sum()), 1)
        by_domain[str(domain)] = float(one.tokens[own].sum() / steps)

    shares = np.average(one.shares, axis=0, weights=np.maximum(one.steps, 1e-9))
    row = {
        "name": one.name,
        "mean_acceptance_length": one.mean_acceptance_length,
        "tokens_per_cost": float(one.tokens.sum() / max(one.seconds.sum(), 1e-9)),
        "regret_steps": int(one.steps.sum() - best.steps.sum()),
        "regret_cost": float(one.seconds.sum() - best.seconds.sum()),
        "switches": one.num_switches,
        "shares": dict(zip(meta.drafters, shares.tolist(), strict=True)),
        "by_domain": by_domain,
        "answers": {
            "id": [answer.id for answer in answers],
            "domain": domains.tolist(),
            "steps": one.steps.tolist(),
            "tokens": one.tokens.tolist(),
        },
    }
    if one.weights is not None:
        row["answers"]["weights"] = one.weights.tolist()

    return row


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Results as a table, a line a selector."""
    domains = list(rows[0]["by_domain"]) if len(rows[0]["by_domain"]) > 1 else []
    head = ["selector", "tokens a pass", "regret (passes)", "switches", *domains]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row["name"],
            f"{row['mean_acceptance_length']:.3f}",
            str(row["regret_steps"]),
            str(row["switches"]),
            *(f"{row['by_domain'][domain]:.3f}" for domain in domains),
        ]
        lines.append("| " + " | ".join(cells) + " |")

    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], drafters: list[str], path: Path) -> Path:
    """Draws each selector's regret along the stream, and the weights of one of them.

    Regret is in passes of the target, against the best fixed drafter in hindsight.
    Where the domain of the stream changes there is a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weighed = next((row for row in rows if "weights" in row["answers"]), None)
    best = next(row for row in rows if row["name"].startswith(BEST))
    figure, grid = plt.subplots(
        1 + (weighed is not None),
        1,
        figsize=(9, 4 + 3 * (weighed is not None)),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    numbers = np.arange(1, len(best["answers"]["steps"]) + 1)

    for row in rows:
        if row["name"] in drafters or row is best:
            continue
        extra = np.subtract(row["answers"]["steps"], best["answers"]["steps"])
        grid[0, 0].plot(numbers, np.cumsum(extra), label=row["name"], lw=1.5)

    grid[0, 0].set(
        title="Passes of the target beyond those of the best fixed drafter",
        ylabel="passes; below 0 is better",
    )
    grid[0, 0].legend(frameon=False)
    if weighed is not None:
        weights = np.asarray(weighed["answers"]["weights"])
        grid[1, 0].stackplot(numbers, weights.T, labels=drafters)
        grid[1, 0].set(title=f"Weights of {weighed['name']}", ylabel="weight")
        grid[1, 0].legend(frameon=False, ncols=min(4, len(drafters)))

    domains = best["answers"]["domain"]
    changes = [i for i in range(1, len(domains)) if domains[i] != domains[i - 1]]
    for axes in grid[:, 0]:
        # Streams that change all the time would be all lines.
        for i in changes if len(changes) <= _MAX_LINES else []:
            axes.axvline(i + 0.5, color="#8a8f98", ls=":", lw=0.8)
        axes.grid(alpha=0.3)

    grid[-1, 0].set(xlabel="answer")

    return atomic.write_figure(figure, path)
