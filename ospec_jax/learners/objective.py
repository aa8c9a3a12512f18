# SPDX-License-Identifier: Apache-2.0
"""What every learner minimises: the drafter's training pass, held against the target.

It is built once, from the drafter's `unroll`; an update rule sees only the functions.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ospec_jax.drafters.base import dequantized, frozen_head
from ospec_jax.learners.base import Segments
from ospec_jax.learners.losses import (
    FORWARD_KL,
    Loss,
    Positions,
    accepted_lengths,
    feature_loss,
    info_of,
    loss_of,
    loss_sums,
    target_probs,
    unrolled_loss,
)
from ospec_jax.learners.parts import Parts, rows_of


class Objective(NamedTuple):
    """The online loss, and the score that promotion compares.

    Attributes:
      loss: `(params, segments, shared, token_ids) -> (loss, LearnerInfo)`, to be
        differentiated by its first argument.
      score: Likewise `-> (LearnerInfo, accepted [b])`; all positions count the same.
      parts: The same loss, a few pairs at a time; None where it cannot be had so.
    """

    loss: Callable
    score: Callable
    parts: Parts | None = None


def build_objective(
    unroll: Callable,
    num_context: int,
    num_steps: int = 3,
    loss: Loss = FORWARD_KL,
    decay: float = 0.8,
    num_candidates: int = 0,
    positions: Positions = "all",
    position_decay: float = 1.0,
    token_share: float = 1.0,
    unroll_features: Callable | None = None,
    feature_weight: float = 0.0,
) -> Objective:
    """Builds the loss of a draft on segments.

    Args:
      unroll: The drafter's training forward pass.
      num_context: Leading pairs of each segment that are only attended to.
      num_steps: Depths to unroll; a draft trained one step deep gets worse at depth.
      loss: One of `learners.losses`.
      decay: Weight of each depth relative to the one before.
      num_candidates: Tokens that an update looks at: those to which the target gives
        most probability in its segments. The loss is then that of a draft with these
        tokens alone, its softmax included: an approximation that leaves the rows of
        all other tokens as they are. What it reports is named after them: a draft
        that is sure of another token looks right among them. 0 looks at the whole
        draft vocabulary, at twice the cost.
      positions: `rejected` counts only those where drafting would fail; see
        `unrolled_loss`.
      position_decay: Weight of each position of a window relative to the one before.
      token_share: Share of positions that count, drawn anew for each batch. It shows
        how many tokens learning needs; it saves no time.
      unroll_features: The drafter's, if it predicts the target's final states.
      feature_weight: Of the loss of those predictions, beside the tokens' loss.
    """
    on = _OnSegments(
        unroll,
        num_context,
        num_steps,
        loss,
        decay,
        num_candidates,
        positions,
        position_decay,
        token_share,
        unroll_features if feature_weight else None,
        feature_weight,
    )
    parts = Parts(
        num_context=num_context,
        num_steps=num_steps,
        num_candidates=num_candidates,
        # Which rows count follows from the draft's own choices.
        is_counted_first=positions == "rejected",
        emphasis=on.emphasis,
        mass=on.mass,
        sums=on.sums,
        loss=lambda sums, counted: loss_of(sums, decay, counted),
        info=lambda sums: info_of(sums, decay),
    )
    has_features = on.unroll_features is not None

    return Objective(on.loss, on.score, None if has_features else parts)


@dataclasses.dataclass(frozen=True)
class _OnSegments:
    """The functions of an objective.

    Attributes:
      loss_of_token: One of `learners.losses`.
      unroll_features: The drafter's, if its predictions of states count.

    The others are arguments of `build_objective`.
    """

    unroll: Callable
    num_context: int
    num_steps: int
    loss_of_token: Loss
    decay: float
    num_candidates: int
    positions: Positions
    position_decay: float
    token_share: float
    unroll_features: Callable | None
    feature_weight: float

    @property
    def rows(self) -> slice:
        """Of the trained pairs' targets: pair i predicts the token after i + 1."""
        return slice(self.num_context + 1, None)

    def loss(self, params, segments: Segments, shared, token_ids):
        """The online loss, and what is told of it."""
        probs, hidden = self._targets(segments, shared, token_ids)
        weight = segments.weight[:, self.rows]
        counted = self.emphasis(segments)
        candidates = None
        # Candidates are chosen by the target's mass over the whole batch, not by
        # position: one small matrix of head rows then serves all of it.
        if 0 < self.num_candidates < probs.shape[-1]:
            mass = jnp.einsum("btq,bt->q", probs, weight)
            candidates = jax.lax.top_k(mass, self.num_candidates)[1]
            probs = probs[..., candidates]

        unroll = self.unroll_features or self.unroll
        found = self._forward(unroll, params, segments, shared, token_ids, candidates)
        logits = found if self.unroll_features is None else found[0]
        total, info = unrolled_loss(
            logits,
            probs,
            weight,
            self.loss_of_token,
            self.decay,
            self.positions,
            counted,
            segments.is_fresh,
        )
        # Figures about the whole draft vocabulary would be wrong for a part of it.
        if candidates is not None:
            info = info.of_candidates()
        if self.unroll_features is None:
            return total, info

        of_states = feature_loss(found[1], hidden, counted, self.decay)
        return total + of_states * self.feature_weight, info

    def score(self, params, segments: Segments, shared, token_ids):
        """What promotion compares."""
        # With all tokens and even weights: drafts are compared by what they get
        # accepted, not by the loss that one of them was trained on.
        logits = self._forward(self.unroll, params, segments, shared, token_ids)
        probs = self._targets(segments, shared, token_ids)[0]
        scored = logits, probs, segments.weight[:, self.rows]
        info = unrolled_loss(*scored, self.loss_of_token, self.decay)[1]

        return info, accepted_lengths(*scored)

    def emphasis(self, segments: Segments):
        """What each trained pair counts, `[b, t]`."""
        weight = segments.weight[:, self.rows]
        if self.position_decay != 1.0:
            weight = weight * self.position_decay ** jnp.arange(weight.shape[1])

        if self.token_share < 1.0:
            key = _batch_key(segments)
            is_drawn = jax.random.bernoulli(key, self.token_share, weight.shape)
            weight = weight * is_drawn

        return weight

    def mass(self, segments: Segments, shared, entries):
        """The target's mass on tokens, over all trained pairs."""
        probs = _probs_of(segments, shared, entries, self.rows)
        return jnp.einsum("btq,bt->q", probs, segments.weight[:, self.rows])

    def sums(self, params, segments, counted, shared, token_ids, candidates, span):
        """Sums over a span of pairs that the loss is made of; see `learners.parts`."""
        first, last = span
        # A draft of the span's last pair is as many tokens long as all others are.
        end = self.num_context + last + self.num_steps
        window = jax.tree.map(lambda x: x[:, :end], segments.feedback)
        logits = self.unroll(
            params,
            token_ids,
            shared,
            window,
            segments.start,
            num_context=self.num_context + first,
            num_steps=self.num_steps,
            candidates=candidates,
        )
        entries = candidates
        if token_ids is not None:
            entries = token_ids if candidates is None else token_ids[candidates]
        here = slice(self.num_context + first + 1, end)

        return loss_sums(
            logits,
            _probs_of(segments, shared, entries, here),
            segments.weight[:, here],
            self.loss_of_token,
            self.positions,
            counted[:, first : last + self.num_steps - 1],
            segments.is_fresh,
        )

    def _targets(self, segments: Segments, shared, token_ids):
        """The target's probabilities and states after each trained pair."""
        feedback = segments.feedback
        assert feedback.hidden is not None, "features are recorded"
        assert feedback.logsumexp is not None, "features are recorded"
        # Recorded states and the frozen head give the target's probabilities: the
        # target itself is not run again.
        head = dequantized(frozen_head(shared, token_ids))
        hidden = feedback.hidden[:, self.rows].astype(jnp.float32)

        return target_probs(head, hidden, feedback.logsumexp[:, self.rows]), hidden

    def _forward(self, unroll, params, segments, shared, token_ids, candidates=None):
        return unroll(
            params,
            token_ids,
            shared,
            segments.feedback,
            segments.start,
            num_context=self.num_context,
            num_steps=self.num_steps,
            candidates=candidates,
        )


def _probs_of(segments: Segments, shared, entries, where: slice):
    """The target's probabilities of some tokens, by their ids; None are all."""
    feedback = segments.feedback
    assert feedback.hidden is not None, "features are recorded"
    assert feedback.logsumexp is not None, "features are recorded"
    head = dequantized(rows_of(shared.head, entries))
    hidden = feedback.hidden[:, where].astype(jnp.float32)

    return target_probs(head, hidden, feedback.logsumexp[:, where])


def _batch_key(segments: Segments):
    """Randomness that is a function of the batch, so that updates stay pure."""
    mixed = jnp.sum(segments.feedback.tokens, dtype=jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), mixed)
