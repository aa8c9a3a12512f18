# SPDX-License-Identifier: Apache-2.0
"""When a draft grows no deeper: depth policies inside the step, on the device.

A rule sees what has been drafted, and may end the growth of a row; what is there stays
and is verified. So output is exact whatever the rule: how much is drafted may depend on
the past and on tokens that will be verified. A *drawn* token is never dropped after a
look at its value: with p = (.5, .5) and q = (.9, .1), dropping improbable drafts would
emit (.55, .45).

Between steps, `control` chooses depths from what earlier steps came to.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.control import marginal
from ospec_jax.control.policy import Policies, newest_of


class Progress(NamedTuple):
    """A tree that is growing, when the nodes of one more depth have been added.

    Only what a rule reads is computed.

    Attributes:
      depth: Of the newest nodes, from 1 on.
      log_probs: `[b, w]` the draft's log-probabilities of the paths to the newest
        nodes, of which the next ones would come; -inf for none.
      logits: `[b, u, q]` what the draft said of tokens at the newest depth, at each
        node that was expanded; None of suggestions, which have no distribution.
      scores: `[b, p]` log-probabilities of the paths to all nodes so far; -inf for
        empty places. None for chains of suggestions, likewise the next.
      scores_before: Likewise, without the newest; None at the first depth.
      num_kept: Nodes that are verified in the end, the root left out.
      node_depths: `[p]` depth of the node at each place of `scores`, likewise.
      context: `[b]` tokens in the target's cache. None where a rule is asked on record
        or of chains of suggestions.
      is_active: `[b]` rows whose answer goes on; None for all.
      steering: What the step was told from outside, or None.
      tree: That is growing; None where there is no steering.
    """

    depth: int | Int[Array, ""]
    log_probs: Float[Array, "b w"]
    logits: Float[Array, "b u q"] | None = None
    scores: Float[Array, "b p"] | None = None
    scores_before: Float[Array, "b p"] | None = None
    num_kept: int = 0
    node_depths: Int[Array, " p"] | None = None
    context: Int[Array, " b"] | None = None
    is_active: Bool[Array, " b"] | None = None
    steering: Any = None
    tree: TreeConfig | None = None

    @property
    def entropies(self) -> Float[Array, "b u"]:
        """Of the draft's distributions over the newest depth's tokens, in nats.

        Raises:
          ConfigError: Suggestions are drafted, which have none.
        """
        if self.logits is None:
            raise ConfigError(
                "this depth rule reads entropies, which suggestions do not have; give "
                "it to a drafter that has logits"
            )

        log_probs = jax.nn.log_softmax(self.logits, axis=-1)
        probs = jnp.exp(log_probs)
        # An impossible token adds nothing, not 0 * -inf.
        return -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)

    @property
    def gain(self) -> Float[Array, " b"]:
        """Accepted tokens that the newest depth adds to those expected before.

        Of the best `num_kept` nodes, by the draft's own probabilities; inf at the first
        depth.
        """
        if self.scores is None or self.scores_before is None:
            return jnp.full(self.log_probs.shape[:1], jnp.inf)

        return self._promise(self.scores) - self._promise(self.scores_before)

    def _promise(self, scores: Float[Array, "b p"]) -> Float[Array, " b"]:
        # A node's path probability is its chance of being accepted, by the draft's own
        # measure, so the sum over the kept nodes is the expected number of accepted
        # tokens.
        best = jax.lax.top_k(scores, self.num_kept)[0]
        return jnp.sum(jnp.exp(best), axis=-1)


StopFn = Callable[[Progress], Bool[Array, " b"] | Bool[Array, ""]]
"""Says which rows, or whether all, grow no deeper."""


def below_probability(lowest: float) -> StopFn:
    """Stops rows whose most probable path falls below a probability."""
    log_lowest = float(np.log(lowest))
    return lambda progress: jnp.max(progress.log_probs, axis=-1) < log_lowest


def below_gain(least: float) -> StopFn:
    """Stops rows to which another depth added little (OPT-Tree, arXiv 2406.17276)."""
    return lambda progress: progress.gain < least


def below_mass(least: float) -> StopFn:
    """Stops rows whose newest paths are improbable together (DDD, arXiv 2409.00142)."""
    return lambda progress: jnp.sum(jnp.exp(progress.log_probs), axis=-1) < least


def above_entropy(most: float) -> StopFn:
    """Stops rows whose draft was not sure of its newest tokens (SVIP, 2411.18462).

    A token is accepted with a chance of at least one minus a multiple of the root of
    the draft's entropy.

    Args:
      most: Of that root, at the most probable node that was expanded.
    """
    return lambda progress: jnp.sqrt(progress.entropies[:, 0]) > most


def taught(policies: Policies) -> StopFn:
    """Stops rows as a policy says that was taught (LTD, arXiv 2603.01639).

    It is part of the compiled step. Of policies that were taught for another draft, or
    on another machine, only the speed suffers.

    Args:
      policies: From `storage.policies.load_policies`; only that for the depth is asked.
    """
    return lambda progress: _is_enough(policies, progress)


def taught_now(progress: Progress) -> Bool[Array, " b"]:
    """Stops rows as policies say that the step is told (`control.policy.Told`).

    They are arguments of the compiled step, so that they may go on learning. A step
    that is told of none drafts to the end.
    """
    told = progress.steering
    if told is None:
        return jnp.zeros(progress.log_probs.shape[:1], bool)

    is_enough = _is_enough(told.policies, progress)
    return jnp.where(told.depth > 0, progress.depth >= told.depth, is_enough)


def _is_enough(policies: Policies, progress: Progress) -> Bool[Array, " b"]:
    """Which rows a policy for the depth stops.

    Raises:
      ConfigError: It knows no such trees, or their nodes are not shown.
    """
    shape = policies.shape
    if progress.scores is None or progress.context is None:
        raise ConfigError(
            "this depth rule sees all nodes of a tree, which chains of suggestions "
            "do not show; give it to a drafter that has logits"
        )
    if progress.log_probs.shape[-1] != shape.topk:
        raise ConfigError(
            f"the policies are for trees of width {shape.topk}, not "
            f"{progress.log_probs.shape[-1]}; draft such trees, or train policies "
            f"on others"
        )

    # A tree may be deeper than those that the policy knows, or less deep.
    scores = progress.scores[:, : shape.num_places]
    pad = shape.num_places - scores.shape[1]
    scores = jnp.pad(scores, ((0, 0), (0, pad)), constant_values=-jnp.inf)
    known = jnp.minimum(progress.depth, shape.depth)
    newest = newest_of(shape, scores, known)
    goes_on = policies.goes_on(newest, known, progress.context)

    return ~goes_on | (progress.depth >= shape.depth)


def unless_worth_more(
    seconds: Sequence[Sequence[float]],
    sizes: Sequence[int],
    factor: Sequence[float],
    odds: Sequence[float],
) -> StopFn:
    """Stops rows of which another depth would yield fewer tokens a second.

    BASTION's marginal rule (arXiv 2605.29727), whose costs and corrections are fixed
    while a step is compiled; see `control.marginal`. Costs of another machine, or
    stale ones, change the speed and nothing else.

    Args:
      seconds: `[depths, sizes]` what steps take, from depth 0 on.
      sizes: Nodes that may be verified, ascending, the root left out.
      factor: What the draft's path probabilities are multiplied by, for each depth.
      odds: Chance that a node is right below a right one, by the latter's grade; see
        `marginal.odds_below`.
    """
    table = jnp.asarray(seconds)
    menu = jnp.asarray(sizes)

    def rule(progress: Progress) -> Bool[Array, " b"]:
        grown = _weigh(progress, max(sizes))
        below = jnp.asarray(odds)[marginal.grades(grown.sure)]

        # Each row by itself, as if it were alone.
        def goes_on(best, depths, newest, odds):
            return marginal.is_worth_more(
                marginal.Costs(table, menu),
                progress.depth,
                best[None],
                depths[None],
                newest[None],
                odds[None],
                jnp.asarray(factor),
            )

        rows = grown.best, grown.depths, progress.log_probs, below
        return ~jax.vmap(goes_on)(*rows)

    return rule


def unless_worth_more_now(progress: Progress) -> Bool[Array, " b"]:
    """The marginal rule, told while decoding what steps cost and what drafts are worth.

    `control.steered` tells it. All rows stop at once: they share the step, so what
    counts is the sum of their tokens. A step that is told nothing drafts to the end.
    """
    rows = progress.log_probs.shape[:1]
    if progress.steering is None:
        return jnp.zeros(rows, bool)

    grown = _weigh(progress, progress.num_kept)
    assert progress.tree is not None
    told = marginal.Steering.unpacked(
        progress.steering, progress.tree.num_steps, len(progress.tree.sizes)
    )
    goes_on = marginal.is_worth_more(
        marginal.Costs(told.seconds, told.sizes),
        progress.depth,
        grown.best,
        grown.depths,
        progress.log_probs,
        told.odds[marginal.grades(grown.sure)],
        told.factor,
        progress.is_active,
    )
    is_over = jnp.where(told.depth > 0, progress.depth >= told.depth, ~goes_on)

    return jnp.broadcast_to(is_over, rows)


class _Weighed(NamedTuple):
    """What the marginal rule reads of a growing tree.

    Attributes:
      best: `[b, n]` log-probabilities of the paths to the most probable nodes.
      depths: `[b, n]` theirs.
      sure: `[b]` how probable the draft found the newest token of its best path.
    """

    best: Float[Array, "b n"]
    depths: Int[Array, "b n"]
    sure: Float[Array, " b"]


def _weigh(progress: Progress, largest: int) -> _Weighed:
    """The best nodes of a growing tree, `largest` of them, and the best path's end.

    Raises:
      ConfigError: Suggestions are drafted, whose nodes are not shown.
    """
    if progress.scores is None or progress.node_depths is None:
        raise ConfigError(
            "this depth rule weighs all nodes of a tree, which chains of "
            "suggestions do not show; give it to a drafter that has logits"
        )

    rows, num_places = progress.scores.shape
    most = min(largest, num_places)
    pad = ((0, 0), (0, largest - most))
    # A chain's nodes stand in this order already.
    if progress.log_probs.shape[-1] == 1:
        best = progress.scores[:, :most]
        depths = jnp.broadcast_to(progress.node_depths[:most], (rows, most))
    else:
        best, places = jax.lax.top_k(progress.scores, most)
        depths = progress.node_depths[places]
    best = jnp.pad(best, pad, constant_values=-jnp.inf)
    depths = jnp.pad(depths, pad, constant_values=1)

    newest = jnp.max(progress.log_probs, axis=-1)
    is_above = progress.node_depths == progress.depth - 1
    above = jnp.max(jnp.where(is_above, progress.scores, -jnp.inf), axis=-1)
    # Above the first depth lies the root, which is certain.
    above = jnp.where(progress.depth == 1, 0.0, above)
    sure = jnp.where(newest > -jnp.inf, jnp.exp(newest - above), 0.0)

    return _Weighed(best, depths, sure)


def rules_of(tree: TreeConfig, stop_fn: StopFn | None = None) -> tuple[StopFn, ...]:
    """A tree's own rules, and one more.

    Raises:
      ConfigError: The tree cannot stop early.
    """
    # A static tree's shape is fixed while tracing, and none of its nodes is dropped.
    if stop_fn is not None and tree.kind == "static":
        raise ConfigError(
            "a static tree always has its full depth, so stop_fn has nothing to say: "
            "use a chain, or a dynamic tree of children='topk'"
        )

    rules = []
    if tree.min_path_probability:
        rules.append(below_probability(tree.min_path_probability))
    if tree.min_gain:
        rules.append(below_gain(tree.min_gain))
    if stop_fn is not None:
        rules.append(stop_fn)

    return tuple(rules)


def is_stopped(rules: tuple[StopFn, ...], progress: Progress) -> Bool[Array, " b"]:
    """Which rows one of the rules stops."""
    stopped = jnp.zeros(progress.log_probs.shape[:1], bool)
    for rule in rules:
        stopped |= rule(progress)

    return stopped
