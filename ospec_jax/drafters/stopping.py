# SPDX-License-Identifier: Apache-2.0
"""When a draft grows no deeper: depth policies inside the step, on the device.

A rule sees what has been drafted, and may end the growth of a row; what is there stays
and is verified. So output is exact whatever the rule: how much is drafted may depend on
the past and on tokens that will be verified. A *drawn* token is never dropped after a
look at its value: with p = (.5, .5) and q = (.9, .1), dropping improbable drafts would
emit (.55, .45).

Between steps, `control` chooses depths from what earlier steps came to.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import ConfigError, TreeConfig


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
    """

    depth: int | Int[Array, ""]
    log_probs: Float[Array, "b w"]
    logits: Float[Array, "b u q"] | None = None
    scores: Float[Array, "b p"] | None = None
    scores_before: Float[Array, "b p"] | None = None
    num_kept: int = 0

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
