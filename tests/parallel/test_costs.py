# SPDX-License-Identifier: Apache-2.0
"""What a token costs by the formulas is what simulated rounds take."""

import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.parallel.costs import (
    SideTimes,
    balanced_length,
    best_length,
    pearl_cost,
    plain_cost,
    presuming_cost,
    serial_cost,
)

TIMES = SideTimes((1, 4), (1.0, 1.3), drafting=0.2, hand_over=0.05)


def simulated(length, rate, is_parallel, num_rounds=4_000):
    """Seconds a token, round by round, with coins."""
    coins = np.random.default_rng(0).random((num_rounds, length + 1)) < rate
    seconds = 0.0
    num_tokens = 0
    is_pending = False
    for row in coins:
        if is_parallel:
            judged = length if is_pending else 1
            writing = length * TIMES.drafting
            seconds += max(writing, TIMES.verify(judged)) + TIMES.hand_over
        else:
            judged = length
            seconds += length * TIMES.drafting + TIMES.verify(length + 1)
        accepted = int(np.argmin(np.append(row[:judged], False)))
        is_pending = accepted == judged
        num_tokens += accepted + (not (is_pending and is_parallel))
    return seconds / num_tokens


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("rate", [0.0, 0.6, 0.9, 1.0])
def test_costs_are_those_of_simulated_rounds(length, rate):
    found = pearl_cost(TIMES, length, rate)
    assert found == pytest.approx(simulated(length, rate, True), rel=0.05)
    found = serial_cost(TIMES, length, rate)
    assert found == pytest.approx(simulated(length, rate, False), rel=0.05)


def test_passes_between_and_beyond_measured_ones_lie_on_lines():
    assert [TIMES.verify(n) for n in (1, 2, 4, 6)] == pytest.approx(
        [1.0, 1.1, 1.3, 1.5]
    )
    assert SideTimes((1,), (2.0,), 1.0).verify(9) == plain_cost(TIMES) * 2


def test_where_all_is_hidden_and_accepted_a_token_costs_its_share_of_a_pass():
    free = SideTimes((1, 16), (1.0, 1.0), drafting=0.125)
    assert pearl_cost(free, 8, 1.0) == pytest.approx(1 / 8)
    # In turns the same chunk costs a second pass, and brings one token more.
    assert serial_cost(free, 8, 1.0) == pytest.approx(2 / 9)
    assert balanced_length(free) == best_length(pearl_cost, free, 1.0)[0] == 8


def test_a_draft_that_is_never_right_makes_parallel_drafting_a_waste():
    free = SideTimes((1, 16), (1.0, 1.0), drafting=0.25)
    assert pearl_cost(free, 4, 0.0) == plain_cost(free)
    assert pearl_cost(free, 8, 0.0) == 2 * plain_cost(free)
    # A pass of the target is spent on a single row, where in turns it judges all.
    rate = 0.5
    assert (
        best_length(serial_cost, free.scaled(drafting=0.1), rate)[1]
        < (best_length(pearl_cost, free.scaled(drafting=0.1), rate)[1])
    )


def test_presuming_outcomes_hides_the_draft_as_far_as_it_guesses():
    free = SideTimes((1, 16), (1.0, 1.0), drafting=0.25)
    assert presuming_cost(free, 4, 0.8, hit_rate=0.0) == pytest.approx(
        serial_cost(free, 4, 0.8)
    )
    assert presuming_cost(free, 4, 0.8, hit_rate=1.0) < pearl_cost(free, 4, 0.8)


def test_balanced_lengths_follow_the_ratio_of_both_sides():
    assert balanced_length(TIMES) == 5
    assert balanced_length(TIMES.scaled(drafting=100)) == 1
    assert balanced_length(TIMES.scaled(verifying=100)) == 16
    assert balanced_length(SideTimes((1,), (1.0,), 0.0), most=7) == 7


@pytest.mark.parametrize(
    ("rows", "verifying", "message"),
    [
        ((2,), (1.0,), "from 1 on"),
        ((1, 1), (1.0, 1.0), "from 1 on"),
        ((1, 2), (1.0,), "each of the rows"),
        ((1,), (float("nan"),), "each of the rows"),
    ],
)
def test_times_that_mean_nothing_are_refused(rows, verifying, message):
    with pytest.raises(ConfigError, match=message):
        SideTimes(rows, verifying, 1.0)
