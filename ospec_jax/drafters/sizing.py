# SPDX-License-Identifier: Apache-2.0
"""How many nodes of a drafted tree are verified: size policies inside the step.

A rule sees the whole draft before any of it is verified, and leaves out the end of it.
That is exact for `topk` children, which follow from the past alone: whatever is left
out, the rest is a tree that might have been drafted. A *drawn* token is never left out:
see `stopping` for why. What was not drafted, because a draft stopped early, costs no
rows either way.

Requests that are decoded together share a step, so one size is chosen for all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.control import marginal
from ospec_jax.control.policy import Policies
from ospec_jax.drafters import topology
from ospec_jax.types import DraftTree
from ospec_jax.typing import typed


class Drafted(NamedTuple):
    """A tree that was drafted, when nothing of it has been verified.

    Only what a rule reads is computed.

    Attributes:
      sizes: To choose from: numbers of nodes, ascending, the root left out.
      num_depths: Of the deepest tree.
      depth: To which it was drafted.
      scores: `[b, n]` log-probabilities of the paths to its nodes, the root left out,
        in the order in which they are kept; -inf for none.
      depths: `[b, n]` of the nodes, from 1 on.
      context: `[b]` tokens in the target's cache.
      is_active: `[b]` rows whose answer goes on.
      seen: `[b, p]` log-probabilities of the paths to all nodes that were seen, at
        their places in `growth.Pool`; None where the drafter does not tell.
      steering: What the step was told from outside, or None.
    """

    sizes: tuple[int, ...]
    num_depths: int
    depth: Int[Array, ""]
    scores: Float[Array, "b n"]
    depths: Int[Array, "b n"]
    context: Int[Array, " b"]
    is_active: Bool[Array, " b"]
    seen: Float[Array, "b p"] | None = None
    steering: Any = None


SizeFn = Callable[[Drafted], Int[Array, ""]]
"""Says how many nodes to verify, by number into the sizes."""


def all_drafted(drafted: Drafted) -> Int[Array, ""]:
    """Verifies all that was drafted: fewer rows only where a draft stopped early."""
    return jnp.int32(len(drafted.sizes) - 1)


def most_tokens_a_second(drafted: Drafted) -> Int[Array, ""]:
    """The marginal rule, told while decoding what steps cost; see `control.steered`.

    A step that is told nothing verifies all that was drafted.
    """
    if drafted.steering is None:
        return all_drafted(drafted)

    num_depths = drafted.num_depths
    told = marginal.Steering.unpacked(drafted.steering, num_depths, len(drafted.sizes))
    of_row = marginal.promised(drafted.scores, drafted.depths, told.factor)
    emitted = marginal.total(of_row, drafted.is_active)
    costs = marginal.Costs(told.seconds, told.sizes)
    chosen, _ = marginal.best_size(costs, drafted.depth, emitted)

    return jnp.where(told.size >= 0, told.size, chosen)


def taught_size(policies: Policies) -> SizeFn:
    """Verifies as many nodes as a policy says that was taught (LTD, 2603.01639).

    Of several rows it is what the most demanding one is given.

    Args:
      policies: From `storage.policies.load_policies`; only that for the size is asked.
    """
    return lambda drafted: _wanted(policies, drafted)


def taught_size_now(drafted: Drafted) -> Int[Array, ""]:
    """Verifies as many nodes as policies say that the step is told (`policy.Told`).

    A step that is told of none verifies all that was drafted.
    """
    told = drafted.steering
    if told is None:
        return all_drafted(drafted)

    return jnp.where(told.size >= 0, told.size, _wanted(told.policies, drafted))


def _wanted(policies: Policies, drafted: Drafted) -> Int[Array, ""]:
    """How many nodes a policy for the size says, by number.

    Raises:
      ConfigError: The drafter shows no nodes.
    """
    if drafted.seen is None:
        raise ConfigError(
            "policies for the size see all nodes that were drafted, which this "
            "drafter does not show; use one that has logits"
        )

    # As in `stopping.taught`: a tree may be deeper than those that it knows.
    shape = policies.shape
    pad = shape.num_places - drafted.seen.shape[1]
    seen = drafted.seen[:, : shape.num_places]
    seen = jnp.pad(seen, ((0, 0), (0, max(pad, 0))), constant_values=-jnp.inf)
    # Rows that stopped before others were drafted less deep.
    is_there = seen > -jnp.inf
    depth = jnp.max(jnp.where(is_there, shape.place_depths, 1), axis=-1)
    wanted = policies.size_for(seen, depth, drafted.context)
    count = jnp.asarray(shape.sizes)[wanted]
    most = jnp.max(jnp.where(drafted.is_active, count, 1))

    return jnp.searchsorted(jnp.asarray(drafted.sizes), most).astype(jnp.int32)


def choose_size(
    size_fn: SizeFn,
    tree: DraftTree,
    config: TreeConfig,
    context: Int[Array, " b"],
    is_active: Bool[Array, " b"],
    steering: Any = None,
) -> Int[Array, ""]:
    """How many of a tree's nodes to verify, by number into `config.sizes`.

    Returns:
      What the rule says, but no more than was drafted; all that was where tokens were
      drawn.
    """
    sizes = np.asarray(config.sizes)
    is_there = tree.is_valid[:, 1:] & is_active[:, None]
    place = np.arange(1, tree.tokens.shape[1])
    drafted = jnp.max(jnp.where(is_there, place, 1))
    enough = jnp.searchsorted(jnp.asarray(sizes), drafted)
    if tree.children != "topk":
        return enough

    number = size_fn(describe(tree, config, context, is_active, steering))
    # Whatever a rule says, it is a size of the menu.
    number = jnp.clip(number, 0, len(sizes) - 1).astype(enough.dtype)
    return jnp.minimum(number, enough)


def describe(
    tree: DraftTree,
    config: TreeConfig,
    context: Int[Array, " b"],
    is_active: Bool[Array, " b"],
    steering: Any = None,
) -> Drafted:
    """What a rule may know of a drafted tree."""
    depth = tree.drafted_depth
    if depth is None:
        is_there = tree.is_valid & is_active[:, None]
        depth = jnp.max(jnp.where(is_there, tree.depths, 1))

    return Drafted(
        sizes=config.sizes,
        num_depths=config.num_steps,
        depth=depth,
        scores=path_scores(tree)[:, 1:],
        depths=tree.depths[:, 1:],
        context=context,
        is_active=is_active,
        seen=tree.seen_scores,
        steering=steering,
    )


def path_scores(tree: DraftTree) -> Float[Array, "b n"]:
    """Log-probabilities of the paths to all nodes, the root's 0; -inf for none."""
    found = jnp.where(tree.depths == 0, 0.0, -jnp.inf)
    above = jnp.maximum(tree.parents, 0)

    # As growing adds them up, from the root down, so that the sums are the same bits.
    for depth in range(1, tree.max_depth + 1):
        score = jnp.take_along_axis(found, above, axis=1) + tree.log_probs
        found = jnp.where((tree.depths == depth) & tree.is_valid, score, found)

    return found


@typed
def first_nodes(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The smaller tree of the first nodes, the root included."""
    cut = lambda x: None if x is None else x[:, :num_nodes]
    return tree.replace(
        tokens=cut(tree.tokens),
        parents=cut(tree.parents),
        depths=cut(tree.depths),
        is_valid=cut(tree.is_valid),
        log_probs=cut(tree.log_probs),
        ancestor_mask=tree.ancestor_mask[:, :num_nodes, :num_nodes],
        draft_probs=cut(tree.draft_probs),
        states=cut(tree.states),
        has_state=cut(tree.has_state),
        choices=cut(tree.choices),
        sources=cut(tree.sources),
    )


def run_one(
    number: Int[Array, ""], passes: Sequence[Callable], cache: Any
) -> tuple[Any, Any]:
    """The result of one of several passes `cache -> (cache, rest)`, by number.

    Each pass stands in a loop that turns once or not at all. `lax.switch` would be the
    same, but XLA:CPU copies what comes out of its branches: here the whole cache. What
    a loop carries is written in place.
    """
    _, like = jax.eval_shape(passes[-1], cache)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    carry = number, cache, nothing

    for i, run in enumerate(passes):
        carry = jax.lax.while_loop(
            lambda carry, i=i: carry[0] == i,
            # No pass has this number: the loop ends, and no other one begins.
            lambda carry, run=run: (jnp.int32(-1), *run(carry[1])),
            carry,
        )

    return carry[1], carry[2]


class Verified(NamedTuple):
    """A tree of which a rule chose how much to verify, and what came of it.

    Attributes:
      tree: Those of its nodes that were not verified are not valid.
      config: That it was grown by.
      size: Nodes that were verified, the root left out.
      emitted: `[b, m]` tokens of the step.
      num_emitted: `[b]` how many of them there are.
      context: `[b]` tokens in the target's cache, before the step.
    """

    tree: DraftTree
    config: TreeConfig
    size: Int[Array, ""]
    emitted: Int[Array, "b m"]
    num_emitted: Int[Array, " b"]
    context: Int[Array, " b"]


EvidenceFn = Callable[[Verified], Float[Array, "b e"]]
"""What a verified tree is reported to a controller as."""


def cycle_of(verified: Verified) -> Float[Array, "b e"]:
    """A cycle for policies to learn from; see `control.lessons.Cycle`.

    A node is right if its path begins what was emitted, whether it was verified or not.
    """
    tree = verified.tree
    assert tree.seen_scores is not None, "trees of several sizes tell"
    assert tree.seen_tokens is not None
    assert tree.seen_parents is not None
    config = verified.config
    above = jnp.full(verified.context.shape, topology.NO_PARENT)
    is_reached = above == topology.NO_PARENT
    places = []

    for depth in range(1, config.num_steps + 1):
        first = topology.first_place(config.topk, depth)
        level = slice(first, topology.first_place(config.topk, depth + 1))
        is_right = tree.seen_tokens[:, level] == verified.emitted[:, depth - 1, None]
        is_right &= tree.seen_parents[:, level] == above[:, None]
        is_right &= tree.seen_scores[:, level] > -jnp.inf
        is_reached &= jnp.any(is_right, axis=1) & (depth <= verified.num_emitted)
        above = first + jnp.argmax(is_right, axis=1)
        places.append(jnp.where(is_reached, above, -1))

    column = lambda x: jnp.broadcast_to(x, above.shape).astype(jnp.float32)[:, None]
    parts = [verified.size, verified.context, *places]
    return jnp.concatenate([*map(column, parts), tree.seen_scores], axis=1)


def promises_of(verified: Verified) -> Float[Array, "b e"]:
    """What a tree promised, for the marginal rule; see `control.marginal.Evidence`."""
    tree = verified.tree
    config = verified.config
    size = verified.size
    k = config.num_steps
    scores = path_scores(tree)
    probs = jnp.where(tree.is_valid, jnp.exp(scores), 0.0)
    at_depth = tree.depths[..., None] == np.arange(1, k + 1)
    mass = jnp.sum(jnp.where(at_depth, probs[..., None], 0.0), axis=1)

    # The best path to each depth, of all that was seen.
    if tree.seen_scores is not None:
        scores = tree.seen_scores
        places = topology.depths_of_places(config.topk, k)
        at_depth = places[:, None] == np.arange(1, k + 1)
    best = jnp.max(jnp.where(at_depth, scores[..., None], -jnp.inf), axis=1)
    depth = tree.drafted_depth
    if depth is None:
        depth = jnp.max(jnp.where(tree.is_valid, tree.depths, 0))

    return marginal.Evidence(depth, size, mass, marginal.sureness(best)).packed()
