# SPDX-License-Identifier: Apache-2.0
"""Values of files: of the right type, or refused with file, name and value."""

import json

import numpy as np
import pytest

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    InputError,
    Llama3Scaling,
    UnforeseenError,
    from_dict,
    naming,
)
from ospec_jax.config.base import is_of_type
from ospec_jax.config.fields import Fields, read_json

SCALING = {
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 64,
}


@pytest.mark.parametrize(
    ("value", "hint", "is_one"),
    [
        (3, int, True),
        (np.int32(3), int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (np.float32(3), float, True),
        (float("nan"), float, False),
        (10**400, float, False),
        (None, int | None, True),
        ("a", int | None, False),
        ((1, 2), tuple[int, ...], True),
        ((1, "a"), tuple[int, ...], False),
        ([1, "a"], list[int], False),
        (1, bool, False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
    ],
)
def test_types_are_those_of_annotations(value, hint, is_one):
    assert is_of_type(value, hint) == is_one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": "8"}, "factor is '8'; use a finite number"),
        ({"factor": None}, "factor is None"),
        ({"original_max_position": 64.5}, "original_max_position is 64.5; use a whole"),
        ({"factor": -1.0}, "factor is -1.0; use a finite number above 0"),
        ({"high_freq_factor": 1.0}, "must be above low_freq_factor 1.0"),
        ({"factors": 1.0}, "did you mean 'factor'"),
    ],
)
def test_dictionaries_become_what_they_say(changes, message):
    assert from_dict(Llama3Scaling, SCALING) == Llama3Scaling(8, 1.0, 4.0, 64)
    with pytest.raises(ConfigError, match=message):
        from_dict(Llama3Scaling, SCALING | changes)


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="DraftConfig lacks 'vocab_size'"):
        from_dict(DraftConfig, {})
    with pytest.raises(ConfigError, match="use a dictionary"):
        from_dict(DraftConfig, [])


@pytest.mark.parametrize("error", [KeyError("a"), TypeError(), RecursionError("deep")])
def test_what_nobody_foresaw_names_the_file(error):
    message = rf"a\.json.*{type(error).__name__}"
    with pytest.raises(UnforeseenError, match=message), naming("a.json"):
        raise error


@pytest.mark.parametrize(
    "error", [InputError("a"), ConfigError("a"), FileNotFoundError("a")]
)
def test_what_was_foreseen_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, naming("a.json"):
        raise error
    assert caught.value is error


def test_a_place_that_cannot_be_read_is_no_fault_of_the_reader(tmp_path):
    with pytest.raises(ConfigError, match="directory") as caught, naming(tmp_path):
        tmp_path.read_text()
    assert not isinstance(caught.value, UnforeseenError)


def test_an_interrupt_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt), naming("a.json"):
        raise KeyboardInterrupt


def test_values_have_their_types_and_ranges(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps({"n": 3, "x": 2, "t": "a", "f": True, "l": [1], "z": None})
    )
    fields = Fields(read_json(file), str(file))
    assert fields.whole("n") == 3
    assert fields.number("x") == 2.0
    assert fields.text("t") == "a"
    assert fields.flag("f") is True
    assert fields.items("l", int) == (1,)
    assert fields.whole("z", None) is None
    assert fields.whole("nothing", 7) == 7
    for read, message in (
        (lambda: fields.whole("t"), "has t 'a'; use a whole number"),
        (lambda: fields.whole("f"), "has f True"),
        (lambda: fields.whole("n", low=4), "has n 3; use 4 to"),
        (lambda: fields.number("t"), "has t 'a'; use a number"),
        (lambda: fields.whole("z", 7), "has null for 'z'"),
        (lambda: fields.whole("nothing"), "lacks 'nothing'"),
        (lambda: fields.items("l", str), "has l .1.; use a list of str"),
        (lambda: fields.section("n"), "has n 3; use an object"),
    ):
        with pytest.raises(ConfigError, match=f"a.json {message}"):
            read()
