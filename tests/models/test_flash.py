# SPDX-License-Identifier: Apache-2.0
"""The TPU's kernel, interpreted: it computes what the reference does, of less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.models import cache as kv
from ospec_jax.models import flash
from ospec_jax.models.attention import attend
from ospec_jax.models.layers import Numerics
from ospec_jax.sharding import make_mesh


def test_blocks_that_no_query_sees_are_not_read():
    """Of rows of unequal lengths, one with a window; the tree of one spans blocks."""
    rng = np.random.default_rng(0)
    b, t, heads, h, e, s = 3, 3, 4, 2, 8, 384
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    queries, keys, values = draw(b, t, heads, e), draw(b, h, e, s), draw(b, h, s, e)
    # The second and the third node are branches of the first.
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    starts = jnp.asarray([0, 127, s - t])
    bias = np.array(kv.tree_bias(starts, jnp.asarray([mask] * b), s))
    bias[2, :, :150] = kv.MASKED
    seen = flash.seen_blocks(jnp.asarray(bias), 128)
    assert seen.tolist() == [[0, 0, 0], [0, 1, 1], [1, 2, 1]]

    numerics = Numerics(is_row_invariant=False)
    args = map(jnp.asarray, (queries, keys, values, bias))
    expected = attend(*args, numerics)
    for row, (first, last, _) in enumerate(seen.tolist()):
        unseen = np.r_[0 : first * 128, (last + 1) * 128 : s]
        keys[row][..., unseen] = np.nan
        values[row][:, unseen] = np.nan

    args = map(jnp.asarray, (queries, keys, values, bias))
    run = jax.jit(flash.attend, static_argnames=("mesh", "is_interpreted"))
    found = run(*args, mesh=make_mesh("data=1"), is_interpreted=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_slots", "size"),
    [
        (1, 8, 8192, 512),
        (1, 8, 640, 128),
        # A multiple of no block.
        (1, 8, 8256, 0),
        # As many heads of keys as of queries: smaller blocks.
        (1, 32, 8192, 128),
        # A prompt's chunk fits, a larger one does not.
        (64, 8, 8192, 512),
        (128, 8, 8192, 0),
    ],
)
def test_shapes_that_do_not_fit_on_the_chip_are_left_to_xla(
    num_tokens, num_heads, num_slots, size
):
    queries = jax.ShapeDtypeStruct((8, num_tokens, 32, 128), jnp.float32)
    keys = jax.ShapeDtypeStruct((8, num_heads, 128, num_slots), jnp.bfloat16)
    assert flash.can_attend(queries, keys) == (size > 0)
    if size:
        assert flash.block_of(keys) == size
