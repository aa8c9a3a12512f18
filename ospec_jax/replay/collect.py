# SPDX-License-Identifier: Apache-2.0
"""Recording the target's own outputs for offline training."""

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
from ospec_jax.replay.store import Recording, recorded, shard_folders, write_shard
from ospec_jax.reports.progress import Interrupt, progress_bar


def collect(
    target: Target,
    prompts: Sequence[Prompt],
    folder: Path,
    taps: tuple[int, ...],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 32,
    capacity: int = 256,
    shard_size: int = 100,
) -> int:
    """Answers every prompt that is not in `folder` yet; returns the number recorded.

    Features are stored as the target computed them, in float16: about 4.6 KB a token
    for a width of 576. Prompts too long for `capacity` are left out, with a warning.
    Ctrl-C keeps all answers that are complete.

    Raises:
      ConfigError: No prompt would fit beside so many new tokens.
      Interrupted: By Ctrl-C or another signal; the same call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = find_known(prompts, *recorded(folder))
    known.warn(folder)
    config = StepConfig(
        model=target.config,
        numerics=target.numerics,
        tree=TreeConfig(num_steps=0),
        taps=taps,
        stop_ids=target.stop_ids,
    )
    engine = Engine(config, target.params, recording="features")
    limit = capacity - max_new_tokens - engine.num_extra_slots
    assert capacity in CAPACITIES
    if limit < 1:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} leave no room for prompts in a capacity "
            f"of {capacity} tokens; raise --capacity"
        )

    requests = []
    prompt_of = {}
    num_long = 0

    for prompt, is_new in zip(known.prompts, known.is_new, strict=True):
        ids = encode(prompt, target.tokenizer)
        num_long += len(ids) > limit
        if is_new and len(ids) <= limit:
            requests.append(Request(prompt.id, ids, max_new_tokens, sampling))
            prompt_of[prompt.id] = prompt

    if num_long:
        warnings.warn(
            f"{num_long} of {len(prompts)} prompts have more than {limit} tokens and "
            f"are left out; raise --capacity",
            stacklevel=2,
        )

    number = len(shard_folders(folder))
    count = 0

    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("collect", total=len(requests))
        completions = engine.serve(
            requests,
            batch_size=batch_size,
            capacity=capacity,
            should_stop=interrupt.is_over,
        )
        for shard in _grouped(completions, shard_size, lambda: bool(interrupt)):
            recordings = [_record(c, prompt_of[c.request.id]) for c in shard]
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


def _record(completion: Completion, prompt: Prompt) -> Recording:
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
    )
