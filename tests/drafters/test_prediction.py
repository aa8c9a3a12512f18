# SPDX-License-Identifier: Apache-2.0
"""Predicted output: followed, lost and found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.drafters.prediction import (
    as_prediction,
    follow,
    nearest_match,
    suggest,
)

advance = jax.jit(follow)


def predicted(tokens, confidence=0.5, capacity=32):
    return jax.tree.map(jnp.asarray, as_prediction(tokens, capacity, confidence))


def emit(prediction, tokens, width=4):
    """Follows an answer in steps of unequal size."""
    tokens = list(tokens)
    for start in range(0, len(tokens), width):
        new = tokens[start : start + width]
        padded = jnp.asarray([new + [99] * (width - len(new))], jnp.int32)
        prediction = advance(prediction, padded, jnp.asarray([len(new)], jnp.int32))
    return prediction


def next_tokens(prediction, count):
    """What is suggested, one token after the other."""
    recent, found = prediction.recent[:, None], []
    for depth in range(count):
        token, rate = suggest(prediction, recent, depth)
        if not np.isfinite(rate[0, 0]):
            break
        found.append(int(token[0, 0]))
        recent = jnp.concatenate([recent[..., 1:], token[..., None]], axis=-1)
    return found


TEXT = np.asarray([5, 6, 7, 8, 5, 6, 9, 10, 11, 12, 13, 14])


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], [5, 6, 7]),
        ([5, 6, 7], [8, 5, 6]),
        ([5, 6, 7, 8, 5, 6], [9, 10, 11]),  # not taken back to the first 5, 6
        ([5, 6, 7, 50], [5, 6, 9]),  # a replaced token
        ([5, 6, 50, 51, 52, 5, 6, 9], [10, 11, 12]),
        ([5, 6, 7, 8, 50, 51, 52, 5, 6], [9, 10, 11]),  # tokens put in
        ([5, 6, 7, 8, 10, 11], [12, 13, 14]),  # tokens left out
        ([50, 51, 52, 53, 8, 5], [6, 9, 10]),  # begins with something else
        (TEXT.tolist(), []),  # all has come
        (TEXT.tolist() + [50, 51, 7, 8], [5, 6, 9]),  # begins again
    ],
)
def test_suggestions_go_on_where_the_answer_is(answer, expected, width):
    prediction = emit(predicted(TEXT), answer, width)
    assert next_tokens(prediction, 3) == expected


def test_longest_match_wins_then_the_nearest_behind():
    tokens = jnp.asarray([[1, 2, 3, 0, 2, 3, 0, 1, 2, 3, 0, 2, 3]], jnp.int32)

    def found(recent, place):
        index, length = nearest_match(
            tokens, jnp.asarray([13], jnp.int32), jnp.asarray([recent], jnp.int32),
            jnp.asarray([place], jnp.int32),
        )  # fmt: skip
        return int(index[0]), int(length[0])

    assert found([8, 2, 3], 4) == (6, 2)
    assert found([8, 2, 3], 7) == (10, 2)
    assert found([1, 2, 3], 4) == (10, 3)
    assert found([1, 2, 3], 11) == (10, 3)  # nothing lies behind
    assert found([8, 8, 8], 0)[1] == 0


def test_rates_follow_the_rule_of_succession():
    rate = lambda p: float(jnp.exp(suggest(p, p.recent[:, None], 0)[1][0, 0]))
    start = predicted(TEXT)
    assert rate(start) == pytest.approx(1 / 2)
    assert rate(predicted(TEXT, confidence=0.9)) == pytest.approx(0.9)
    assert rate(emit(start, [5])) == pytest.approx(2 / 3)
    assert rate(emit(start, [5, 6, 7])) == pytest.approx(4 / 5)
    assert rate(emit(start, [5, 6, 7, 50])) == pytest.approx(1 / 3)
    assert rate(emit(start, [5, 6, 7, 50, 51, 52])) == pytest.approx(1 / 5)


def test_paths_that_leave_the_prediction_get_no_suggestion():
    prediction = emit(predicted(TEXT), [5, 6])
    paths = jnp.asarray([[[5, 6, 7], [5, 6, 4]]], jnp.int32)
    token, rate = suggest(prediction, paths, 1)
    assert int(token[0, 0]) == 8
    assert np.isfinite(rate[0]).tolist() == [True, False]


def test_rows_that_emit_nothing_stay_as_they_are():
    prediction = emit(predicted(TEXT), [5, 6, 50])
    junk = jnp.full((1, 4), 7, jnp.int32)
    after = advance(prediction, junk, jnp.zeros(1, jnp.int32))
    for old, new in zip(*map(jax.tree.leaves, (prediction, after)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_long_predictions_are_cut():
    prediction = predicted(np.arange(1, 50), capacity=8)
    assert int(prediction.num_tokens[0]) == 8
    assert next_tokens(emit(prediction, range(1, 8)), 3) == [8]
