# SPDX-License-Identifier: Apache-2.0
"""What every learner minimises: the drafter's training pass, held against the target.

It is built once, from the drafter's `unroll`; an update rule sees only the functions.
"""

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
    # Pair i predicts the token after i + 1.
    rows = slice(num_context + 1, None)

    def targets(segments: Segments, shared, token_ids):
        """The target's probabilities and states after each trained pair."""
        feedback = segments.feedback
        assert feedback.hidden is not None, "features are recorded"
        assert feedback.logsumexp is not None, "features are recorded"
        # Recorded states and the frozen head give the target's probabilities: the
        # target itself is not run again.
        head = dequantized(frozen_head(shared, token_ids))
        hidden = feedback.hidden[:, rows].astype(jnp.float32)

        return target_probs(head, hidden, feedback.logsumexp[:, rows]), hidden

    def emphasis(segments: Segments):
        weight = segments.weight[:, rows]
        if position_decay != 1.0:
            weight = weight * position_decay ** jnp.arange(weight.shape[1])

        if token_share < 1.0:
            is_drawn = jax.random.bernoulli(
                _batch_key(segments), token_share, weight.shape
            )
            weight = weight * is_drawn

        return weight

    def forward(unroll, params, segments, shared, token_ids, candidates=None):
        return unroll(
            params,
            token_ids,
            shared,
            segments.feedback,
            segments.start,
            num_context=num_context,
            num_steps=num_steps,
            candidates=candidates,
        )

    def loss_fn(params, segments: Segments, shared, token_ids):
        probs, hidden = targets(segments, shared, token_ids)
        weight = segments.weight[:, rows]
        counted = emphasis(segments)
        candidates = None
        # Candidates are chosen by the target's mass over the whole batch, not by
        # position: one small matrix of head rows then serves all of it.
        if 0 < num_candidates < probs.shape[-1]:
            mass = jnp.einsum("btq,bt->q", probs, weight)
            candidates = jax.lax.top_k(mass, num_candidates)[1]
            probs = probs[..., candidates]

        args = params, segments, shared, token_ids, candidates

        def of_tokens(logits):
            total, info = unrolled_loss(
                logits,
                probs,
                weight,
                loss,
                decay,
                positions,
                counted,
                segments.is_fresh,
            )
            # Figures about the whole draft vocabulary would be wrong for a part of it.
            return total, info if candidates is None else info.of_candidates()

        if unroll_features is None or not feature_weight:
            return of_tokens(forward(unroll, *args))

        logits, features = forward(unroll_features, *args)
        total, info = of_tokens(logits)
        of_states = feature_loss(features, hidden, counted, decay)

        return total + of_states * feature_weight, info

    def score(params, segments: Segments, shared, token_ids):
        # With all tokens and even weights: drafts are compared by what they get
        # accepted, not by the loss that one of them was trained on.
        logits = forward(unroll, params, segments, shared, token_ids)
        probs = targets(segments, shared, token_ids)[0]
        scored = logits, probs, segments.weight[:, rows]
        return unrolled_loss(*scored, loss, decay)[1], accepted_lengths(*scored)

    def probs_of(segments: Segments, shared, entries, where: slice):
        """The target's probabilities of some tokens, by their ids; None are all."""
        feedback = segments.feedback
        assert feedback.hidden is not None, "features are recorded"
        assert feedback.logsumexp is not None, "features are recorded"
        head = dequantized(rows_of(shared.head, entries))
        hidden = feedback.hidden[:, where].astype(jnp.float32)
        return target_probs(head, hidden, feedback.logsumexp[:, where])

    def mass_of(segments: Segments, shared, entries):
        probs = probs_of(segments, shared, entries, rows)
        return jnp.einsum("btq,bt->q", probs, segments.weight[:, rows])

    def sums_of(params, segments, counted, shared, token_ids, candidates, span):
        first, last = span
        # A draft of the span's last pair is as many tokens long as all others are.
        end = num_context + last + num_steps
        window = jax.tree.map(lambda x: x[:, :end], segments.feedback)
        logits = unroll(
            params,
            token_ids,
            shared,
            window,
            segments.start,
            num_context=num_context + first,
            num_steps=num_steps,
            candidates=candidates,
        )
        entries = candidates
        if token_ids is not None:
            entries = token_ids if candidates is None else token_ids[candidates]
        here = slice(num_context + first + 1, end)
        return loss_sums(
            logits,
            probs_of(segments, shared, entries, here),
            segments.weight[:, here],
            loss,
            positions,
            counted[:, first : last + num_steps - 1],
            segments.is_fresh,
        )

    parts = Parts(
        num_context=num_context,
        num_steps=num_steps,
        num_candidates=num_candidates,
        # Which rows count follows from the draft's own choices.
        is_counted_first=positions == "rejected",
        emphasis=emphasis,
        mass=mass_of,
        sums=sums_of,
        loss=lambda sums, counted: loss_of(sums, decay, counted),
        info=lambda sums: info_of(sums, decay),
    )
    has_features = unroll_features is not None and feature_weight
    return Objective(loss=loss_fn, score=score, parts=None if has_features else parts)


def _batch_key(segments: Segments):
    """Randomness that is a function of the batch, so that updates stay pure."""
    mixed = jnp.sum(segments.feedback.tokens, dtype=jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), mixed)
