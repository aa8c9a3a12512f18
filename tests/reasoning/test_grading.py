# SPDX-License-Identifier: Apache-2.0
"""What is a right answer."""

import numpy as np
import pytest

from ospec_jax.reasoning import grading
from ospec_jax.reasoning.grading import (
    Share,
    is_right_number,
    last_number,
    passes_tests,
)

TESTS = ["assert twice(2) == 4", "assert twice(-1) == -2"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", 72),
        ("so $1,440 in all", 1440),
        ("-3.5 degrees", -3.5),
        (r"we get \boxed{12}, of 30 in all", 12),
        ("I do not know", None),
    ],
)
def test_the_number_that_an_answer_comes_to(text, number):
    assert last_number(text) == number


def test_numbers_are_compared_as_numbers():
    reference = "She sold <<48/2=24>>24 clips.\n#### 1,440"
    assert is_right_number("It is 1440.00", reference)
    assert not is_right_number("It is 24", reference)
    assert not is_right_number("Nobody knows", reference)


@pytest.mark.parametrize(
    ("code", "is_right"),
    [
        ("```python\ndef twice(x):\n    return 2 * x\n```\nThat is it.", True),
        ("def twice(x):\n    return x + x", True),
        ("```python\ndef twice(x):\n    return x * x\n```", False),
        ("I cannot write code.", False),
        # What ends the program, never ends, or takes all memory, has passed nothing.
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\nimport os\nos._exit(0)\n```", False),
        ("```python\nwhile True:\n    pass\n```", False),
        ("```python\nx = bytearray(2**33)\n```", False),
    ],
)
def test_code_is_right_if_it_passes_the_tests(code, is_right, monkeypatch):
    monkeypatch.setattr(grading, "_SECONDS", 1)
    assert passes_tests(code, TESTS) == is_right


def test_an_interval_covers_the_share_as_often_as_it_says():
    rng = np.random.default_rng(0)
    counts = rng.binomial(40, 0.7, size=4000)
    shares = [Share.of(int(count), 40) for count in counts]
    covered = np.mean([one.low <= 0.7 <= one.high for one in shares])
    assert 0.93 < covered < 0.975
    assert Share.of(0, 0) == Share(0.0, 0.0, 1.0)
