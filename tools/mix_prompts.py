# SPDX-License-Identifier: Apache-2.0
"""Makes one file of prompts of several, of the rows that training left out.

    python tools/mix_prompts.py gsm8k.jsonl math.jsonl mbpp.jsonl --out mix.jsonl

Training of the shipped draft left every tenth row of its prompt files out. Of these it
takes some from each file, evenly spread, and shuffles them all by a seed: so the same
files give the same prompts, on any machine.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import Prompt, read_prompts, write_prompts
from ospec_jax.reports.progress import say


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is mixed.

    Attributes:
      files: Prompt files, as `ospec bench` takes them.
      out: The file that is written.
      every: Of so many rows the first was left out of training.
      per_file: Prompts of each file.
      seed: Of the shuffle.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    every: int = 10
    per_file: int = 20
    seed: int = 0


def spread(path: Path, every: int, count: int) -> list[Prompt]:
    """So many of a file's left-out rows, from its first to its last.

    Raises:
      ConfigError: It has fewer.
    """
    left_out = read_prompts(path)[::every]
    if len(left_out) < count:
        raise ConfigError(
            f"{path} has {len(left_out)} rows that were left out, and {count} are "
            f"wanted; lower --per-file"
        )

    places = np.linspace(0, len(left_out) - 1, count).round().astype(int)
    return [left_out[i] for i in places]


def main(settings: Settings) -> None:
    """Mixes and writes."""
    chosen = [
        prompt
        for path in settings.files
        for prompt in spread(path, settings.every, settings.per_file)
    ]
    order = np.random.default_rng(settings.seed).permutation(len(chosen))
    write_prompts(settings.out, [chosen[i] for i in order])
    say(f"{len(chosen)} prompts of {len(settings.files)} files: {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
