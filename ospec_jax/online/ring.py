# SPDX-License-Identifier: Apache-2.0
"""A ring of recent windows of verified traffic, as a value."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ospec_jax.learners.base import Segments
from ospec_jax.types import Feedback, Owner
from ospec_jax.typing import struct


@struct
class FeedbackRing:
    """The newest windows; older ones are overwritten.

    Attributes:
      segments: `[capacity, ...]`; windows that were never written weigh nothing.
      num_added: Windows added so far.
      numbers: `[capacity]` of the windows, as they were added; below 0 in places that
        were never written.
      owners: `[capacity]` scopes whose they are.
    """

    segments: Segments
    num_added: Int[Array, ""]
    numbers: Int[Array, " c"]
    owners: Int[Array, " c"]

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
        numbers=numbers_in_turn(0, capacity),
        owners=jnp.zeros((capacity,), jnp.int32),
    )


def numbers_in_turn(num_added, capacity: int) -> Int[Array, " c"]:
    """Numbers of the windows in a ring whose places were written in turn."""
    return num_added - 1 - (num_added - 1 - jnp.arange(capacity)) % capacity


def window_starts(
    num_prompt: int, num_recorded: int, num_context: int, window: int
) -> list[int]:
    """First positions of the windows that cover an answer once.

    The pair before the prompt's last token predicts the answer's first one. A window's
    context may reach before the prompt; those positions are negative.
    """
    pairs = range(num_prompt - 2, num_recorded - 2, window)
    return [first - num_context for first in pairs]


def _place_for(ring: FeedbackRing, owner: Owner) -> Int[Array, ""]:
    """Where a window goes: over the oldest, of its owner's own once these are many.

    So a flood of one scope's windows does not push out everybody else's.
    """
    is_held = ring.numbers >= 0
    is_own = is_held & (ring.owners == owner.scope)
    is_of_kin = is_held & owner.is_kin[ring.owners]
    most = lambda share: jnp.maximum((share * ring.capacity).astype(jnp.int32), 1)
    is_full = jnp.sum(is_own) >= most(owner.share)
    are_full = jnp.sum(is_of_kin) >= most(owner.kin_share)
    may_go = jnp.where(is_full, is_own, is_of_kin | ~are_full)

    # Places that were never written have the lowest numbers.
    return jnp.argmin(jnp.where(may_go, ring.numbers, ring.num_added))


def add_window(
    ring: FeedbackRing,
    feedback: Feedback,
    start,
    num_prompt,
    num_recorded,
    owner: Owner | None = None,
) -> FeedbackRing:
    """Adds the window that begins at `start` of a request's `[1, s, ...]` feedback.

    Args:
      start: Position of its first token, negative before the prompt; a scalar, as are
        the others.
      owner: None is nobody in particular, who may take all the room.
    """
    size = ring.segments.weight.shape[1]
    positions = start + jnp.arange(size)
    # The target's distribution is known from the prompt's last token on.
    is_verified = (positions >= num_prompt - 1) & (positions < num_recorded)
    # Positions before the prompt are read from its first token; negative positions mark
    # them as padding.
    take = lambda x: jnp.take(x[0], positions, axis=0, mode="clip")
    slot = jnp.argmin(ring.numbers) if owner is None else _place_for(ring, owner)
    scope = 0 if owner is None else owner.scope
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[None], slot, 0)
    window = Segments(
        feedback=jax.tree.map(take, feedback),
        start=jnp.asarray(start, jnp.int32),
        weight=is_verified.astype(jnp.float32),
    )

    return FeedbackRing(
        segments=jax.tree.map(put, ring.segments, window),
        num_added=ring.num_added + 1,
        numbers=ring.numbers.at[slot].set(ring.num_added),
        owners=ring.owners.at[slot].set(scope),
    )


def forget(ring: FeedbackRing, is_gone: Bool[Array, " c"]) -> FeedbackRing:
    """Empties the windows of some scopes; their places weigh nothing until they are
    written again.

    Args:
      is_gone: Which, by their numbers.
    """
    is_dropped = is_gone[ring.owners]

    def cleared(x):
        where = is_dropped.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(where, jnp.zeros_like(x), x)

    return ring.replace(
        segments=jax.tree.map(cleared, ring.segments), owners=cleared(ring.owners)
    )


def is_fresh(ring: FeedbackRing, num_fresh) -> Bool[Array, " c"]:
    """Which places hold one of the windows that were added last.

    Args:
      num_fresh: How many were added; some may have been overwritten since.
    """
    newest = ring.num_added - num_fresh
    return (ring.numbers >= 0) & (ring.numbers >= newest)


def num_fresh_held(ring: FeedbackRing, num_fresh: int) -> int:
    """How many of the windows that were added last are still there."""
    # On the host, where no program has to be compiled for it.
    numbers, num_added = jax.device_get((ring.numbers, ring.num_added))
    return int(np.sum((numbers >= 0) & (numbers >= num_added - num_fresh)))


def newest(ring: FeedbackRing, count: int, num_fresh, num_newer=0) -> Segments:
    """The newest `count` windows, `[count, t]`, of which `num_fresh` weigh anything.

    Args:
      num_newer: Windows to leave out before them, which are fresh ones, too.
    """
    # Windows are numbered by age, the newest being 0; `slots` go round the ring.
    age = num_newer + jnp.arange(count)
    slots = _by_age(ring, age)
    segments = jax.tree.map(lambda x: x[slots], ring.segments)
    is_wanted = is_fresh(ring, num_fresh)[slots] & (age < ring.capacity)

    return segments.replace(weight=segments.weight * is_wanted[:, None])


def _by_age(ring: FeedbackRing, age):
    """Places of windows, the newest being of age 0."""
    newest_first = jnp.argsort(-ring.numbers)
    return newest_first[age % ring.capacity]


def draw(ring: FeedbackRing, key, count: int, num_fresh=0) -> Segments:
    """`count` windows, `[count, t]`, drawn evenly from those that the ring holds.

    Args:
      num_fresh: The newest windows, which are left out; if there are no others, what is
        drawn weighs nothing.
    """
    num_held = jnp.sum(ring.numbers >= 0)
    num_newer = jnp.sum(is_fresh(ring, num_fresh))
    num_old = num_held - num_newer
    age = num_newer + jax.random.randint(key, (count,), 0, jnp.maximum(num_old, 1))
    slots = _by_age(ring, age)
    segments = jax.tree.map(lambda x: x[slots], ring.segments)

    return segments.replace(weight=segments.weight * (num_old > 0))
