# SPDX-License-Identifier: Apache-2.0
"""A clock finds the parts of steps again, and goes through JSON unchanged."""

import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.control.clock import Clock, Timed, fit_clock, flat_clock, read_clock

DRAFTING = (0.0, 0.5, 1.5, 2.5)
VERIFYING = {1: 4.0, 2: 4.0, 4: 5.5, 9: 9.0}


def step(depth, rows, context):
    more = (context - 200) * (0.001 + 0.002 * rows)
    return Timed(depth, rows, context, DRAFTING[depth] + VERIFYING[rows] + more)


STEPS = [
    step(depth, rows, context)
    for depth, rows in [(0, 1), (1, 2), (2, 4), (3, 4), (3, 2), (3, 9)]
    for context in (100, 300)
]


def test_a_fit_finds_both_parts_and_the_slopes_again():
    clock = fit_clock(STEPS, topk=2)
    np.testing.assert_allclose(clock.drafting, DRAFTING, atol=1e-9)
    np.testing.assert_allclose(clock.verifying, list(VERIFYING.values()), atol=1e-9)
    assert clock.rows == tuple(VERIFYING)
    assert clock.context == 200
    assert clock.error < 1e-9
    for timed in STEPS:
        found = clock.seconds(timed.depth, timed.rows, timed.context)
        np.testing.assert_allclose(found, timed.seconds, rtol=1e-6)


def test_rows_between_and_beyond_those_measured():
    clock = fit_clock(STEPS, topk=2)
    found = clock.seconds(0, np.array([3, 9, 14]), 200)
    np.testing.assert_allclose(found, [4.75, 9.0, 9.0 + 5 * 0.7], rtol=1e-6)


def test_a_noisy_step_shows_as_an_error():
    noisy = [*STEPS[:-1], STEPS[-1]._replace(seconds=2 * STEPS[-1].seconds)]
    assert fit_clock(noisy, topk=2).error > 0.05


def test_steps_that_tell_too_little_are_refused():
    with pytest.raises(ConfigError, match="apart"):
        fit_clock([step(0, 1, 1), step(1, 2, 1), step(2, 4, 1)], topk=2)
    with pytest.raises(ConfigError, match="plain steps"):
        fit_clock([step(1, 2, 1), step(2, 2, 1)], topk=2)
    with pytest.raises(ConfigError, match="all depths"):
        fit_clock([step(0, 1, 1), step(2, 2, 1), step(2, 4, 1)], topk=2)


def test_a_saved_clock_is_the_same(tmp_path):
    clock = fit_clock(STEPS, topk=2, device="cpu", method="minima")
    clock.save(tmp_path / "clock.json")
    assert read_clock(tmp_path / "clock.json") == clock


def test_a_flat_clock_has_one_price_for_all_rows():
    clock = flat_clock(topk=4, depth=6)
    assert clock.seconds(2, 3, 10) == clock.seconds(2, 60, 1000)
    assert clock.seconds(3, 3, 10) > clock.seconds(2, 3, 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": (2, 3)},
        {"rows": (1, 3, 2), "verifying": (1.0, 1.0, 1.0)},
        {"verifying": (1.0,)},
        {"verifying": (1.0, float("nan"))},
        {"drafting": ()},
    ],
)
def test_what_is_no_clock_is_refused(changes):
    fields = {"topk": 1, "drafting": (0.0,), "rows": (1, 2), "verifying": (1.0, 1.1)}
    with pytest.raises(ConfigError, match="clock"):
        Clock(**fields | changes)
