# SPDX-License-Identifier: Apache-2.0
"""Cycles of drafting and verification on a trace, under a clock: pure JAX.

`reset` and `step` are an environment: where a request stands, and what a choice of
depth and size comes to. Both may be vmapped and scanned, so thousands of cycles go by
at once. What a choice emits is exact (`trees`); what it takes is the clock's word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ospec_jax.config import ConfigError
from ospec_jax.control.clock import Clock
from ospec_jax.control.marginal import SIZES, Costs
from ospec_jax.replay.trees import Trace
from ospec_jax.typing import struct


@struct
class Cycles:
    """A trace as the environment reads it; see `trees.Trace`.

    Sizes are numbers into the menu `sizes`; depth 0 is plain decoding, of any size.

    Attributes:
      best: `[n, k, m]` log-probabilities of the paths to the most probable nodes of a
        tree of each depth from 1 on, falling; -inf for none.
      depths: `[n, k, m]` theirs, from 1 on.
      is_right: `[n, k, m]` whether each of them is right.
      frontier: `[n, k, w]` log-probabilities of the newest nodes.
      scores: `[n, p]` those of all nodes, at their places; see `trees.Grown`.
      right: `[n, p]` whether each of these is right.
      entropies: `[n, k, w]`.
      contexts: `[n]` tokens in the cache.
      remaining: `[n]` tokens that may still come.
      starts: `[a]` first position of each answer.
      sizes: `[s]` nodes to verify, the root left out.
      rows: `[k + 1, s]` rows that the target runs over: a depth may have fewer nodes.
      clock: What a choice takes.
    """

    best: Float[Array, "n k m"]
    depths: Int[Array, "n k m"]
    is_right: Bool[Array, "n k m"]
    frontier: Float[Array, "n k w"]
    scores: Float[Array, "n p"]
    right: Bool[Array, "n p"]
    entropies: Float[Array, "n k w"]
    contexts: Int[Array, " n"]
    remaining: Int[Array, " n"]
    starts: Int[Array, " a"]
    sizes: Int[Array, " s"]
    rows: Int[Array, "d s"]
    clock: Clock = flax.struct.field(pytree_node=False)

    @property
    def depth(self) -> int:
        """The deepest tree's."""
        return self.best.shape[1]

    @property
    def topk(self) -> int:
        """Width of the trees."""
        return self.frontier.shape[2]

    @property
    def num_positions(self) -> int:
        """Positions of all answers."""
        return self.best.shape[0]


class Seen(NamedTuple):
    """What may be known of a tree before it is verified; the leading axis is its depth.

    A rule for the depth may look at entries up to the depth that is drafted so far.

    Attributes:
      best: `[k, m]`; as in `Cycles`, likewise the next.
      depths: `[k, m]`.
      frontier: `[k, w]`.
      scores: `[p]`, depth by depth.
      entropies: `[k, w]`.
      costs: Of depths and sizes, at this context.
      context: Tokens in the cache.
    """

    best: Float[Array, "k m"]
    depths: Int[Array, "k m"]
    frontier: Float[Array, "k w"]
    scores: Float[Array, " p"]
    entropies: Float[Array, "k w"]
    costs: Costs
    context: Int[Array, ""]


class Choice(NamedTuple):
    """How much is drafted and verified.

    Attributes:
      depth: 0 for plain decoding.
      size: Number into the menu of sizes.
    """

    depth: Int[Array, ""]
    size: Int[Array, ""]


class Result(NamedTuple):
    """What a cycle came to.

    Attributes:
      num_accepted: Draft tokens, as verification says, were the answer to go on.
      num_emitted: Tokens.
      seconds: It took, by the clock.
      is_last: Whether the answer ended with it.
    """

    num_accepted: Int[Array, ""]
    num_emitted: Int[Array, ""]
    seconds: Float[Array, ""]
    is_last: Bool[Array, ""]

    @property
    def reward(self) -> Float[Array, ""]:
        """Tokens a second of the cycle: what LTD's policies are paid (2603.01639)."""
        return self.num_emitted / self.seconds


@struct
class Place:
    """Where a request stands."""

    position: Int[Array, ""]
    key: Key[Array, ""]


def build_cycles(
    trace: Trace, clock: Clock, sizes: Sequence[int] = SIZES, num_nodes: int = 0
) -> Cycles:
    """Makes the environment of a trace and a clock.

    Args:
      sizes: The menu; those that the trace has no nodes for are left out.
      num_nodes: Most nodes to verify; 0 for the trace's own number.

    Raises:
      ConfigError: The clock is of trees of another width, or less deep.
    """
    shape = trace.shape
    if clock.topk != shape.topk or len(clock.drafting) <= shape.depth:
        raise ConfigError(
            f"the clock knows trees of width {clock.topk} and depths up to "
            f"{len(clock.drafting) - 1}, the trace has {shape.topk} and {shape.depth}; "
            f"measure the clock for it"
        )

    most = min(num_nodes or shape.num_nodes, shape.num_places)
    menu = sorted({size for size in sizes if size < most} | {most})
    places = np.arange(shape.num_places)
    best = []
    depths = []
    is_right = []
    frontier = []

    for depth in range(1, shape.depth + 1):
        count = shape.first_place(depth + 1)
        scores = np.asarray(trace.scores[:, :count])
        # As growing keeps them: of nodes that tie the first ones.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        pad = ((0, 0), (0, most - order.shape[1]))
        take = lambda x, order=order: np.take_along_axis(x, order, axis=1)
        best.append(np.pad(take(scores), pad, constant_values=-np.inf))
        right = np.asarray(trace.is_right[:, :count])
        is_right.append(np.pad(take(right), pad))
        of_place = shape.depths[places[order]]
        depths.append(np.pad(of_place, pad, constant_values=1))
        newest = scores[:, shape.first_place(depth) :]
        frontier.append(-np.sort(-newest, axis=1)[:, : shape.topk])

    stack = lambda parts: jnp.asarray(np.stack(parts, axis=1))
    rows = np.minimum(
        1 + np.asarray(menu),
        1 + np.asarray([[shape.first_place(d + 1)] for d in range(1, shape.depth + 1)]),
    )
    rows = np.concatenate([np.ones((1, len(menu)), int), rows])

    return Cycles(
        best=stack(best),
        depths=stack(depths),
        is_right=stack(is_right),
        frontier=stack(frontier),
        scores=jnp.asarray(trace.scores),
        right=jnp.asarray(trace.is_right),
        entropies=jnp.asarray(trace.entropies),
        contexts=jnp.asarray(trace.contexts),
        remaining=jnp.asarray(trace.remaining),
        starts=jnp.asarray(trace.starts),
        sizes=jnp.asarray(menu),
        rows=jnp.asarray(rows),
        clock=clock,
    )


def costs_at(cycles: Cycles, context: Int[Array, ""]) -> Costs:
    """What steps take at a filling of the cache, by depth and size."""
    depth = jnp.arange(cycles.depth + 1)[:, None]
    return Costs(cycles.clock.seconds(depth, cycles.rows, context), cycles.sizes)


def look(cycles: Cycles, position: Int[Array, ""]) -> Seen:
    """What may be known at a position; where NaN, entropies are not known."""
    context = cycles.contexts[position]
    return Seen(
        best=cycles.best[position],
        depths=cycles.depths[position],
        frontier=cycles.frontier[position],
        scores=cycles.scores[position],
        entropies=cycles.entropies[position],
        costs=costs_at(cycles, context),
        context=context,
    )


def verify(cycles: Cycles, position: Int[Array, ""], choice: Choice) -> Result:
    """What a choice comes to at a position."""
    level = jnp.maximum(choice.depth - 1, 0)
    places = jnp.arange(cycles.best.shape[-1])
    is_kept = (places < cycles.sizes[choice.size]) & (choice.depth > 0)
    # One right node a depth at most, each below the other.
    accepted = jnp.sum(cycles.is_right[position, level] & is_kept)
    remaining = cycles.remaining[position]
    costs = costs_at(cycles, cycles.contexts[position])

    return Result(
        num_accepted=accepted,
        num_emitted=jnp.minimum(accepted + 1, remaining),
        seconds=costs.seconds[choice.depth, choice.size],
        is_last=accepted + 1 >= remaining,
    )


def verified_mass(
    cycles: Cycles, position: Int[Array, ""], choice: Choice
) -> Float[Array, " k"]:
    """Path probabilities of the verified nodes, summed by depth."""
    level = jnp.maximum(choice.depth - 1, 0)
    places = jnp.arange(cycles.best.shape[-1])
    is_kept = (places < cycles.sizes[choice.size]) & (choice.depth > 0)
    probs = jnp.where(is_kept, jnp.exp(cycles.best[position, level]), 0.0)
    depths = cycles.depths[position, level]

    return jnp.zeros(cycles.depth).at[depths - 1].add(probs)


def begin(cycles: Cycles, key: Key[Array, ""]) -> Place:
    """The beginning of a random answer."""
    key, key_next = jax.random.split(key)
    return Place(jax.random.choice(key, cycles.starts), key_next)


def move_on(cycles: Cycles, place: Place, result: Result) -> Place:
    """The place behind a cycle; a random answer is begun where one has ended."""
    key, key_next = jax.random.split(place.key)
    fresh = jax.random.choice(key, cycles.starts)
    following = place.position + result.num_emitted

    return Place(jnp.where(result.is_last, fresh, following), key_next)


def reset(cycles: Cycles, key: Key[Array, ""]) -> tuple[Place, Seen]:
    """Begins a random answer."""
    place = begin(cycles, key)
    return place, look(cycles, place.position)


def step(cycles: Cycles, place: Place, choice: Choice) -> tuple[Place, Seen, Result]:
    """One cycle; a random answer is begun where one has ended."""
    result = verify(cycles, place.position, choice)
    place = move_on(cycles, place, result)

    return place, look(cycles, place.position), result
