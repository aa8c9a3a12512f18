# SPDX-License-Identifier: Apache-2.0
"""JAX's attention, which cuDNN's kernel stands behind, computes what ours does."""

import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.models import cache as kv
from ospec_jax.models.attention import attend, by_library
from ospec_jax.models.layers import Numerics


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layouts_groups_and_bias_agree(dtype):
    rng = np.random.default_rng(0)
    b, t, heads, h, e, s = 2, 3, 6, 2, 8, 16
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    queries = draw(b, t, heads, e).astype(jnp.float32)
    keys, values = draw(b, h, e, s), draw(b, h, s, e)
    mask = jnp.asarray(rng.random((b, t, t)) < 0.5) | jnp.eye(t, dtype=bool)
    bias = kv.tree_bias(jnp.asarray([4, 0]), mask, s)
    expected = attend(queries, keys, values, bias, Numerics(is_row_invariant=False))
    found = by_library(queries, keys, values, bias, "xla")
    assert found.dtype == expected.dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(found, expected, atol=tolerance)
