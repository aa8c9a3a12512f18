# SPDX-License-Identifier: Apache-2.0
"""Differences of low rank between the draft that all share and that of one scope.

A scope is a key or a tenant (`online.scopes`). Its difference is learned from its own
answers alone, and drafts for it alone: nothing of it is in what others are served with.

The draft has the logits `x W^T`, of the inputs `x` of its output projection `W`. A
scope's has `x W^T + (x B^T) D`. `B`, `[r, e]`, are the directions in which the first
inputs of the scope have most of their energy, scaled so that none outweighs the others,
and fixed then. `D`, `[r, q]`, is a softmax regression on them, and convex. Its steps
are scaled so that an error of 1 moves its own sample's logit by 1 (normalised LMS), and
shorter for tokens that have been corrected often, as in `learners.projection`.

In so few directions a sample moves many others, which helps a draft that is far from
home and disturbs one that is at home. So both are asked at each answer, before it is
learned from, and the difference drafts while it has been right more often of late.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.learners.base import chosen
from ospec_jax.learners.last_layer import SHORTEST, drawn_probs
from ospec_jax.learners.projection import HeadSamples, damped_rate, find_inside
from ospec_jax.types import Deltas
from ospec_jax.typing import typed

NUM_PLACES = 32
"""Scopes that have a difference at once."""
_NUM_SEEN = 128
"""Inputs that a scope's directions are made of, some two answers. With those of one
answer a weak draft gained a tenth less."""
_PATIENCE = 16.0
"""Squared error that a token takes before its steps shorten to seven tenths."""
_FADING = 0.999
"""Factor on old squared errors, by part of an answer."""
_LEAD_FADING = 0.9
"""Factor on the lead, likewise."""
_DAMPING = 0.1
"""Added to the energy of directions when they are scaled, relative to its mean."""


def init_deltas(rank: int, width: int, num_tokens: int) -> Deltas:
    """Nobody's differences.

    Args:
      rank: Directions of each.
      width: Of the inputs of the draft's output projection.
      num_tokens: Of the draft's vocabulary.
    """
    n = NUM_PLACES
    return Deltas(
        owners=jnp.zeros(n, jnp.int32),
        ages=jnp.zeros(n, jnp.int32),
        directions=jnp.zeros((n, rank, width)),
        shifts=jnp.zeros((n, rank, num_tokens)),
        energy=jnp.zeros((n, num_tokens)),
        leads=jnp.zeros(n),
        # Of fewer inputs there are no more directions than that.
        seen=jnp.zeros((n, max(_NUM_SEEN, rank), width)),
        num_seen=jnp.zeros(n, jnp.int32),
    )


def claim(deltas: Deltas, scope: Int[Array, ""]) -> Deltas:
    """Gives a scope a place, that of who was not heard of for longest if none is free.

    Args:
      scope: Its number, above 0.
    """
    is_own = deltas.owners == scope
    is_known = jnp.any(is_own)
    # A free place is older than any other.
    ages = jnp.where(deltas.owners == 0, jnp.iinfo(jnp.int32).max, deltas.ages)
    place = jnp.where(is_known, jnp.argmax(is_own), jnp.argmax(ages))
    # The place alone is written: the table is large.
    emptied = jax.tree.map(
        lambda x: x.at[place].set(jnp.where(is_known, x[place], 0)), deltas
    )
    owners = deltas.owners.at[place].set(scope)
    is_older = (owners > 0) & (owners != scope)

    return emptied.replace(owners=owners, ages=jnp.where(is_older, deltas.ages + 1, 0))


def count_deltas(deltas: Deltas) -> dict[str, int]:
    """How many scopes have a draft of their own, and whose drafts at present."""
    is_taken = np.asarray(deltas.owners) > 0
    is_drafting = is_taken & (np.asarray(deltas.leads) > 0)
    return {"num": int(is_taken.sum()), "num_drafting": int(is_drafting.sum())}


def forget(deltas: Deltas, is_gone: Bool[Array, " c"]) -> Deltas:
    """Drops the differences of some scopes.

    Args:
      is_gone: Which, by their numbers.
    """
    is_dropped = is_gone[deltas.owners] & (deltas.owners > 0)

    def clear(x):
        return jnp.where(is_dropped.reshape(-1, *[1] * (x.ndim - 1)), 0, x)

    return jax.tree.map(clear, deltas)


@typed
def learn(deltas: Deltas, scope: Int[Array, ""], samples: HeadSamples) -> Deltas:
    """Learns from a part of an answer; nothing where that would not be finite.

    Args:
      scope: Whose it is; it has a place.
      samples: With the logits of the draft that all share.
    """
    place = jnp.argmax(deltas.owners == scope)
    own = jax.tree.map(lambda x: x[place], deltas)
    own = _with_directions(own, samples)
    real = samples.is_real[:, None]
    along = (samples.inputs @ own.directions.T) * real
    logits = samples.logits + along @ own.shifts
    lead = _LEAD_FADING * own.leads + _num_gained(samples, logits)

    # From here on logits are u = z / T, as in `learners.last_layer`.
    length = jnp.ones(())
    if samples.sampling is not None:
        logits = logits / samples.sampling.temperature
        length = jnp.maximum(samples.sampling.temperature, SHORTEST)
    is_inside, labels = find_inside(samples)
    probs = drawn_probs(samples.replace(logits=logits))
    rows = jnp.arange(labels.shape[0])
    error = probs.at[rows, labels].add(-is_inside.astype(probs.dtype))

    energy = _FADING * own.energy
    steps = length * damped_rate(1.0, energy, _PATIENCE)
    curvature = jnp.sum(along**2, axis=1, keepdims=True)
    along = along / jnp.maximum(curvature, 1e-9)
    shifts = own.shifts - steps * (along.T @ error)
    energy = energy + jnp.sum(error**2, axis=0)

    learned = own.replace(shifts=shifts, energy=energy, leads=lead)
    found = learned.directions, shifts, energy, lead
    is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in found]))
    before = jax.tree.map(lambda x: x[place], deltas)
    own = chosen(is_finite, learned, before)

    return jax.tree.map(lambda x, y: x.at[place].set(y), deltas, own)


def _num_gained(samples: HeadSamples, logits) -> Float[Array, ""]:
    """How many more tokens are right with these logits than with the samples'."""
    is_inside, labels = find_inside(samples)

    def num_right(logits):
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.sum(is_inside & (own >= jnp.max(logits, axis=-1)))

    gained = num_right(logits) - num_right(samples.logits)
    return gained.astype(jnp.float32)


def _with_directions(own: Deltas, samples: HeadSamples) -> Deltas:
    """One scope's, with directions once enough inputs have been seen.

    Args:
      own: A place of its own: without the axis of places.
    """
    room = own.seen.shape[0]
    places = own.num_seen + jnp.cumsum(samples.is_real) - 1
    # Those behind the last place are left out.
    places = jnp.where(samples.is_real, places, room)
    seen = own.seen.at[places].set(samples.inputs, mode="drop")
    num_seen = jnp.minimum(own.num_seen + jnp.sum(samples.is_real), room)
    is_complete = (num_seen == room) & (own.num_seen < room)
    rank = own.directions.shape[0]
    directions = jax.lax.cond(
        is_complete, lambda: _directions_of(seen, rank), lambda: own.directions
    )

    return own.replace(directions=directions, seen=seen, num_seen=num_seen)


def _directions_of(seen: Float[Array, "m e"], rank: int) -> Float[Array, "r e"]:
    """Where inputs have most of their energy, scaled to be alike."""
    # The inputs' own products are few: `[m, m]`, in place of `[e, e]`.
    values, vectors = jnp.linalg.eigh(seen @ seen.T)
    values = values[::-1][:rank]
    vectors = vectors[:, ::-1][:, :rank]
    values = jnp.maximum(values, 0.0)
    axes = (vectors.T @ seen) / jnp.maximum(jnp.sqrt(values), 1e-9)[:, None]
    count, width = seen.shape
    energy = values / count
    floor = _DAMPING * jnp.sum(seen**2) / count / width

    return axes / jnp.sqrt(energy + floor + np.float32(1e-9))[:, None]
