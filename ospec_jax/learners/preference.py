# SPDX-License-Identifier: Apache-2.0
"""Learning the draft's last layer from its rejected tokens: preferences by token.

Where the draft's most probable token r is not the target's token c, the pair says that
c is to be preferred. The loss is that of direct preference optimisation (Rafailov et
al., arXiv 2305.18290, equation 7) for answers of one token,

    -log sigmoid(beta * margin), margin = (z_c - z_r) - (z_c' - z_r'),

of the draft's logits z, and of z' by the projection that a span of answers began with.
OnlineSPEC's Online-LR (arXiv 2603.12617) does the same with whole steps of reasoning.
The softmax's normaliser is the same for both tokens and falls out, so a pair reads and
moves two rows of the projection, where a softmax step computes the logits of all.

The gradient is taken without its constant beta / 2, so `rate` 1 raises c's logit by
2 sigmoid(-beta * margin) nats, 1 at first. Of that r's logit falls by `rejected_weight`
alone, where the loss as published has 1: a softmax step would raise c by 1 - p(c),
which is nearly 1 where c was not drafted, and lower r by p(r), which is much less.
Directions and the damping of rows are those of `learners.projection`.

By default no reference is kept. All pairs are fresh ones then, and a step is that of a
structured perceptron (Collins, EMNLP 2002): with a reference renewed every eight
answers a weak draft gained less on every stream that was tried (`docs/results.md`).

A greedy answer's first rejected token is such an r, so what is learned is the event
that counts there. A sampled c is a draw. Against the most probable token its pairs
would only come to rest where the draft's first choice changes as often as the target's
draws do, and that choice is accepted less than the one best token. So sampled answers
are left out (`online.last_layer`), as are those of adjusted logits. Where a suggestion
was drafted instead of the draft's own token, r is still the latter: what an n-gram
suggests, no projection changes. A c outside of the draft vocabulary makes no pair.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ospec_jax.config.learner import Recording, check
from ospec_jax.learners.last_layer import LastLayer
from ospec_jax.learners.projection import (
    HeadInfo,
    HeadLearner,
    HeadSamples,
    HeadState,
    damped_rate,
    find_directions,
    find_inside,
    moved,
    new_state,
    share_of,
)
from ospec_jax.typing import typed


@dataclasses.dataclass(frozen=True)
class Preference(LastLayer):
    """Settings of the learner `preference`, which `online.last_layer` trains.

    Attributes:
      head_rate: Nats by which a step raises the target's token of a fresh pair.
      head_candidates: Of the softmax steps.
      beta: How fast steps shorten while a pair's margin grows, per nat; like
        `margin_cap` without effect where there is no reference.
      rejected_weight: Of that, what the draft's token falls by; the loss has 1.
      margin_cap: Nats from which a pair moves nothing.
      reference_answers: Answers for which the projection stays that margins are counted
        from; 0 counts none, and all steps are those of fresh pairs.
      softmax_every: One answer of so many is learned by `head`'s softmax step instead;
        0 for none.
    """

    recording: ClassVar[Recording] = "choices"

    head_patience: float = 16.0
    beta: float = 1.0
    rejected_weight: float = 0.3
    margin_cap: float = 4.0
    reference_answers: int = 0
    softmax_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        check(self, "beta margin_cap", lambda x: x > 0, "above 0")
        check(self, "rejected_weight", lambda x: 0 <= x <= 1, "0 to 1")
        check(self, "reference_answers softmax_every", lambda x: x >= 0, "0 or more")


def preference_learner(
    rate: float = 1.0,
    damping: float = 0.1,
    beta: float = 1.0,
    rejected_weight: float = 0.3,
    margin_cap: float = 4.0,
    patience: float = 16.0,
    fading: float = 0.999,
) -> HeadLearner:
    """Builds the learner.

    Args:
      rate: Of the step; 1 raises the target's token of a fresh pair by 1 nat.
      damping: Added to the second moment, relative to its mean eigenvalue.
      beta: Of the loss.
      rejected_weight: Of the step on the draft's token; 1 is the loss's own.
      margin_cap: Nats from which a pair moves nothing.
      patience: Squared error that a row takes before its steps shorten to seven
        tenths; they go on shrinking with the root of it.
      fading: Factor on the old second moment and the old errors, by update.
    """

    @typed
    def update(state: HeadState, samples: HeadSamples):
        seen = find_directions(state, samples, damping, fading)
        is_pair, rows = _pairs(samples)
        margin = _margin(state, samples, rows)

        # Both rows of a pair: up for the target's token, down for the draft's.
        error = 2 * jax.nn.sigmoid(-beta * margin) * (is_pair & (margin < margin_cap))
        errors = jnp.concatenate([error, -rejected_weight * error])
        along = jnp.concatenate([seen.along, seen.along])
        energy = fading * state.energy
        steps = damped_rate(rate, energy[rows], patience) * errors
        shift = steps[:, None] * along

        energy = energy.at[rows].add(errors**2)
        state, shift, is_finite = moved(state, rows, shift, energy, seen)
        losses = is_pair * jax.nn.softplus(-beta * margin)
        is_right = samples.is_real & (samples.choices == samples.labels)
        info = HeadInfo(
            loss=share_of(losses, is_pair),
            agreement=share_of(is_right, samples.is_real),
            num_samples=jnp.sum(samples.is_real),
            step_norm=_norm(rows, shift),
            num_refused=(~is_finite).astype(jnp.int32),
        )

        return state, rows, info

    return HeadLearner(new_state, update)


def _pairs(samples: HeadSamples):
    """Which samples are pairs, `[n]`, and the rows of their tokens, `[2 n]`.

    The first `n` rows are those of the target's tokens, the others of the draft's; 0
    where there is no pair.
    """
    assert samples.choices is not None, "somebody recorded what the draft chose"
    is_inside, labels = find_inside(samples)
    is_pair = is_inside & (samples.choices >= 0) & (samples.choices != labels)
    rows = jnp.concatenate([labels, samples.choices])

    return is_pair, jnp.where(jnp.tile(is_pair, 2), rows, 0)


def _margin(state: HeadState, samples: HeadSamples, rows):
    """By how many nats each pair's difference has grown since the reference, `[n]`."""
    n = samples.labels.shape[0]
    if state.reference is None:
        return jnp.zeros((n,))

    grown = state.kernel[rows] - state.reference[rows]
    return jnp.sum((grown[:n] - grown[n:]) * samples.inputs, axis=1)


def _norm(rows, shift):
    """Of what all rows moved by together: pairs may share one."""
    is_same = rows[:, None] == rows
    square = jnp.sum(jnp.where(is_same, shift @ shift.T, 0.0))
    return jnp.sqrt(jnp.maximum(square, 0.0))
