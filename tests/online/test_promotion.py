# SPDX-License-Identifier: Apache-2.0
"""Promotion follows evidence, in both directions, however often it is looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.online import promotion

LEVEL, PATIENCE = 0.1, 128


def guard_of(gains, number=1):
    guard = promotion.init_guard("served")
    for _ in range(number):
        guard = promotion.nominate(guard, "candidate")
    for gain in gains:
        guard = promotion.observe(guard, jnp.float32(gain))
    return guard


def verdict(guard, level=LEVEL, patience=PATIENCE):
    return promotion.verdict(guard, level, patience)


@pytest.mark.parametrize(("mean", "expected"), [(0.2, "promote"), (-0.2, "rollback")])
def test_clear_evidence_decides(mean, expected):
    gains = mean + 0.1 * np.random.default_rng(0).normal(size=40)
    assert verdict(guard_of(gains)) == expected
    assert verdict(guard_of(gains[:4])) == "wait"


def test_wealth_is_that_of_the_mean_of_bets():
    gains = np.random.default_rng(0).uniform(-0.5, 1.0, size=9)
    guard, bets = guard_of(gains), np.array(promotion.BETS)[:, None]
    for sign, found in ((1, guard.better), (-1, guard.worse)):
        expected = np.log(np.mean(np.prod(1 + sign * bets * gains, axis=1)))
        np.testing.assert_allclose(promotion.log_wealth(found), expected, rtol=1e-4)
    assert int(guard.num_requests) == 9


def test_later_candidates_need_more_evidence():
    """Levels of all candidates add up to the run's."""
    levels = LEVEL / np.array([j * (j + 1) for j in range(1, 10**4)])
    assert levels.sum() == pytest.approx(LEVEL, rel=1e-3)
    for number in (1, 2, 5):
        needed = np.log(number * (number + 1) / LEVEL)
        for change, expected in ((-1e-3, "wait"), (1e-3, "promote")):
            wealth = jnp.full(len(promotion.BETS), needed + change)
            guard = guard_of([], number).replace(better=wealth)
            assert verdict(guard) == expected


def test_without_a_verdict_a_candidate_is_dropped():
    guard = guard_of([0.01, -0.01] * 4)
    assert verdict(guard, patience=9) == "wait"
    assert verdict(guard, patience=8) == "expire"
    guard = promotion.dismiss(guard, "newest")
    assert verdict(guard, patience=1) == "wait"
    assert not guard.is_open
    again = promotion.nominate(guard, "newest")
    assert (again.candidate, int(again.number)) == ("newest", 2)
    assert int(again.num_requests) == 0
    assert not np.any(again.better)


def test_a_gain_is_the_windows_mean_over_its_bound():
    newer, older = jnp.array([2.0, 3.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 3.0, 1.0])
    weight = jnp.array([1.0, 9.0, 0.0, 2.0])  # how much does not matter
    gain = promotion.gain_of(newer, older, weight, num_steps=3)
    assert float(gain) == pytest.approx((1 + 2 + 0) / 3 / 3)
    nothing = promotion.gain_of(newer, older, jnp.zeros(4), num_steps=3)
    assert float(nothing) == 0.0
    broken = jnp.array([jnp.nan, 3.0])
    gain = promotion.gain_of(broken, jnp.array([3.0, 3.0]), jnp.ones(2), 3)
    assert float(gain) == pytest.approx(-0.5)


def runs_of(edge, num_runs, num_requests, seed, rho=0.5, spread=0.15):
    """`[r, n]` requests' gains of four windows, correlated within a request."""
    rng = np.random.default_rng(seed)
    shape = num_runs, num_requests
    shared = rng.normal(size=(*shape, 1))
    own = rng.normal(size=(*shape, 4))
    windows = edge + np.sqrt(rho) * shared + np.sqrt(1 - rho) * own
    return np.clip(spread * windows.mean(-1), -1, 1)


def played(gains, patience=PATIENCE):
    """Which runs promote, and after how many requests, looked at after each.

    Candidates that are rolled back or dropped are followed by others of the same edge.
    """
    num_runs, num_requests = gains.shape
    bets = np.array(promotion.BETS)
    number, age = np.ones(num_runs), np.zeros(num_runs)
    better = np.zeros((num_runs, len(bets)))
    worse = np.zeros_like(better)
    when = np.full(num_runs, num_requests + 1)
    for n in range(num_requests):
        x = gains[:, n, None]
        better, worse, age = (
            better + np.log1p(bets * x), worse + np.log1p(-bets * x), age + 1
        )  # fmt: skip
        needed = np.log(number * (number + 1) / LEVEL)
        is_won = promotion.log_wealth(better) >= needed
        when = np.where(is_won, np.minimum(when, n + 1), when)
        is_lost = promotion.log_wealth(worse) >= needed
        is_next = is_won | is_lost | (age >= patience)
        number = number + is_next
        for evidence in (better, worse, age):
            evidence[is_next] = 0
    return when <= num_requests, when


@pytest.mark.parametrize("patience", [PATIENCE, 10**9])
@pytest.mark.parametrize("edge", [0.0, -0.05])
def test_few_runs_ever_promote_what_is_no_better(edge, patience):
    """Of 3000 looks a run, at one candidate or at dozens."""
    num_runs = 1000
    gains = runs_of(edge, num_runs, 3000, seed=1, spread=0.6)
    is_promoted, _ = played(gains, patience)
    slack = 3 * np.sqrt(LEVEL * (1 - LEVEL) / num_runs)
    assert is_promoted.mean() <= LEVEL + slack
    # The level is used, too: a test that never promotes would keep to any.
    assert edge < 0 or is_promoted.mean() > LEVEL / 10


def test_gains_are_promoted_within_a_reasonable_number_of_requests():
    for spread, limit in ((0.15, 60), (0.5, 30)):  # the edge is 0.7 of it a window
        gains = runs_of(0.7, 500, PATIENCE, seed=2, spread=spread)
        is_promoted, when = played(gains)
        assert is_promoted.mean() > 0.95
        assert np.median(when) < limit


def test_the_simulation_tests_what_is_run():
    gains = runs_of(0.5, 8, 70, seed=3)
    is_promoted, when = played(gains)
    assert is_promoted.sum() > 0
    for run, first in zip(gains, when, strict=True):
        found = [verdict(guard_of(run[:n])) for n in (first - 1, first) if n <= 70]
        assert found in (["wait", "promote"], ["wait"])
    assert jax.tree.leaves(guard_of([0.1]).better)[0].dtype == jnp.float32
