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

Requests that are decoded together share a step: what pays is what pays for the sum of
their tokens. What is learned is learned from numbers alone, by methods that arrays of
NumPy and of JAX have in common: the same functions run on record and on the host.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.typing import struct

_HOPE = 0.9
"""Chance of a first drafted token of which nothing is known, as in `depth`."""
_HOPE_TRIALS = 4.0
"""Trials that the hope weighs, and verified nodes that a factor of 1 does."""
_NUM_GRADES = 8
"""Grades of sureness that are told apart."""
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 60)
"""Sizes on a menu, as far as a tree has them: a pass of the target is compiled for
each."""


Numbers = Array | np.ndarray


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

    hits: Float[Numbers, " k"]
    trials: Float[Numbers, " k"]
    mass: Float[Numbers, " k"]
    hits_below: Float[Numbers, " g"]
    trials_below: Float[Numbers, " g"]


class Costs(NamedTuple):
    """Seconds of a step by depth from 0 on and by size, `[k + 1, s]`.

    Attributes:
      seconds: Of a step; at depth 0 it drafts nothing, whatever the size.
      sizes: `[s]` nodes to verify, the root left out.
    """

    seconds: Float[Numbers, "d s"]
    sizes: Int[Numbers, " s"]


class Steering(NamedTuple):
    """What the rule is told within a step; arguments, so that nothing is recompiled.

    A step is handed them as one array (`packed`): each argument takes the host time.

    Attributes:
      seconds: `[k + 1, s]` as in `Costs`, likewise the sizes.
      factor: `[k]`, see `factors`.
      odds: `[g]`, see `odds_below`.
      depth: To draft to whatever is promised; 0 to choose.
      size: To verify, by number, whatever is promised; -1 to choose.
    """

    seconds: Any
    sizes: Any
    factor: Any
    odds: Any
    depth: Any
    size: Any

    def packed(self) -> np.ndarray:
        """All numbers, one after the other, in float32."""
        return np.concatenate([np.ravel(field) for field in self]).astype(np.float32)

    @classmethod
    def unpacked(cls, numbers: Float[Array, " n"], depth: int, sizes: int):
        """What was packed, for trees of so many depths and sizes."""
        counts = np.cumsum([(depth + 1) * sizes, sizes, depth, _NUM_GRADES, 1])
        parts = jnp.split(numbers, counts)
        seconds = parts[0].reshape(depth + 1, sizes)
        whole = lambda x: x.astype(jnp.int32)
        return cls(
            seconds,
            whole(parts[1]),
            parts[2],
            parts[3],
            whole(parts[4])[0],
            whole(parts[5])[0],
        )


class Evidence(NamedTuple):
    """What verified trees say of the draft, packed like `Steering`, `[b, 2 + 2 k]`.

    Attributes:
      depth: To which they were drafted.
      size: Nodes that were verified, the root left out.
      mass: `[b, k]` path probabilities of the verified nodes, summed by depth.
      sure: `[b, k]` see `sureness`.
    """

    depth: Any
    size: Any
    mass: Any
    sure: Any

    def packed(self) -> Float[Array, "b n"]:
        """All numbers; depth and size are said in each row."""
        b = self.mass.shape[0]
        column = lambda x: jnp.full((b, 1), x, jnp.float32)
        parts = [column(self.depth), column(self.size), self.mass, self.sure]
        return jnp.concatenate(parts, axis=1)

    @classmethod
    def unpacked(cls, numbers: np.ndarray) -> "Evidence":
        """What was packed, of one row at least."""
        k = (numbers.shape[1] - 2) // 2
        depth, size = numbers[0, :2].astype(int).tolist()
        return cls(depth, size, numbers[:, 2 : 2 + k], numbers[:, 2 + k :])


def begin(depth: int) -> Calibration:
    """One that has seen nothing, for trees of so many depths."""
    zeros = jnp.zeros((depth,))
    grades = jnp.zeros((_NUM_GRADES,))
    return Calibration(zeros, zeros, zeros, grades, grades)


def learn(
    known: Calibration,
    num_accepted: Int[Numbers, " b"],
    mass: Float[Numbers, "b k"],
    sure: Float[Numbers, "b k"],
    depth: Int[Numbers, ""] | int,
    kept: float,
) -> Calibration:
    """Books the verified trees of one step; plain steps fade the evidence, too.

    Args:
      mass: Path probabilities of the verified nodes, summed by depth.
      sure: See `sureness`.
      depth: Of the trees; 0 for a plain step.
      kept: What is left of older evidence.
    """
    depths = np.arange(1, known.hits.shape[0] + 1)
    accepted = num_accepted[:, None]
    is_tried = (accepted >= depths - 1) & (depths <= depth)
    is_hit = is_tried & (accepted >= depths)
    # `[b, k - 1, g]`: of the depth above. The first depth has the root above it.
    of_grade = grades(sure)[:, :-1, None] == np.arange(_NUM_GRADES)
    by_grade = lambda what: (what[:, 1:, None] & of_grade).sum((0, 1))

    return Calibration(
        hits=kept * known.hits + is_hit.sum(0),
        trials=kept * known.trials + is_tried.sum(0),
        mass=kept * known.mass + mass.sum(0),
        hits_below=kept * known.hits_below + by_grade(is_hit),
        trials_below=kept * known.trials_below + by_grade(is_tried),
    )


def sureness(best: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """How probable the draft found the newest token of its best path, by depth.

    Args:
      best: Log-probability of the best path to each depth.
    """
    above = jnp.concatenate([jnp.zeros_like(best[..., :1]), best[..., :-1]], axis=-1)
    # Both may be -inf, where a draft has no more tokens to give.
    return jnp.where(best > -jnp.inf, jnp.exp(best - above), 0.0)


def grades(sure: Any) -> Any:
    """The grade of a sureness, of an array of NumPy or JAX."""
    return (sure * _NUM_GRADES).astype(np.int32).clip(0, _NUM_GRADES - 1)


def odds_below(known: Calibration) -> Any:
    """Chance that a node is right below a right one, `[g]` by the latter's grade."""
    # Of a grade that is not known yet the middle of its sureness is believed.
    hope = (np.arange(_NUM_GRADES) + 0.5) / _NUM_GRADES
    hits = known.hits_below + _HOPE_TRIALS * hope

    return hits / (known.trials_below + _HOPE_TRIALS)


def factors(known: Calibration) -> Any:
    """What the draft's path probabilities are multiplied by, `[k]` for each depth."""
    return (known.hits + _HOPE_TRIALS) / (known.mass + _HOPE_TRIALS)


def chances(known: Calibration) -> list[Any]:
    """Chance of each depth's node to be right if one of the depth before was."""
    hope: Any = _HOPE
    found = []

    for depth in range(known.hits.shape[0]):
        # A depth's estimate is the hope of the next: late ones are seldom tried. The
        # first is hoped for with the weight of a single trial, so that it is soon left.
        weight = _HOPE_TRIALS if found else 1.0
        hope = (known.hits[depth] + weight * hope) / (known.trials[depth] + weight)
        found.append(hope)

    return found


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
    costs: Costs, depth, emitted: Float[Array, " n"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The size of most tokens a second, by number, and these.

    Args:
      depth: That was drafted; its cost is spent, and counts in each size's rate.
      emitted: Expected tokens of the step, with the best 1, 2, ... nodes of each row.
    """
    rates = emitted[costs.sizes - 1] / costs.seconds[depth]
    chosen = jnp.argmax(rates)

    return chosen, rates[chosen]


def is_worth_more(
    costs: Costs,
    depth: int | Int[Array, ""],
    log_probs: Float[Array, "b n"],
    depths: Int[Array, "b n"],
    frontier: Float[Array, "b w"],
    odds: Float[Array, " b"],
    factor: Float[Array, " k"],
    is_active: Bool[Array, " b"] | None = None,
) -> Bool[Array, ""]:
    """Whether drafting deeper promises more tokens a second than verifying now.

    Args:
      depth: That is drafted so far, from 1 on.
      log_probs: `[b, n]` of the paths to the best nodes so far.
      frontier: `[b, w]` of those to the newest nodes.
      odds: Chance that a node is right below a right one of the newest.
      factor: `[k]`, see `factors`.
      is_active: Rows that count; None for all.
    """
    num_depths = costs.seconds.shape[0] - 1
    if num_depths == 1:
        return jnp.asarray(False)

    of_row = promised(log_probs, depths, factor)
    emitted = total(of_row, is_active)
    _, now = best_size(costs, depth, emitted)
    # With no node at all each row emits its one token.
    emitted = jnp.concatenate([total(jnp.ones_like(of_row[:, :1]), is_active), emitted])

    # A deeper node is right if one of the newest is, and all after it are.
    newest = jnp.sum(jnp.exp(frontier), axis=-1) * factor[depth - 1]
    reached = jnp.minimum(newest, 1.0)
    more = np.arange(1, num_depths)
    gain = reached[:, None] * jnp.cumsum(odds[:, None] ** more, axis=-1)
    gain = total(gain, is_active)

    # `[j, s]`: each further depth takes the place of one node at least.
    room = costs.sizes - more[:, None]
    further = depth + more
    is_there = (further <= num_depths)[:, None] & (costs.sizes >= further[:, None])
    seconds = costs.seconds[jnp.minimum(further, num_depths)]
    rates = (emitted[jnp.maximum(room, 0)] + gain[:, None]) / seconds

    return jnp.max(jnp.where(is_there, rates, 0.0)) > now


def total(
    of_row: Float[Array, "b n"], is_active: Bool[Array, " b"] | None
) -> Float[Array, " n"]:
    """The sum over the rows that count."""
    if is_active is None:
        return jnp.sum(of_row, axis=0)

    return jnp.sum(jnp.where(is_active[:, None], of_row, 0.0), axis=0)


def is_worth_drafting(costs: Costs, known: Calibration) -> Any:
    """Whether any depth promises more tokens a second than plain decoding."""
    reached = 1.0
    emitted = 1.0
    is_worth: Any = np.False_

    for depth, chance in enumerate(chances(known), 1):
        reached = reached * chance
        emitted = emitted + reached
        # A node of a depth comes with all those above it.
        is_deep = costs.sizes >= depth
        is_faster = emitted * costs.seconds[0, 0] > costs.seconds[depth]
        is_worth = is_worth | (is_deep & is_faster).any()

    return is_worth
