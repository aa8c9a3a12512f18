# SPDX-License-Identifier: Apache-2.0
"""Where steps end."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.reasoning.steps import StepRule

TEXT = "\n\nFirst.\n\nThen\nthis.\n\n\nLast"


def decode(ids):
    return bytes(ids).decode()


def test_a_text_is_cut_behind_blank_lines():
    steps = StepRule().cut(decode, TEXT.encode())
    texts = [decode(step) for step in steps]
    # White space in front of a step ends none.
    assert texts == ["\n\nFirst.\n\n", "Then\nthis.\n\n", "\nLast"]


def test_long_steps_are_cut():
    assert StepRule(max_tokens=4).find_ends(decode, b"abcdefg\n\nhi") == [4, 8]


@pytest.mark.parametrize("num_new", [1, 3, 50])
def test_an_answer_ends_behind_a_step_however_many_tokens_come_at_once(num_new):
    ids = list(TEXT.encode())
    find_stop = StepRule().stop_after(decode, 2)
    found = None
    for end in range(num_new, len(ids) + num_new, num_new):
        found = find_stop(ids[:end])
        if found is not None:
            break
    assert found is not None
    assert decode(ids[: found.num_tokens]) == "\n\nFirst.\n\nThen\nthis.\n\n"
    assert not found.text_over


@pytest.mark.parametrize("settings", [{"separator": ""}, {"max_tokens": 0}])
def test_rules_that_end_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        StepRule(**settings)
