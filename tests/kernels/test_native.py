# SPDX-License-Identifier: Apache-2.0
"""int8 products of the package's own: exact, whatever stands beside a row."""

import jax
import numpy as np
import pytest

from ospec_jax.kernels import native
from ospec_jax.models.hub import cache_folder
from ospec_jax.models.layers import Numerics, linear

NATIVE = Numerics("int8", has_native_int8=True)


@pytest.fixture(scope="module", autouse=True)
def _available():
    if not native.is_available(cache_folder()):
        pytest.skip("int8 products cannot be built here: no C++ compiler, or no CPU")


def random_product(rows, features, columns, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    kernel = rng.integers(-127, 128, size=(features, columns)).astype(np.int8)
    return x, {"kernel": kernel, "scale": rng.random(features).astype(np.float32)}


def exact(x, params):
    """The product in float64, of the same rounded values."""
    scale = np.max(np.abs(x), axis=-1, keepdims=True) * np.float32(1 / 127)
    rounded = np.rint(x / np.where(scale > 0, scale, 1))
    y = rounded.astype(np.int64) @ params["kernel"].astype(np.int64).T
    return y * scale.astype(np.float64) * params["scale"]


SHAPES = [(1, 1, 1), (2, 4, 64), (3, 7, 65), (5, 33, 127), (8, 576, 576), (17, 40, 200)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_exact_product(shape):
    x, params = random_product(*shape)
    y = jax.jit(linear, static_argnums=2)(x, params, NATIVE)
    np.testing.assert_allclose(y, exact(x, params), rtol=3e-7)


def test_extremes_do_not_overflow():
    """Every term at its largest, over more columns than 16 bits could add."""
    x = np.ones((2, 4096), np.float32)
    for value in (-127, -128, 127):
        kernel = np.full((5, 4096), value, np.int8)
        params = {"kernel": kernel, "scale": np.ones(5, np.float32)}
        y = linear(x, params, NATIVE)
        np.testing.assert_allclose(y, np.full((2, 5), 4096.0 * value), rtol=1e-6)


def test_zero_rows_give_zeros():
    _, params = random_product(1, 9, 70)
    y = linear(np.zeros((2, 70), np.float32), params, NATIVE)
    np.testing.assert_array_equal(y, np.zeros((2, 9)))


def test_rows_do_not_depend_on_their_neighbours():
    x, params = random_product(40, 300, 100)
    together = np.asarray(linear(x, params, NATIVE))
    for size in (1, 2, 3, 5, 13):
        parts = [linear(x[i : i + size], params, NATIVE) for i in range(0, 40, size)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


def test_leading_axes_and_vmap():
    x, params = random_product(6, 11, 30)
    flat = np.asarray(linear(x, params, NATIVE))
    batched = linear(x.reshape(2, 3, 30), params, NATIVE)
    np.testing.assert_array_equal(batched, flat.reshape(2, 3, 11))
    mapped = jax.vmap(lambda row: linear(row[None], params, NATIVE)[0])(x)
    np.testing.assert_array_equal(mapped, flat)


def test_agrees_with_the_product_of_xla():
    x, params = random_product(4, 50, 96)
    of_xla = jax.jit(linear, static_argnums=2)(x, params, Numerics("int8"))
    np.testing.assert_allclose(linear(x, params, NATIVE), of_xla, rtol=1e-6)


def test_without_a_compiler_it_warns_and_says_no(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert not native.is_available.__wrapped__(tmp_path)


def test_a_failing_compiler_warns_with_its_words(tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit\n'
        "echo out of cheese >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="out of cheese"):
        assert not native.is_available.__wrapped__(tmp_path)


def test_it_can_be_turned_off(tmp_path, monkeypatch):
    monkeypatch.setenv("OSPEC_NATIVE", "0")
    assert not native.is_available.__wrapped__(tmp_path)
