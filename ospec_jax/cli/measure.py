# SPDX-License-Identifier: Apache-2.0
"""`ospec bench`, `ospec roofline`, `ospec demo`: measuring."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ospec_jax.cli.arguments import (
    Decoding,
    Shared,
    as_precision,
    console,
    learner_config,
    live,
    write_json,
)
from ospec_jax.data.prompts import demo_prompts, read_prompts
from ospec_jax.models.hub import load_target
from ospec_jax.progress import Interrupt, progress_bar


def bench(
    prompts: Path | None = None,
    decoding: Shared = Decoding(),
    num_prompts: int = 50,
    modes: str = "autoregressive,static,ngrams,learned",
    learner: str = "gradient",
    learn_budget: float | None = None,
    learning_rate: float | None = None,
    peers: str = "",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    markdown: Path | None = None,
    plot: Path | None = None,
    stream_plot: Path | None = None,
) -> None:
    """Measures decoding modes, interleaved on the same prompts.

    Args:
      prompts: A JSONL file; without one, mathematics that comes with the package.
      num_prompts: Prompts taken from its beginning.
      modes: Comma-separated: autoregressive, static (the draft as it is), ngrams (and
        n-grams of the request), learned (and of earlier ones; the draft is trained).
      learner: gradient, momentum, optimistic, ensemble, shared_ensemble, osd, head, memory,
        or a Python file with `get_config() -> LearnerConfig`.
      learn_budget: Share of the learned mode's time for learning.
      peers: Comma-separated other decoders of the same weights: transformers,
        transformers-bfloat16, transformers-lookup, transformers-assisted, llama-cpp,
        llama-cpp-lookup.
      json_file: Write one row a mode.
      markdown: Write the table.
      plot: Draw the modes' speed into this PNG.
      stream_plot: Draw acceptance over the stream into this PNG.
    """
    from ospec_jax.bench.harness import BenchConfig
    from ospec_jax.bench.peers import open_peer
    from ospec_jax.bench.report import markdown_table, plot_modes, plot_stream

    rows = read_prompts(prompts) if prompts else demo_prompts("math")
    rows = rows[:num_prompts]
    config = BenchConfig(
        modes=tuple(m for m in modes.split(",") if m), tree=decoding.tree_config,
        max_new_tokens=decoding.max_new_tokens,
        learner=learner_config(
            learner, learning_rate=learning_rate, budget=learn_budget
        ),
        sampling=decoding.sampling, is_raw=decoding.raw, ngrams=decoding.ngrams,
        batch_size=decoding.batch_size,
    )  # fmt: skip
    names = [name for name in peers.split(",") if name]
    assistant = decoding.draft.removeprefix("model:") if ":" in decoding.draft else None
    others = [open_peer(name, decoding.target, assistant) for name in names]
    target, draft = decoding.load()
    run, table = run_with_progress(target, draft, rows, config, others)
    write_json(json_file, table, is_list=True)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(markdown_table(table) + "\n")
    if plot is not None:
        console.print(f"plot: {plot_modes(table, plot)}")
    if stream_plot is not None:
        console.print(f"plot: {plot_stream(run, stream_plot)}")


def roofline(
    target: str = "smollm2-135m",
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
    capacity: int = 256,
) -> None:
    """Times target passes by rows, against this machine's memory and arithmetic.

    Args:
      capacity: Slots of the cache.
    """
    from ospec_jax.bench import passes
    from ospec_jax.bench.report import roofline_table

    loaded = load_target(target, as_precision(precision))
    machine = passes.measure_machine(loaded)
    costs = passes.roofline(loaded, machine, capacity=capacity)
    print(roofline_table(costs, machine))


def run_with_progress(target, draft, prompts, config, peers=()):
    """Runs a benchmark behind a live bar and prints its table."""
    from ospec_jax.bench.harness import ModeRun, run_bench
    from ospec_jax.bench.report import markdown_table, terminal_table
    from ospec_jax.bench.rows import to_rows

    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("compiling", total=len(prompts))

        def show(number, name, turns):
            text = f"{turns.tokens_per_second_with_learning:.1f} tokens/s"
            if isinstance(turns, ModeRun):
                text = live(turns.results[-1], turns.results)
            bar.update(task, completed=number, description=f"{name}: {text}")

        should_stop = lambda: bool(interrupt)
        run = run_bench(target, draft, prompts, config, show, should_stop, peers)
    table = to_rows(run)
    if console.is_terminal:
        title = f"{target.name}, {target.numerics.precision}"
        console.print(terminal_table(table, title))
    else:
        console.print(markdown_table(table), soft_wrap=True, markup=False)
    return run, table


def demo(
    out: Path = Path("demo-output"),
    num_prompts_per_domain: int = 20,
    max_new_tokens: int = 64,
    num_speculative_tokens: int = 3,
    learner: str = "gradient",
    learn_budget: float | None = None,
    learning_rate: float | None = None,
) -> None:
    """The main job: a draft that learns while its stream moves through three domains.

    Args:
      out: Folder of the plot, the table and the learned draft's checkpoint.
      learner: gradient, momentum, optimistic, ensemble, shared_ensemble, osd, head, memory,
        or a Python file with `get_config() -> LearnerConfig`.
    """
    from ospec_jax.demo import run_demo

    run_demo(
        out, num_prompts_per_domain, max_new_tokens, num_speculative_tokens,
        learner_config(learner, budget=learn_budget, learning_rate=learning_rate),
    )  # fmt: skip
