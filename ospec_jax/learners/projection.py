# SPDX-License-Identifier: Apache-2.0
"""What learners of a draft's output projection share: samples, state, and steps.

States are far from isotropic: a few directions carry most of their energy, and plain
gradient descent moves along little else. So a step is preconditioned with the inverse
second moment of the states, an online Newton step whose Hessian is taken to be the same
for all tokens of the vocabulary, and scaled so that an error of 1 moves its sample's
own logit by 1 (as normalised LMS does). Rows of tokens that have been corrected often
take shorter steps, as with AdaGrad: where the draft is at home, whole steps would only
follow the noise of single tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.learners.base import chosen
from ospec_jax.learners.inverse import inverse
from ospec_jax.typing import struct

REFRESH = 8
"""Updates between two inversions of the second moment, at first; later it moves less,
and is inverted each `REFRESH**2` updates."""


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
      logits: `[n, q]` of the draft; of no tokens at all, q = 0, for rules that read
        `choices` instead.
      labels: `[n]` what the target emitted, as entries of the draft vocabulary; -1 for
        tokens outside.
      is_real: `[n]` whether there is a sample at all.
      sampling: Of the labels; None for greedy ones, and for those drawn at temperature
        1 from all tokens: both are fitted by the softmax of the logits.
      choices: `[n]` what the draft took for most probable, likewise; -1 where that is
        not known. None where nobody reads it.
    """

    inputs: Float[Array, "n d"]
    logits: Float[Array, "n q"]
    labels: Int[Array, " n"]
    is_real: Bool[Array, " n"]
    sampling: HeadSampling | None = None
    choices: Int[Array, " n"] | None = None


@struct
class HeadState:
    """What a learner keeps beside the projection.

    Attributes:
      kernel: The projection, in float32.
      moment: Sum of the inputs' outer products, fading.
      weight: Of that sum: samples, fading likewise.
      preconditioner: Inverse of the damped mean outer product.
      energy: Sum of each row's squared errors, fading.
      num_updates: Updates done.
      reference: The projection that preferences are held against, or that a softmax
        regression began with; None where nobody reads it.
      lead: How many more tokens of late the projection had right than its reference;
        None likewise.
    """

    kernel: Float[Array, "q d"]
    moment: Float[Array, "d d"]
    weight: Float[Array, ""]
    preconditioner: Float[Array, "d d"]
    energy: Float[Array, " q"]
    num_updates: Int[Array, ""]
    reference: Float[Array, "q d"] | None = None
    lead: Float[Array, ""] | None = None


class HeadInfo(NamedTuple):
    """For looking at.

    Attributes:
      loss: The mean of what the rule makes smaller, nats. Of softmax steps it is the
        cross-entropy of the tokens inside the draft vocabulary, of sampled ones at
        their temperature, nothing being cut off; of preference steps that of the pairs.
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
        are as before, and a row may be named more than once. All of the state is as
        before, if the new one would not be finite.
    """

    init: Callable
    update: Callable


class Directions(NamedTuple):
    """Where samples point, and the second moment that tells.

    Attributes:
      along: `[n, d]`: a sample's logit moves by what its row moves along this.
      moment: As in `HeadState`, with these samples; likewise the others.
    """

    along: Float[Array, "n d"]
    moment: Float[Array, "d d"]
    weight: Float[Array, ""]
    preconditioner: Float[Array, "d d"]


def new_state(kernel: Float[Array, "q d"]) -> HeadState:
    """A state that has seen nothing."""
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


def find_directions(
    state: HeadState, samples: HeadSamples, damping: float, fading: float
) -> Directions:
    """Preconditions the samples' inputs.

    Args:
      damping: Added to the second moment, relative to its mean eigenvalue.
      fading: Factor on the old second moment.
    """

    def inverted(moment, weight):
        mean = moment / jnp.maximum(weight, 1.0)
        width = mean.shape[0]
        # Relative to the mean eigenvalue, so that damping means the same for states of
        # any scale; the constant serves before any state was seen.
        floor = damping * jnp.trace(mean) / width + 1e-6
        return inverse(mean + floor * jnp.eye(width))

    # The second moment of the inputs, and its inverse where that is due: it moves too
    # little to be inverted at every update.
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

    # Divided by the curvature, so that a sample's own logit moves by exactly its error.
    along = x @ preconditioner
    curvature = jnp.sum(along * x, axis=1, keepdims=True)
    along = along / jnp.maximum(curvature, 1e-9)

    return Directions(along, moment, weight, preconditioner)


def damped_rate(rate: float, energy: Array, patience: float) -> Array:
    """A row's step size, by the squared errors that it has had, as with AdaGrad."""
    return rate / jnp.sqrt(1 + energy / patience)


def moved(
    state: HeadState,
    rows: Int[Array, " c"],
    shift: Float[Array, "c d"],
    energy: Float[Array, " q"],
    seen: Directions,
) -> tuple[HeadState, Float[Array, "c d"], Bool[Array, ""]]:
    """Takes a step, or none of it where anything would not be finite.

    Returns:
      The state behind it, the shift that was done, and whether that is finite.
    """
    # The projection may be served already, and is overwritten: refused here, or never.
    # Only some of its rows change, so that all of it need not be read.
    kept = state.moment, state.preconditioner, state.energy
    changed = seen.moment, seen.preconditioner, energy
    results = state.kernel[rows] + shift, shift, *changed
    is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in results]))

    shift = jnp.where(is_finite, shift, 0.0)
    moment, preconditioner, energy = chosen(is_finite, changed, kept)
    state = state.replace(
        kernel=state.kernel.at[rows].add(shift),
        moment=moment,
        weight=jnp.where(is_finite, seen.weight, state.weight),
        preconditioner=preconditioner,
        energy=energy,
        num_updates=state.num_updates + is_finite,
    )

    return state, shift, is_finite


def find_inside(samples: HeadSamples) -> tuple[Bool[Array, " n"], Int[Array, " n"]]:
    """Which samples have a label in the draft vocabulary, and labels for all."""
    is_inside = samples.is_real & (samples.labels >= 0)
    return is_inside, jnp.where(is_inside, samples.labels, 0)


def share_of(found: Array, of: Array) -> Float[Array, ""]:
    """The sum of some values over that of others, 0 where that is nothing."""
    return jnp.sum(found) / jnp.maximum(jnp.sum(of), 1)
