# SPDX-License-Identifier: Apache-2.0
"""Learning the draft's last layer alone, from states that drafting left behind.

The output projection is a softmax regression: convex, and learned without a pass
through any layer, because the states that it read were computed while drafting. Each
verified token is one sample: the state from which the draft predicted it, and the token
that the target emitted there, which for sampled output is an unbiased draw from the
target's distribution. The target's logits are not needed at all.

A step is preconditioned and damped as `learners.projection` says: with `rate` 1 each
sample would move its own logits by exactly the error of its probabilities.

What was learned of one kind of text may be in the way of another, on which the draft
was good before. So the projection that learning began with is asked beside the learned
one, and while it was right more often of late, rows go back towards it.

Sampled tokens are draws of the target's *processed* law (`ospec_jax.sampling`), and a
drawn child is one of the draft's, processed likewise. So the model that is fitted to
them is the processed draft: softmax(z / T) of its logits z at temperature T, cut by
top-k and top-p where the request asked for these. Its logits then learn the target's
raw ones, whatever the temperature, and processing them again is right. Greedy tokens
are labels of the softmax itself: at temperature 0 the processed draft has no gradient.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.config.learner import Effort, Method, Recording, check, check_finite
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
from ospec_jax.sampling import processed_probs
from ospec_jax.types import SamplingParams
from ospec_jax.typing import typed

SHORTEST = 0.5
"""Least factor that a temperature puts on a step. Near temperature 0 the curvature of
wrong predictions is all but zero, and steps as short as the temperature, made for the
right ones, would never correct them: at 0.2, 64 draws by step, acceptance rises from
0.13 to 0.89 in 1,000 steps as short as that, and to 0.94 in steps of 0.5."""
_PROBE_EVERY = 2
"""Updates, mostly answers, in one of which the projection that learning began with is
asked, too: a second product, with all of the draft's vocabulary."""
_NUM_PROBES = 16
"""Samples that it is asked of then, at most."""
_LEAD_FADING = 0.9
"""Factor on the lead each time: some twenty answers count. Measured together with
`head_return`; where a hundred count the way back begins too late."""


@dataclasses.dataclass(frozen=True)
class LastLayer(Method):
    """Settings of the learner `head`, which `online.last_layer` trains.

    Attributes:
      head_rate: Step size; 1 is a whole Newton step for a token.
      head_damping: Of the preconditioner; see this module.
      head_patience: Squared error that a token's row takes before its steps shorten to
        seven tenths; a draft far from home learns faster with 16 or 64.
      head_return: Part of the way back to where it began, that a row goes with a step
        which changes it, while the projection that learning began with was right more
        often of late; 0 for none.
      head_every: Answers, of which one is learned from while what was learned is no
        better than the projection that learning began with, and the square of it behind
        64 answers; 1 learns from all. The first 16 answers are, and all without
        `head_return`, which asks that projection.
      head_candidates: Draft tokens whose rows of the projection one step may change.
      num_steps: Drafted tokens over which `pace` counts what learning gains.
    """

    parts: ClassVar[tuple[type, ...]] = (Effort,)
    recording: ClassVar[Recording] = "states"

    head_rate: float = 1.0
    head_damping: float = 0.1
    head_patience: float = 4.0
    head_return: float = 0.1
    head_every: int = 4
    head_candidates: int = 256
    num_steps: int = 3

    def __post_init__(self):
        check_finite(self)
        check(self, "head_rate head_damping head_patience", lambda x: x > 0, "above 0")
        check(self, "head_return", lambda x: 0 <= x <= 1, "from 0 to 1")
        check(
            self, "head_candidates head_every num_steps", lambda x: x >= 1, "1 or more"
        )


def head_learner(
    rate: float = 1.0,
    damping: float = 0.1,
    num_candidates: int = 256,
    patience: float = 4.0,
    fading: float = 0.999,
    pull: float = 0.0,
) -> HeadLearner:
    """Builds the learner.

    Args:
      rate: Of the step; 1 is a whole Newton step for a sample.
      damping: Added to the second moment, relative to its mean eigenvalue.
      num_candidates: Rows that an update may change: those of the emitted tokens, and
        of those with most of the draft's probability. The gradient of the others, all
        but zero, is dropped.
      patience: Squared error that a row takes before its steps shorten to seven
        tenths; they go on shrinking with the root of it.
      fading: Factor on the old second moment and the old errors, by update.
      pull: Part of the way back that a row goes while the lead is negative.
    """

    def init(kernel) -> HeadState:
        state = new_state(kernel)
        if not pull:
            return state

        # A copy: the projection itself is overwritten.
        origin = jnp.copy(state.kernel)
        return state.replace(reference=origin, lead=jnp.zeros(()))

    @typed
    def update(state: HeadState, samples: HeadSamples):
        seen = find_directions(state, samples, damping, fading)
        lead = _lead(state, samples) if pull else None
        # From here on `logits` are u = z / T.
        if samples.sampling is not None:
            scaled = samples.logits / samples.sampling.temperature
            samples = samples.replace(logits=scaled)

        # The step: each sample's error along its direction, so that it moves its own
        # logits by exactly its error at `rate` 1.
        total = jax.nn.logsumexp(samples.logits, axis=-1, keepdims=True)
        error, rows = _errors(samples, total, num_candidates)
        energy = fading * state.energy
        steps = damped_rate(rate, energy[rows], patience)
        shift = -steps[:, None] * (error.T @ seen.along)
        if samples.sampling is not None:
            # The step above is a whole Newton step on u = z / T. On z = T u a sample's
            # gradient is 1 / T of that on u and its curvature 1 / T**2, so the step is
            # T times as long: u moves by the error of its probabilities, as ever.
            shift = jnp.maximum(samples.sampling.temperature, SHORTEST) * shift

        if lead is not None:
            assert state.reference is not None, "it began with one"
            back = state.reference[rows] - state.kernel[rows]
            shift = shift + jnp.where(lead < 0, pull, 0.0) * back

        energy = energy.at[rows].add(jnp.sum(error**2, axis=0))
        kept = jnp.zeros(()) if state.lead is None else state.lead
        state, shift, is_finite = moved(state, rows, shift, energy, seen)
        if lead is not None:
            state = state.replace(lead=jnp.where(is_finite, lead, kept))
        step_norm = jnp.sqrt(jnp.sum(shift**2))

        return state, rows, _info(samples, total, step_norm, ~is_finite)

    return HeadLearner(init, update)


def _lead(state: HeadState, samples: HeadSamples) -> Float[Array, ""]:
    """The lead with these samples, if it is their turn."""
    before = state.lead
    assert before is not None, "it began with one"
    every = max(1, samples.labels.shape[0] // _NUM_PROBES)
    few = jax.tree.map(lambda x: x[::every], samples.replace(sampling=None))
    is_inside, labels = find_inside(few)
    num_right = lambda logits, axis: jnp.sum(
        is_inside & (jnp.argmax(logits, axis=axis) == labels)
    )

    def asked():
        # The large matrix comes first: XLA's product takes a third less time so.
        origin = state.reference @ few.inputs.T
        gained = num_right(few.logits, axis=1) - num_right(origin, axis=0)
        return _LEAD_FADING * before + gained

    is_due = state.num_updates % _PROBE_EVERY == 0
    return jax.lax.cond(is_due, asked, lambda: before)


def _errors(samples: HeadSamples, total, num_candidates: int):
    """Probabilities less one at the label, `[n, c]`, of the candidate rows `[c]`.

    Where tokens are cut off, this is the gradient of the cross-entropy of those that
    are left; a label among the others is pulled up until it is one of them, and what
    the target cuts off is pushed down until the draft does so, too.

    Args:
      samples: With logits at their temperature.
      total: `[n, 1]` logsumexp of the logits.
    """
    is_inside, labels = find_inside(samples)
    is_real = samples.is_real[:, None]
    probs = lambda logits: jnp.exp(logits - total) * is_real
    kept = _kept_probs(samples)
    # Emitted tokens come first, whatever the draft thought of them.
    mass = jnp.sum(probs(samples.logits) if kept is None else kept, axis=0)
    mass = mass.at[labels].add(jnp.where(is_inside, 1e6, 0.0))
    rows = jax.lax.top_k(mass, min(num_candidates, mass.shape[0]))[1]
    is_label = (rows == labels[:, None]) & is_inside[:, None]
    if kept is not None:
        return kept[:, rows] - is_label, rows

    return probs(samples.logits[:, rows]) - is_label, rows


def _kept_probs(samples: HeadSamples):
    """The draft's `[n, q]` after top-k and top-p; None where nothing is cut off.

    Args:
      samples: With logits at their temperature.
    """
    sampling = samples.sampling
    if sampling is None or sampling.top_k is None or sampling.top_p is None:
        return None

    each = lambda value: jnp.broadcast_to(value, samples.labels.shape)
    params = SamplingParams(
        temperature=jnp.ones(samples.labels.shape),
        top_k=each(sampling.top_k),
        top_p=each(sampling.top_p),
        min_p=None if sampling.min_p is None else each(sampling.min_p),
    )
    return processed_probs(samples.logits, params) * samples.is_real[:, None]


def drawn_probs(samples: HeadSamples) -> Float[Array, "n q"]:
    """What tokens would be drawn from, of real samples; 0 of others.

    Args:
      samples: With logits at their temperature.
    """
    kept = _kept_probs(samples)
    if kept is not None:
        return kept

    return jax.nn.softmax(samples.logits, axis=-1) * samples.is_real[:, None]


def _info(samples: HeadSamples, total, step_norm, is_refused) -> HeadInfo:
    is_inside, labels = find_inside(samples)
    chosen = jnp.take_along_axis(samples.logits, labels[:, None], axis=1)
    is_right = is_inside & (chosen[:, 0] >= jnp.max(samples.logits, axis=-1))
    losses = (total - chosen)[:, 0] * is_inside

    return HeadInfo(
        loss=share_of(losses, is_inside),
        agreement=share_of(is_right, samples.is_real),
        num_samples=jnp.sum(samples.is_real),
        step_norm=step_norm,
        num_refused=is_refused.astype(jnp.int32),
    )
