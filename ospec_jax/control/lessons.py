# SPDX-License-Identifier: Apache-2.0
"""Policies that learn from what every choice would have come to.

A verified cycle tells more than what its own choice was worth. Of most probable
children a tree that is less deep, or keeps fewer nodes or more, is a part of what was
drafted, and a node is right if its path begins what was emitted, whether it was
verified or not: so tokens of all choices up to the drafted depth are known, and seconds
are the clock's. Only what lies below a right node that was left out is not: it counts
as wrong, which is rare, since nodes are left out that are improbable.

LTD (arXiv 2603.01639) has PPO draw one choice a cycle, and guess by a second network
how good it was. Here nothing is drawn or guessed: the expectation over all choices is
differentiated as it is. What is maximised is the speed of a text, all its tokens over
all its seconds, where LTD has the mean of the cycles' speeds. Each cycle counts by the
choices that are known of it, in the policies' own proportions; which they are follows
from what was drafted, and never from what was accepted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import ConfigError, check_types
from ospec_jax.control.policy import (
    CONTINUE,
    STOP,
    Policies,
    PolicyShape,
    newest_of,
    run_layers,
    see_depth,
    see_size,
)
from ospec_jax.typing import struct


@dataclasses.dataclass(frozen=True)
class LessonConfig:
    """How policies go on learning.

    Attributes:
      num_cycles: That are remembered, the newest ones.
      num_gradients: Of an update, each from all that is remembered.
      learning_rate: Adam's.
      entropy: Weight of the policies' entropy, which keeps them ready to change.
      max_grad_norm: Longer gradients are shortened to it.
      deep_every: One cycle of so many is drafted to the deepest depth, whatever the
        policies say: of depths beyond theirs nothing else would tell.
    """

    num_cycles: int = 256
    num_gradients: int = 16
    learning_rate: float = 3e-3
    entropy: float = 0.01
    max_grad_norm: float = 0.5
    deep_every: int = 16

    def __post_init__(self):
        check_types(self)
        for name in ("num_cycles", "num_gradients", "deep_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 1 or more")


class Cycle(NamedTuple):
    """Verified cycles as steps report them, packed in one array `[n, 2 + k + p]`.

    Attributes:
      size: `[n]` nodes that were verified, the root left out.
      context: `[n]` tokens in the cache.
      right: `[n, k]` place of the right node of each depth, as far as what was emitted
        tells; -1 for none.
      scores: `[n, p]` log-probabilities of the paths to all nodes, at their places;
        -inf for those that were not drafted.
    """

    size: Any
    context: Any
    right: Any
    scores: Any

    def packed(self) -> np.ndarray:
        """All numbers, one row a cycle, in float32."""
        column = lambda x: np.asarray(x)[:, None]
        parts = [column(self.size), column(self.context), self.right, self.scores]
        return np.concatenate(parts, axis=1).astype(np.float32)

    @classmethod
    def unpacked(cls, rows: Float[Array, "n e"], depth: int) -> "Cycle":
        """What was packed, of trees of so many depths."""
        whole = lambda x: x.astype(jnp.int32)
        return cls(
            whole(rows[:, 0]),
            whole(rows[:, 1]),
            whole(rows[:, 2 : 2 + depth]),
            rows[:, 2 + depth :],
        )


@struct
class Lessons:
    """What every choice would have come to, by depth from 1 on and by size.

    Attributes:
      scores: `[n, p]` see `Cycle`.
      context: `[n]` tokens in the cache.
      emitted: `[n, k, s]` tokens.
      is_known: `[n, k, s]` whether that follows from what was drafted.
      weight: `[n]` 0 for places that hold no cycle.
    """

    scores: Float[Array, "n p"]
    context: Int[Array, " n"]
    emitted: Float[Array, "n k s"]
    is_known: Bool[Array, "n k s"]
    weight: Float[Array, " n"]


def lessons_of(
    shape: PolicyShape, rows: Float[Array, "n e"], weight: Float[Array, " n"]
) -> Lessons:
    """What cycles teach; see `Cycle` for their rows."""
    cycle = Cycle.unpacked(rows, shape.depth)
    # As growing keeps them: most probable first, of nodes that tie the first ones.
    order = jnp.argsort(-cycle.scores, axis=1, stable=True)
    depth_of = jnp.asarray(shape.place_depths)[order]
    is_there = jnp.take_along_axis(cycle.scores, order, axis=1) > -jnp.inf
    number = np.arange(shape.num_places)
    is_right = jnp.any(cycle.right[:, :, None] == number, axis=1)
    is_right = jnp.take_along_axis(is_right, order, axis=1)
    deepest = jnp.max(jnp.where(is_there, depth_of, 0), axis=1)

    emitted = []
    is_known = []
    sizes = np.asarray(shape.sizes)[:, None]

    for depth in range(1, shape.depth + 1):
        # Nodes of a tree that is so deep, and which of them each size keeps.
        is_own = is_there & (depth_of <= depth)
        place = jnp.cumsum(is_own, axis=1)
        is_kept = is_own[:, None] & (place[:, None] <= sizes)
        emitted.append(1.0 + jnp.sum(is_kept & is_right[:, None], axis=-1))
        is_known.append(jnp.broadcast_to(depth <= deepest[:, None], is_kept.shape[:2]))

    return Lessons(
        scores=cycle.scores,
        context=cycle.context,
        emitted=jnp.stack(emitted, axis=1),
        is_known=jnp.stack(is_known, axis=1),
        weight=weight,
    )


def log_chances(
    policies: Policies, scores: Float[Array, "n p"], context: Int[Array, " n"]
) -> Float[Array, "n k s"]:
    """Log-probabilities of all choices, were each drawn as the policies weigh it."""
    shape = policies.shape
    depths = _log_depths(policies, scores, context)
    if policies.size is None:
        is_own = np.arange(len(shape.sizes)) == policies.fixed_size
        sizes = jnp.broadcast_to(
            jnp.where(is_own, 0.0, -jnp.inf), (*depths.shape, len(shape.sizes))
        )
    else:
        seen = [see_size(shape, scores, d, context) for d in _range(shape)]
        said = run_layers(policies.size, jnp.stack(seen, axis=1), policies.activation)
        sizes = jax.nn.log_softmax(said, axis=-1)

    return depths[..., None] + sizes


def _range(shape: PolicyShape) -> range:
    return range(1, shape.depth + 1)


def _log_depths(policies: Policies, scores, context) -> Float[Array, "n k"]:
    """Log-probabilities of the depths at which drafting stops."""
    shape = policies.shape
    if policies.depth is None:
        is_own = np.arange(1, shape.depth + 1) == policies.fixed_depth
        depths = jnp.where(is_own, 0.0, -jnp.inf)
        return jnp.broadcast_to(depths, (len(context), shape.depth))

    found = []
    so_far = jnp.zeros(context.shape)

    for depth in range(1, shape.depth):
        newest = newest_of(shape, scores, depth)
        seen = see_depth(newest, depth, context)
        said = run_layers(policies.depth, seen, policies.activation)
        log_probs = jax.nn.log_softmax(said, axis=-1)
        found.append(so_far + log_probs[:, STOP])
        so_far = so_far + log_probs[:, CONTINUE]

    # The deepest ends by itself.
    return jnp.stack([*found, so_far], axis=1)


def log_rate(
    chances: Float[Array, "n k s"], lessons: Lessons, seconds: Float[Array, "k s"]
) -> Float[Array, ""]:
    """Log of the tokens a second that choices make which are drawn by their chances.

    Args:
      chances: Log-probabilities; see `log_chances`.
      seconds: Of a step, by depth from 1 on and by size.
    """
    # Of unknown choices nothing is said: the known ones share their chances.
    known = jnp.where(lessons.is_known, chances, -jnp.inf)
    has_any = jnp.any(known > -jnp.inf, axis=(1, 2))
    # A softmax over nothing would be NaN, and so would its slope.
    known = jnp.where(has_any[:, None, None], known, 0.0)
    share = jax.nn.softmax(known, axis=(1, 2))
    weight = lessons.weight * has_any
    tokens = jnp.sum(share * lessons.emitted, axis=(1, 2))
    taken = jnp.sum(share * seconds, axis=(1, 2))

    # Where nothing is known there is nothing to learn, and no NaN either.
    log_of = lambda x: jnp.log(jnp.maximum(jnp.sum(weight * x), 1e-30))

    return log_of(tokens) - log_of(taken)


def build_optimizer(config: LessonConfig) -> optax.GradientTransformation:
    """Adam on shortened gradients."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adam(config.learning_rate, eps=1e-5),
    )


def build_update(config: LessonConfig) -> Callable:
    """Builds `(policies, optimizer, lessons, seconds) -> (policies, optimizer, rate)`.

    `rate` is the log of the tokens a second before the last gradient, by the clock.
    """
    optimizer = build_optimizer(config)

    def loss_of(policies: Policies, lessons: Lessons, seconds):
        chances = log_chances(policies, lessons.scores, lessons.context)
        rate = log_rate(chances, lessons, seconds)
        # Choices that are fixed have a probability of 0, and no entropy.
        is_open = chances > -jnp.inf
        finite = jnp.where(is_open, chances, 0.0)
        entropy = -jnp.sum(jnp.where(is_open, jnp.exp(finite) * finite, 0.0), (1, 2))
        share = lessons.weight / jnp.maximum(jnp.sum(lessons.weight), 1.0)

        return -rate - config.entropy * jnp.sum(share * entropy), rate

    def update(policies: Any, state: Any, lessons: Lessons, seconds):
        def body(carry, _):
            policies, state = carry
            slopes, rate = jax.grad(loss_of, has_aux=True)(policies, lessons, seconds)
            changes, state = optimizer.update(slopes, state)
            return (optax.apply_updates(policies, changes), state), rate

        carry = policies, state
        steps = jax.lax.scan(body, carry, length=config.num_gradients)
        (policies, state), rates = steps

        return policies, state, rates[-1]

    return update
