# SPDX-License-Identifier: Apache-2.0
"""A target's answers to prompts, kept to train drafts and to replay drafts on them.

Greedy answers do not depend on the draft, so one recording serves every draft,
learner and seed. It holds users' prompts and answers, which can be read back from it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ospec_jax import atomic
from ospec_jax.config import ConfigError, SamplingConfig, from_dict, naming
from ospec_jax.config.fields import read_json
from ospec_jax.data.known import find_known
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.engine import CAPACITIES
from ospec_jax.models.hub import Target
from ospec_jax.replay.collect import collect
from ospec_jax.replay.store import FeedbackStore, recorded

_FILE = "recording.json"


@dataclasses.dataclass(frozen=True)
class RecordingMeta:
    """What the answers belong to.

    Attributes:
      fingerprint: Of the target's weights.
      taps: Target layers whose inputs were kept.
      order: Ids of the prompts, in the stream's order.
      temperature: Of the answers; above 0 they serve for training alone.
    """

    target: str
    fingerprint: str
    precision: str
    taps: tuple[int, ...]
    max_new_tokens: int
    order: tuple[str, ...] = ()
    temperature: float = 0.0


def record(
    target: Target,
    prompts: Sequence[Prompt],
    folder: Path,
    taps: tuple[int, ...],
    *,
    max_new_tokens: int = 64,
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 8,
    capacity: int = 0,
    shard_size: int = 50,
) -> int:
    """Records answers to all prompts; returns how many are new.

    Goes on where an interrupted recording stopped, and adds to a complete one.

    Args:
      batch_size: Requests decoded together at most; fewer in long caches.
      capacity: Cache slots of the longest request; prompts that do not fit are left
        out. 0 takes all that the target has positions for.

    Raises:
      ConfigError: The folder holds answers of another target or other settings.
    """
    meta = RecordingMeta(
        target.name,
        target.fingerprint,
        target.numerics.precision,
        tuple(taps),
        max_new_tokens,
        temperature=sampling.temperature,
    )
    known = ()
    if (folder / _FILE).exists():
        found = read_meta(folder)
        known = found.order
        _check_same(folder, dataclasses.replace(found, order=()), meta)

    if capacity and capacity not in CAPACITIES:
        raise ConfigError(
            f"the capacity is {capacity}; use one of {CAPACITIES}, or 0 for all prompts"
        )

    named = find_known(prompts, *recorded(folder)).prompts
    order = dict.fromkeys([*known, *(prompt.id for prompt in named)])
    fields = dataclasses.asdict(meta) | {"order": list(order)}
    atomic.write_text(folder / _FILE, json.dumps(fields, indent=1))

    return collect(
        target,
        prompts,
        folder,
        taps,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        batch_size=batch_size,
        capacity=capacity,
        shard_size=shard_size,
    )


def read_meta(folder: Path) -> RecordingMeta:
    """The record of what a folder holds.

    Raises:
      FileNotFoundError: It holds no recording.
      ConfigError: The record is damaged.
    """
    file = folder / _FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no recording; make one with `ospec record --prompts FILE "
            f"--out {folder}`"
        )

    with naming(file):
        try:
            return from_dict(RecordingMeta, read_json(file))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error


def _check_same(folder: Path, found: RecordingMeta, wanted: RecordingMeta) -> None:
    for field in dataclasses.fields(RecordingMeta):
        old = getattr(found, field.name)
        new = getattr(wanted, field.name)
        if old != new:
            raise ConfigError(
                f"{folder} was recorded with {field.name} {old}, not {new}; use what "
                f"it was recorded with, or another folder"
            )


def open_recording(
    folder: Path,
    target: Target,
    taps: tuple[int, ...] | None,
    ids: Sequence[str | Prompt] = (),
) -> tuple[FeedbackStore, list[int]]:
    """The store, and the numbers of its entries in the stream's order.

    Args:
      taps: What the draft reads; None for any.
      ids: Replay these prompts, in this order, instead of all in the recorded one. A
        `Prompt` is found by its content, whatever its name was.

    Raises:
      ConfigError: The recording is of another target, precision or taps, or lacks one
        of the prompts.
    """
    meta = read_meta(folder)
    wanted = dataclasses.replace(
        meta,
        fingerprint=target.fingerprint,
        precision=target.numerics.precision,
        taps=meta.taps if taps is None else tuple(taps),
        temperature=0.0,
    )
    _check_same(folder, meta, wanted)
    names, contents = recorded(folder)
    asked = [i for i in ids if isinstance(i, Prompt)]
    known = find_known(asked, names, contents)
    is_known = set(names)
    missing = [p.id for p in known.new]
    missing += [i for i in ids if isinstance(i, str) and i not in is_known]
    if missing:
        raise ConfigError(
            f"{len(missing)} prompts of the stream are not in {folder}, the first is "
            f"{missing[0]!r}; record the stream's file into it, too"
        )

    store = FeedbackStore(folder)
    number = {entry.id: i for i, entry in enumerate(store.entries)}
    found = iter(known.prompts)
    wished = [i if isinstance(i, str) else next(found).id for i in ids]
    order = [number[i] for i in wished or meta.order if i in number]
    if any(store.entries[i].last_token < 0 for i in order):
        raise ConfigError(
            f"{folder} holds answers without their last token, which replay needs; "
            f"record into another folder"
        )

    return store, order
