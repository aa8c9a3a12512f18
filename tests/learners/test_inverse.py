# SPDX-License-Identifier: Apache-2.0
"""The inverse against numpy's in double precision, and what it is made of."""

import jax
import numpy as np
import pytest

from ospec_jax.learners.inverse import inverse


def moment(width, spread=1e2):
    """Of states whose directions differ in energy, damped as the learner does."""
    rng = np.random.default_rng(width)
    scales = np.geomspace(spread, 1, width)
    states = rng.normal(size=(4 * width, width)) * scales
    mean = states.T @ states / len(states)
    return (mean + 0.1 * np.trace(mean) / width * np.eye(width)).astype(np.float32)


@pytest.mark.parametrize("width", [1, 5, 72, 73, 150, 576])
def test_it_is_the_inverse(width):
    matrix = moment(width)
    expected = np.linalg.inv(matrix.astype(np.float64))
    found = np.asarray(jax.jit(inverse)(matrix))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def states_that_agree(width, num_states, damping):
    """A moment of states with a large part in common, of fewer than there are axes."""
    rng = np.random.default_rng(width)
    own = rng.normal(size=(num_states, width)) * np.geomspace(10, 1, width)
    states = own + 20 * rng.normal(size=width)
    mean = states.T @ states / num_states
    return (mean + damping * np.trace(mean) / width * np.eye(width)).astype(np.float32)


@pytest.mark.parametrize("num_states", [64, 2304])
@pytest.mark.parametrize("width", [144, 576])
def test_it_holds_for_moments_of_traffic(width, num_states):
    """Their condition is some thousands, and more."""
    matrix = states_that_agree(width, num_states, damping=0.01)
    exact = np.linalg.inv(matrix.astype(np.float64))
    condition = np.linalg.cond(matrix.astype(np.float64))
    assert condition > 5e3
    found = np.asarray(jax.jit(inverse)(matrix), np.float64)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # As much as rounding the matrix itself may change its inverse.
    assert error < condition * np.finfo(np.float32).eps


def test_nothing_of_it_is_lapacks():
    """Whose threads spin, to everybody's cost."""
    lowered = jax.jit(inverse).lower(moment(150)).as_text()
    assert "custom_call" not in lowered
