# SPDX-License-Identifier: Apache-2.0
"""The theory's bounds hold where its assumptions do."""

import numpy as np
import pytest

from ospec_jax.learners import bounds

STEPS, COST = 4, 0.1


def random_rounds(rng, num_rounds, spread):
    """Target and draft distributions `[t, v]`, `spread` apart in logits."""
    logits = rng.normal(size=(num_rounds, 12))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return softmax(logits), softmax(logits + spread * rng.normal(size=logits.shape))


def simulated_tokens(rng, acceptance, num_steps):
    """Tokens of a pass whose draft tokens are accepted one by one, by chance."""
    is_accepted = rng.random((len(acceptance), num_steps)) < acceptance[:, None]
    return 1 + np.cumprod(is_accepted, axis=1).sum(axis=1)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 1.0, 3.0])
def test_bound_stays_below_the_measured_acceleration(spread):
    """Geometric acceptance with another probability in each round."""
    rng = np.random.default_rng(int(10 * spread))
    p, q = random_rounds(rng, 20_000, spread)
    acceptance = np.minimum(p, q).sum(axis=1)
    tokens = simulated_tokens(rng, acceptance, STEPS)
    measured = bounds.acceleration_rate(tokens.mean(), STEPS, COST)
    total = (p * np.log(p / q)).sum()
    bound = bounds.acceleration_lower_bound(total, len(p), STEPS, COST)
    error = tokens.std() / np.sqrt(len(p)) / (COST * STEPS + 1)
    assert bound <= measured + 4 * error
    exact = bounds.expected_tokens(acceptance, STEPS).mean()
    assert bound <= bounds.acceleration_rate(exact, STEPS, COST) + 1e-12
    assert exact == pytest.approx(tokens.mean(), abs=5 * error * (COST * STEPS + 1))
    # A loss that the comparators leave counts like regret.
    half = bounds.acceleration_lower_bound(
        total / 2, len(p), STEPS, COST, comparator_loss=total / 2
    )
    assert half == pytest.approx(bound)


def test_bound_falls_with_regret_between_its_limits():
    total = np.linspace(0, 5000, 60)
    bound = bounds.acceleration_lower_bound(total, 1000, STEPS, COST)
    assert np.all(np.diff(bound) <= 0)
    assert bound[0] == pytest.approx((STEPS + 1) / (COST * STEPS + 1))
    assert bound[-1] == pytest.approx(1 / (COST * STEPS + 1))
    longer = bounds.acceleration_lower_bound(total[1], 2000, STEPS, COST)
    assert longer > bound[1]


def test_expected_tokens_is_the_closed_form():
    rates = np.array([0.0, 0.3, 0.9])
    closed = (1 - rates**5) / (1 - rates)
    np.testing.assert_allclose(bounds.expected_tokens(rates, 4), closed)
    assert bounds.expected_tokens(1.0, 4) == 5


class Drifting:
    """Online quadratics |w - u_t|^2 / 2 whose minimisers wander in the unit ball."""

    def __init__(self, num_rounds=400, drift=0.05, seed=0):
        steps = np.random.default_rng(seed).normal(size=(num_rounds, 3)) * drift
        points, here = [], np.zeros(3)
        for step in steps:
            here = project(here + step)
            points.append(here)
        self.points = np.array(points)
        self.path_length = bounds.path_length(points)

    def regret(self, played):
        return 0.5 * ((played - self.points) ** 2).sum()


DIAMETER = GRADIENT = 2.0


def project(w):
    return w / max(1.0, np.linalg.norm(w))


def descend(problem, step_size):
    w, played = np.ones(3) / 3, []
    for u in problem.points:
        played.append(w)
        w = project(w - step_size * (w - u))
    return np.array(played)


def optimistic(problem, step_size):
    base, hint, played, errors = np.ones(3) / 3, np.zeros(3), [], []
    for u in problem.points:
        played.append(project(base - step_size * hint))
        gradient = played[-1] - u
        errors.append(((gradient - hint) ** 2).sum())
        base, hint = project(base - step_size * gradient), gradient
    return np.array(played), errors


def ensemble(problem, num_experts, best):
    """Ader: experts on a grid about the best step size, Hedge over linear losses."""
    grid = best * 2.0 ** (np.arange(num_experts) - num_experts // 2)
    experts = np.ones((num_experts, 3)) / 3
    rate = np.sqrt(8 * np.log(num_experts) / len(problem.points))
    rate /= GRADIENT * DIAMETER
    losses, played = np.zeros(num_experts), []
    for u in problem.points:
        weights = np.exp(-rate * (losses - losses.min()))
        played.append(weights @ experts / weights.sum())
        gradient = played[-1] - u
        losses += experts @ gradient
        moved = experts - grid[:, None] * gradient
        experts = np.array([project(w) for w in moved])
    return np.array(played)


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.1, 1.0])
def test_learners_stay_below_their_bounds(drift):
    problem = Drifting(drift=drift)
    known = (len(problem.points), problem.path_length, DIAMETER, GRADIENT)
    best = bounds.best_step_size(*known)
    for step_size in (best / 3, best, 3 * best):
        bound = bounds.gradient_descent_bound(*known, step_size)
        assert problem.regret(descend(problem, step_size)) <= bound
        assert bound >= bounds.gradient_descent_bound(*known) - 1e-9
        played, errors = optimistic(problem, step_size)
        args = errors, problem.path_length, DIAMETER
        assert problem.regret(played) <= bounds.optimistic_bound(*args, step_size)
        assert bounds.optimistic_bound(*args, step_size) >= (
            bounds.optimistic_bound(*args) - 1e-9
        )
    mixed = ensemble(problem, 9, best)
    assert problem.regret(mixed) <= bounds.ensemble_bound(*known, 9)


def test_bounds_grow_with_path_length_and_hint_errors():
    of = lambda path: bounds.gradient_descent_bound(100, path, DIAMETER, GRADIENT)
    assert of(0.0) < of(1.0) < of(10.0)
    hints = lambda error: bounds.optimistic_bound([error] * 100, 1.0, DIAMETER)
    assert hints(0.0) < hints(0.1) < hints(1.0)
    assert hints(GRADIENT**2) == pytest.approx(of(1.0))


def test_path_length_is_summed_movement():
    assert bounds.path_length([[0, 0], [3, 4], [3, 4], [3, 5]]) == pytest.approx(6)
