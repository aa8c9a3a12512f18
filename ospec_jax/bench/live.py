# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that show how they get on."""

from ospec_jax.bench.asking import num_turns
from ospec_jax.bench.harness import run_bench
from ospec_jax.bench.report import markdown_report, terminal_report
from ospec_jax.bench.rows import to_rows
from ospec_jax.bench.runs import ModeRun
from ospec_jax.reports.progress import console, live, progress_bar, say


def run_live(target, draft, prompts, config, interrupt, peers=(), contenders=None):
    """Runs a benchmark behind a live bar, until `interrupt` is set."""
    with interrupt, progress_bar() as bar:
        task = bar.add_task("compiling", total=num_turns(prompts))

        def show(number, name, turns):
            text = f"{turns.tokens_per_second_with_learning:.1f} tokens/s"
            if isinstance(turns, ModeRun):
                text = live(turns.results[-1], turns.results)

            bar.update(task, completed=number, description=f"{name}: {text}")

        should_stop = lambda: bool(interrupt)
        run = run_bench(
            target,
            draft,
            prompts,
            config,
            show,
            should_stop,
            interrupt.is_over,
            peers,
            contenders,
        )

    if not run.prompts:  # nothing was measured that a table could show
        interrupt.raise_if_set()

    return run


def run_with_progress(
    target, draft, prompts, config, interrupt, peers=(), contenders=None
):
    """Runs a benchmark behind a live bar and prints its tables."""
    run = run_live(target, draft, prompts, config, interrupt, peers, contenders)
    table = to_rows(run)
    if console.is_terminal:
        title = f"{target.name}, {target.numerics.precision}"
        console.print(terminal_report(table, title))
    else:
        say(markdown_report(table))

    return run, table
