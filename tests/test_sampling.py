# SPDX-License-Identifier: Apache-2.0
"""Processed distributions against a plain implementation that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.sampling import (
    _draw_index,
    draw,
    gumbel,
    is_any_of,
    processed_probs,
    sample,
    sample_without_replacement,
)
from ospec_jax.types import SamplingParams


def params(temperature, top_k=0, top_p=1.0, rows=None, min_p=None):
    """Sampling parameters, one value for all rows or a list."""
    rows = rows or max(np.size(x) for x in (temperature, top_k, top_p, min_p))
    fill = lambda value, dtype: jnp.asarray(np.broadcast_to(value, rows), dtype)
    return SamplingParams(
        temperature=fill(temperature, jnp.float32),
        top_k=fill(top_k, jnp.int32),
        top_p=fill(top_p, jnp.float32),
        min_p=None if min_p is None else fill(min_p, jnp.float32),
    )


def reference(logits, temperature, top_k, top_p, min_p=0.0):
    """One row: sort, cut, normalise; ties with the last kept token are kept."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    weights = np.exp((logits - logits.max()) / temperature)
    weights[weights < np.float32(min_p)] = 0
    if top_k:
        weights[weights < np.sort(weights)[::-1][:top_k][-1]] = 0
    if top_p < 1:
        ordered = np.sort(weights)[::-1]
        last = np.searchsorted(np.cumsum(ordered), np.float32(top_p) * weights.sum())
        weights[weights < ordered[last]] = 0
    return weights / weights.sum()


@pytest.fixture(scope="module", params=[True, False], ids=["invariant", "plain"])
def processed(request):
    function = lambda logits, p: processed_probs(logits, p, request.param)
    return jax.jit(function)


def logits_of(vocab_size, rows=1, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, vocab_size)) * scale, jnp.float32)


@pytest.mark.parametrize("vocab_size", [5, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 64, 65, 300, 2000])
def test_peaked_distributions(processed, vocab_size, top_k, top_p):
    logits = logits_of(vocab_size)
    for temperature in (0.3, 1.0, 2.0):
        found = processed(logits, params(temperature, top_k, top_p))[0]
        expected = reference(logits[0], temperature, top_k, top_p)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(found) > 1e-20, expected > 1e-20)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_improbable_tokens_are_dropped_first(processed, top_k, top_p, scale):
    """By a share of the most probable one's probability, at the row's temperature."""
    logits = jnp.repeat(logits_of(1000, scale=scale), 5, axis=0)
    temperature = [0.7, 0.7, 0.7, 1.5, 0.0]
    min_p = [0.0, 0.1, 1.0, 0.1, 0.1]
    asked = params(temperature, top_k, top_p, rows=5, min_p=min_p)
    found = np.asarray(processed(logits, asked))
    for row in range(5):
        expected = reference(logits[row], temperature[row], top_k, top_p, min_p[row])
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
        np.testing.assert_array_equal(found[row] > 1e-20, expected > 1e-20)

    without = processed(logits, params(temperature, top_k, top_p, rows=5))
    np.testing.assert_array_equal(found[0], np.asarray(without)[0])
    assert (found[2] > 0).sum() == 1


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("top_k", [0, 500])
def test_flat_distributions_need_the_bisection(processed, top_k, top_p):
    logits = logits_of(1000, scale=0.1)
    expected = reference(logits[0], 1.0, top_k, top_p)
    assert (expected > 0).sum() > 64
    found = processed(logits, params(1.0, top_k, top_p))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found) > 0, expected > 0)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(2, 1.0), (0, 0.45), (100, 1.0), (0, 0.7)]
)
def test_ties_are_kept_together(processed, top_k, top_p):
    small = [3.0, 1.0, 1.0, 1.0, -2.0]
    logits = jnp.asarray([small, [1.0, 3.0, 1.0, -2.0, 1.0]])
    if top_k == 100 or top_p == 0.7:  # beyond the prefix of the largest
        pattern = np.repeat([0.1, 0.0, -0.1], [50, 200, 750])
        logits = jnp.asarray([pattern, pattern[::-1]], jnp.float32)
    found = np.asarray(processed(logits, params(1.0, top_k, top_p, rows=2)))
    for row in range(2):
        expected = reference(logits[row], 1.0, top_k, top_p)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
        for value in np.unique(logits[row]):
            assert np.ptp(found[row][np.asarray(logits[row]) == value]) == 0


def test_uniform_logits_are_all_kept(processed):
    found = processed(jnp.zeros((1, 1000)), params(1.0, 5, 0.3))
    np.testing.assert_allclose(found, 1e-3, rtol=1e-5)


def test_rows_of_every_kind_in_one_batch(processed):
    temperature = [0.0, 1.0, 0.5, 0.0, 2.0, 1.0]
    top_k, top_p = [0, 0, 3, 7, 200, 0], [1.0, 0.9, 1.0, 0.5, 0.8, 0.6]
    logits = logits_of(1000, rows=6) * jnp.asarray([1, 1, 1, 1, 0.05, 0.05])[:, None]
    found = np.asarray(processed(logits, params(temperature, top_k, top_p)))
    for row in range(6):
        expected = reference(logits[row], temperature[row], top_k[row], top_p[row])
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
        np.testing.assert_array_equal(found[row] > 1e-20, expected > 1e-20)
    np.testing.assert_array_equal(found[0], np.eye(1000)[np.argmax(logits[0])])


def test_a_row_does_not_depend_on_its_neighbours(processed):
    logits = logits_of(1000, rows=4, scale=1.0)
    settings = ([1.0, 0.7, 1.0, 0.0], [0, 40, 0, 0], [0.9, 1.0, 0.3, 1.0])
    together = processed(logits, params(*settings))
    for row in range(4):
        alone = processed(
            jnp.repeat(logits[row : row + 1], 2, axis=0),
            params(*(setting[row] for setting in settings), rows=2),
        )
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-6)


@pytest.mark.parametrize("vocab_size", [12, 1000, 20_000])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (7, 0.9)])
def test_a_lone_row_has_the_same_bits(vocab_size, top_k, top_p):
    logits = logits_of(vocab_size, rows=3)
    together = jax.jit(processed_probs)(logits, params(0.8, top_k, top_p, rows=3))
    for row in range(3):
        lone = logits[row : row + 1]
        alone = jax.jit(processed_probs)(lone, params(0.8, top_k, top_p))
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_tiny_temperatures_are_greedy(processed, temperature):
    logits = logits_of(100)
    found = processed(logits, params(temperature))
    np.testing.assert_array_equal(found[0], np.eye(100)[np.argmax(logits[0])])


def test_sampling_follows_the_probabilities():
    probs = jnp.asarray([0.5, 0.0, 0.2, 0.3])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(sample)(keys, jnp.tile(probs, (20_000, 1)))
    share = np.bincount(drawn, minlength=4) / 20_000
    np.testing.assert_allclose(share, probs, atol=0.02)
    assert share[1] == 0


def test_draws_over_many_blocks_follow_the_law():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(1_000, 0.3))
    probs = np.where(rng.random(1_000) < 0.5, probs, 0.0)
    probs /= probs.sum()
    rows = 40_000
    keys = jax.random.split(jax.random.key(2), rows)
    drawn = jax.jit(jax.vmap(draw, (0, None)))(keys, jnp.asarray(probs, jnp.float32))
    share = np.bincount(drawn, minlength=1_000) / rows
    assert share[probs == 0].sum() == 0
    error = np.sqrt(probs * (1 - probs) / rows)
    assert np.all(np.abs(share - probs) < 5 * error + 5 / rows)


def test_a_draw_depends_on_neither_scale_nor_neighbours():
    rng = np.random.default_rng(1)
    probs = jnp.asarray(rng.dirichlet(np.full(777, 0.2), size=8), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 8)
    drawn = jax.jit(sample)
    together = drawn(keys, probs)
    by_itself = jax.jit(draw)
    alone = [int(by_itself(key, p)) for key, p in zip(keys, probs, strict=True)]
    assert together.tolist() == alone == drawn(keys, 4 * probs).tolist()


@pytest.mark.parametrize("uniform", [0.0, 1e-9, 0.5, 1 - 2**-24])
def test_no_rounding_draws_what_weighs_nothing(uniform):
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.random((200, 64)) * (rng.random((200, 64)) < 0.1))
    weights = weights.at[:, 30].set(1e-6)
    drawn = jax.vmap(_draw_index, (None, 0))(jnp.float32(uniform), weights)
    assert np.all(np.take_along_axis(np.asarray(weights), drawn[:, None], 1) > 0)


def test_draws_without_replacement_are_distinct_and_sequential():
    probs = jnp.asarray([0.5, 0.1, 0.2, 0.2])
    rows = 20_000
    keys = jax.random.split(jax.random.key(1), rows)
    drawn = np.asarray(sample_without_replacement(keys, jnp.tile(probs, (rows, 1)), 3))
    assert all(len(set(row)) == 3 for row in drawn)
    for first in range(4):
        rest = np.where(np.arange(4) == first, 0.0, probs)
        second = drawn[drawn[:, 0] == first, 1]
        assert abs(len(second) / rows - probs[first]) < 0.02
        share = np.bincount(second, minlength=4) / len(second)
        np.testing.assert_allclose(share, rest / rest.sum(), atol=0.05)


def test_is_any_of():
    tokens = jnp.asarray([[1, 2, 3], [4, 2, 7]])
    assert is_any_of(tokens, (2, 7)).tolist() == [[False, True, False],
                                                  [False, True, True]]  # fmt: skip
    assert not is_any_of(tokens, ()).any()


def test_the_upper_tail_of_gumbel_noise_is_fine():
    """From 23 random bits a fifth of the largest values would be equal to others."""
    noise = np.sort(np.asarray(gumbel(jax.random.key(0), (1 << 22,))))
    assert len(np.unique(noise[-1000:])) > 990
