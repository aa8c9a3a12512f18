# SPDX-License-Identifier: Apache-2.0
"""`ospec stream`, `record`, `replay`, `telemetry`: learners on drifting streams."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.progress import Progress

from ospec_jax.cli.arguments import (
    PrecisionName,
    as_precision,
    learner_config,
)
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.data.prompts import read_prompts, write_prompts
from ospec_jax.data.streams import build_stream
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import load_draft
from ospec_jax.models.hub import load_target
from ospec_jax.reports.progress import Interrupt, Interrupted, progress_bar, say
from ospec_jax.reports.tables import print_table
from ospec_jax.storage import low_rank

if TYPE_CHECKING:
    from ospec_jax.replay.record import RecordingMeta
    from ospec_jax.replay.replayer import Replayer
    from ospec_jax.replay.results import Results
    from ospec_jax.reports.telemetry import Telemetry

StreamKind = Literal["single", "shifts", "gradual", "alternating", "fast"]


def stream(
    domains: str,
    out: Path,
    kind: StreamKind = "shifts",
    num_prompts: int = 800,
    block: int = 40,
    seed: int = 0,
) -> None:
    """Makes a stream of prompts whose domain drifts; each prompt occurs once.

    Args:
      domains: NAME=FILE.jsonl, comma-separated, in the order of their appearance.
      out: The stream as a JSONL file, for --prompts of the other commands.
      kind: single; shifts (each domain once, in one block); gradual (from one to the
        next); alternating (short blocks that come back); fast (another one with every
        prompt, by chance).
      num_prompts: Prompts of the stream; the files must have enough of each domain.
      block: Prompts of a block, for alternating.
      seed: Of the choice and order of the prompts.
    """
    # The inputs are only known once the domains are read; see below.
    check_outputs([out])
    files = {}
    paths = []

    for part in domains.split(","):
        name, _, file = part.partition("=")
        if not name or not file or name in files:
            raise ConfigError(
                f"cannot read the domains {domains!r}: use NAME=FILE,NAME=FILE with "
                f"a name once"
            )
        paths.append(Path(file))
        files[name] = read_prompts(file)

    check_outputs([out], inputs=paths)
    write_prompts(out, build_stream(files, kind, num_prompts, seed, block))
    say(f"saved {out}")


def record(
    prompts: Path,
    out: Path,
    target: str = "smollm2-135m",
    draft: str = "shipped",
    precision: PrecisionName = "auto",
    max_new_tokens: int = 64,
    batch_size: int = 8,
    capacity: int = 0,
    num_speculative_tokens: int | None = None,
    trees: str = "",
) -> None:
    """Records a target's greedy answers, to replay drafts and learners on them.

    Of a pool (--draft pool:A+B+...) it is recorded, instead of features, what each of
    its drafts would have had accepted at every position, to compare selections.

    Ctrl-C keeps complete answers; the same command goes on. The recording holds prompts
    and answers, which can be read back from it.

    Args:
      prompts: A JSONL file.
      out: Folder of the recording; of other prompts, more can be added later.
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      draft: Whose view of the target is recorded: shipped, or a checkpoint folder; or
        pool:A+B+....
      precision: Of weights and products; auto measures which is fastest on this device.
      max_new_tokens: Longest answer, in tokens.
      batch_size: Requests decoded together.
      capacity: Tokens of a prompt and its answer; longer prompts are left out. 0 takes
        all.
      num_speculative_tokens: Of a pool: depth of the chains, by default 3.
      trees: TOPK,DEPTH,NODES: also grow the draft's widest and deepest tree at each
        token, for `ospec rules`.
    """
    from ospec_jax.replay import record
    from ospec_jax.replay.trees import TraceShape, grow_trees

    is_pool = draft.startswith("pool:")
    if num_speculative_tokens is not None and not is_pool:
        raise ConfigError(
            "--num-speculative-tokens is for recording a pool; other recordings serve "
            "chains of any depth"
        )
    if is_pool and trees:
        raise ConfigError("--trees are grown of one draft, not of a pool")
    if is_pool and capacity:
        raise ConfigError("--capacity is not for recording a pool; leave it out")

    check_outputs(folders=[out])
    hold(out)
    shape = TraceShape.parse(trees) if trees else None
    rows = read_prompts(prompts)
    if is_pool:
        depth = 3 if num_speculative_tokens is None else num_speculative_tokens
        whole_number("--num-speculative-tokens", depth, least=1)
        _record_pool(rows, out, target, draft, precision, max_new_tokens, depth)
        return

    loaded = load_target(target, as_precision(precision))
    drafting = load_draft(draft, loaded)
    count = record.record(
        loaded,
        rows,
        out,
        drafting.taps,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        capacity=capacity,
    )
    say(f"recorded {count} answers in {out}")
    if shape is not None:
        count = grow_trees(loaded, drafting, out, shape)
        say(f"grew trees along {count} answers in {out}")


def _record_pool(rows, out, target, draft, precision, max_new_tokens, depth) -> None:
    """Records a pool, one answer after the other."""
    from ospec_jax.replay.pool_record import record_pool

    loaded = load_target(target, as_precision(precision))
    pool = load_draft(draft, loaded)
    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("record", total=len(rows))
        count = record_pool(
            loaded,
            pool,
            rows,
            out,
            num_steps=depth,
            max_new_tokens=max_new_tokens,
            should_stop=lambda: bool(interrupt),
            on_answer=lambda answer: bar.update(task, advance=1),
        )

    say(f"recorded {count} answers in {out}")
    interrupt.raise_if_set()


def replay(
    folder: tyro.conf.Positional[Path],
    learners: Annotated[str, tyro.conf.arg(aliases=["--learner"])] = "static,gradient",
    draft: str = "shipped",
    target: str = "smollm2-135m",
    prompts: Path | None = None,
    num_speculative_tokens: int = 3,
    update_interval: int | None = None,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    seeds: Annotated[str, tyro.conf.arg(aliases=["--seed"])] = "0",
    regret: bool = False,
    chunk_size: int = 40,
    select: str | None = None,
    costs: str = "",
    router: Path | None = None,
    copies: str = "",
    shuffles: int = 0,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    plot: Path | None = None,
    telemetry: Path | None = None,
) -> None:
    """Compares learners on a recording, with the draft alone and no target.

    On the recording of a pool it compares selections among its drafts (--select), with
    no model at all: each draft by itself, the best ones in hindsight, and the rules.

    Acceptance is what decoding would measure with chains, at batch 1 and without
    n-grams. Ctrl-C keeps what was replayed; with --json the same command goes on with
    the runs that are not finished.

    Args:
      folder: From `ospec record`.
      learners: Comma-separated: static (the draft as it is), names or Python files as
        for `ospec learn`.
      draft: shipped, or a checkpoint folder.
      target: The one that was recorded.
      prompts: Replay these recorded prompts in this order: a stream's file.
      num_speculative_tokens: Depth of the draft, K.
      update_interval: Tokens between updates; 512 for learners that name none.
      learning_rate: Of all learners that follow gradients; those that were published
        with SGD (optimistic, momentum) take an --optimizer beside it.
      optimizer: Likewise: any optax optimizer, in place of what a learner has by
        default or by its file.
      seeds: Comma-separated, of learners that draw old windows (`replay_share`);
        others run once. The stream's order has a seed of its own.
      regret: Also measure losses, and the regret against drafts trained on each chunk
        in hindsight.
      chunk_size: Answers of such a chunk.
      select: Comma-separated rules, as for `ospec generate --select`. Behind those that
        judge may follow :once, too: the draft is chosen when an answer begins, and
        stays.
      costs: What a step of each draft takes, comma-separated, in any unit, for rules
        that weigh time; by default the same.
      router: Also a classifier that is trained on these recorded prompts, and chooses
        for those of --prompts by their words; both name their domains.
      copies: Numbers of drafts, like 2,4,8,16: instead, regret in pools of so many,
        filled up with copies of the recorded ones that lose tokens by chance.
      shuffles: Orders of the prompts: instead, every domain's stream alone and all of
        them mixed, with the spread over so many orders; with --copies, over these.
      json_file: Results; also where finished runs are found.
      plot: Draw acceptance along the stream into this PNG.
      telemetry: Folder of telemetry files, one a run.
    """
    from ospec_jax.cli.selections import Wanted, replay_selection
    from ospec_jax.replay import results
    from ospec_jax.replay.pool_record import is_pool_recording
    from ospec_jax.replay.record import read_meta
    from ospec_jax.replay.replayer import Replayer

    check_outputs([json_file], [telemetry], figures=[plot], inputs=[prompts, router])
    if select is not None or is_pool_recording(folder):
        others = learners != "static,gradient", regret, telemetry, optimizer
        if any(others) or learning_rate is not None or update_interval is not None:
            raise ConfigError(
                "a selection is replayed without learners; leave their flags and "
                "--telemetry out"
            )
        wanted = Wanted(
            select, costs, prompts, router, copies, shuffles, json_file, plot
        )
        replay_selection(folder, wanted)
        return
    if costs or router is not None or copies or shuffles:
        raise ConfigError(
            "--costs, --router, --copies and --shuffles go with the recording of a pool"
        )

    hold(telemetry, files=[json_file])
    flags = {
        "update_interval": update_interval,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
    }
    configs = _configs_of(learners, seeds, flags)
    asked = read_prompts(prompts) if prompts else []
    kept = results.Results.open(json_file)
    meta = read_meta(folder)
    loaded = load_target(target, as_precision(meta.precision))
    replayer = Replayer(
        loaded, load_draft(draft, loaded), folder, num_speculative_tokens, asked, regret
    )
    key, content = _keys_of(replayer, meta)
    rows = []
    is_cut_short = False

    with Interrupt() as interrupt, progress_bar() as bar:
        runs = _Runs(replayer, kept, bar, interrupt, telemetry)
        for name, config in configs.items():
            # Learners that draw nothing give the same for every seed.
            some = seeds.split(",")[: None if _draws(config) else 1]
            for seed in map(int, some):
                config = config and config.replace(seed=seed)
                settings = results.settings_of(
                    name, config, draft, num_speculative_tokens, key, content
                )
                row = runs.row_of(config, settings, f"{Path(name).stem}-{seed}")
                rows += [row] if row else []
                is_cut_short |= row is None
        hindsight = None
        if regret and not interrupt:
            names = [draft, key, content]
            hindsight = _hindsight(replayer, kept, chunk_size, bar, names, interrupt)
        is_cut_short |= regret and hindsight is None

    results.add_regret(rows, hindsight)
    _show(rows, plot)
    if is_cut_short or not all(row["is_finished"] for row in rows):
        interrupt.raise_if_set()


def _configs_of(
    learners: str, seeds: str, flags: dict[str, Any]
) -> dict[str, LearnerConfig | None]:
    """Settings of the learners to compare, by their names; None is the static draft.

    Raises:
      ConfigError: There is none, or the seeds are not whole numbers.
    """
    # A name that is given twice runs once, in the place of the first.
    names = dict.fromkeys(name for name in learners.split(",") if name)
    configs = {
        name: None if name == "static" else _replayed(name, **flags) for name in names
    }
    if not configs or not all(s.strip().isdecimal() for s in seeds.split(",")):
        raise ConfigError(f"use learners and whole seeds, not {learners!r}, {seeds!r}")

    return configs


def _keys_of(replayer: "Replayer", meta: "RecordingMeta") -> tuple[str, str]:
    """What results depend on: the stream; the recording and the draft's weights."""
    from ospec_jax.replay import results

    entries = [replayer.store.entries[i] for i in replayer.order]
    key = results.stream_key([e.id for e in entries], [e.content for e in entries])
    kind = meta.fingerprint, meta.precision, str(meta.max_new_tokens)

    return key, " ".join([*kind, low_rank.fingerprint(replayer.draft.draft)])


def _show(rows: list[dict], plot: Path | None) -> None:
    """Prints the table, and draws the plot if there is to be one."""
    from ospec_jax.replay import results

    if sys.stdout.isatty():
        print_table(results.terminal_table(rows))
    else:
        print(results.markdown_table(rows))
    if plot is not None and rows:
        say(f"plot: {results.plot_replays(rows, plot)}")


def _replayed(name: str, **flags) -> LearnerConfig:
    """A learner whose updates come at an interval of tokens, and without n-grams."""
    from ospec_jax.replay.replayer import DEFAULT_INTERVAL

    config = learner_config(name, memory_slots=0)
    if not config.is_training:
        return config  # it would read none of the flags

    config = learner_config(name, memory_slots=0, **flags)
    if config.schedule is None:  # `auto` is decided with the draft
        return config
    if config.schedule.update_interval or config.schedule.update_every_prompts:
        return config

    return config.replace(update_interval=DEFAULT_INTERVAL)


def _draws(config: LearnerConfig | None) -> bool:
    """Whether a learner's result depends on its seed."""
    if config is None or config.batches is None:
        return False

    return config.batches.replay_share > 0


@dataclasses.dataclass(frozen=True)
class _Runs:
    """What learners are replayed with.

    Attributes:
      kept: Finished runs, so that the same command goes on.
      telemetry: Folder of their files, if any.
    """

    replayer: "Replayer"
    kept: "Results"
    bar: Progress
    interrupt: Interrupt
    telemetry: Path | None

    def row_of(
        self, config: LearnerConfig | None, settings: dict, label: str
    ) -> dict | None:
        """A learner's results: from the file, or of a run; None behind a signal."""
        row = self.kept.find(settings, self.replayer.has_losses)
        if row is None and not self.interrupt:
            row = self._run(config, settings, label)
            self.kept.put(row)

        return row

    def _run(self, config: LearnerConfig | None, settings: dict, label: str) -> dict:
        """Replays one learner behind the bar."""
        from ospec_jax.replay import results

        num_answers = len(self.replayer.order)
        task = self.bar.add_task(f"{label}: compiling", total=num_answers)
        answers = []
        writer = self._open_writer(label)

        def show(answer):
            answers.append(answer)
            length = _recent_length(answers[-results.WINDOW :])
            text = f"{label}: acceptance length {length:.2f}"
            self.bar.update(task, advance=1, description=text)
            if writer is not None:
                writer.answer(
                    answer.id,
                    answer.domain,
                    answer.num_tokens,
                    answer.stats,
                    answer.version,
                    answer.learning_seconds,
                )

        on_update = writer.update if writer else None
        run = self.replayer.run(config, show, on_update, lambda: bool(self.interrupt))
        if writer is not None:
            writer.close()

        return results.to_row(run, settings, len(run.answers) == num_answers)

    def _open_writer(self, label: str) -> "Telemetry | None":
        from ospec_jax.reports.telemetry import Telemetry

        if self.telemetry is None:
            return None

        file = self.telemetry / f"{label}.jsonl"
        file.unlink(missing_ok=True)  # an interrupted run begins anew
        return Telemetry(file)


def _recent_length(answers: list) -> float:
    """Mean acceptance length of some answers."""
    drafts = sum(answer.stats.num_drafts for answer in answers)
    accepted = sum(answer.stats.num_accepted_tokens for answer in answers)
    return 1 + accepted / max(drafts, 1)


def _hindsight(
    replayer, kept, chunk_size: int, bar, names, interrupt
) -> list[float] | None:
    """Losses in hindsight, kept in the results; None where a signal came first."""
    from ospec_jax.replay.hindsight import best_per_chunk_in_hindsight

    key = " ".join([*names, str(replayer.num_steps), str(chunk_size)])
    if key not in kept.hindsight:
        task = bar.add_task("hindsight", total=len(replayer.order))

        def show(count):
            bar.update(task, completed=count)
            # Chunk by chunk; a part of a series of losses is of no use, so nothing is
            # kept.
            interrupt.raise_if_set()

        try:
            found = best_per_chunk_in_hindsight(replayer, chunk_size, on_chunk=show)
        except Interrupted:
            return None

        kept.hindsight[key] = found
        kept.write()

    return kept.hindsight[key]


def telemetry(file: tyro.conf.Positional[Path], plot: Path) -> None:
    """Draws what `ospec learn --telemetry` or `ospec replay --telemetry` wrote.

    Args:
      file: The JSONL file that was written.
      plot: The PNG to write.
    """
    from ospec_jax.reports.telemetry import plot_telemetry, read_rows

    check_outputs(figures=[plot], inputs=[file])
    say(f"plot: {plot_telemetry(read_rows(file), plot)}")
