# SPDX-License-Identifier: Apache-2.0
"""Learning what a scope's own draft has beside that of all, with whatever else is."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import RECORDS_STATES, ConfigError
from ospec_jax.decoding.request import Completion
from ospec_jax.drafters.base import Drafter
from ospec_jax.learners import deltas as rule
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.sharing import share
from ospec_jax.online.samples import HEAD, as_drawn, parts_of, samples_of
from ospec_jax.online.scopes import NOBODY
from ospec_jax.online.trainer import Traffic, Trainer
from ospec_jax.types import Deltas, Draft


class _Programs(NamedTuple):
    """Jitted `rule.claim` and `_Parts.learn`, which overwrite the differences."""

    claim: Callable
    learn: Callable


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What is run over parts of answers; equal ones share their compiled functions.

    Attributes:
      head_inputs: The drafter's.
      vocab_size: The target's.
    """

    head_inputs: Callable
    numerics: Numerics
    vocab_size: int

    def learn(self, deltas: Deltas, scope, sampling, params, *args) -> Deltas:
        """One step, from a part of an answer of the scope."""
        samples = samples_of(self.head_inputs, self.vocab_size, params, *args)
        logits = linear(samples.inputs, params[HEAD], self.numerics)
        samples = samples.replace(logits=logits, sampling=sampling)
        return rule.learn(deltas, scope, samples)


@share
def _compiled(parts: _Parts) -> _Programs:
    return _Programs(
        claim=jax.jit(rule.claim, donate_argnums=0),
        learn=jax.jit(parts.learn, donate_argnums=0),
    )


def with_deltas(
    trainer: Trainer,
    rank: int,
    drafter: Drafter,
    numerics: Numerics,
    vocab_size: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Trainer:
    """A trainer that also learns each scope's own difference; it changes nothing else.

    Args:
      rank: Of the differences; 0 leaves the trainer as it is.
      drafter: Of the draft.
      vocab_size: The target's.

    Raises:
      ConfigError: The draft cannot add them, or the trainer wants other things
        recorded.
    """
    if rank == 0:
        return trainer

    head_inputs = _checked(trainer, rank, drafter, mesh)
    programs = _compiled(_Parts(head_inputs, numerics, vocab_size))

    def init(draft: Draft):
        state, traffic = trainer.init(draft)
        num_tokens, width = draft.params[HEAD]["kernel"].shape
        return state, traffic.replace(deltas=rule.init_deltas(rank, width, num_tokens))

    def learn(deltas: Deltas, served: Draft, completion: Completion) -> Deltas:
        scope = jnp.int32(completion.request.scope)
        sampling = as_drawn(completion.request.sampling)
        parts = list(parts_of(served.params, served.token_ids, completion))
        # Who teaches nothing takes nobody's place.
        if parts:
            deltas = programs.claim(deltas, scope)
        for args in parts:
            deltas = programs.learn(deltas, scope, sampling, *args)

        return deltas

    def remember(traffic: Traffic, served: Draft, completion: Completion) -> Traffic:
        traffic = trainer.remember(traffic, served, completion)
        # Nobody in particular has none: the shared draft is theirs.
        if completion.request.scope == NOBODY:
            return traffic

        assert traffic.deltas is not None, "they are there from the beginning"
        return traffic.replace(deltas=learn(traffic.deltas, served, completion))

    def warm_up(state, traffic: Traffic, draft, served, completion, speed=None):
        # Somebody's, of whom nothing is kept: in a copy, which is overwritten.
        request = dataclasses.replace(completion.request, scope=np.iinfo(np.int32).max)
        own = dataclasses.replace(completion, request=request)
        assert traffic.deltas is not None
        copy = jax.tree.map(jnp.copy, traffic.deltas)
        jax.block_until_ready(learn(copy, served, own))
        return trainer.warm_up(state, traffic, draft, served, completion, speed)

    recording = trainer.recording
    return trainer._replace(
        recording="states" if recording == "nothing" else recording,
        init=init,
        warm_up=warm_up,
        remember=remember,
    )


def _checked(trainer: Trainer, rank: int, drafter: Drafter, mesh) -> Callable:
    """What the draft's output projection reads, if differences can be learned of it."""
    if not drafter.adds_deltas or drafter.head_inputs is None:
        raise ConfigError(
            f"delta_rank is {rank}, and this draft adds no differences to its logits; "
            f"use an EAGLE draft with an output projection of its own, such as "
            f"`shipped`, or leave it out"
        )
    if mesh is not None:
        raise ConfigError(
            f"delta_rank is {rank}, and the target lies on a mesh; differences of "
            f"single scopes work on a single device: leave it out"
        )
    if trainer.recording not in ("nothing", *RECORDS_STATES):
        raise ConfigError(
            f"delta_rank is {rank}, and the learner {trainer.label} learns from "
            f"features, not from the draft's states; use --learner head, preference or "
            f"memory beside it"
        )

    return drafter.head_inputs
