# SPDX-License-Identifier: Apache-2.0
"""`ospec replay` on a pool's recording: selections are compared, without a model."""

import dataclasses
from pathlib import Path
from typing import Any

from ospec_jax.cli.arguments import write_json
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.data.prompts import Prompt, read_prompts
from ospec_jax.replay import copies as sizes
from ospec_jax.replay import mixtures, selection
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta, in_order, read_pool
from ospec_jax.replay.router import Routes, routes_of
from ospec_jax.reports.progress import say

DEFAULT = "normalhedge,ucb,exp3"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What `ospec replay` was asked about a pool; see its flags."""

    select: str | None = None
    costs: str = ""
    prompts: Path | None = None
    router: Path | None = None
    copies: str = ""
    shuffles: int = 0
    json_file: Path | None = None
    plot: Path | None = None

    @property
    def names(self) -> list[str]:
        """Of rules."""
        return [name for name in (self.select or DEFAULT).split(",") if name]

    @property
    def seeds(self) -> range:
        """Of orders."""
        return range(max(self.shuffles, 1))


def replay_selection(folder: Path, wanted: Wanted) -> None:
    """Compares selections on a recording: along it, on mixtures, or by N.

    Raises:
      ConfigError: Flags contradict each other, or the recording lacks what they need.
    """
    whole_number("--shuffles", wanted.shuffles, least=0)
    _check_flags(wanted)
    meta, recorded = read_pool(folder)
    prompts = None if wanted.prompts is None else read_prompts(wanted.prompts)
    answers = recorded if prompts is None else in_order(recorded, prompts, folder)

    if wanted.copies:
        rows: list[dict[str, Any]] = sizes.regret_by_size(
            meta, answers, wanted.names, _sizes_in(wanted.copies), wanted.seeds
        )
        print(sizes.markdown_table(rows))
        _write(wanted, rows)
        if wanted.plot is not None:
            say(f"plot: {sizes.plot(rows, wanted.plot)}")
        return

    routes = None
    if wanted.router is not None:
        assert prompts is not None
        training = read_prompts(wanted.router)
        routes = _routes(meta, prompts, recorded, training, wanted.costs, folder)
    if wanted.shuffles:
        rows = mixtures.compare_mixtures(
            meta, answers, wanted.names, wanted.seeds, routes
        )
        print(mixtures.markdown_table(rows))
        _write(wanted, rows)
        return

    _along(meta, answers, wanted, routes)


def _along(
    meta: PoolMeta, answers: list[PoolAnswer], wanted: Wanted, routes: Routes | None
) -> None:
    """Compares them on the recording, in its order."""
    costs = _costs_in(wanted.costs)
    found = selection.compare(meta, answers, wanted.names, costs)
    if routes is not None:
        fixed = found[: len(meta.drafters)]
        # Behind the best in hindsight, before the rules.
        found.insert(len(fixed) + 2, routes.select(fixed, answers))

    best = next(one for one in found if one.name.startswith(selection.BEST))
    rows = [selection.to_row(one, best, answers, meta) for one in found]
    print(selection.markdown_table(rows))
    _write(wanted, rows)
    if wanted.plot is not None:
        say(f"plot: {selection.plot(rows, list(meta.drafters), wanted.plot)}")


def _routes(
    meta: PoolMeta,
    prompts: list[Prompt],
    recorded: list[PoolAnswer],
    training: list[Prompt],
    costs: str,
    folder: Path,
) -> Routes:
    trained_on = in_order(recorded, training, folder)
    routes = routes_of(meta, prompts, trained_on, training, _costs_in(costs))
    chosen = ", ".join(f"{name} for {key}" for key, name in routes.drafters.items())
    say(
        f"the router knows {routes.right:.1%} of the prompts' domains, and has {chosen}"
    )

    return routes


def _check_flags(wanted: Wanted) -> None:
    if wanted.router is not None and wanted.prompts is None:
        raise ConfigError(
            "--router is trained on some prompts and selects for others; give those as "
            "--prompts"
        )
    if wanted.copies and wanted.router is not None:
        raise ConfigError("--copies have no --router; leave one of them out")
    if wanted.costs and (wanted.copies or wanted.shuffles):
        raise ConfigError(
            "--copies and --shuffles count passes of the target; leave --costs out"
        )
    if wanted.plot is not None and wanted.shuffles and not wanted.copies:
        raise ConfigError("--shuffles makes a table; leave --plot out")


def _sizes_in(copies: str) -> list[int]:
    parts = [part.strip() for part in copies.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(
            f"--copies is {copies!r}; use numbers of drafters, like 2,4,8,16"
        )

    return [int(part) for part in parts]


def _costs_in(costs: str) -> list[float]:
    try:
        return [float(cost) for cost in costs.split(",") if cost]
    except ValueError as error:
        raise ConfigError(
            f"costs are {costs!r}; use numbers, separated by commas"
        ) from error


def _write(wanted: Wanted, rows: list[dict[str, Any]]) -> None:
    if wanted.json_file is not None:
        write_json(wanted.json_file, rows, is_list=True)
