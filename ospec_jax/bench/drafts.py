# SPDX-License-Identifier: Apache-2.0
"""Several drafts against each other, domain by domain."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from ospec_jax.bench.parts import PLAIN, by_domain, paired_quartiles
from ospec_jax.bench.rows import count_mismatches
from ospec_jax.bench.runs import BenchRun, ModeRun
from ospec_jax.config import ChildrenKind, ConfigError, TreeConfig, Verification
from ospec_jax.decoding.stats import DecodingStats, repeated_share

ALL = "all"


def parse_contender(text: str, parse: Callable[..., TreeConfig]):
    """Reads `DRAFT[@TREE[@CHILDREN[@VERIFICATION]]]`: who drafts, and how.

    Args:
      parse: From notations, as many as are given, to the tree.

    Returns:
      The draft's name and its tree.
    """
    name, *shape = text.split("@")
    if not name or name == "none":
        raise ConfigError(
            f"{text!r} names no draft to compare; use DRAFT or DRAFT@TREE"
        )

    for word, known in zip(shape[1:], (ChildrenKind, Verification), strict=False):
        if word not in get_args(known):
            raise ConfigError(
                f"{word!r} in {text!r} is none of {', '.join(get_args(known))}"
            )

    if len(shape) > 3 or not all(shape):
        raise ConfigError(
            f"cannot read the draft {text!r}; use DRAFT@TREE@CHILDREN@VERIFICATION, "
            f"or fewer of these"
        )

    return name, parse(*shape)


def domain_rows(run: BenchRun) -> list[dict]:
    """One row for each domain and mode, those of all prompts last.

    Raises:
      ConfigError: Prompts were decoded in batches, not plainly as well, or not at all.
    """
    if not run.prompts:
        raise ConfigError("no prompt was answered by all drafts: nothing to compare")
    if run.config.batch_size > 1 or PLAIN not in run.modes:
        raise ConfigError(
            f"drafts are compared prompt by prompt with plain decoding: use a batch "
            f"size of 1, and the mode {PLAIN!r} among --modes"
        )

    chosen = by_domain(run) | {ALL: list(range(len(run.prompts)))}

    return [
        _row(run, name, domain, where)
        for domain, where in chosen.items()
        for name in run.modes
    ]


def _row(run: BenchRun, name: str, domain: str, where: Sequence[int]) -> dict:
    """A mode on some of the prompts; costs are in plain steps."""
    mode = run.modes[name]
    plain = run.modes[PLAIN]
    cost = run.pass_seconds[name]
    step = run.pass_seconds[PLAIN].step
    part = _part(mode, where)
    seconds = lambda mode: np.take(mode.turn_seconds, where)
    tokens = lambda mode: np.take(mode.turn_tokens, where)
    total = lambda mode: seconds(mode).sum() / max(tokens(mode).sum(), 1)
    empty = DecodingStats(num_spec_tokens=mode.session.tree.num_steps)
    stats = sum((result.stats for result in part.results), empty)
    picked = dataclasses.replace(run, reference=[run.reference[i] for i in where])
    mismatched, ties = count_mismatches(picked, part)

    return {
        "domain": domain,
        "mode": name,
        "temperature": run.config.sampling.temperature,
        "num_prompts": len(where),
        "num_tokens": int(tokens(mode).sum()),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_cost": (cost.step - run.verify_seconds[name]) / step,
        "step_cost": cost.step / step,
        "tokens_per_second": 1 / total(mode),
        "speedup": total(plain) / total(mode),
        "repeated_token_share": repeated_share([r.token_ids for r in part.results]),
        "paired_speedup_quartiles": paired_quartiles(plain, mode, where),
        "num_mismatched_outputs": mismatched,
        "num_tie_flips": ties,
    }


def _part(mode: ModeRun, where: Sequence[int]) -> ModeRun:
    return dataclasses.replace(mode, results=[mode.results[i] for i in where])


def drafts_table(rows: Sequence[dict]) -> str:
    """Markdown: a line for each draft, acceptance length and speed-up by domain.

    The fastest of each domain is set in bold.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    found = {(row["mode"], row["domain"]): row for row in rows}
    modes = [m for m in dict.fromkeys(row["mode"] for row in rows) if m != PLAIN]
    best = {
        domain: max(modes, key=lambda mode: found[mode, domain]["speedup"], default="")
        for domain in domains
    }
    lines = ["| draft | draft cost | step cost | " + " | ".join(domains) + " |"]
    lines.append("|" + "---|" * (len(domains) + 3))

    for mode in modes:
        row = found[mode, domains[0]]
        cells = [mode, f"{row['draft_cost']:.2f}", f"{row['step_cost']:.2f}"]
        for domain in domains:
            row = found[mode, domain]
            speed = f"{row['speedup']:.2f}"
            speed = f"**{speed}**" if best[domain] == mode else speed
            cells.append(f"{row['mean_acceptance_length']:.2f} ({speed})")
        lines.append("| " + " | ".join(cells) + " |")

    plain = [f"{found[PLAIN, domain]['tokens_per_second']:.1f}" for domain in domains]
    lines.append("| plain, tokens/s | - | 1.00 | " + " | ".join(plain) + " |")
    repeated = [f"{found[PLAIN, d]['repeated_token_share']:.0%}" for d in domains]
    lines.append("| plain, repeated tokens | - | - | " + " | ".join(repeated) + " |")
    counts = [r["num_mismatched_outputs"] for r in rows if r["domain"] == ALL]
    different = "not compared" if None in counts else sum(counts)
    lines += [
        "",
        "Acceptance length, in brackets tokens/s as a ratio to plain decoding;",
        f"costs in plain steps. Outputs that differ from plain ones: {different}.",
        "Tokens of runs of 16 that the answer held before flatter n-grams.",
    ]

    return "\n".join(lines)
