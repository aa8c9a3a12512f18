# SPDX-License-Identifier: Apache-2.0
"""Caches hold the same bits however their entries are written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import TreeConfig
from ospec_jax.decoding.step import StepConfig, build_step, empty_state
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.quantization import cast_params
from ospec_jax.testing import random_model_params, tiny_model_config


def random(shape, dtype=jnp.bfloat16, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# The last row's entries do not fit behind its start, and are moved in front of the end.
STARTS = [0, 5, 9, 15]


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slices_and_a_scatter_write_the_same(num_tokens, layer, axis, dtype):
    shape = [4, 2, 8, 16] if axis == -1 else [4, 2, 16, 8]
    layers = [] if layer is None else [3]
    buffer = random((*layers, *shape), dtype)
    shape[axis] = num_tokens
    new = random(shape, jnp.float32, seed=1)
    starts = jnp.asarray(STARTS, jnp.int32)
    number = None if layer is None else jnp.int32(layer)
    write = jax.jit(kv.write_rows, static_argnums=(3, 4))
    found = write(buffer, new, starts, axis, False, number)
    expected = write(buffer, new, starts, axis, True, number)
    np.testing.assert_array_equal(found, expected)
    # Against a plain loop, too: both could be wrong in the same way.
    loop = np.asarray(buffer.astype(jnp.float32)).copy()
    for row, start in enumerate(STARTS):
        start = min(start, 16 - num_tokens)
        slots = [slice(None)] * 3
        slots[axis] = slice(start, start + num_tokens)
        place = (row, *slots) if layer is None else (layer, row, *slots)
        loop[place] = np.asarray(new[row].astype(dtype).astype(jnp.float32))
    np.testing.assert_array_equal(found.astype(jnp.float32), loop)


def test_programs_do_not_grow_with_very_many_rows():
    def size(num_rows):
        buffer = jnp.zeros((num_rows, 2, 16, 8))
        starts = jnp.arange(num_rows) % 16
        write = jax.jit(kv.write_rows)
        return len(write.lower(buffer, buffer[:, :, :1], starts).as_text())

    # A slice a row up to a point, from which on all are one write.
    assert size(128) > 10 * size(4)
    assert size(3000) < 2 * size(4)


@pytest.mark.parametrize("is_stacked", [True, False])
def test_an_accepted_path_is_moved_alike(is_stacked):
    cache = kv.init_cache(2, 3, 2, 16, 8, jnp.bfloat16, is_stacked)
    cache = jax.tree.map(lambda x: random(x.shape), cache)
    path = jnp.asarray([[0, 2, 5], [0, 1, 1], [0, 3, 4]], jnp.int32)
    starts = jnp.asarray([0, 4, 9], jnp.int32)
    move = jax.jit(kv.keep_path, static_argnums=3)
    found = move(cache, starts, path, False)
    expected = move(cache, starts, path, True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("is_scanned", [True, False])
def test_steps_leave_the_same_state_either_way(is_scanned):
    """As on accelerators, by forcing what is otherwise for split rows."""
    model = tiny_model_config(64, num_layers=2)
    params = cast_params(random_model_params(model), "bfloat16")
    if is_scanned:
        from ospec_jax.models.llama import stack_layers

        params = stack_layers(params)
    states = []
    for groups in (1, 2):
        numerics = Numerics(
            "bfloat16", False, is_scanned=is_scanned, num_row_groups=groups
        )
        assert numerics.has_batched_writes == (groups > 1)
        config = StepConfig(model, numerics, TreeConfig(num_steps=0))
        state = empty_state(config, None, 4, 32)
        state = state.replace(
            last_token=jnp.arange(4) + 5,
            lengths=jnp.asarray([0, 3, 9, 20], jnp.int32),
            num_remaining=state.num_remaining + 9,
            is_finished=state.is_finished & False,
        )
        step = jax.jit(build_step(config, None))
        for _ in range(3):
            state, _ = step(params, None, state)
        states.append(dataclasses.replace(state, request_keys=None))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert jnp.any(jax.tree.leaves(states[0].cache)[0] != 0)


@pytest.mark.parametrize("shape", [(1, 32), (1, 1, 32), (2, 32)])
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "float32"])
def test_a_lone_row_is_padded_on_accelerators_alone(shape, precision):
    params = cast_params(
        {"o_proj": {"kernel": random((24, 32), jnp.float32)}}, precision
    )
    params = params["o_proj"]
    x = random(shape, jnp.float32, seed=2)
    program = lambda is_row_invariant: jax.make_jaxpr(
        lambda x: linear(x, params, Numerics(precision, is_row_invariant))
    )(x)
    is_lone = np.prod(shape[:-1]) == 1 and precision != "float32"
    assert ("pad" in str(program(False))) == is_lone
    assert "pad" not in str(program(True))
    found = linear(x, params, Numerics(precision, False))
    expected = linear(x, params, Numerics(precision))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
