# SPDX-License-Identifier: Apache-2.0
"""Regret against drafts that were trained in hindsight."""

import numpy as np

from ospec_jax.replay import hindsight


def test_proxy_sums_differences():
    series = hindsight.dynamic_regret_proxy([2.0, 3.0, 1.0], [1.0, 1.0, 2.0])
    np.testing.assert_array_equal(series, [1, 3, 2])
