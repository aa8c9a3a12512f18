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
from ospec_jax.config.fields import Fields, read_json
from ospec_jax.learners.base import Segments
from ospec_jax.types import Feedback

_ARRAYS = ("tokens", "taps", "hidden", "logsumexp")
_RANKS = {"taps": 2, "hidden": 2, "logsumexp": 1}


@dataclasses.dataclass(frozen=True)
class Recording:
    """One request's verified tokens and features.

    Attributes:
      num_prompt: Leading tokens that belong to the prompt.
      arrays: `Feedback`'s fields without batch axis, `[t, ...]` each.
      last_token: The answer's last one, after which nothing was verified, so that it
        is not among `arrays`; -1 where it was not kept.
      content: Hash of the prompt (`data.known`); empty where it was not kept.
      taps: Layers whose features are in `arrays`; None where it was not kept.
    """

    id: str
    domain: str
    num_prompt: int
    arrays: dict[str, np.ndarray]
    last_token: int = -1
    content: str = ""
    taps: tuple[int, ...] | None = None


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
        "taps": [r.taps for r in recordings],
    }
    (part / "index.json").write_text(json.dumps(index))
    # The folder gets its name last: whoever finds a shard finds all of it.
    part.rename(part.with_suffix(""))


def shard_folders(folder: Path) -> list[Path]:
    """Shards, in order.

    Raises:
      ConfigError: Some are missing, or have lost their index.
    """
    shards = sorted(folder.glob("shard_?????"))
    # Shards are numbered without gaps, so a missing one shows.
    names = [f"shard_{i:05d}" for i in range(len(shards))]
    found = [p.name for p in shards if (p / "index.json").exists()]
    if found != names:
        wrong = sorted({*names, *(p.name for p in shards)} - ({*names} & {*found}))
        raise ConfigError(
            f"{folder} lacks a part of its recording, at {', '.join(wrong[:3])}: a "
            f"shard is missing or has no index.json; get it back, or record into "
            f"another folder"
        )

    return shards


def recorded(folder: Path) -> tuple[list[str], list[str]]:
    """Ids of the requests that are already on disk, and hashes of their prompts."""
    ids = []
    contents = []

    for shard in shard_folders(folder):
        index = read_index(shard)
        ids += index["ids"]
        contents += _contents(index)

    return ids, contents


def read_index(shard: Path) -> dict[str, Any]:
    """What a shard says of its requests: lists with an entry for each of them.

    Raises:
      ConfigError: It is damaged.
    """
    file = shard / "index.json"
    fields = Fields(read_json(file), str(file))
    kinds = {"ids": str, "domains": str, "num_prompt": int, "lengths": int}
    lists = {name: fields.items(name, kind) for name, kind in kinds.items()}
    if "last_tokens" in fields:
        lists["last_tokens"] = fields.items("last_tokens", int)

    for name, values in fields.values.items():
        if not isinstance(values, list) or len(values) != len(lists["ids"]):
            raise ConfigError(
                f"{file} has {name} {values!r:.80}; use a list with an entry for each "
                f"of its {len(lists['ids'])} requests"
            )

    for taps in fields.values.get("taps", []):
        if taps is not None and (
            not isinstance(taps, list) or any(type(tap) is not int for tap in taps)
        ):
            raise ConfigError(f"{file} has taps {taps!r:.80}; use lists of layers")

    pairs = zip(lists["num_prompt"], lists["lengths"], strict=True)
    if any(not 0 < num_prompt <= length for num_prompt, length in pairs):
        raise ConfigError(f"{file} has a prompt that is longer than its request")

    return fields.values


def _open_arrays(shard: Path, length: int) -> dict[str, np.ndarray]:
    """A shard's arrays of so many tokens, which stay on disk until read."""
    arrays = {}
    for name in _ARRAYS:
        file = shard / f"{name}.npy"
        try:
            arrays[name] = np.load(file, mmap_mode="r")
        except OSError:
            raise
        except Exception as error:
            # A header is Python's text: what is wrong with it may be anything.
            raise ConfigError(
                f"{file} cannot be read ({error}): it is truncated or damaged; record "
                f"into another folder"
            ) from error

        found = arrays[name]
        wanted = (np.integer, 1) if name == "tokens" else (np.floating, _RANKS[name])
        is_good = np.issubdtype(found.dtype, wanted[0]) and found.ndim == wanted[1]
        if not is_good or len(found) != length:
            raise ConfigError(
                f"{file} holds {found.dtype} of the shape {found.shape}, but its index "
                f"tells of {length} tokens; record into another folder"
            )

    return arrays


def recorded_taps(folder: Path) -> set[tuple[int, ...]]:
    """Layers whose features are on disk; older versions did not say."""
    indices = map(read_index, shard_folders(folder))
    return {tuple(taps) for index in indices for taps in index.get("taps", []) if taps}


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
    taps: tuple[int, ...] | None


class FeedbackStore:
    """Random access to windows of all recorded requests."""

    def __init__(self, folder: Path):
        self.entries: list[_Entry] = []
        for shard in shard_folders(folder):
            index = read_index(shard)
            # Mapped, not read: a recording may be larger than memory.
            arrays = _open_arrays(shard, sum(index["lengths"]))
            count = len(index["ids"])
            last = index.get("last_tokens", [-1] * count)
            contents = _contents(index)
            taps = index.get("taps", [None] * count)
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
                        None if taps[i] is None else tuple(taps[i]),
                    )
                )
                begin += length

        if not self.entries:
            raise ConfigError(f"{folder} holds no recorded shards; collect some first")

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the target's own outputs but the last of each."""
        return sum(e.length - e.num_prompt for e in self.entries)

    def answer(self, entry: int) -> np.ndarray:
        """Token ids of one answer but the last, after which nothing was verified."""
        e = self.entries[entry]
        return np.asarray(
            e.arrays["tokens"][e.begin + e.num_prompt : e.begin + e.length]
        )

    def prompt(self, entry: int) -> np.ndarray:
        """Token ids of one prompt."""
        e = self.entries[entry]
        return np.asarray(e.arrays["tokens"][e.begin : e.begin + e.num_prompt])

    def recording(self, entry: int) -> Recording:
        """One request as it was written; its arrays stay on disk until read."""
        e = self.entries[entry]
        own = {n: x[e.begin : e.begin + e.length] for n, x in e.arrays.items()}
        return Recording(
            e.id, e.domain, e.num_prompt, own, e.last_token, e.content, e.taps
        )

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
        """Stacks windows of `num_context` + `length` pairs for `num_steps` depths.

        Returns:
          `[len(windows), num_context + length + num_steps, ...]` in each field.
        """
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

        # The target's distributions are known from the prompt's last token on.
        positions = start + np.arange(size)
        is_verified = (positions >= e.num_prompt - 1) & (positions < e.length)
        window["weight"] = is_verified.astype(np.float32)

        return window
