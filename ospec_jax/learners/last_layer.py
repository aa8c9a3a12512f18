# SPDX-License-Identifier: Apache-2.0
"""Learning the draft's last layer alone, from states that drafting left behind.

The output projection is a softmax regression: convex, and learned without a pass
through any layer, because the states that it read were computed while drafting. Each
verified token is one sample: the state from which the draft predicted it, and the token
that the target emitted there, which for sampled output is an unbiased draw from the
target's distribution. The target's logits are not needed at all.

States are far from isotropic: a few directions carry most of their energy, and plain
gradient descent moves along little else. So a step is preconditioned with the inverse
second moment of the states, an online Newton step whose Hessian is taken to be the same
for all tokens of the vocabulary, and scaled so that with `rate` 1 each sample would
move its own logits by exactly the error of its probabilities (as normalised LMS does).
Rows of tokens that have been corrected often take shorter steps, as with AdaGrad: where
the draft is at home, whole steps would only follow the noise of single tokens.

Sampled tokens are draws of the target's *processed* law (`ospec_jax.sampling`), and a
drawn child is one of the draft's, processed likewise. So the model that is fitted to
them is the processed draft: softmax(z / T) of its logits z at temperature T, cut by
top-k and top-p where the request asked for these. Its logits then learn the target's
raw ones, whatever the temperature, and processing them again is right. Greedy tokens
are labels of the softmax itself: at temperature 0 the processed draft has no gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config.learner import Effort, Method, Recording, check, check_finite
from ospec_jax.learners.base import chosen
from ospec_jax.learners.inverse import inverse
from ospec_jax.sampling import processed_probs
from ospec_jax.types import SamplingParams
from ospec_jax.typing import struct, typed

REFRESH = 8
"""Updates between two inversions of the second moment, at first; later it moves less,
and is inverted each `REFRESH**2` updates."""

SHORTEST = 0.5
"""Least factor that a temperature puts on a step. Near temperature 0 the curvature of
wrong predictions is all but zero, and steps as short as the temperature, made for the
right ones, would never correct them: at 0.2, 64 draws by step, acceptance rises from
0.13 to 0.89 in 1,000 steps as short as that, and to 0.94 in steps of 0.5."""


@dataclasses.dataclass(frozen=True)
class LastLayer(Method):
    """Settings of the learner `head`, which `online.last_layer` trains.

    Attributes:
      head_rate: Step size; 1 is a whole Newton step for a token.
      head_damping: Of the preconditioner; see this module.
      head_candidates: Draft tokens whose rows of the projection one step may change.
      num_steps: Drafted tokens over which `pace` counts what learning gains.
    """

    parts: ClassVar[tuple[type, ...]] = (Effort,)
    recording: ClassVar[Recording] = "states"

    head_rate: float = 1.0
    head_damping: float = 0.1
    head_candidates: int = 256
    num_steps: int = 3

    def __post_init__(self):
        check_finite(self)
        check(self, "head_rate head_damping", lambda x: x > 0, "above 0")
        check(self, "head_candidates num_steps", lambda x: x >= 1, "1 or more")


@struct
class HeadSampling:
    """How labels were drawn from the target's logits.

    Attributes:
      temperature: Above 0.
      top_k: As in `SamplingParams`; None, with `top_p`, where nothing is cut off.
      top_p: Likewise.
      min_p: Likewise; None for none.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None


@struct
class HeadSamples:
    """Predictions and what came instead.

    Attributes:
      inputs: `[n, d]` what the output projection read.
      logits: `[n, q]` of the draft.
      labels: `[n]` what the target emitted, as entries of the draft vocabulary; -1 for
        tokens outside.
      is_real: `[n]` whether there is a sample at all.
      sampling: Of the labels; None for greedy ones, and for those drawn at temperature
        1 from all tokens: both are fitted by the softmax of the logits.
    """

    inputs: Float[Array, "n d"]
    logits: Float[Array, "n q"]
    labels: Int[Array, " n"]
    is_real: Bool[Array, " n"]
    sampling: HeadSampling | None = None


@struct
class HeadState:
    """What the learner keeps beside the projection.

    Attributes:
      kernel: The projection, in float32.
      moment: Sum of the inputs' outer products, fading.
      weight: Of that sum: samples, fading likewise.
      preconditioner: Inverse of the damped mean outer product.
      energy: Sum of each row's squared errors, fading.
      num_updates: Updates done.
    """

    kernel: Float[Array, "q d"]
    moment: Float[Array, "d d"]
    weight: Float[Array, ""]
    preconditioner: Float[Array, "d d"]
    energy: Float[Array, " q"]
    num_updates: Int[Array, ""]


class HeadInfo(NamedTuple):
    """For looking at.

    Attributes:
      loss: Mean cross-entropy of the tokens inside the draft vocabulary, nats; of
        sampled ones at their temperature, nothing being cut off.
      agreement: Share of samples whose likeliest token was the target's. The samples
        are the draft's own, so for a chain of likeliest tokens this is the share of
        drafted ones that is right; of drawn children, and with several of them, other
        tokens are accepted, too.
      num_samples: How many there were.
      step_norm: How far the projection moved.
      num_refused: Updates that would not have been finite, and were not done.
    """

    loss: Float[Array, ""]
    agreement: Float[Array, ""]
    num_samples: Int[Array, ""]
    step_norm: Float[Array, ""]
    num_refused: Int[Array, ""] | int = 0


class HeadLearner(NamedTuple):
    """A learner of output projections.

    Attributes:
      init: `kernel [q, d] -> HeadState`.
      update: `(state, samples) -> (state, rows [c], info)`; the projection's other rows
        are as before. All of the state is, if the new one would not be finite.
    """

    init: Callable
    update: Callable


def head_learner(
    rate: float = 1.0,
    damping: float = 0.1,
    num_candidates: int = 256,
    patience: float = 4.0,
    fading: float = 0.999,
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
    """

    def init(kernel) -> HeadState:
        width = kernel.shape[1]
        # A copy: the state is donated, and the caller's kernel may be in use.
        return HeadState(
            kernel=jnp.array(kernel, jnp.float32, copy=True),
            moment=jnp.zeros((width, width)),
            weight=jnp.zeros(()),
            preconditioner=jnp.eye(width),
            energy=jnp.zeros(kernel.shape[0]),
            num_updates=jnp.zeros((), jnp.int32),
        )

    def inverted(moment, weight):
        mean = moment / jnp.maximum(weight, 1.0)
        width = mean.shape[0]
        # Relative to the mean eigenvalue, so that damping means the same for states of
        # any scale; the constant serves before any state was seen.
        floor = damping * jnp.trace(mean) / width + 1e-6
        return inverse(mean + floor * jnp.eye(width))

    @typed
    def update(state: HeadState, samples: HeadSamples):
        # The second moment of the inputs, and its inverse where that is due: it moves
        # too little to be inverted at every update.
        x = samples.inputs * samples.is_real[:, None]
        moment = fading * state.moment + x.T @ x
        weight = fading * state.weight + jnp.sum(samples.is_real)
        is_early = state.num_updates < REFRESH**2
        is_due = state.num_updates % jnp.where(is_early, REFRESH, REFRESH**2) == 0
        preconditioner = jax.lax.cond(
            is_due & (weight > 0),
            inverted,
            lambda *_: state.preconditioner,
            moment,
            weight,
        )
        # From here on `logits` are u = z / T.
        if samples.sampling is not None:
            scaled = samples.logits / samples.sampling.temperature
            samples = samples.replace(logits=scaled)

        # The step: each sample's error along its preconditioned input, divided by the
        # curvature, so that it moves its own logits by exactly its error at `rate` 1.
        total = jax.nn.logsumexp(samples.logits, axis=-1, keepdims=True)
        error, rows = _errors(samples, total, num_candidates)
        direction = x @ preconditioner
        curvature = jnp.sum(direction * x, axis=1, keepdims=True)
        direction = direction / jnp.maximum(curvature, 1e-9)

        # Rows that were often corrected take shorter steps, as with AdaGrad.
        energy = fading * state.energy
        steps = rate / jnp.sqrt(1 + energy[rows] / patience)
        shift = -steps[:, None] * (error.T @ direction)
        if samples.sampling is not None:
            # The step above is a whole Newton step on u = z / T. On z = T u a sample's
            # gradient is 1 / T of that on u and its curvature 1 / T**2, so the step is
            # T times as long: u moves by the error of its probabilities, as ever.
            shift = jnp.maximum(samples.sampling.temperature, SHORTEST) * shift

        energy = energy.at[rows].add(jnp.sum(error**2, axis=0))
        # The projection may be served already, and is overwritten: refused here, or
        # never. Only some of its rows change, so that all of it need not be read.
        kept = state.moment, state.preconditioner, state.energy
        changed = moment, preconditioner, energy
        results = state.kernel[rows] + shift, shift, *changed
        is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in results]))
        shift = jnp.where(is_finite, shift, 0.0)
        moment, preconditioner, energy = chosen(is_finite, changed, kept)
        new = HeadState(
            kernel=state.kernel.at[rows].add(shift),
            moment=moment,
            weight=jnp.where(is_finite, weight, state.weight),
            preconditioner=preconditioner,
            energy=energy,
            num_updates=state.num_updates + is_finite,
        )
        step_norm = jnp.sqrt(jnp.sum(shift**2))

        return new, rows, _info(samples, total, step_norm, ~is_finite)

    return HeadLearner(init, update)


def _inside(samples: HeadSamples):
    """Which samples have a label in the draft vocabulary, and labels for all."""
    is_inside = samples.is_real & (samples.labels >= 0)
    return is_inside, jnp.where(is_inside, samples.labels, 0)


def _errors(samples: HeadSamples, total, num_candidates: int):
    """Probabilities less one at the label, `[n, c]`, of the candidate rows `[c]`.

    Where tokens are cut off, this is the gradient of the cross-entropy of those that
    are left; a label among the others is pulled up until it is one of them, and what
    the target cuts off is pushed down until the draft does so, too.

    Args:
      samples: With logits at their temperature.
      total: `[n, 1]` logsumexp of the logits.
    """
    is_inside, labels = _inside(samples)
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


def _info(samples: HeadSamples, total, step_norm, is_refused) -> HeadInfo:
    is_inside, labels = _inside(samples)
    chosen = jnp.take_along_axis(samples.logits, labels[:, None], axis=1)
    is_right = is_inside & (chosen[:, 0] >= jnp.max(samples.logits, axis=-1))
    share = lambda x, of: jnp.sum(x) / jnp.maximum(jnp.sum(of), 1)
    losses = (total - chosen)[:, 0] * is_inside

    return HeadInfo(
        loss=share(losses, is_inside),
        agreement=share(is_right, samples.is_real),
        num_samples=jnp.sum(samples.is_real),
        step_norm=step_norm,
        num_refused=is_refused.astype(jnp.int32),
    )
