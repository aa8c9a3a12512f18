# SPDX-License-Identifier: Apache-2.0
"""Estimated acceptance lengths against those of an enumeration."""

import itertools

import numpy as np
import pytest

from ospec_jax.control.lengths import Pending, Windows, expected_lengths, join


def law(rng, num_tokens):
    weights = rng.gamma(0.7, size=num_tokens) + 1e-3
    return weights / weights.sum()


def random_laws(seed, num_tokens, depth):
    """A law after every prefix."""
    rng = np.random.default_rng(seed)
    prefixes = itertools.chain.from_iterable(
        itertools.product(range(num_tokens), repeat=n) for n in range(depth)
    )
    return {prefix: law(rng, num_tokens) for prefix in prefixes}


def exact_length(target, draft, num_tokens, depth):
    """1 + the chances that one, two, ... drawn tokens are accepted."""
    total = 1.0
    for n in range(1, depth + 1):
        for path in itertools.product(range(num_tokens), repeat=n):
            total += np.prod(
                [
                    min(target[path[:i]][path[i]], draft[path[:i]][path[i]])
                    for i in range(n)
                ]
            )
    return total


def mean_length(target, draft, num_tokens, depth, estimator):
    """Over all answers of the target, each as likely as it is."""
    mean = 0.0
    for path in itertools.product(range(num_tokens), repeat=depth):
        p = [target[path[:i]] for i in range(depth)]
        q = [draft[path[:i]] for i in range(depth)]
        chances = [np.minimum(a, b).sum() for a, b in zip(p, q, strict=True)]
        couplings = [
            min(1, b[x] / a[x]) if a[x] else 0.0
            for a, b, x in zip(p, q, path, strict=True)
        ]
        windows = Windows(*(np.array(v)[None, :, None] for v in (chances, couplings)))
        weight = np.prod([a[x] for a, x in zip(p, path, strict=True)])
        mean += weight * expected_lengths(windows, estimator)[0, 0, -1]
    return mean


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_tokens", [2, 3])
def test_coupled_lengths_are_unbiased_and_products_are_not(seed, num_tokens):
    target = random_laws(seed, num_tokens, 3)
    draft = random_laws(100 + seed, num_tokens, 3)
    exact = exact_length(target, draft, num_tokens, 3)
    coupled = mean_length(target, draft, num_tokens, 3, "coupled")
    np.testing.assert_allclose(coupled, exact, rtol=1e-12)
    product = mean_length(target, draft, num_tokens, 3, "product")
    assert abs(product - exact) > 1e-4


def test_two_tokens_are_accepted_every_other_time():
    target = {(): [0.5, 0.5], (0,): [1.0, 0.0], (1,): [1.0, 0.0]}
    draft = {(): [1.0, 0.0], (0,): [1.0, 0.0], (1,): [0.0, 1.0]}
    target, draft = ({k: np.array(v) for k, v in x.items()} for x in (target, draft))
    assert exact_length(target, draft, 2, 2) == 1 + 1 / 2 + 1 / 2
    assert mean_length(target, draft, 2, 2, "coupled") == 1 + 1 / 2 + 1 / 2
    assert mean_length(target, draft, 2, 2, "product") == 1 + 1 / 2 + 1 / 4


def test_greedy_lengths_are_runs():
    hits = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]], float)[..., None]
    for estimator in ("coupled", "product"):
        found = expected_lengths(Windows(hits, hits), estimator)
        assert found[:, 0].tolist() == [[1, 2, 3, 3], [1, 1, 1, 1], [1, 2, 3, 4]]


def test_windows_are_complete_whatever_comes_at_once():
    rng = np.random.default_rng(0)
    chances, couplings = rng.uniform(size=(2, 11, 3, 4))
    whole = Pending().add(chances, couplings)
    assert whole.num_windows == 9
    for i in range(9):
        for depth in range(3):
            np.testing.assert_array_equal(
                whole.chances[i, depth], chances[i + depth, depth]
            )
    pending = Pending()
    parts, first = [], 0
    for length in (1, 1, 4, 0, 3, 2):
        rows = slice(first, first + length)
        parts.append(pending.add(chances[rows], couplings[rows]))
        first += length
    # Of the first two tokens no window is complete.
    assert [part.num_windows for part in parts] == [0, 0, 4, 0, 3, 2]
    for found, wanted in zip(join(parts), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # The last two tokens begin windows that the answer's end has cut short.
    assert len(pending.chances) == 2
