# SPDX-License-Identifier: Apache-2.0
"""How deep and how large a tree pays: BASTION's marginal rule on measured costs.

A tree emits one token and, in expectation, the sum of its nodes' chances of being
right. A node is worth verifying while `chance * (drafting + cost) > emitted * extra
cost` (BASTION, arXiv 2605.29727): the first-order condition of most tokens a second.
Costs here are steps of compiled row counts, not a smooth curve, so every size of the
menu is looked at instead of going on node by node until the condition fails.

Chances are the draft's path probabilities, corrected by a factor for each depth that
is learned from verified nodes. Whether another depth pays must be foreseen, since its
nodes are not drafted yet: from how often a node was right below one of the same
sureness, which is how probable the draft found the newest token of its best path. A
draft that was sure of a token is mostly right about the next one, too.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.typing import struct

_HOPE = 0.9
"""Chance of a first drafted token of which nothing is known, as in `depth`."""
_HOPE_TRIALS = 4.0
"""Trials that the hope weighs, and verified nodes that a factor of 1 does."""
_NUM_GRADES = 8
"""Grades of sureness that are told apart."""


@struct
class Calibration:
    """What verified nodes said of the draft; all fades at a constant rate.

    Attributes:
      hits: `[k]` times that a node of each depth was right.
      trials: `[k]` times that nodes of a depth were verified below a right one.
      mass: `[k]` what the draft had promised: the verified nodes' path probabilities.
      hits_below: `[g]` times that a node was right below a right one, by how sure the
        draft was of the depth above.
      trials_below: `[g]` times that nodes were verified there.
    """

    hits: Float[Array, " k"]
    trials: Float[Array, " k"]
    mass: Float[Array, " k"]
    hits_below: Float[Array, " g"]
    trials_below: Float[Array, " g"]


class Costs(NamedTuple):
    """Seconds of a step by depth from 0 on and by size, `[k + 1, s]`.

    Attributes:
      seconds: Of a step; at depth 0 it drafts nothing, whatever the size.
      sizes: `[s]` nodes to verify, the root left out.
    """

    seconds: Float[Array, "d s"]
    sizes: Int[Array, " s"]


def begin(depth: int) -> Calibration:
    """One that has seen nothing, for trees of so many depths."""
    zeros = jnp.zeros((depth,))
    grades = jnp.zeros((_NUM_GRADES,))
    return Calibration(zeros, zeros, zeros, grades, grades)


def learn(
    known: Calibration,
    num_accepted: Int[Array, ""],
    mass: Float[Array, " k"],
    sure: Float[Array, " k"],
    depth: Int[Array, ""],
    kept: float,
) -> Calibration:
    """Books one verified tree; plain steps fade the evidence, too.

    Args:
      mass: Path probabilities of the verified nodes, summed by depth.
      sure: See `sureness`.
      depth: Of the tree; 0 for a plain step.
      kept: What is left of older evidence.
    """
    depths = jnp.arange(1, len(known.hits) + 1)
    is_tried = (num_accepted >= depths - 1) & (depths <= depth)
    is_hit = is_tried & (num_accepted >= depths)
    above = grades(sure)[:-1]
    add = lambda old, new: (kept * old).at[above].add(new[1:].astype(old.dtype))

    return Calibration(
        hits=kept * known.hits + is_hit,
        trials=kept * known.trials + is_tried,
        mass=kept * known.mass + mass,
        hits_below=add(known.hits_below, is_hit),
        trials_below=add(known.trials_below, is_tried),
    )


def sureness(frontier: Float[Array, "k w"]) -> Float[Array, " k"]:
    """How probable the draft found the newest token of its best path, by depth.

    Args:
      frontier: Log-probabilities of the paths to the newest nodes, the best one first.
    """
    best = frontier[:, 0]
    above = jnp.concatenate([jnp.zeros(1), best[:-1]])
    # Both may be -inf, where a draft has no more tokens to give.
    return jnp.where(best > -jnp.inf, jnp.exp(best - above), 0.0)


def grades(sure: Float[Array, "*b"]) -> Int[Array, "*b"]:
    """The grade of a sureness."""
    return jnp.clip((sure * _NUM_GRADES).astype(jnp.int32), 0, _NUM_GRADES - 1)


def odds_below(known: Calibration) -> Float[Array, " g"]:
    """Chance that a node is right below a right one, by the grade of the latter."""
    # Of a grade that is not known yet the middle of its sureness is believed.
    hope = (jnp.arange(_NUM_GRADES) + 0.5) / _NUM_GRADES
    hits = known.hits_below + _HOPE_TRIALS * hope

    return hits / (known.trials_below + _HOPE_TRIALS)


def factors(known: Calibration) -> Float[Array, " k"]:
    """What the draft's path probabilities are multiplied by, for each depth."""
    return (known.hits + _HOPE_TRIALS) / (known.mass + _HOPE_TRIALS)


def chances(known: Calibration) -> Float[Array, " k"]:
    """Chance that a node of each depth is right if one of the depth before was."""
    hope = jnp.float32(_HOPE)
    found = []

    for hits, trials in zip(known.hits, known.trials, strict=True):
        # A depth's estimate is the hope of the next: late ones are seldom tried. The
        # first is hoped for with the weight of a single trial, so that it is soon left.
        weight = _HOPE_TRIALS if found else 1.0
        hope = (hits + weight * hope) / (trials + weight)
        found.append(hope)

    return jnp.stack(found)


def promised(
    log_probs: Float[Array, "*b n"], depths: Int[Array, "*b n"], factor
) -> Float[Array, "*b n"]:
    """Expected tokens of trees of the best 1, 2, ... n nodes, `[n]`, the first one in.

    Args:
      log_probs: Of the paths, falling; -inf for none.
      depths: Of the nodes, from 1 on.
      factor: `[k]` of each depth.
    """
    right = jnp.minimum(jnp.exp(log_probs) * factor[depths - 1], 1.0)
    return 1.0 + jnp.cumsum(right, axis=-1)


def best_size(
    costs: Costs, depth, log_probs: Float[Array, " n"], depths, factor
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The size of most tokens a second, by number, and these.

    Args:
      depth: That was drafted; its cost is spent, and counts in each size's rate.
    """
    emitted = promised(log_probs, depths, factor)[costs.sizes - 1]
    rates = emitted / costs.seconds[depth]
    chosen = jnp.argmax(rates)

    return chosen, rates[chosen]


def is_worth_more(
    costs: Costs,
    depth: int,
    log_probs: Float[Array, " n"],
    depths: Int[Array, " n"],
    frontier: Float[Array, " w"],
    odds: Float[Array, ""],
    factor: Float[Array, " k"],
) -> Array:
    """Whether drafting deeper promises more tokens a second than verifying now.

    Args:
      depth: That is drafted so far, from 1 on.
      log_probs: `[n]` of the paths to the best nodes so far.
      frontier: `[w]` of those to the newest nodes.
      odds: Chance that a node is right below a right one of the newest.
      factor: `[k]`, see `factors`.
    """
    num_depths = costs.seconds.shape[0] - 1
    if depth == num_depths:
        return jnp.asarray(False)

    _, now = best_size(costs, depth, log_probs, depths, factor)
    emitted = promised(log_probs, depths, factor)
    emitted = jnp.concatenate([jnp.ones(1), emitted])
    # A deeper node is right if one of the newest is, and all after it are.
    reached = jnp.minimum(jnp.sum(jnp.exp(frontier)) * factor[depth - 1], 1.0)
    gain = 0.0
    later = []

    for further in range(depth + 1, num_depths + 1):
        reached = reached * odds
        gain = gain + reached
        # Each further depth takes the place of one node at least.
        room = costs.sizes - (further - depth)
        rates = (emitted[jnp.maximum(room, 0)] + gain) / costs.seconds[further]
        later.append(jnp.max(jnp.where(costs.sizes >= further, rates, 0.0)))

    return jnp.max(jnp.stack(later)) > now


def is_worth_drafting(costs: Costs, known: Calibration) -> Array:
    """Whether any depth promises more tokens a second than plain decoding."""
    emitted = 1.0 + jnp.cumsum(jnp.cumprod(chances(known)))
    rates = emitted[:, None] / costs.seconds[1:]
    # A node of a depth comes with all those above it.
    deep = jnp.arange(1, len(emitted) + 1)[:, None]
    rates = jnp.where(costs.sizes >= deep, rates, 0.0)

    return jnp.max(rates) > 1.0 / costs.seconds[0, 0]
