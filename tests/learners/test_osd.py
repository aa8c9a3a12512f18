# SPDX-License-Identifier: Apache-2.0
"""OSD: one step for a buffer of requests, which is then empty."""

import jax.numpy as jnp
import numpy as np
import optax
from quadratics import chasing, points

from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.osd import osd

START = {"w": jnp.zeros(2)}


def test_it_steps_once_for_all_buffered_requests():
    """Three requests one by one are the one batch of all of them."""
    requests = np.random.default_rng(0).normal(size=(6, 2))
    learner = osd(chasing(), optax.adam(0.1), interval=3)
    state, waiting = learner.init(START), []
    for request in requests[:3]:
        state, info = learner.update(state, points([request]), None, None)
        waiting.append(int(info.extra["buffered"]))
        if waiting[-1]:
            np.testing.assert_array_equal(state.params["w"], START["w"])
            assert float(info.extra["step_norm"]) == 0
    assert waiting == [1, 2, 0]
    plain = gradient(chasing(), optax.adam(0.1))
    batched, _ = plain.update(plain.init(START), points(requests[:3]), None, None)
    np.testing.assert_allclose(state.params["w"], batched.params["w"], rtol=1e-5)
    # The buffer was emptied: the next step knows nothing of the first three.
    for request in requests[3:]:
        state, _ = learner.update(state, points([request]), None, None)
    batched, _ = plain.update(batched, points(requests[3:]), None, None)
    np.testing.assert_allclose(state.params["w"], batched.params["w"], rtol=1e-5)
    assert int(state.num_updates) == 6


def test_requests_without_traffic_are_not_counted():
    learner = osd(chasing(), optax.adam(0.1), interval=1)
    state, info = learner.update(
        learner.init(START), points([[1.0, 1.0]], weight=0.0), None, None
    )
    assert int(info.extra["buffered"]) == int(state.num_updates) == 0
    np.testing.assert_array_equal(state.params["w"], START["w"])
