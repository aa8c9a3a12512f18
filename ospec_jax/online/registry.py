# SPDX-License-Identifier: Apache-2.0
"""Trainers by what a learner needs to know."""

from collections.abc import Callable, Sequence

import jax

from ospec_jax.config import RECORDS_STATES
from ospec_jax.drafters.base import Drafter
from ospec_jax.learners.config import LearnerConfig, build_learner
from ospec_jax.models.layers import Numerics
from ospec_jax.online.deltas import with_deltas
from ospec_jax.online.last_layer import last_layer_trainer
from ospec_jax.online.memory import counting_trainer, with_memory
from ospec_jax.online.trainer import Trainer
from ospec_jax.online.windows import windows_trainer
from ospec_jax.types import Draft, SharedTables


def build_trainer(
    config: LearnerConfig,
    drafter: Drafter,
    shared: SharedTables,
    serve: Callable[[Draft], Draft],
    *,
    tap_width: int,
    hidden_size: int,
    vocab_size: int,
    numerics: Numerics,
    orders: Sequence[int] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Trainer:
    """The trainer of a configuration.

    Args:
      drafter: Of the draft that is trained.
      shared: The target's embedding and head.
      serve: Makes the draft that decodes of one in float32.
      tap_width: Width of the features that are recorded for the draft.
      hidden_size: Width of the target's final states.
      vocab_size: The target's.
      orders: Lengths of the n-grams to remember; none remembers none.

    Raises:
      ConfigError: The draft cannot be trained like this, or settings do not go
        together.
    """
    if config.recording == "nothing":
        trainer = counting_trainer(serve, mesh)
    elif config.recording in RECORDS_STATES:
        trainer = last_layer_trainer(
            config, drafter.head_inputs, numerics, vocab_size, serve, mesh
        )
    else:
        learner = build_learner(config, drafter.unroll)
        assert learner is not None, "it learns from features"
        trainer = windows_trainer(
            config, learner, shared, serve, tap_width, hidden_size, mesh
        )

    # n-grams are remembered beside any learner, if the draft's family looks them up.
    num_slots = config.memory_slots if orders else 0
    trainer = with_memory(trainer, num_slots, tuple(orders), mesh)
    return with_deltas(trainer, config.delta_rank, drafter, numerics, vocab_size, mesh)
