# SPDX-License-Identifier: Apache-2.0
"""Optimism is the paper's two-state rule, and gains where gradients are alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratics import chasing, drifting, points, run

from ospec_jax.learners.base import LearnerInfo
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.objective import Objective
from ospec_jax.learners.optimistic import optimistic, projected

ETA = 0.2


def linear() -> Objective:
    """f(w) = <point, w>: gradients are what the stream says, wherever one plays."""

    def loss(params, segments, shared, token_ids):
        value = jnp.sum(params["w"] * segments.feedback.hidden[0, 0])
        nothing = jnp.zeros(1)
        return value, LearnerInfo(value, nothing, nothing, value, jnp.ones(()))

    return Objective(loss, lambda *args: (loss(*args)[1], jnp.zeros(1)))


def test_it_is_the_papers_rule():
    """Played parameters against the formulas, written out."""
    stream = drifting(num_rounds=40)
    _, infos, state, path = run(optimistic(chasing(), optax.sgd(ETA)), stream)
    learned, hint, played = np.zeros(4), np.zeros(4), np.zeros(4)
    for t, batch in enumerate(stream):
        gradient_t = played - batch.mean(0)
        error = np.sum((gradient_t - hint) ** 2)
        assert infos.extra["hint_error"][t] == pytest.approx(error, rel=1e-4)
        learned, hint = learned - ETA * gradient_t, gradient_t
        played = learned - ETA * hint
        np.testing.assert_allclose(path[t], played, atol=1e-4)
    steps = np.linalg.norm(np.diff(path, axis=0, prepend=0), axis=1)
    np.testing.assert_allclose(infos.extra["step_norm"], steps, rtol=1e-3)
    assert infos.extra["path_length"][-1] == pytest.approx(steps.sum(), rel=1e-4)
    np.testing.assert_allclose(state.opt_state.params["w"], learned, atol=1e-4)


def test_without_a_ball_it_is_optaxs_but_for_the_first_step():
    """`w_{t+1} = w_t - 2 eta g_t + eta g_{t-1}` with g_0 = 0; gradients are given."""
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(12, 1, 4)), jnp.float32)
    *_, path = run(optimistic(linear(), optax.sgd(ETA)), grads)
    optimizer = optax.optimistic_gradient_descent(ETA)
    params, opt_state = jnp.zeros(4), optimizer.init(jnp.zeros(4))
    for t, grad in enumerate(grads[:, 0]):
        updates, opt_state = optimizer.update(grad, opt_state)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(path[t], params - ETA * grads[0, 0], atol=1e-5)


@pytest.mark.parametrize("hint_decay", [0.0, 0.3])
def test_it_gains_where_gradients_are_alike(hint_decay):
    """Linear losses whose gradient turns slowly, or at random, played in a ball."""
    angle = np.linspace(0, 6 * np.pi, 300)
    turning = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]
    random = np.random.default_rng(0).permutation(turning)
    rule = lambda decay, step: optimistic(linear(), optax.sgd(step), decay, radius=2.0)
    plain = lambda stream: run(_projected_descent(2.0), stream, dim=2)[0].mean()
    ahead = lambda stream: run(rule(hint_decay, ETA), stream, dim=2)[0].mean()
    assert ahead(turning) < plain(turning) - 0.05
    assert ahead(random) > plain(random) - 0.02
    hints = lambda stream: run(rule(0.0, ETA), stream, dim=2)[1].extra["hint_error"]
    assert hints(turning)[1:].mean() < 0.01 < 1.0 < hints(random)[1:].mean()


def _projected_descent(radius):
    """Without hints: an average that keeps all of its first value, which is zero."""
    return optimistic(linear(), optax.sgd(ETA), hint_decay=1.0, radius=radius)


def test_a_steady_drift_is_tracked_as_plain_descent_does():
    """With a constant step the lag behind a quadratic's centre is the same."""
    steady = np.repeat(np.linspace(0, 20, 200)[:, None, None], 4, axis=2)
    plain = run(gradient(chasing(), optax.sgd(ETA)), steady)[0]
    losses, infos, *_ = run(optimistic(chasing(), optax.sgd(ETA)), steady)
    assert losses[50:].mean() == pytest.approx(plain[50:].mean(), rel=1e-3)
    late = infos.extra["hint_error"][100:].mean()
    assert late < 0.01 * np.mean(infos.grad_norm[100:] ** 2)


def test_noise_makes_the_hint_wrong():
    _, infos, *_ = run(
        optimistic(chasing(), optax.sgd(ETA)), drifting(speed=0.0, noise=1.0)
    )
    late = slice(50, None)
    square = np.mean(infos.grad_norm[late] ** 2)
    assert infos.extra["hint_error"][late].mean() > square


def test_an_average_of_gradients_is_the_hint():
    learner = optimistic(chasing(), optax.sgd(ETA), hint_decay=0.75)
    state = learner.init({"w": jnp.zeros(2)})
    hint = np.zeros(2)
    for value in ([1.0, 2.0], [3.0, -1.0], [0.0, 1.0]):
        grad = np.asarray(state.params["w"]) - value
        state, _ = learner.update(state, points([value]), None, None)
        hint = 0.75 * hint + 0.25 * grad
        np.testing.assert_allclose(state.opt_state.hint["w"], hint, rtol=1e-6)


def test_parameters_stay_in_the_ball():
    start = {"w": jnp.asarray([1.0, 1.0])}
    learner = optimistic(chasing(), optax.sgd(0.9), radius=0.5)
    state, update = learner.init(start), jax.jit(learner.update)
    far = points([[9.0, 1.0]])
    for _ in range(10):
        state, _ = update(state, far, None, None)
    np.testing.assert_allclose(state.params["w"], [1.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(state.opt_state.params["w"], [1.5, 1.0], atol=1e-6)
    inside = projected({"w": jnp.asarray([1.2, 1.0])}, start, 0.5)
    np.testing.assert_array_equal(inside["w"], jnp.asarray([1.2, 1.0]))


def test_with_adam_it_plays_the_step_that_the_hint_would_make():
    optimizer = optax.adam(0.1)
    learner = optimistic(chasing(), optimizer)
    state = learner.init({"w": jnp.zeros(2)})
    state, _ = learner.update(state, points([[1.0, -2.0]]), None, None)
    params, grad = jnp.zeros(2), jnp.asarray([-1.0, 2.0])
    opt_state = optimizer.init(params)
    for _ in range(2):  # the gradient that was seen, and the same one expected
        updates, opt_state = optimizer.update(grad, opt_state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.params["w"], params, rtol=1e-5)
