# SPDX-License-Identifier: Apache-2.0
"""`ospec bench`, `ospec table`, `ospec roofline`, `ospec demo`: measuring."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ospec_jax.bench.live import run_live, run_with_progress
from ospec_jax.bench.peers import Peer
from ospec_jax.bench.runs import BenchRun, Contender
from ospec_jax.cli.arguments import (
    Decoding,
    Given,
    LearnBudget,
    Learner,
    LearningRate,
    Optimizer,
    PrecisionName,
    Shared,
    as_precision,
    learner_config,
    run_config,
    write_json,
    write_text,
)
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.data.conversations import (
    Conversation,
    choose_evenly,
    read_spec_bench,
    shuffled,
)
from ospec_jax.data.prompts import Prompt, demo_prompts, read_prompts
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import load_target
from ospec_jax.reports.progress import Interrupt, say


def bench(
    prompts: Path | None = None,
    decoding: Shared = Given,
    spec_bench: Path | None = None,
    num_prompts: int | None = None,
    shuffle: int | None = None,
    modes: str = "",
    drafts: tuple[str, ...] = (),
    controllers: str = "",
    learner: Learner = "auto",
    learn_budget: LearnBudget = None,
    learn_idle: int = 2,
    learning_rate: LearningRate = None,
    optimizer: Optimizer = None,
    peers: str = "",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    markdown: Path | None = None,
    plot: Path | None = None,
    stream_plot: Path | None = None,
) -> None:
    """Measures decoding modes, interleaved on the same prompts.

    Args:
      prompts: A JSONL file; without one, mathematics that comes with the package.
      spec_bench: Spec-Bench's file of questions instead: conversations turn by turn,
        by its six tasks, with the table as it is published.
      num_prompts: Prompts taken from the file's beginning, by default 50. Of
        Spec-Bench, questions of each task, evenly spread over it; by default all.
      shuffle: Ask in an order drawn by this seed; turns of a conversation stay
        together.
      modes: Comma-separated: autoregressive, static (the draft as it is), ngrams (and
        n-grams of the request), learned (and of earlier ones; the draft is trained).
        These by default; with --drafts or --controllers, autoregressive alone. Also
        longer: ngrams, of which longer chains are drafted where they are likely (as
        --draft longer:ngram,DRAFT does), and learned-longer, learned so; unpadded:
        plain decoding that need not be exact, the faster baseline; and idle: learned,
        and between turns, off the clock, from what the target writes itself.
      drafts: Compare these drafts, each as it is, by the prompts' domains instead:
        DRAFT, or DRAFT@TREE@CHILDREN@VERIFICATION, or fewer of these, for others than
        --tree, --draft-sample-method and --verification: shipped@static:2,2,2@hub. The
        target decodes plainly beside them.
      controllers: Comma-separated rules for how much to draft, to be compared beside
        plain decoding with the draft as it is (n-grams as --ngrams says): fixed, as
        --num-speculative-tokens and --tree say; a number, a chain of so many; auto,
        marginal, joint, ltd:DIR as for --controller.
      learn_idle: Exercises that the mode idle has for each answer.
      peers: Comma-separated other decoders of the same weights: transformers,
        transformers-bfloat16, transformers-lookup, transformers-assisted, llama-cpp,
        and llama-cpp-KIND with its n-grams of a kind: ngram-simple, ngram-map-k,
        ngram-map-k4v, ngram-mod, ngram-cache. Of llama.cpp one a run: threads of
        several disturb each other.
      json_file: Write one row a mode; within it, one a domain and a prompt length.
      markdown: Write the tables.
      plot: Draw the modes' speed, by domain and by prompt length, too, into this PNG.
      stream_plot: Draw acceptance over the stream into this PNG.
    """
    from ospec_jax.bench.runs import MODES, BenchConfig

    check_outputs(
        [json_file, markdown],
        figures=[plot, stream_plot],
        inputs=[prompts, spec_bench],
    )
    _check_compared(decoding, drafts, controllers)
    if drafts and (peers or plot or stream_plot):
        raise ConfigError("--drafts goes without --peers, --plot and --stream-plot")

    alone = "autoregressive" if drafts or controllers else ",".join(MODES)
    modes = modes or alone
    rows = _asked(prompts, spec_bench, num_prompts, shuffle)
    config = BenchConfig(
        modes=tuple(m for m in modes.split(",") if m),
        tree=decoding.tree_config,
        max_new_tokens=decoding.max_new_tokens,
        learner=learner_config(
            learner,
            learning_rate=learning_rate,
            optimizer=optimizer,
            budget=learn_budget,
        ),
        sampling=decoding.sampling,
        is_raw=decoding.raw,
        ngrams=decoding.ngrams,
        batch_size=decoding.batch_size,
        stop=decoding.stop,
        num_predicted_tokens=decoding.num_predicted_tokens,
        select=decoding.select,
        learn_idle=learn_idle,
    )
    others = _open_peers(peers, decoding)
    if drafts:
        _compare(drafts, decoding, rows, config, json_file, markdown)
        return

    compared = _parse_controllers(controllers, decoding)
    target, draft = decoding.load(is_compared=True)
    contenders = _contenders(compared, draft, decoding.ngrams)
    interrupt = Interrupt()
    run, table = run_with_progress(
        target, draft, rows, config, interrupt, others, contenders
    )
    _write(run, table, json_file, markdown, plot, stream_plot)
    if not run.is_complete:
        interrupt.raise_if_set()


def _check_compared(
    decoding: Decoding, drafts: tuple[str, ...], controllers: str
) -> None:
    """Refuses comparisons that would compare nothing, or not what was asked for."""
    if drafts and decoding.batch_size > 1:
        raise ConfigError("drafts are compared with a batch size of 1")
    if drafts and decoding.select:
        raise ConfigError(
            "--drafts compares single drafts, of which --select has nothing to choose; "
            "leave one of the two out"
        )

    if decoding.is_within_step:
        raise ConfigError(
            f"--controller {decoding.controller} is compared as one of several: use "
            f"--controllers {decoding.controller}"
        )
    if decoding.learn_control or decoding.follow_clock:
        raise ConfigError(
            "--learn-control and --follow-clock are for serving, and bench compares "
            "rules as they are; leave them out"
        )
    if controllers and (drafts or decoding.select):
        raise ConfigError(
            "--controllers compares how much one draft drafts; leave out --drafts and "
            "--select"
        )


def _open_peers(text: str, decoding: Decoding) -> list[Peer]:
    """Other decoders of the same weights, by the names that `--peers` lists.

    Raises:
      ConfigError: One of them is unknown, or could not stop as is asked for.
    """
    from ospec_jax.bench.peers import open_peer

    names = [name for name in text.split(",") if name]
    if names and decoding.stop:
        raise ConfigError("other decoders know no --stop; leave it out")

    is_model = decoding.draft.startswith("model:")
    assistant = decoding.draft.removeprefix("model:") if is_model else None
    return [open_peer(name, decoding.target, assistant) for name in names]


def _contenders(
    compared: dict[str, tuple], draft: LoadedDraft | None, ngrams: bool
) -> dict[str, Contender]:
    """Modes of the same draft, each with its own controller."""
    if not compared:
        return {}
    if draft is None:
        raise ConfigError("--controllers needs a draft; name one with --draft")

    return {
        name: Contender(draft, tree, ngrams, controller)
        for name, (controller, tree) in compared.items()
    }


def _write(
    run: BenchRun,
    table: list,
    json_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
    stream_plot: Path | None,
) -> None:
    """Writes and draws what was asked for; each is tried, also if another one fails."""
    from ospec_jax.bench.report import markdown_report, plot_modes, plot_stream

    with contextlib.ExitStack() as ends:
        ends.callback(write_json, json_file, table, is_list=True)
        if markdown is not None:
            ends.callback(write_text, markdown, markdown_report(table))
        if plot is not None:
            ends.callback(lambda: say(f"plot: {plot_modes(table, plot)}"))
        if stream_plot is not None:
            draw = lambda: plot_stream(run, stream_plot)
            ends.callback(lambda: say(f"plot: {draw()}"))


def _parse_controllers(text: str, decoding: Decoding) -> dict[str, tuple]:
    """For each name of `--controllers` a session's controller, and its tree.

    Raises:
      ConfigError: One of them is no controller.
    """
    found = {}
    for name in [name.strip() for name in text.split(",") if name.strip()]:
        if name.isdecimal():
            own = dataclasses.replace(
                decoding, controller=None, num_speculative_tokens=int(name)
            )
        elif name == "fixed":
            own = dataclasses.replace(decoding, controller=name)
        else:
            own = dataclasses.replace(
                decoding, controller=name, num_speculative_tokens=None
            )
        found[name] = (own.session_controller, own.tree_config)

    return found


def _asked(
    prompts: Path | None,
    spec_bench: Path | None,
    num_prompts: int | None,
    shuffle: int | None,
) -> Sequence[Prompt | Conversation]:
    """What is asked, in its order.

    Raises:
      ConfigError: Flags contradict each other, or a file has another form.
    """
    if prompts is not None and spec_bench is not None:
        raise ConfigError("give either --prompts or --spec-bench")
    if num_prompts is not None:
        whole_number("--num-prompts", num_prompts, least=1)
    if shuffle is not None:
        whole_number("--shuffle", shuffle, least=0)

    if spec_bench is not None:
        asked = read_spec_bench(spec_bench)
        asked = choose_evenly(asked, num_prompts) if num_prompts else asked
    else:
        asked = read_prompts(prompts) if prompts else demo_prompts("math")
        asked = asked[: num_prompts or 50]

    return asked if shuffle is None else shuffled(asked, shuffle)


def _compare(names, decoding: Decoding, prompts, config, json_file, markdown) -> None:
    """Runs several drafts against each other, and prints and writes their table."""
    from ospec_jax.bench.drafts import domain_rows, drafts_table, parse_contender
    from ospec_jax.loading import load_draft

    fields = ("tree", "draft_sample_method", "verification")
    shaped = lambda *given: (
        dataclasses.replace(
            decoding, draft="", **dict(zip(fields, given, strict=False))
        ).tree_config
    )
    chosen = {text: parse_contender(text, shaped) for text in names}
    target, _ = dataclasses.replace(decoding, draft="none").load()
    contenders = {
        text: Contender(load_draft(name, target), tree)
        for text, (name, tree) in chosen.items()
    }
    interrupt = Interrupt()
    run = run_live(target, None, prompts, config, interrupt, contenders=contenders)
    table = domain_rows(run)
    text = drafts_table(table)
    say(text)
    with contextlib.ExitStack() as ends:
        ends.callback(write_json, json_file, table, is_list=True)
        if markdown is not None:
            ends.callback(write_text, markdown, text)
    if not run.is_complete:
        interrupt.raise_if_set()


def table(
    config: Annotated[Path, tyro.conf.Positional],
    prompts: Path,
    out: Path,
    targets: str = "",
    precision: PrecisionName = "auto",
) -> None:
    """Measures a table of methods by targets and sets of prompts, as papers have them.

    All methods answer a set's prompts in one interleaved run. Ctrl-C keeps complete
    runs; the same command goes on with the others.

    Args:
      config: A Python file with `get_config() -> TableConfig`.
      prompts: Folder of the sets' JSONL files; what is not there is left out.
      out: Folder of the runs, of `table.md`, and of a plot for each target.
      targets: Comma-separated: some of the table's targets; by default all.
      precision: Of weights and products; auto measures which is fastest on this device.
    """
    from ospec_jax.bench.table import TableConfig, measure_table, plot_table

    check_outputs(folders=[out])
    hold(out)
    found = run_config(str(config), TableConfig)
    text = measure_table(
        found,
        prompts,
        out,
        Interrupt(),
        lambda name: load_target(name, as_precision(precision)),
        [name for name in targets.split(",") if name],
        precision,
    )
    say(text)
    for file in plot_table(found, out):
        say(f"plot: {file}")


def roofline(
    target: str = "smollm2-135m",
    precision: PrecisionName = "auto",
    capacity: int = 256,
) -> None:
    """Times target passes by rows, against this machine's memory and arithmetic.

    Args:
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      precision: Of weights and products; auto measures which is fastest on this device.
      capacity: Slots of the cache.
    """
    from ospec_jax.bench import passes
    from ospec_jax.bench.report import roofline_table

    loaded = load_target(target, as_precision(precision))
    machine = passes.measure_machine(loaded)
    costs = passes.roofline(loaded, machine, capacity=capacity)
    print(roofline_table(costs, machine))


def demo(
    out: Path = Path("demo-output"),
    num_prompts_per_domain: int = 20,
    max_new_tokens: int = 64,
    num_speculative_tokens: int = 3,
    learner: Learner = "auto",
    learn_budget: LearnBudget = None,
    learning_rate: LearningRate = None,
    optimizer: Optimizer = None,
) -> None:
    """The main job: a draft that learns while its stream moves through three domains.

    Args:
      out: Folder of the plot, the table and the learned draft's checkpoint.
      num_prompts_per_domain: Prompts of each of the three domains, 28 at most.
      max_new_tokens: Longest answer, in tokens.
      num_speculative_tokens: Depth of the draft, K.
    """
    from ospec_jax.bench.demo import run_demo

    check_outputs(folders=[out])
    hold(out)
    run_demo(
        out,
        num_prompts_per_domain,
        max_new_tokens,
        num_speculative_tokens,
        learner_config(
            learner,
            budget=learn_budget,
            learning_rate=learning_rate,
            optimizer=optimizer,
        ),
    )
