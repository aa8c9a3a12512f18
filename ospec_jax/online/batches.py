# SPDX-License-Identifier: Apache-2.0
"""What a round of learning trains on: batches of the ring's windows."""

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.learners.base import Segments
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.online.ring import FeedbackRing, draw, newest, num_fresh_held


def num_newest(config: LearnerConfig) -> int:
    """Windows of a batch that are not drawn from older ones."""
    return config.batch_size - round(config.batch_size * config.replay_share)


def of_round(
    config: LearnerConfig, ring: FeedbackRing, num_fresh: int
) -> list[np.int32]:
    """How many windows are newer than each batch's; the oldest batch comes first.

    An interval trains on one batch, a chunk of prompts on all that it left.
    """
    if not config.update_every_prompts:
        return [np.int32(0)]

    size = num_newest(config)
    num_held = num_fresh_held(ring, num_fresh)

    # Rounded up: windows that do not fill a batch are trained on with weightless ones
    # beside them.
    num_batches = -(-num_held // size)
    return [np.int32(i * size) for i in reversed(range(num_batches))]


def make_batch(
    config: LearnerConfig,
    ring: FeedbackRing,
    num_fresh,
    num_updates,
    num_newer,
    is_first_epoch,
) -> Segments:
    """The newest windows but some, and older ones against forgetting."""
    count = num_newest(config)
    num_old = config.batch_size - count
    fresh = newest(ring, count, num_fresh, num_newer)
    fresh = fresh.replace(is_fresh=jnp.full((count,), is_first_epoch))
    if num_old == 0:
        return fresh

    # A function of the update's number, so that a resumed run draws the same windows.
    key = jax.random.fold_in(jax.random.key(config.seed), num_updates)
    # Not from this round's: they would be trained on before they are judged.
    old = draw(ring, key, num_old, num_fresh)
    # Nothing fresh, nothing to learn: the batch must weigh nothing as a whole.
    old = old.replace(
        weight=old.weight * (num_fresh > 0), is_fresh=jnp.zeros((num_old,), bool)
    )
    join = lambda a, b: jnp.concatenate([a, b])

    return jax.tree.map(join, fresh, old)


def of_request(config: LearnerConfig, ring: FeedbackRing, num_windows) -> Segments:
    """The windows that entered last, of one request, as far as a batch holds them."""
    found = newest(ring, config.batch_size, num_windows)
    return found.replace(is_fresh=jnp.ones((config.batch_size,), bool))
