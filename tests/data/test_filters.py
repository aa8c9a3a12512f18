# SPDX-License-Identifier: Apache-2.0
"""Which texts are kept, and why others are not."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.filters import FilterConfig, Seen, find_fault

GOOD = "Could you explain how a heat pump works, and what one costs in a cold country?"

LOOP = "".join(f"set_image_of_the_game_{i}, " for i in range(30))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD, ""),
        ("Übersetze bitte diesen kurzen Satz über Bäume.", ""),
        ("Hi", "too short"),
        ("   Hi         ", "too short"),
        ("a word or two " * 100, "too long"),
        (GOOD + "\ufffd", "no text"),
        (GOOD + "\x07", "no text"),
        (GOOD + "\n\tand more", ""),
        ("12 + 34 = 46, 5 * 6 = 30", "few letters"),
        ("Расскажи мне, как работает тепловой насос", "other script"),
        ("in a loop and " * 8, "repeats itself"),
        (LOOP, "repeats itself"),
    ],
)
def test_faults(text, fault):
    assert find_fault(text, FilterConfig()) == fault


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("Hi", {"min_chars": 1}),
        ("many a word " * 10, {"max_repeated_share": 1.0}),
        (LOOP, {"min_packed_share": 0.0}),
        (LOOP, {"min_packed_share": 0.0, "max_chars": len(LOOP)}),
        (GOOD + "\ufffd", {"max_odd_share": 0.1}),
        ("12 + 34 = 46, 5 * 6 = 30", {"min_letter_share": 0.0}),
        ("Расскажи мне, как работает тепловой насос", {"script": "CYRILLIC"}),
        ("Расскажи мне, как работает тепловой насос", {"script": ""}),
    ],
)
def test_every_bound_is_a_parameter(text, change):
    assert find_fault(text, FilterConfig(**change)) == ""


def test_what_is_like_earlier_texts_is_known():
    seen = Seen(FilterConfig())
    assert seen.find_fault(GOOD) == ""
    seen.add(GOOD)
    assert seen.find_fault(GOOD.upper().replace(",", " -")) == "said before"
    assert seen.find_fault(GOOD.replace("cold", "warm")) == "like others"
    assert seen.find_fault("Could you explain how a heat pump is repaired?") == ""
    # Below five words only the same ones are alike.
    seen.add("Tell me more")
    assert seen.find_fault("tell me more!") == "said before"
    assert seen.find_fault("tell me more now") == ""
    assert Seen(FilterConfig(max_overlap=1.0)).find_fault(GOOD) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_chars": 9, "max_chars": 8}, "9 to 8 characters"),
        ({"max_overlap": 1.5}, r"max_overlap is 1.5; it lies in \[0, 1\]"),
        ({"script": 3}, "script is 3; use text"),
    ],
)
def test_bounds_that_are_none_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        FilterConfig(**change)
