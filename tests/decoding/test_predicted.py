# SPDX-License-Identifier: Apache-2.0
"""What of a prediction came true is counted as the drafter follows it."""

import jax
import numpy as np
import pytest

from ospec_jax.decoding.predicted import Followed
from ospec_jax.drafters.prediction import as_prediction, follow


@pytest.mark.parametrize("seed", range(4))
def test_the_host_follows_where_the_device_does(seed):
    rng = np.random.default_rng(seed)
    # Few tokens, so that they often occur again.
    predicted = rng.integers(0, 4, 20).tolist()
    answer = [*predicted[:6], *rng.integers(0, 4, 5), *predicted[8:18], 1, 2, 3]
    followed = Followed(predicted)
    going_on = jax.jit(follow)
    prediction = as_prediction(predicted, 24, 0.5)
    while answer:
        count = int(rng.integers(1, 5))
        new = [int(token) for token in answer[:count]]
        del answer[:count]
        followed.add(new, 0)
        padded = np.asarray([[*new, *[0] * (4 - len(new))]], np.int32)
        prediction = going_on(prediction, padded, np.asarray([len(new)], np.int32))
        expected = int(prediction.place[0]), int(prediction.num_skipped[0])
        assert followed.place == expected


def test_drafted_tokens_are_accepted_and_absent_ones_rejected():
    followed = Followed([1, 2, 3, 4, 5, 6, 7, 8, 9])
    # The first token of an answer is the target's own, and so is each pass's last one.
    followed.add([1], 0)
    followed.add([2, 3, 4], 2)
    assert followed.num_accepted() == 2
    assert followed.num_missing() == 5
    # 5 is replaced, 6 and 7 are written again, and found.
    followed.add([99, 6, 7], 0)
    assert followed.num_accepted() == 2
    assert followed.num_missing() == 3
    followed.add([8], 1)
    followed.add([], 0)
    assert followed.num_accepted() == 3
    assert followed.num_missing() == 2
    # The one that stands for the end is not counted.
    assert followed.num_accepted((8, 9)) == 2
    assert followed.num_missing((8, 9)) == 1


def test_nothing_comes_true_of_another_text():
    followed = Followed([1, 2, 3])
    followed.add([7, 8], 1)
    followed.add([9], 0)
    assert followed.num_accepted() == 0
    assert followed.num_missing() == 3
