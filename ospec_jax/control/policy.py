# SPDX-License-Identifier: Apache-2.0
"""Policies that were taught how much to draft: what they see, and what they say.

They are those of LTD (arXiv 2603.01639). Once a depth has been drafted, the policy for
the depth sees the log-probabilities of the paths to that depth's nodes; the policy for
the size is asked once a cycle, and sees those of all nodes. Both see the depth and the
tokens in the cache. The same functions run on recorded trees and inside a step.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ospec_jax.config import ConfigError
from ospec_jax.typing import struct

Activation = Literal["relu", "tanh"]
Layers = Any
"""Layers of a network, `((kernel [i, o], bias [o]), ...)`."""

STOP = 0
CONTINUE = 1
"""What the policy for the depth may say."""

_LOWEST = -20.0
"""In place of the log-probability of a node that is not there, or less than that."""
_COPIES = {"depth": 0.14, "size": 0.024}
"""Copies of the depth, and of the context's length, for each log-probability that is
seen: the released code's 14 beside 100 and 29 beside 1210. A single number would be
drowned."""


@dataclasses.dataclass(frozen=True)
class PolicyShape:
    """What policies are for.

    Attributes:
      topk: Width of the trees.
      depth: Of the deepest ones.
      sizes: Nodes that may be verified, ascending, the root left out.
    """

    topk: int
    depth: int
    sizes: tuple[int, ...]

    def __post_init__(self):
        if min(self.topk, self.depth, *self.sizes) < 1:
            raise ConfigError(
                f"policies need a width, a depth and sizes of at least 1, not "
                f"{self.topk}, {self.depth} and {self.sizes}"
            )

    @property
    def num_newest(self) -> int:
        """Most nodes of a depth that are seen."""
        return self.topk**2 if self.depth > 1 else self.topk

    @property
    def num_places(self) -> int:
        """Nodes of the deepest tree."""
        return self.topk + (self.depth - 1) * self.topk**2

    @property
    def place_depths(self) -> np.ndarray:
        """Depth of the node at each place, `[p]`."""
        deeper = np.repeat(np.arange(2, self.depth + 1), self.topk**2)
        return np.concatenate([np.ones(self.topk, int), deeper])

    def num_seen(self, kind: Literal["depth", "size"]) -> int:
        """Length of what a policy sees."""
        count = self.num_newest if kind == "depth" else self.num_places
        return count + 2 * _num_copies(kind, count)


def _num_copies(kind: str, count: int) -> int:
    return max(1, round(_COPIES[kind] * count))


@struct
class Policies:
    """What was learned; where one of the two was not, it is fixed.

    Attributes:
      depth: Layers of the policy for the depth; None to draft `fixed_depth` always.
      size: Layers of that for the size; None to verify `fixed_size` always.
      fixed_depth: From 1 on.
      fixed_size: Number into the sizes.
      shape: What they are for.
      activation: Between layers.
    """

    depth: Layers
    size: Layers
    fixed_depth: int = flax.struct.field(pytree_node=False)
    fixed_size: int = flax.struct.field(pytree_node=False)
    shape: PolicyShape = flax.struct.field(pytree_node=False)
    activation: Activation = flax.struct.field(pytree_node=False, default="relu")

    def goes_on(
        self,
        newest: Float[Array, "*b c"],
        depth: Int[Array, "*b"] | int,
        context: Int[Array, "*b"],
    ) -> Bool[Array, "*b"]:
        """Whether to draft deeper.

        Args:
          newest: Log-probabilities of the paths to the newest nodes; see `newest_of`.
          depth: Theirs.
          context: Tokens in the cache.
        """
        if self.depth is None:
            return jnp.broadcast_to(depth < self.fixed_depth, context.shape)

        seen = see_depth(newest, depth, context)
        said = run_layers(self.depth, seen, self.activation)
        return jnp.argmax(said, axis=-1) == CONTINUE

    def size_for(
        self,
        scores: Float[Array, "*b p"],
        depth: Int[Array, "*b"] | int,
        context: Int[Array, "*b"],
    ) -> Int[Array, "*b"]:
        """How much to verify, by number into the sizes.

        Args:
          scores: Log-probabilities of the paths to all nodes, at their places; what
            lies deeper than `depth` is not looked at.
        """
        if self.size is None:
            return jnp.full(context.shape, self.fixed_size)

        seen = see_size(self.shape, scores, depth, context)
        return jnp.argmax(run_layers(self.size, seen, self.activation), axis=-1)


@struct
class Told:
    """What rules that ask policies are told within a step.

    All of it is arguments of the compiled step: others of the same shape take their
    place between two steps, and nothing is compiled anew.

    Attributes:
      policies: To ask.
      depth: To draft to, whatever they say; 0 to ask.
      size: To verify, by number, whatever they say; -1 to ask.
    """

    policies: Policies
    depth: Any
    size: Any


def newest_of(
    shape: PolicyShape, scores: Float[Array, "*b p"], depth: Int[Array, ""] | int
) -> Float[Array, "*b c"]:
    """Log-probabilities of the nodes of a depth; zeros fill up the first one's."""
    topk = shape.topk
    first = jnp.pad(scores[..., :topk], _behind(scores, shape.num_newest - topk))
    if shape.depth == 1:
        return first

    start = topk + (jnp.maximum(depth, 2) - 2) * topk**2
    deeper = jax.lax.dynamic_slice_in_dim(scores, start, topk**2, axis=-1)

    return jnp.where(depth == 1, first, deeper)


def _behind(array: Array, count: int) -> list[tuple[int, int]]:
    return [(0, 0)] * (array.ndim - 1) + [(0, count)]


def see_depth(
    newest: Float[Array, "*b c"], depth, context: Int[Array, "*b"]
) -> Float[Array, "*b o"]:
    """What the policy for the depth sees."""
    return _with_scalars("depth", newest, depth, context)


def see_size(
    shape: PolicyShape, scores: Float[Array, "*b p"], depth, context: Int[Array, "*b"]
) -> Float[Array, "*b o"]:
    """What the policy for the size sees: zeros stand for depths that are not there."""
    is_there = jnp.asarray(shape.place_depths) <= jnp.asarray(depth)[..., None]
    return _with_scalars("size", jnp.where(is_there, scores, 0.0), depth, context)


def _with_scalars(kind: str, log_probs, depth, context) -> Float[Array, "*b o"]:
    count = _num_copies(kind, log_probs.shape[-1])
    spread = lambda x: jnp.broadcast_to(
        jnp.asarray(x, jnp.float32)[..., None], (*context.shape, count)
    )
    parts = [
        jnp.maximum(log_probs, _LOWEST),
        spread(context) * 1e-3,
        spread(depth) * 0.1,
    ]

    return jnp.concatenate(parts, axis=-1)


def init_layers(key: Key[Array, ""], widths: Sequence[int], gain: float) -> Layers:
    """A network's first layers: orthogonal, as Stable-Baselines3 begins.

    Args:
      widths: Of the input, of each layer, and of the output.
      gain: Of the last layer; the others have that of ReLU, the root of 2.
    """
    return _init_layers(key, tuple(widths), gain)


@functools.partial(jax.jit, static_argnames=("widths", "gain"))
def _init_layers(key, widths: tuple[int, ...], gain: float) -> Layers:
    layers = []

    for i, key_layer in enumerate(jax.random.split(key, len(widths) - 1)):
        scale = gain if i == len(widths) - 2 else float(np.sqrt(2.0))
        shape = widths[i], widths[i + 1]
        kernel = jax.nn.initializers.orthogonal(scale)(key_layer, shape)
        layers.append((kernel, jnp.zeros(widths[i + 1])))

    return tuple(layers)


def run_layers(
    layers: Layers, seen: Float[Array, "*b i"], activation: Activation
) -> Float[Array, "*b o"]:
    """What a network says of what it sees."""
    between = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    *hidden, last = layers

    for kernel, bias in hidden:
        seen = between(seen @ kernel + bias)

    return seen @ last[0] + last[1]
