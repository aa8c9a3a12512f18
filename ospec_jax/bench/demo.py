# SPDX-License-Identifier: Apache-2.0
"""The demonstration: three domains, four decoding modes, one learning draft."""

import json
import shutil
from pathlib import Path

from ospec_jax import atomic
from ospec_jax.bench.live import run_with_progress
from ospec_jax.bench.report import markdown_report, plot_stream
from ospec_jax.bench.runs import BenchConfig
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import load_draft
from ospec_jax.models.hub import load_target
from ospec_jax.reports.progress import Interrupt, say
from ospec_jax.storage import checkpoint


def run_demo(
    out: Path,
    num_prompts_per_domain: int,
    max_new_tokens: int,
    num_speculative_tokens: int,
    learner: LearnerConfig,
) -> list[dict]:
    """Runs the stream and writes `acceptance.png`, `results.json`, `results.md` and
    the `checkpoint` of the learned draft into `out`; returns the table's rows.
    """
    is_again = (out / "results.json").exists()
    if not is_again and checkpoint.steps(out / "checkpoint"):
        raise ConfigError(
            f"{out / 'checkpoint'} is of another run; choose another folder with --out"
        )

    target = load_target("smollm2-135m")
    draft = load_draft("shipped", target)
    stream = [
        prompt
        for domain in DEMO_DOMAINS
        for prompt in demo_prompts(domain)[:num_prompts_per_domain]
    ]
    config = BenchConfig(
        max_new_tokens=max_new_tokens,
        tree=TreeConfig(num_steps=num_speculative_tokens),
        learner=learner,
    )
    interrupt = Interrupt()
    run, rows = run_with_progress(target, draft, stream, config, interrupt)
    atomic.write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    atomic.write_text(out / "results.md", markdown_report(rows) + "\n")
    plot = plot_stream(run, out / "acceptance.png")
    if is_again:  # the checkpoint is an earlier demonstration's
        shutil.rmtree(out / "checkpoint", ignore_errors=True)

    saved = run.modes["learned"].session.save(out / "checkpoint")
    say(f"plot        {plot}\ncheckpoint  {saved}")
    if not run.is_complete:
        interrupt.raise_if_set()

    return rows
