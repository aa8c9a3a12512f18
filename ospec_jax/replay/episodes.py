# SPDX-License-Identifier: Apache-2.0
"""Episodes of LTD (arXiv 2603.01639) on recorded trees: pure JAX, many at once.

A cycle of drafting and verification is an episode. That of the depth takes a step for
each depth, and is paid when drafting stops; that of the size is a single step. The text
goes on behind an episode's end, as a decoder's does, and a random answer is begun where
one has ended. The other policy is a part of the world, and stays as it is.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ospec_jax.config import ConfigError
from ospec_jax.control.ltd import Drafting as DraftingKind
from ospec_jax.control.ltd import Reward
from ospec_jax.control.policy import (
    CONTINUE,
    Policies,
    PolicyShape,
    newest_of,
    see_depth,
    see_size,
)
from ospec_jax.control.ppo import Env
from ospec_jax.replay.cycles import (
    Choice,
    Cycles,
    Place,
    Result,
    begin,
    costs_at,
    move_on,
    verify,
)
from ospec_jax.typing import struct


@struct
class World:
    """What an episode goes by.

    Attributes:
      policies: The one that is not taught is asked; the other is not looked at.
      rate: Tokens a second that a `surplus` is beyond.
    """

    cycles: Cycles
    policies: Policies
    rate: Float[Array, ""]


@struct
class Drafting:
    """A request while it drafts.

    Attributes:
      place: Where it stands.
      depth: That is drafted.
    """

    place: Place
    depth: Int[Array, ""]


def shape_of(cycles: Cycles) -> PolicyShape:
    """What policies for a trace are for."""
    return PolicyShape(
        cycles.topk, cycles.depth, tuple(np.asarray(cycles.sizes).tolist())
    )


def paid(
    reward: Reward, world: World, position: Int[Array, ""], result: Result
) -> Float[Array, ""]:
    """What a cycle is paid; times are in those of a plain step, so that 1 is its speed.

    - `speed`: tokens a second of the cycle, as LTD.
    - `length`: tokens, as an ablation of the paper.
    - `time`: less for each second, likewise.
    - `surplus`: tokens beyond those that the world's rate makes in that time. The speed
      of a text is its tokens over its seconds, not the mean of its cycles' speeds;
      whoever maximises this difference at the best rate there is has the former.
    """
    plain = costs_at(world.cycles, world.cycles.contexts[position]).seconds[0, 0]
    if reward == "speed":
        return result.reward * plain
    if reward == "length":
        return result.num_emitted.astype(jnp.float32)
    if reward == "time":
        return -result.seconds / plain

    return result.num_emitted - world.rate * result.seconds


def depth_env(shape: PolicyShape, reward: Reward = "speed") -> Env:
    """Episodes of the policy for the depth; the size is the world's to choose.

    The first depth is always drafted, and the deepest ends the episode by itself, so
    that a choice is made at each depth between them.

    Raises:
      ConfigError: The trees are of one depth, and there is nothing to choose.
    """
    if shape.depth < 2:
        raise ConfigError(
            "trees of one depth leave a policy no depth to choose; record deeper ones"
        )

    def see(world: World, state: Drafting):
        position = state.place.position
        newest = newest_of(shape, world.cycles.scores[position], state.depth)
        return see_depth(newest, state.depth, world.cycles.contexts[position])

    def reset(world: World, key: Key[Array, ""]):
        state = Drafting(begin(world.cycles, key), jnp.int32(1))
        return state, see(world, state)

    def step(world: World, state: Drafting, action: Int[Array, ""]):
        cycles = world.cycles
        position = state.place.position
        depth = state.depth + (action == CONTINUE)
        is_done = (action != CONTINUE) | (depth == shape.depth)
        size = world.policies.size_for(
            cycles.scores[position], depth, cycles.contexts[position]
        )
        result = verify(cycles, position, Choice(depth, size))
        earned = jnp.where(is_done, paid(reward, world, position, result), 0.0)

        moved = move_on(cycles, state.place, result)
        following = Drafting(
            place=jax.tree.map(
                lambda new, old: jnp.where(is_done, new, old), moved, state.place
            ),
            depth=jnp.where(is_done, 1, depth),
        )
        return following, see(world, following), earned, is_done

    return Env(reset, step, shape.num_seen("depth"), num_actions=2)


def size_env(
    shape: PolicyShape,
    reward: Reward = "speed",
    drafting: DraftingKind = "random",
) -> Env:
    """Episodes of the policy for the size.

    Args:
      drafting: How deep: drawn anew for each cycle, as in the paper's first stage;
        always the deepest, as the released code has it; or as the world's policy for
        the depth says.
    """

    def draft_at(world: World, place: Place) -> tuple[Drafting, Any]:
        cycles = world.cycles
        scores = cycles.scores[place.position]
        context = cycles.contexts[place.position]
        depth = jnp.int32(shape.depth)
        if drafting == "random":
            # Places draw with their own key, which is split when they move on.
            key = jax.random.fold_in(place.key, 1)
            depth = jax.random.randint(key, (), 1, shape.depth + 1)
        if drafting == "policy":
            depth = drafted_by(world.policies, scores, context)

        state = Drafting(place, depth)
        return state, see_size(shape, scores, depth, context)

    def reset(world: World, key: Key[Array, ""]):
        return draft_at(world, begin(world.cycles, key))

    def step(world: World, state: Drafting, action: Int[Array, ""]):
        position = state.place.position
        result = verify(world.cycles, position, Choice(state.depth, action))
        earned = paid(reward, world, position, result)
        following, seen = draft_at(world, move_on(world.cycles, state.place, result))

        return following, seen, earned, jnp.asarray(True)

    return Env(reset, step, shape.num_seen("size"), num_actions=len(shape.sizes))


def drafted_by(
    policies: Policies, scores: Float[Array, "*b p"], context: Int[Array, "*b"]
) -> Int[Array, "*b"]:
    """How deep the policy for the depth lets trees grow.

    It is asked as in decoding: at each depth, of what has been drafted up to there.
    """
    shape = policies.shape
    depth = jnp.full(context.shape, shape.depth)

    # From the deepest on, so that the first depth at which it stops stands in the end.
    for d in range(shape.depth - 1, 0, -1):
        newest = newest_of(shape, scores, d)
        depth = jnp.where(policies.goes_on(newest, d, context), depth, d)

    return depth


def choices_of(policies: Policies, cycles: Cycles) -> Choice:
    """What policies choose at all positions, `[n]`."""
    depth = drafted_by(policies, cycles.scores, cycles.contexts)
    return Choice(depth, policies.size_for(cycles.scores, depth, cycles.contexts))


def check_fits(policies: Policies, cycles: Cycles) -> None:
    """Refuses policies that were taught on trees of another shape.

    Raises:
      ConfigError: They were.
    """
    found = shape_of(cycles)
    if policies.shape != found:
        raise ConfigError(
            f"the policies are for {_in_words(policies.shape)}, the trees have "
            f"{_in_words(found)}; train some on these trees"
        )


def _in_words(shape: PolicyShape) -> str:
    values = dataclasses.asdict(shape)
    return f"width {values['topk']}, depth {values['depth']}, sizes {values['sizes']}"
