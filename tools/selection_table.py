# SPDX-License-Identifier: Apache-2.0
"""Records a pool of experts and makes HedgeSpec's tables of it, in one command.

    python tools/selection_table.py RECORDING --out TABLES \\
        --prompts TEST.jsonl --train TRAIN.jsonl \\
        --draft pool:shipped+EXPERT1+EXPERT2+...

Rows of both files name their `domain`. The recording goes on where it stopped, and
without --draft it is taken as it is. In the folder TABLES are afterwards, each with its
numbers as JSON beside it: `mixtures.md`, every rule on each domain's stream and on
mixtures; `reworded.md`, the same on prompts that mention a question of another domain,
which mislead a router; `sizes.md` and `sizes.png`, regret by the number of drafters.
"""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

from ospec_jax import atomic
from ospec_jax.cli.streams import record
from ospec_jax.data.prompts import Prompt, read_prompts, write_prompts
from ospec_jax.replay import copies, mixtures
from ospec_jax.replay.copies import as_experts
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta, in_order, read_pool
from ospec_jax.replay.router import reworded, routes_of

RULES = (
    "ucb:request",
    "ucb",
    "exp3:request",
    "exp3",
    "metasd:request",
    "metasd",
    "normalhedge:once",
    "normalhedge:request",
    "normalhedge",
    "share",
    "normalhedge:domain",
    "normalhedge:opening",
    "normalhedge:similar",
)
"""Bandits as published (`request`) and with a memory; HedgeSpec, and more."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draft", default="", help="pool:A+B+...; record it first")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--select", default=",".join(RULES))
    parser.add_argument(
        "--made-up",
        type=float,
        default=0.0,
        help="in place of the pool's members, experts that lose tokens with this "
        "chance outside their domain",
    )
    parser.add_argument("--shuffles", type=int, default=5)
    parser.add_argument("--sizes", default="2,4,8,16")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Records, if that is asked, and writes the tables."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts, training = read_prompts(args.prompts), read_prompts(args.train)
    changed = reworded(prompts, training)
    if args.draft:
        # In one go, and under names of their own: both files may have the same.
        parts = {"test": prompts, "train": training, "reworded": changed}
        asked = args.out / "asked.jsonl"
        write_prompts(
            asked,
            [
                dataclasses.replace(prompt, id=f"{part}-{prompt.id}")
                for part, rows in parts.items()
                for prompt in rows
            ],
        )
        record(
            prompts=asked,
            out=args.recording,
            target=args.target,
            draft=args.draft,
            precision=args.precision,
            max_new_tokens=args.max_new_tokens,
            num_speculative_tokens=args.num_speculative_tokens,
        )

    names = [name for name in args.select.split(",") if name]
    for kind, asked in (("mixtures", prompts), ("reworded", changed)):
        write_mixtures(args, kind, asked, training, names)
    write_sizes(args, prompts, names)


def write_mixtures(
    args: argparse.Namespace,
    kind: str,
    prompts: list[Prompt],
    training: list[Prompt],
    names: list[str],
) -> None:
    """Writes one of the tables by streams."""
    meta, recorded = _read(args)
    answers = in_order(recorded, prompts, args.recording)
    trained_on = in_order(recorded, training, args.recording)
    routes = routes_of(meta, prompts, trained_on, training)
    rows = mixtures.compare_mixtures(meta, answers, names, range(args.shuffles), routes)

    experts = ", ".join(f"{name} for {key}" for key, name in routes.drafters.items())
    text = (
        f"{len(answers)} of {len(recorded)} recorded answers, K = {meta.num_steps}, "
        f"{args.shuffles} orders. The router takes {routes.right:.1%} of the prompts "
        f"for what their domain says; it has {experts}.\n\n"
        f"{mixtures.markdown_table(rows)}\n"
    )
    _write(args.out / f"{kind}.md", text, rows)


def _read(args: argparse.Namespace) -> tuple[PoolMeta, list[PoolAnswer]]:
    """The recording, as it is or with made-up experts."""
    meta, recorded = read_pool(args.recording)
    return (
        as_experts(meta, recorded, args.made_up) if args.made_up else (meta, recorded)
    )


def write_sizes(
    args: argparse.Namespace, prompts: list[Prompt], names: list[str]
) -> None:
    """Writes the table and the plot of regret by the number of drafters."""
    meta, recorded = _read(args)
    answers = in_order(recorded, prompts, args.recording)
    sizes = [int(size) for size in args.sizes.split(",")]
    rows = copies.regret_by_size(meta, answers, names, sizes, range(args.shuffles))
    _write(args.out / "sizes.md", copies.markdown_table(rows) + "\n", rows)
    copies.plot(rows, args.out / "sizes.png")


def _write(file: Path, text: str, rows: list[dict]) -> None:
    atomic.write_text(file, text)
    atomic.write_text(file.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    print(f"{file}\n\n{text}")


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
