# SPDX-License-Identifier: Apache-2.0
"""Recorded feedback on disk: folders of memory-mapped arrays.

A shard holds whole requests, one behind the other. It appears under its final name only
when complete, so an interrupted collection leaves nothing half-written.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.learners.base import Segments
from ospec_jax.types import Feedback

_ARRAYS = ("tokens", "taps", "hidden", "logsumexp")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One request's verified tokens and features.

    Attributes:
      num_prompt: Leading tokens that belong to the prompt.
      arrays: `Feedback`'s fields without batch axis, `[t, ...]` each.
      last_token: The answer's last one, after which nothing was verified, so that it
        is not among `arrays`; -1 where it was not kept.
      content: Hash of the prompt (`data.known`); empty where it was not kept.
    """

    id: str
    domain: str
    num_prompt: int
    arrays: dict[str, np.ndarray]
    last_token: int = -1
    content: str = ""


def write_shard(folder: Path, number: int, recordings: Sequence[Recording]) -> None:
    """Writes recordings as shard `number`, atomically."""
    part = folder / f"shard_{number:05d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    for name in _ARRAYS:
        joined = np.concatenate([r.arrays[name] for r in recordings])
        np.save(part / f"{name}.npy", joined)

    lengths = [len(r.arrays["tokens"]) for r in recordings]
    index = {
        "ids": [r.id for r in recordings],
        "domains": [r.domain for r in recordings],
        "num_prompt": [r.num_prompt for r in recordings],
        "lengths": lengths,
        "last_tokens": [r.last_token for r in recordings],
        "contents": [r.content for r in recordings],
    }
    (part / "index.json").write_text(json.dumps(index))
    part.rename(part.with_suffix(""))


def shard_folders(folder: Path) -> list[Path]:
    """Complete shards, in order."""
    return sorted(p for p in folder.glob("shard_?????") if (p / "index.json").exists())


def recorded(folder: Path) -> tuple[list[str], list[str]]:
    """Ids of the requests that are already on disk, and hashes of their prompts."""
    ids = []
    contents = []

    for shard in shard_folders(folder):
        index = json.loads((shard / "index.json").read_text())
        ids += index["ids"]
        contents += _contents(index)

    return ids, contents


def recorded_ids(folder: Path) -> set[str]:
    """Ids of the requests that are already on disk."""
    return set(recorded(folder)[0])


def _contents(index: dict) -> list[str]:
    """Hashes of a shard's prompts; older versions kept none."""
    return index.get("contents", [""] * len(index["ids"]))


@dataclasses.dataclass(frozen=True)
class _Entry:
    arrays: dict[str, np.ndarray]
    begin: int
    length: int
    num_prompt: int
    domain: str
    id: str
    last_token: int
    content: str


class FeedbackStore:
    """Random access to windows of all recorded requests."""

    def __init__(self, folder: Path):
        self.entries: list[_Entry] = []
        for shard in shard_folders(folder):
            index = json.loads((shard / "index.json").read_text())
            arrays = {n: np.load(shard / f"{n}.npy", mmap_mode="r") for n in _ARRAYS}
            count = len(index["ids"])
            last = index.get("last_tokens", [-1] * count)
            contents = _contents(index)
            begin = 0
            for i, length in enumerate(index["lengths"]):
                self.entries.append(
                    _Entry(
                        arrays,
                        begin,
                        length,
                        index["num_prompt"][i],
                        index["domains"][i],
                        index["ids"][i],
                        last[i],
                        contents[i],
                    )
                )
                begin += length

        if not self.entries:
            raise ConfigError(f"{folder} holds no recorded shards; collect some first")

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the target's own outputs."""
        return sum(e.length - e.num_prompt for e in self.entries)

    def answer(self, entry: int) -> np.ndarray:
        """Token ids of one answer."""
        e = self.entries[entry]
        return np.asarray(
            e.arrays["tokens"][e.begin + e.num_prompt : e.begin + e.length]
        )

    def recording(self, entry: int) -> Recording:
        """One request as it was written; its arrays stay on disk until read."""
        e = self.entries[entry]
        own = {n: x[e.begin : e.begin + e.length] for n, x in e.arrays.items()}
        return Recording(e.id, e.domain, e.num_prompt, own, e.last_token, e.content)

    def windows(self, entries: Sequence[int], length: int) -> list[tuple[int, int]]:
        """Windows `(entry, first trained pair)` that cover each answer once."""
        found = []
        for i in entries:
            e = self.entries[i]
            # Pair P - 2 predicts the answer's first token.
            found += [(i, s) for s in range(e.num_prompt - 2, e.length - 2, length)]

        return found

    def segments(
        self,
        windows: Sequence[tuple[int, int]],
        num_context: int,
        length: int,
        num_steps: int,
    ) -> Segments:
        """Stacks windows of `num_context` + `length` pairs for `num_steps` depths."""
        size = num_context + length + num_steps
        rows = [self._window(i, s - num_context, size) for i, s in windows]
        fields: dict[str, Any] = {
            name: np.stack([row[name] for row in rows]) for name in _ARRAYS
        }
        start: Any = np.asarray([s - num_context for _, s in windows], np.int32)
        weight: Any = np.stack([row["weight"] for row in rows])

        return Segments(feedback=Feedback(**fields), start=start, weight=weight)

    def _window(self, entry: int, start: int, size: int) -> dict[str, np.ndarray]:
        e = self.entries[entry]
        low = max(start, 0)
        high = min(start + size, e.length)
        inside = slice(low - start, high - start)
        window = {}

        for name in _ARRAYS:
            source = e.arrays[name]
            window[name] = np.zeros((size, *source.shape[1:]), source.dtype)
            window[name][inside] = source[e.begin + low : e.begin + high]

        positions = start + np.arange(size)
        is_verified = (positions >= e.num_prompt - 1) & (positions < e.length)
        window["weight"] = is_verified.astype(np.float32)

        return window
