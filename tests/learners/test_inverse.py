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


def test_nothing_of_it_is_lapacks():
    """Whose threads spin, to everybody's cost."""
    lowered = jax.jit(inverse).lower(moment(150)).as_text()
    assert "custom_call" not in lowered
