# SPDX-License-Identifier: Apache-2.0
"""A convex stand-in for a draft: parameters that chase points, gradients counted."""

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.learners.base import LearnerInfo, Segments
from ospec_jax.learners.objective import Objective
from ospec_jax.types import Feedback


class Counter:
    """Gradients computed, whatever the compiled program looks like."""

    def __init__(self):
        self.gradients = 0

    def add(self):
        self.gradients += 1


def chasing(counter: Counter | None = None) -> Objective:
    """f(w) = mean of |w - point|^2 / 2 over the points of a batch."""

    @jax.custom_vjp
    def watched(params):
        return params

    def backward(_, cotangent):
        if counter is not None:
            jax.debug.callback(counter.add)
        return (cotangent,)

    watched.defvjp(lambda params: (params, None), backward)

    def loss(params, segments, shared, token_ids):
        gaps = watched(params)["w"] - segments.feedback.hidden[:, 0]
        weight = segments.weight[:, 0]
        total = jnp.maximum(jnp.sum(weight), 1e-6)
        value = jnp.sum(0.5 * jnp.sum(gaps**2, -1) * weight) / total
        nothing = jnp.zeros(1)
        fresh = weight if segments.is_fresh is None else weight * segments.is_fresh
        fresh_total = jnp.maximum(jnp.sum(fresh), 1e-6)
        info = LearnerInfo(
            value, nothing, nothing, jnp.zeros(()), weight.sum(),
            fresh_loss=jnp.sum(0.5 * jnp.sum(gaps**2, -1) * fresh) / fresh_total,
            fresh_weight=fresh.sum(),
        )  # fmt: skip
        return value, info

    def score(params, segments, shared, token_ids):
        info = loss(params, segments, shared, token_ids)[1]
        return info, jnp.zeros(segments.weight.shape[0])

    return Objective(loss, score)


def points(values, weight=1.0, is_fresh=None) -> Segments:
    """A batch of points `[b, d]`."""
    values = jnp.asarray(values, jnp.float32)
    b = values.shape[0]
    feedback = Feedback(
        tokens=jnp.zeros((b, 1), jnp.int32),
        taps=jnp.zeros((b, 1, 1)),
        hidden=values[:, None],
        logsumexp=jnp.zeros((b, 1)),
    )
    if is_fresh is not None:
        is_fresh = jnp.asarray(is_fresh)
    start, weights = jnp.zeros(b, jnp.int32), jnp.full((b, 1), weight)
    return Segments(feedback, start, weights, is_fresh)


def run(learner, stream, dim=4):
    """Plays a stream `[t, b, d]`; true losses `[t]` before each update, infos, state.

    A round's loss is the one at the played parameters, on a batch they never saw.
    """
    state = learner.init({"w": jnp.zeros(dim)})

    def play(state, values):
        segments = points(values)
        before = learner.evaluate(state.params, segments, None, None)[0].loss
        state, info = learner.update(learner.begin(state), segments, None, None)
        return state, (before, info, state.params["w"])

    state, (losses, infos, path) = jax.jit(
        lambda state, stream: jax.lax.scan(play, state, stream)
    )(state, jnp.asarray(stream, jnp.float32))
    return np.asarray(losses), infos, state, np.asarray(path)


def drifting(num_rounds=300, speed=0.05, noise=0.5, batch=2, dim=4, seed=0):
    """Points around a centre that walks at random, `[t, b, d]`."""
    rng = np.random.default_rng(seed)
    centre = np.cumsum(speed * rng.normal(size=(num_rounds, 1, dim)), axis=0)
    return centre + noise * rng.normal(size=(num_rounds, batch, dim))


def shifting(num_rounds=400, every=100, jump=3.0, noise=1.0, batch=2, dim=4, seed=0):
    """Points around a centre that rests, and jumps now and then, `[t, b, d]`."""
    rng = np.random.default_rng(seed)
    centres = jump * rng.normal(size=(-(-num_rounds // every), 1, dim))
    centre = np.repeat(centres, every, axis=0)[:num_rounds]
    return centre + noise * rng.normal(size=(num_rounds, batch, dim))
