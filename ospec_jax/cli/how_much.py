# SPDX-License-Identifier: Apache-2.0
"""`ospec rules`, `ospec train-control`: how much to draft, on recorded trees."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ospec_jax.cli.arguments import as_precision, write_json
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.reports.progress import Interrupt, progress_bar, say

_CLOCK = "clock.json"


def rules(
    folder: tyro.conf.Positional[Path],
    trees: str = "4,6,16",
    draft: str = "shipped",
    target: str = "smollm2-135m",
    clock: str = "measured",
    statistic: Literal["median", "least"] = "median",
    num_training: int | None = None,
    policies: tuple[Path, ...] = (),
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
      policies: Folders of `ospec train-control`, to be compared, too; those taught on
        answers that are reported are refused.
      json_file: Also write the table.
    """
    from ospec_jax.replay.cycles import build_cycles
    from ospec_jax.replay.rules import compare, markdown_table
    from ospec_jax.replay.trees import TraceShape, open_trace, trace_folder
    from ospec_jax.storage.policies import load_policies

    check_outputs([json_file])
    hold(files=[json_file])
    shape = TraceShape.parse(trees)
    place = trace_folder(folder, shape)
    trace = open_trace(place)
    first = _num_training(num_training, trace)
    taught = {str(place): load_policies(place) for place in policies}
    for name, (_, meta) in taught.items():
        _check_unseen(name, meta, trace, first)

    ticks = _clock(clock, place, shape, draft, target, statistic, trace)
    say(f"clock: {ticks.device}; {ticks.method}; largest error {ticks.error:.1%}")
    cycles_of = lambda answers: build_cycles(
        trace.select(answers), ticks, num_nodes=shape.num_nodes
    )
    held_out = cycles_of(range(first, len(trace.ids)))
    more = [
        _score_policies(held_out, name, found) for name, (found, _) in taught.items()
    ]
    scores, settings = compare(cycles_of(range(first)), held_out, shape.topk, more)
    print(markdown_table(scores, settings))
    rows = [
        dataclasses.asdict(score) | {"settings": settings.get(score.name, "")}
        for score in scores
    ]
    write_json(json_file, rows, is_list=True)


def _num_training(asked: int | None, trace) -> int:
    """Answers that are not reported, the first ones."""
    count = len(trace.ids)
    first = count // 2 if asked is None else asked
    whole_number("--num-training", first, least=1)
    if first >= count:
        raise ConfigError(
            f"{first} of {count} recorded answers to choose settings on leave none to "
            f"report; record more, or lower --num-training"
        )

    return first


def _check_unseen(name: str, meta, trace, first: int) -> None:
    """Refuses policies that know the answers they would be reported on."""
    seen = set(meta.answers) & set(trace.ids[first:])
    if seen:
        raise ConfigError(
            f"the policies of {name} were taught on {len(seen)} of the answers that "
            f"would be reported, such as {min(seen)!r}; raise --num-training"
        )


def _score_policies(cycles, name: str, policies):
    from ospec_jax.replay.episodes import check_fits
    from ospec_jax.replay.ltd import run_policies

    check_fits(policies, cycles)
    return run_policies(cycles, policies, f"LTD, {name}")


def train_control(
    folder: tyro.conf.Positional[Path],
    out: Path,
    trees: str = "4,6,16",
    config: Path | None = None,
    reward: Literal["speed", "length", "time", "surplus"] | None = None,
    apart: tuple[Literal["depth", "size"], ...] | None = None,
    in_turns: tuple[Literal["depth", "size"], ...] | None = None,
    seed: int | None = None,
    draft: str = "shipped",
    target: str = "smollm2-135m",
    clock: str = "measured",
    statistic: Literal["median", "least"] = "median",
    num_training: int | None = None,
    resume: bool = False,
) -> None:
    """Teaches policies how much to draft, on recorded trees and without the target.

    They are those of LTD: one stops a draft, one says how much is verified. `ospec
    rules --policies` compares them. Ctrl-C saves; the same command with --resume goes
    on, as if nothing had happened.

    Args:
      folder: From `ospec record --trees`.
      out: Folder of the policies.
      trees: Which: TOPK,DEPTH,NODES, of which NODES is the most to verify.
      config: A Python file with `get_config() -> LtdConfig`; by default settings that
        take minutes.
      reward: What a cycle is paid: speed (the default), length, time, surplus.
      apart: Policies that are taught by themselves; by default size and depth.
      in_turns: Those that are taught again beside the other one; by default size, depth
        and size.
      seed: Of random numbers.
      draft: That grew the trees; it is loaded only to measure the clock.
      target: Likewise.
      clock: As for `ospec rules`.
      statistic: Likewise.
      num_training: Answers to teach and choose on, the first ones; by default half.
      resume: Go on where the folder's run stopped.
    """
    from ospec_jax.cli.arguments import run_config
    from ospec_jax.control.ltd import LtdConfig
    from ospec_jax.replay.trees import TraceShape, open_trace, trace_folder
    from ospec_jax.storage import checkpoint

    check_outputs(folders=[out])
    hold(out)
    settings = LtdConfig() if config is None else run_config(str(config), LtdConfig)
    asked = {"reward": reward, "apart": apart, "in_turns": in_turns, "seed": seed}
    settings = settings.replace(**{k: v for k, v in asked.items() if v is not None})
    shape = TraceShape.parse(trees)
    place = trace_folder(folder, shape)
    trace = open_trace(place)
    first = _num_training(num_training, trace)
    if not resume and checkpoint.steps(out):
        raise ConfigError(
            f"{out} holds an earlier run; go on with --resume, or choose another folder"
        )

    ticks = _clock(clock, place, shape, draft, target, statistic, trace)
    say(f"clock: {ticks.device}; {ticks.method}; largest error {ticks.error:.1%}")
    _teach(trace, first, ticks, shape.num_nodes, settings, out, resume)


def _teach(trace, first: int, ticks, num_nodes: int, settings, out: Path, resume: bool):
    """Teaches, shows how it goes, and saves at each validation."""
    from ospec_jax.replay.cycles import build_cycles
    from ospec_jax.replay.ltd import Teacher, grounds_of
    from ospec_jax.replay.rules import fixed, run_rule
    from ospec_jax.storage.policies import save_policies

    cycles_of = lambda answers: build_cycles(
        trace.select(answers), ticks, num_nodes=num_nodes
    )
    num_validation = _num_validation(settings, first)
    taught = first - num_validation
    grounds = grounds_of(cycles_of(range(taught)), cycles_of(range(taught, first)))
    teacher = Teacher(settings, grounds)
    meta = _meta(trace, first, ticks, settings)
    course = _begun(teacher, meta, out, resume)
    if course is None:
        say(f"the policies of {out} are taught already")
        return

    def save(course) -> None:
        is_over = course.stage == len(settings.stages)
        progress = None if is_over else course.progress
        told = dataclasses.replace(meta, progress=progress, history=course.history)
        arrays = None if is_over else course.arrays
        with interrupt.held():
            found = teacher.policies(course)
            save_policies(out, len(course.history), found, told, arrays)

    with Interrupt() as interrupt, progress_bar() as bar:
        tasks = [
            bar.add_task(str(stage), total=stage.ppo.num_updates)
            for stage in settings.stages
        ]
        for task in tasks[: course.stage]:
            bar.update(task, completed=bar.tasks[task].total)

        def show(course, told) -> None:
            bar.update(
                tasks[course.stage],
                completed=int(course.learning.num_updates),
                description=f"{settings.stages[course.stage]}: "
                f"{course.best_speed:.1f} tokens/s held out",
            )

        course = teacher.run(course, show, save, lambda: bool(interrupt))
        if course.stage < len(settings.stages):
            save(course)
            interrupt.raise_if_set()

    best = run_rule(grounds.validation, fixed(*grounds.best_fixed))
    say(
        f"{course.best_speed:.1f} tokens/s on the {num_validation} answers that "
        f"policies were chosen on, {best.tokens_per_second:.1f} with the best fixed "
        f"choice; see `ospec rules --policies {out}`"
    )


def _num_validation(settings, first: int) -> int:
    """Answers that policies are chosen on, of those to teach on."""
    count = max(1, round(settings.validation * first))
    if count >= first:
        raise ConfigError(
            f"{first} answers to teach on leave none beside the {count} that policies "
            f"are chosen on; record more, or raise --num-training"
        )

    return count


def _begun(teacher, meta, out: Path, resume: bool):
    """The course that goes on from what a folder holds, or begins; None at its end."""
    from ospec_jax.storage import checkpoint
    from ospec_jax.storage.policies import load_course, load_policies

    if not resume or not checkpoint.steps(out):
        return teacher.start()

    _, found = load_policies(out)
    _check_same(out, found, meta)
    if found.progress is None:
        return None

    arrays = load_course(out, teacher.like(found.progress))
    return teacher.resume(arrays, found.progress, found.history)


def _meta(trace, first: int, ticks, settings):
    """What the policies of a run are for."""
    from ospec_jax.storage.policies import PolicyMeta

    return PolicyMeta(
        target=trace.meta.fingerprint,
        draft=trace.meta.draft,
        clock=f"{ticks.device}; {ticks.method}",
        answers=tuple(trace.ids[:first]),
        # As JSON gives it back.
        config=json.loads(json.dumps(dataclasses.asdict(settings))),
    )


def _check_same(out: Path, found, wanted) -> None:
    """Refuses to go on with a run of other trees or settings."""
    for name in ("target", "draft", "clock", "answers", "config"):
        if getattr(found, name) != getattr(wanted, name):
            raise ConfigError(
                f"the run of {out} had another {name}; give what it was begun with, or "
                f"choose another folder"
            )


def _clock(name: str, place: Path, shape, draft: str, target: str, statistic, trace):
    """The clock of a name, or of a file."""
    from ospec_jax.control.clock import flat_clock, read_clock
    from ospec_jax.control.marginal import SIZES
    from ospec_jax.loading import load_draft
    from ospec_jax.models.hub import load_target
    from ospec_jax.replay.clocking import measure_clock

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
