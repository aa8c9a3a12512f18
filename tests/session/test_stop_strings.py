# SPDX-License-Identifier: Apache-2.0
"""Stop strings: the text ends in front of them, wherever tokens begin and end."""

import pytest

from ospec_jax import Session
from ospec_jax.decoding.request import StopPoint
from ospec_jax.models.tokenizer import TextStream
from ospec_jax.session.requests import find_stop
from ospec_jax.testing import tiny_target

PIECES = ["Hello", "#", "##", "Hello#", "a###b", " world", "ab", "cd", "ef"]
HELLO, HASH, HASHES, HELLO_HASH, WHOLE, WORLD, AB, CD, EF = range(len(PIECES))


def decode(ids):
    return "".join(PIECES[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        ([HELLO, WORLD], ("###",), None),
        ([HELLO, HASH, HASHES], ("###",), StopPoint(1)),
        # Text in front of it in the same token stays.
        ([HELLO_HASH, HASHES, WORLD], ("###",), StopPoint(1, "#")),
        ([HELLO, WHOLE], ("###",), StopPoint(2, "###b")),
        ([HASHES, HASH], ("###",), StopPoint(0)),
        # The one that is complete first, however many tokens came at once.
        ([AB, CD, EF], ("abcdef", "cd"), StopPoint(1)),
        ([AB, CD], ("cd", "bc"), StopPoint(1, "b")),
    ],
)
def test_the_answer_ends_in_front_of_the_string(ids, stop, expected):
    assert find_stop(decode, stop, ids) == expected


@pytest.mark.parametrize(
    ("ids", "shown", "text"),
    [
        ([HELLO, HASH, HASHES], ["Hello", "", ""], "Hello"),
        ([HELLO_HASH, WORLD], ["Hello", "# world"], "Hello# world"),
        ([HELLO, WHOLE], ["Hello", "a"], "Helloa"),
        ([HELLO, HASH], ["Hello", ""], "Hello#"),
    ],
)
def test_streams_hold_back_what_may_become_a_stop_string(ids, shown, text):
    stream = TextStream(decode, ("###",))
    assert [stream.add([i]) for i in ids] == shown
    assert "".join(shown) + stream.finish(text) == text


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_session_cuts_text_and_stream_alike(target, draft):
    """The string is bytes of several tokens, one of which begins a character."""
    [whole] = Session(target).generate("Why?", 40)
    start = len(whole.text) // 2
    stop = whole.text[start : start + 3]
    pieces = []
    session = Session(target, draft, stop=stop)
    [result] = session.generate("Why?", 40, on_text=lambda _, t: pieces.append(t))
    assert session.stop == (stop,)
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert "".join(pieces) == result.text
