# SPDX-License-Identifier: Apache-2.0
"""int8 products of the package's own: exact, whatever stands beside a row."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from ospec_jax.kernels import native
from ospec_jax.models.hub import cache_folder
from ospec_jax.models.layers import Numerics, linear

pytestmark = pytest.mark.optimized

NATIVE = Numerics("int8", is_native=True)


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


SHAPES = [(1, 1, 1), (1, 40, 64), (2, 4, 64), (2, 16, 70), (3, 7, 65), (4, 48, 130)]
SHAPES += [(5, 33, 127), (6, 20, 66), (7, 64, 64), (8, 576, 576), (17, 40, 200)]
# So many rows share packed channels: 32 of them, 16, and what is left.
SHAPES += [(14, 48, 64), (37, 85, 130), (70, 31, 1001)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_exact_product(shape):
    x, params = random_product(*shape)
    y = jax.jit(linear, static_argnums=2)(x, params, NATIVE)
    np.testing.assert_allclose(y, exact(x, params), rtol=3e-7)


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 8, 9, 15, 16, 17, 33, 64, 70, 130])
def test_tiles_change_no_bit(rows):
    """Where the CPU has none, both are the same code."""
    x, params = random_product(rows, 75, 192)
    args = x, params["kernel"], params["scale"]
    found = native.int8_linear(*args, has_tiles=True)
    np.testing.assert_array_equal(found, native.int8_linear(*args, has_tiles=False))


def test_rounding_of_ties_is_that_of_the_quotient():
    """A product with the reciprocal would round some of them the other way."""
    rng = np.random.default_rng(0)
    largest = rng.random((50, 1)).astype(np.float32) + np.float32(0.1)
    scale = largest * np.float32(1 / 127)
    halves = rng.integers(-126, 126, size=(50, 640)) + np.float32(0.5)
    x = halves.astype(np.float32) * scale
    x[:, :1] = largest
    params = {
        "kernel": np.eye(640, dtype=np.int8),
        "scale": np.ones(640, np.float32),
    }
    rounded = np.rint(x / scale) * scale
    np.testing.assert_array_equal(linear(x, params, NATIVE), rounded)


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


def random_attention(seed=0, b=2, t=5, heads=6, kv_heads=2, e=32, s=80):
    """Queries, keys, values and a bias that masks some slots, as a tree's would."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    bias = np.where(rng.random((b, t, s)) < 0.6, 0.0, -1e30).astype(np.float32)
    bias[:, :, 0] = 0.0
    bias[:, :, s - 20 :] = -1e30
    return (
        normal(b, t, heads, e), normal(b, kv_heads, e, s), normal(b, kv_heads, s, e),
        bias,
    )  # fmt: skip


def exact_attention(queries, keys, values, bias):
    """In float64."""
    group = queries.shape[2] // keys.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (keys, values))
    scores = np.einsum("bthe,bhes->bths", queries, k) / queries.shape[-1] ** 0.5
    scores = scores + bias[:, :, None]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = np.einsum("bths,bhse->bthe", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(*queries.shape[:2], -1)


@pytest.mark.parametrize(
    "shape",
    [{}, {"e": 64, "s": 256}, {"e": 16, "t": 1, "s": 16}, {"e": 144, "t": 64, "b": 1}],
)
def test_attention_equals_the_exact_one(shape):
    args = random_attention(**shape)
    found = native.attention(*args)
    np.testing.assert_allclose(found, exact_attention(*args), rtol=3e-5, atol=3e-6)


def test_large_scores_do_not_overflow():
    queries, keys, values, bias = random_attention()
    args = (1e3 * queries, keys, values, bias)
    np.testing.assert_allclose(
        native.attention(*args), exact_attention(*args), rtol=1e-2, atol=1e-3
    )


def test_masked_slots_leave_no_trace():
    """Rubbish behind the mask, and where the attended slots lie, changes no bit."""
    queries, keys, values, bias = random_attention(b=1, t=1)
    before = np.asarray(native.attention(queries, keys, values, bias))
    is_masked = bias[0, 0] < -1e29
    rubbish = keys.copy(), values.copy()
    rubbish[0][..., is_masked], rubbish[1][:, :, is_masked] = 1e20, -1e20
    np.testing.assert_array_equal(native.attention(queries, *rubbish, bias), before)
    order = np.argsort(is_masked, kind="stable")
    moved = native.attention(
        queries, keys[..., order], values[:, :, order], bias[:, :, order]
    )
    np.testing.assert_array_equal(moved, before)


def test_slots_beyond_a_window_are_not_read():
    """Not even what would spread: a window costs what it holds, wherever it lies."""
    queries, keys, values, bias = random_attention()
    bias[..., :40] = -1e30
    bias[..., 40] = 0.0
    before = np.asarray(native.attention(queries, keys, values, bias))
    exact = exact_attention(queries, keys, values, bias)
    np.testing.assert_allclose(before, exact, rtol=3e-5, atol=3e-6)
    for unread in (slice(0, 32), slice(64, 80)):  # in vectors of 16
        keys[..., unread] = np.nan
        values[:, :, unread] = np.nan
    found = native.attention(queries, keys, values, bias)
    np.testing.assert_array_equal(found, before)


def test_queries_do_not_depend_on_their_neighbours():
    queries, keys, values, bias = random_attention(t=13)
    together = np.asarray(native.attention(queries, keys, values, bias))
    for i in range(13):
        alone = native.attention(
            queries[:, i : i + 1], keys, values, bias[:, i : i + 1]
        )
        np.testing.assert_array_equal(alone, together[:, i : i + 1])


@pytest.mark.parametrize("t", [1, 4])
def test_how_work_is_divided_changes_no_bit(t):
    """Threads share a head where three of them leave one of two threads idle."""
    queries, keys, values, bias = random_attention(
        b=1, t=t, heads=12, kv_heads=4, s=256
    )
    together = np.asarray(native.attention(queries, keys, values, bias))
    three = native.attention(queries[:, :, :9], keys[:, :3], values[:, :3], bias)
    np.testing.assert_array_equal(three, together[..., : three.shape[-1]])


def test_only_whole_vectors_of_float32_are_attended_to():
    queries, keys, *_ = random_attention()
    assert native.can_attend(queries, keys)
    assert not native.can_attend(queries, keys[..., :70])
    assert not native.can_attend(queries[..., :24], keys)
    assert not native.can_attend(queries, keys.astype(np.float16))


@pytest.fixture
def _small_library(tmp_path, monkeypatch):
    """One function in place of the kernels, which take a quarter of a minute."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cc").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(native, "_FOLDER", folder)
    monkeypatch.setattr(native, "_SOURCES", ("small.cc",))


@pytest.mark.usefixtures("_small_library")
def test_a_damaged_library_is_built_again_not_loaded(tmp_path, monkeypatch):
    built = []
    compile = native._run
    monkeypatch.setattr(native, "_run", lambda *a: (built.append(a), compile(*a))[1])
    native._load(tmp_path)
    (library,) = (tmp_path / "native").glob("*.so")
    content = library.read_bytes()
    num_runs = len(built)
    native._load(tmp_path)
    assert len(built) == num_runs + 1  # that asks the compiler's version
    # Loading half of one would end this process. The file of the one that is loaded
    # stays as it is: another takes its name.
    library.unlink()
    library.write_bytes(content[: len(content) // 2])
    assert native._load(tmp_path).answer() == 42
    assert len(built) == num_runs + 1 + 3  # version, compilation, linking
    assert [p.read_bytes() for p in (tmp_path / "native").glob("*.so")] == [content]


@pytest.mark.usefixtures("_small_library")
def test_who_comes_while_it_is_built_waits_for_it(tmp_path, monkeypatch):
    commands = []
    compile = native._run

    def slowly(*command):
        commands.append(command)
        if "--version" not in command:
            # The others have long asked for it by then.
            while len(commands) < 4:
                time.sleep(0.01)
        return compile(*command)

    monkeypatch.setattr(native, "_run", slowly)
    with ThreadPoolExecutor(3) as pool:
        libraries = list(pool.map(native._load, [tmp_path] * 3))
    assert [library.answer() for library in libraries] == [42] * 3
    assert sum("-c" in command for command in commands) == 1


@pytest.mark.usefixtures("_small_library")
def test_a_library_that_cannot_be_kept_is_used_all_the_same(tmp_path):
    (tmp_path / "native").touch()
    assert native._load(tmp_path).answer() == 42
