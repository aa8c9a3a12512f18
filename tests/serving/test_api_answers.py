# SPDX-License-Identifier: Apache-2.0
"""Events become OpenAI's objects; what tokens look like; how chunks are padded."""

import json

import pytest

from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.serving.answers import (
    Source,
    Teller,
    as_event,
    merge_ends,
    metrics_json,
)
from ospec_jax.serving.asks import ChoiceEnd, Ended, Piece, Token, Usage
from ospec_jax.serving.prompting import Server
from ospec_jax.serving.schema import read_wanted
from ospec_jax.serving.settings import HttpConfig
from ospec_jax.serving.token_texts import TokenTexts
from ospec_jax.testing import byte_tokenizer

SERVER = Server(HttpConfig(), "fake", vocab_size=256)
STATS = DecodingStats(2, 4, 8, 5, [1, 1, 2])
ENDED = Ended(Usage(7, 6), STATS, 9, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def texts():
    """Of a tokenizer of bytes."""
    return TokenTexts(byte_tokenizer())


def teller(texts, tells_acceptance=True, **changes):
    """Tells a chat."""
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    wanted = read_wanted(body | changes, "chat", "chatcmpl-1", SERVER)
    fingerprint = lambda version=1: f"draft-{version}"
    source = Source("chatcmpl-1", "fake", texts, fingerprint, tells_acceptance)
    return Teller(wanted, source, 7)


def tokens(text):
    """Tokens of a text."""
    return tuple(Token(i) for i in byte_tokenizer().encode(text))


def test_metrics_of_one_answer():
    found = metrics_json(ENDED, 1)
    assert found["speculative_decoding"] == STATS.to_json()
    assert found["time_to_first_token_ms"] == 500
    assert found["queue_time_ms"] == 250
    assert found["generation_time_ms"] == 500
    assert found["mean_itl_ms"] == 100
    assert found["tokens_per_second"] == 10


def test_metrics_of_several_answers_or_no_time_have_no_rates():
    assert metrics_json(ENDED, 2).keys() == {"speculative_decoding"}
    one = ENDED._replace(usage=Usage(7, 1), seconds=0.5)
    assert "tokens_per_second" not in metrics_json(one, 1)


def test_ends_of_several_prompts_add_up():
    other = Ended(Usage(1, 2, 3, 4, 5), STATS, 10, 0.5, 0.75, 0.9)
    merged = merge_ends([ENDED, other])
    assert merged.usage == Usage(8, 8, 3, 4, 5)
    assert merged.stats == STATS + STATS
    assert merged[2:] == (10, 0.5, 0.5, 1.0)


def test_the_last_chunk_waits_for_what_is_said_of_all(texts):
    told = teller(texts, n=2)
    assert len(told.open()) == 2
    first = told.add([Piece(0, "a", tokens("a")), ChoiceEnd(0, "", "stop")])
    assert [c["choices"][0]["finish_reason"] for c in first] == ["stop"]
    assert "metrics" not in first[0]
    assert told.add([ChoiceEnd(1, "b", "length")]) == []
    (last,) = told.add([ENDED])
    assert last["choices"][0]["delta"] == {"content": "b"}
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["metrics"]["speculative_decoding"]
    assert last["system_fingerprint"] == "draft-9"
    assert "usage" not in last


def test_acceptance_is_not_told_everywhere(texts):
    told = teller(texts, tells_acceptance=False)
    assert "metrics" not in told.tell_whole([ChoiceEnd(0, "", "stop")], ENDED)


def test_pieces_without_text_are_no_chunks(texts):
    nothing = Piece(0, "", tokens("a"))
    assert teller(texts).add([nothing]) == []
    assert len(teller(texts, logprobs=True).add([nothing])) == 1
    assert len(teller(texts, speculative={"show": True}).add([nothing])) == 1


def test_what_had_no_chunk_is_counted_in_the_next(texts):
    options = {"continuous_usage_stats": True}
    told = teller(texts, stream=True, stream_options=options)
    told.add([Piece(0, "", tokens("ab"))])
    (chunk,) = told.add([Piece(0, "abc", tokens("c"))])
    assert chunk["usage"]["completion_tokens"] == 3
    assert chunk["usage"]["total_tokens"] == 10


def test_pieces_at_once_go_together(texts):
    pieces = [Piece(0, "a", tokens("a")), Piece(1, "x", ()), Piece(0, "b", ())]
    chunks = teller(texts, n=2).add(pieces)
    said = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks]
    assert said == [(0, {"content": "ab"}), (1, {"content": "x"})]


def test_a_pool_s_member_is_told_of_what_it_proposed(texts):
    told = teller(texts, speculative={"show": True})
    two = (Token(5, "draft"), Token(6))
    pieces = [Piece(0, "a", two, drafter=1), Piece(0, "b", two)]
    (chunk,) = told.add(pieces)
    found = chunk["choices"][0]["speculative"]["tokens"]
    assert [token["source"] for token in found] == ["draft", "target"] * 2
    assert [token["drafted"] for token in found] == [True, False] * 2
    assert [token.get("drafter") for token in found] == [1, None, None, None]


@pytest.mark.parametrize("value", [None, float("-inf"), float("nan"), -1e30])
def test_log_probs_that_json_does_not_know(texts, value):
    token = Token(1, "target", value, ((2, float("-inf")),))
    told = teller(texts, logprobs=True)
    (chunk,) = told.add([Piece(0, "a", (token,))])
    (entry,) = chunk["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -9999
    assert entry["top_logprobs"][0]["logprob"] == -9999
    json.loads(as_event(chunk)[6:], parse_constant=pytest.fail)


@pytest.mark.parametrize("text", ["", "a", "é" * 40, "x" * 255, "x" * 256])
def test_padding_makes_sizes_few(text):
    line = as_event({"text": text}, is_obfuscated=True)
    content = line.removeprefix(b"data: ").removesuffix(b"\n\n")
    assert len(content) % 256 == 0
    assert json.loads(content)["text"] == text
    assert b"obfuscation" not in as_event({"text": text})


def test_bytes_of_tokens_are_those_of_the_text(texts):
    text = "Grüße 🚀\n\x00"
    ids = byte_tokenizer().encode(text)
    assert b"".join(map(texts.bytes_of, ids)).decode() == text
    assert texts.text_of(ids[2]) == "\ufffd"
    assert texts.plain_of(ids[2]) == "bytes:\\xc3"
    assert texts.plain_of(ids[0]) == "G"
    assert texts.decode(ids) == text


class Pieces:
    """A tokenizer in SentencePiece's way, as far as it is asked here."""

    letters = ("<0xC3>", "\u2581Hi", "<s>", "x")
    added_tokens_decoder = {2: "<s>"}

    def convert_ids_to_tokens(self, token_id):
        return self.letters[token_id] if token_id < 4 else None


def test_tokens_of_other_tokenizers():
    texts = TokenTexts(Pieces())
    found = [texts.bytes_of(i) for i in range(5)]
    assert found == [b"\xc3", b" Hi", b"<s>", b"x", b""]
