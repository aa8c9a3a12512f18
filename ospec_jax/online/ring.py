# SPDX-License-Identifier: Apache-2.0
"""A ring of recent windows of verified traffic, as a value."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ospec_jax.learners.base import Segments
from ospec_jax.types import Feedback
from ospec_jax.typing import struct


@struct
class FeedbackRing:
    """The newest windows; older ones are overwritten.

    Attributes:
      segments: `[capacity, ...]`; windows that were never written weigh nothing.
      num_added: Windows added so far.
    """

    segments: Segments
    num_added: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Windows that the ring holds."""
        return self.segments.start.shape[0]


def init_ring(
    capacity: int, window_size: int, tap_width: int, hidden_size: int
) -> FeedbackRing:
    """An empty ring of windows of `window_size` tokens."""
    shape = (capacity, window_size)
    return FeedbackRing(
        segments=Segments(
            feedback=Feedback(
                tokens=jnp.zeros(shape, jnp.int32),
                taps=jnp.zeros((*shape, tap_width), jnp.float16),
                hidden=jnp.zeros((*shape, hidden_size), jnp.float16),
                logsumexp=jnp.zeros(shape),
            ),
            start=jnp.zeros((capacity,), jnp.int32),
            weight=jnp.zeros(shape),
        ),
        num_added=jnp.zeros((), jnp.int32),
    )


def window_starts(
    num_prompt: int, num_recorded: int, num_context: int, window: int
) -> list[int]:
    """First positions of the windows that cover an answer once.

    The pair before the prompt's last token predicts the answer's first one. A window's
    context may reach before the prompt; those positions are negative.
    """
    pairs = range(num_prompt - 2, num_recorded - 2, window)
    return [first - num_context for first in pairs]


def add_window(
    ring: FeedbackRing, feedback: Feedback, start, num_prompt, num_recorded
) -> FeedbackRing:
    """Adds the window that begins at `start` of a request's `[1, s, ...]` feedback.

    Args:
      start: Position of its first token, negative before the prompt; a scalar, as are
        the others.
    """
    size = ring.segments.weight.shape[1]
    positions = start + jnp.arange(size)
    # The target's distribution is known from the prompt's last token on.
    is_verified = (positions >= num_prompt - 1) & (positions < num_recorded)
    # Positions before the prompt are read from its first token; negative positions mark
    # them as padding.
    take = lambda x: jnp.take(x[0], positions, axis=0, mode="clip")
    slot = ring.num_added % ring.capacity
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[None], slot, 0)
    window = Segments(
        feedback=jax.tree.map(take, feedback),
        start=jnp.asarray(start, jnp.int32),
        weight=is_verified.astype(jnp.float32),
    )

    return FeedbackRing(
        segments=jax.tree.map(put, ring.segments, window),
        num_added=ring.num_added + 1,
    )


def newest(ring: FeedbackRing, count: int, num_fresh, num_newer=0) -> Segments:
    """The newest `count` windows, `[count, t]`, of which `num_fresh` weigh anything.

    Args:
      num_newer: Windows to leave out before them, which are fresh ones, too.
    """
    # Windows are numbered by age, the newest being 0; `slots` go round the ring.
    age = num_newer + jnp.arange(count)
    slots = (ring.num_added - 1 - age) % ring.capacity
    segments = jax.tree.map(lambda x: x[slots], ring.segments)
    num_held = jnp.minimum(ring.num_added, ring.capacity)
    is_fresh = (age < num_fresh) & (age < num_held)

    return segments.replace(weight=segments.weight * is_fresh[:, None])


def draw(ring: FeedbackRing, key, count: int, num_fresh=0) -> Segments:
    """`count` windows, `[count, t]`, drawn evenly from those that the ring holds.

    Args:
      num_fresh: The newest windows, which are left out; if there are no others, what is
        drawn weighs nothing.
    """
    held = jnp.minimum(ring.num_added, ring.capacity)
    num_old = held - jnp.minimum(num_fresh, held)
    age = num_fresh + jax.random.randint(key, (count,), 0, jnp.maximum(num_old, 1))
    slots = (ring.num_added - 1 - age) % ring.capacity
    segments = jax.tree.map(lambda x: x[slots], ring.segments)

    return segments.replace(weight=segments.weight * (num_old > 0))
