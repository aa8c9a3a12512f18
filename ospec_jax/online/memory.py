# SPDX-License-Identifier: Apache-2.0
"""Learning n-grams: beside whatever else is learned, or alone."""

from collections.abc import Callable

import jax
import numpy as np

from ospec_jax import sharding
from ospec_jax.decoding.request import Completion
from ospec_jax.drafters import ngram
from ospec_jax.models.sharing import share
from ospec_jax.online.scopes import nobody
from ospec_jax.online.trainer import (
    Traffic,
    Trainer,
    TrainerState,
    UpdateReport,
    new_counts,
)
from ospec_jax.types import Draft, Owner


@share
def _compiled(mesh: jax.sharding.Mesh | None) -> Callable:
    """The jitted `ngram.remember`."""
    return jax.jit(sharding.pinned(ngram.remember, mesh, sharding.replicated))


def with_memory(
    trainer: Trainer,
    num_slots: int,
    orders: tuple[int, ...],
    mesh: jax.sharding.Mesh | None = None,
) -> Trainer:
    """A trainer that also remembers the n-grams of answers; it changes nothing else.

    Args:
      num_slots: n-grams of each order that are remembered; 0 leaves the trainer as it
        is.
      orders: Lengths of the n-grams.
    """
    if num_slots == 0:
        return trainer

    remember = _compiled(mesh)

    def init(draft: Draft):
        state, traffic = trainer.init(draft)
        memory = sharding.put_params(ngram.init_memory(num_slots, orders), mesh)
        return state, traffic.replace(memory=memory)

    def keep(traffic: Traffic, served: Draft, completion: Completion) -> Traffic:
        assert traffic.memory is not None
        # Not donated: the old memory may still be read by a step that is under way.
        memory = remember(traffic.memory, *_ngrams_of(completion))
        kept = trainer.remember(traffic, served, completion)
        return kept.replace(memory=memory)

    def warm_up(state, traffic: Traffic, draft, served, completion, speed=None):
        jax.block_until_ready(keep(traffic, served, completion))
        return trainer.warm_up(state, traffic, draft, served, completion, speed)

    return trainer._replace(init=init, warm_up=warm_up, remember=keep)


def _ngrams_of(
    completion: Completion,
) -> tuple[np.ndarray, np.int32, np.int32, Owner]:
    """Padded tokens `[capacity]`, where the answer begins, how many are real, whose."""
    ids = [*completion.request.prompt_ids, *completion.token_ids]
    num_prompt = np.int32(len(completion.request.prompt_ids))
    padded = np.zeros(completion.capacity, np.int32)  # few lengths, few executables
    padded[: len(ids)] = ids
    return padded, num_prompt, np.int32(len(ids)), completion.owner or nobody()


def counting_trainer(
    serve: Callable[[Draft], Draft], mesh: jax.sharding.Mesh | None = None
) -> Trainer:
    """Trains nothing, and counts the answers; `with_memory` it learns n-grams alone.

    Args:
      serve: Makes the draft that decodes of one in float32.
    """

    def init(draft: Draft):
        state = sharding.put_params(TrainerState(*new_counts()), mesh)
        return state, Traffic()

    def observe(state: TrainerState, traffic, draft, completion):
        return state.replace(num_prompts=state.num_prompts + 1), traffic

    def warm_up(state, traffic, draft, served, completion, speed=None):
        observe(state, traffic, draft, completion)
        return state

    def update(*_) -> tuple[TrainerState, Draft, Draft, UpdateReport]:
        raise AssertionError("there is nothing to train")

    return Trainer(
        recording="nothing",
        init=init,
        serve=serve,
        warm_up=warm_up,
        is_ready=lambda state: True,
        observe=observe,
        is_due=lambda state: False,
        answers_until_due=lambda state, num_tokens: len(num_tokens),
        update=update,
        label="'memory'",
        remedy="",
    )
