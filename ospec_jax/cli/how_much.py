# SPDX-License-Identifier: Apache-2.0
"""`ospec rules`: how much to draft, by every rule, on recorded trees."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ospec_jax.cli.arguments import as_precision, write_json
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.reports.progress import progress_bar, say

_CLOCK = "clock.json"


def rules(
    folder: tyro.conf.Positional[Path],
    trees: str = "4,6,16",
    draft: str = "shipped",
    target: str = "smollm2-135m",
    clock: str = "measured",
    statistic: Literal["median", "least"] = "median",
    num_training: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Compares rules for how much to draft, on recorded trees and without the target.

    What a rule chooses emits exactly what decoding would emit; what it takes is the
    clock's word. The oracle, which knows what the target will say, is the ceiling.

    Args:
      folder: From `ospec record --trees`.
      trees: Which: TOPK,DEPTH,NODES, of which NODES is the most to verify.
      draft: That grew them; it is loaded only to measure the clock.
      target: Likewise.
      clock: measured (once, and kept beside the trees), again (measure it anew), flat
        (made up: rows cost nothing, as on a TPU), or a file of a clock.
      statistic: Of the measured rounds: median, or least, where others use the machine,
        too.
      num_training: Answers that settings are chosen on, the first ones; the others are
        what is reported. By default half.
      json_file: Also write the table.
    """
    from ospec_jax.replay.cycles import build_cycles
    from ospec_jax.replay.rules import compare, markdown_table
    from ospec_jax.replay.trees import TraceShape, open_trace, trace_folder

    check_outputs([json_file])
    hold(files=[json_file])
    shape = TraceShape.parse(trees)
    place = trace_folder(folder, shape)
    trace = open_trace(place)
    count = len(trace.ids)
    first = count // 2 if num_training is None else num_training
    whole_number("--num-training", first, least=1)
    if first >= count:
        raise ConfigError(
            f"{first} of {count} recorded answers to choose settings on leave none to "
            f"report; record more, or lower --num-training"
        )

    ticks = _clock(clock, place, shape, draft, target, statistic, trace)
    say(f"clock: {ticks.device}; {ticks.method}; largest error {ticks.error:.1%}")
    cycles_of = lambda answers: build_cycles(
        trace.select(answers), ticks, num_nodes=shape.num_nodes
    )
    scores, settings = compare(
        cycles_of(range(first)), cycles_of(range(first, count)), shape.topk
    )
    print(markdown_table(scores, settings))
    rows = [
        dataclasses.asdict(score) | {"settings": settings.get(score.name, "")}
        for score in scores
    ]
    write_json(json_file, rows, is_list=True)


def _clock(name: str, place: Path, shape, draft: str, target: str, statistic, trace):
    """The clock of a name, or of a file."""
    from ospec_jax.control.clock import flat_clock, read_clock
    from ospec_jax.loading import load_draft
    from ospec_jax.models.hub import load_target
    from ospec_jax.replay.clocking import measure_clock
    from ospec_jax.replay.cycles import SIZES

    kept = place / _CLOCK
    if name == "flat":
        return flat_clock(shape.topk, shape.depth)
    if name not in ("measured", "again"):
        return read_clock(Path(name))
    if name == "measured" and kept.exists():
        return read_clock(kept)

    loaded = load_target(target, as_precision(trace.meta.precision))
    low, high = (int(trace.contexts.min()), int(trace.contexts.max()))
    sizes = [size for size in SIZES if size < shape.num_nodes] + [shape.num_nodes]

    with progress_bar() as bar:
        task = bar.add_task("clock", total=None)
        found = measure_clock(
            loaded,
            load_draft(draft, loaded),
            shape,
            sizes,
            contexts=sorted({low, high}),
            statistic=statistic,
            on_round=lambda done, total: bar.update(task, completed=done, total=total),
        )

    found.save(kept)
    return found
