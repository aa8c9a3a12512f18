# SPDX-License-Identifier: Apache-2.0
"""Recording the target's own outputs for offline training."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.data.known import content_hash, find_known
from ospec_jax.data.prompts import Prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.engine import CAPACITIES, Engine
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.models.hub import Target
from ospec_jax.replay.store import (
    Recording,
    recorded,
    recorded_taps,
    shard_folders,
    write_shard,
)
from ospec_jax.reports.progress import Interrupt, progress_bar
from ospec_jax.sharding import AnyMesh

_MOST_SLOTS = 32_768
"""Cache slots of a batch: 1.5 GB of keys and values for SmolLM2-135M in float32."""


def collect(
    target: Target,
    prompts: Sequence[Prompt],
    folder: Path,
    taps: tuple[int, ...],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 32,
    capacity: int = 0,
    shard_size: int = 100,
) -> int:
    """Answers every prompt that is not in `folder` yet; returns the number recorded.

    Features are stored as the target computed them, in float16: about 4.6 KB a token
    for a width of 576. Prompts too long for `capacity`, or for the target, are left
    out, with a warning. Short prompts are answered first, in short caches: each size of
    them has its own batches. Ctrl-C keeps all answers that are complete.

    Args:
      batch_size: Requests decoded together at most; fewer in long caches.
      capacity: Cache slots of the longest request, one of `CAPACITIES`; 0 for as many
        as the target has positions.

    Raises:
      ConfigError: No prompt would fit beside so many new tokens, or the folder holds
        features of other layers.
      Interrupted: By Ctrl-C or another signal; the same call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = find_known(prompts, *recorded(folder))
    known.warn(folder)
    engine = _recording_engine(target, taps)
    room = _room(target, engine, capacity)
    limit = room - max_new_tokens
    _check_room(limit, room, max_new_tokens, capacity, target)

    requests = []
    prompt_of = {}
    num_long = 0

    for prompt, is_new in zip(known.prompts, known.is_new, strict=True):
        ids = encode(prompt, target.tokenizer)
        num_long += len(ids) > limit
        if is_new and len(ids) <= limit:
            requests.append(Request(prompt.id, ids, max_new_tokens, sampling))
            prompt_of[prompt.id] = prompt

    if requests:
        _check_taps(folder, taps)
    if num_long:
        warnings.warn(
            f"{num_long} of {len(prompts)} prompts have more than {limit} tokens and "
            f"are left out; {_remedy(room, target)}",
            stacklevel=2,
        )

    number = len(shard_folders(folder))
    count = 0

    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("collect", total=len(requests))
        completions = _served(engine, requests, batch_size, interrupt.is_over)
        for shard in _grouped(completions, shard_size, lambda: bool(interrupt)):
            recordings = [_record(c, prompt_of[c.request.id], taps) for c in shard]
            with interrupt.held():
                write_shard(folder, number, recordings)
            number = number + 1
            count = count + len(recordings)
            bar.update(task, completed=count)
            if interrupt:
                break

    if count < len(requests):
        interrupt.raise_if_set()

    return count


def _recording_engine(target: Target, taps: tuple[int, ...]) -> Engine:
    """Decodes plainly, and records what these layers read."""
    config = StepConfig(
        model=target.config,
        numerics=target.numerics,
        tree=TreeConfig(num_steps=0),
        taps=taps,
        stop_ids=target.stop_ids,
    )
    return Engine(config, target.params, recording="features")


def _room(target: Target, engine: Engine, capacity: int) -> int:
    """Tokens of the longest request."""
    largest = capacity or CAPACITIES[-1]
    assert largest in CAPACITIES
    return min(largest - engine.num_extra_slots, target.config.max_position)


def _check_room(
    limit: int, room: int, max_new_tokens: int, capacity: int, target: Target
) -> None:
    """Refuses answers beside which no prompt would fit.

    Args:
      limit: Tokens that are left for a prompt.
    """
    if limit < 1 and not capacity:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} leave no room for prompts in the {room} "
            f"tokens of {target.name}; lower max_new_tokens"
        )
    if limit < 1:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} leave no room for prompts in a capacity "
            f"of {capacity} tokens; raise --capacity"
        )


def _check_taps(folder: Path, taps: tuple[int, ...]) -> None:
    """Refuses to add to features of other layers."""
    others = recorded_taps(folder) - {tuple(taps)}
    if others:
        raise ConfigError(
            f"{folder} holds features of layers {others.pop()}, not {tuple(taps)}: "
            f"they were recorded for another draft; record into a new folder"
        )


def _remedy(room: int, target: Target) -> str:
    """How longer prompts could be answered."""
    if room < target.config.max_position:
        return "raise --capacity"

    return f"{target.name} has only {room} positions: lower --max-new-tokens"


def _served(
    engine: Engine,
    requests: Sequence[Request],
    batch_size: int,
    should_stop: Callable[[], bool],
) -> Iterator[Completion]:
    """Answers, those that fit the smallest cache first."""
    capacity_of = lambda request: engine.capacity_for([request])
    ordinals = itertools.count()

    for capacity, group in itertools.groupby(
        sorted(requests, key=capacity_of), capacity_of
    ):
        yield from engine.serve(
            list(group),
            batch_size=rows_of(capacity, batch_size, engine.config.mesh),
            capacity=capacity,
            # Each answer's random numbers are its own, over all groups.
            ordinals=ordinals,
            should_stop=should_stop,
        )


def rows_of(capacity: int, batch_size: int, mesh: AnyMesh | None = None) -> int:
    """Requests to decode together in caches of a size, `batch_size` at most.

    Args:
      mesh: Over whose `data` axis rows are split.
    """
    least = 1 if mesh is None else mesh.shape["data"]
    fitting = _MOST_SLOTS // capacity // least * least

    return min(batch_size, max(fitting, least))


def _grouped(
    items: Iterator[Completion], size: int, should_stop: Callable[[], bool]
) -> Iterator[list[Completion]]:
    """Groups of a size; a smaller one at the end, or once it shall stop."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size or should_stop():
            yield group
            group = []

    if group:
        yield group


def _record(completion: Completion, prompt: Prompt, taps: tuple[int, ...]) -> Recording:
    feedback = completion.feedback
    assert feedback is not None, "the engine records"
    n = completion.num_recorded
    arrays = {
        name: np.asarray(getattr(feedback, name))[0, :n]
        for name in ("tokens", "taps", "hidden", "logsumexp")
    }
    num_prompt = len(completion.request.prompt_ids)

    return Recording(
        prompt.id,
        prompt.domain,
        num_prompt,
        arrays,
        completion.token_ids[-1],
        content_hash(prompt),
        tuple(taps),
    )
