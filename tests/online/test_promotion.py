# SPDX-License-Identifier: Apache-2.0
"""Promotion follows evidence, in both directions."""

import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.online import promotion


def guard_of(gains):
    gains = jnp.asarray(gains, jnp.float32)
    return promotion.observe(promotion.init_guard(), gains, jnp.ones_like(gains))


def test_too_few_windows_wait():
    assert promotion.verdict(guard_of([1.0] * 7), min_count=8) == "wait"


@pytest.mark.parametrize(("mean", "expected"), [(0.2, "promote"), (-0.2, "rollback")])
def test_clear_evidence_decides(mean, expected):
    gains = mean + 0.1 * np.random.default_rng(0).normal(size=40)
    assert promotion.verdict(guard_of(gains), min_count=8) == expected


def test_noise_alone_is_promoted_in_about_a_tenth_of_cases():
    rng = np.random.default_rng(1)
    verdicts = [
        promotion.verdict(guard_of(rng.normal(size=30)), min_count=8)
        for _ in range(300)
    ]
    assert 0.04 < verdicts.count("promote") / 300 < 0.17


def test_windows_without_weight_are_no_evidence():
    gains = jnp.asarray([5.0, 5.0, 5.0])
    guard = promotion.observe(promotion.init_guard(), gains, jnp.zeros(3))
    assert int(guard.count) == 0
    assert float(guard.total) == 0.0
