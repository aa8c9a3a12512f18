# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the API is honoured as it is, or refused by its name."""

import dataclasses
import json

import pytest

from ospec_jax.config import SamplingConfig
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.prompting import Server
from ospec_jax.serving.schema import read_wanted
from ospec_jax.serving.settings import HttpConfig
from ospec_jax.serving.values import parse_body

SERVER = Server(HttpConfig(), "fake", vocab_size=256)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "fake", "prompt": "Hi"}


def chat(server: Server = SERVER, **changes):
    """What a chat request asks for."""
    return read_wanted(CHAT | changes, "chat", "chatcmpl-1", server)


def completion(server: Server = SERVER, **changes):
    """What a completion request asks for."""
    return read_wanted(TEXT | changes, "completion", "cmpl-1", server)


def only(wanted):
    """The one prompt's ask."""
    (ask,) = wanted.asks
    return ask


def test_a_plain_chat_has_the_api_s_defaults():
    wanted = chat()
    ask = only(wanted)
    assert ask.prompt.messages == ({"role": "user", "content": "Hi"},)
    assert ask.prompt.text == "Hi"
    assert ask.prompt.seed is None
    assert ask.sampling == SamplingConfig(temperature=1.0)
    assert ask.max_new_tokens is None
    assert ask.num_choices == 1
    assert ask.stop == ()
    assert ask.num_log_probs is None
    assert ask.can_speculate
    assert ask.can_teach
    assert ask.scope == ""
    assert not ask.is_raw
    assert not wanted.is_stream


def test_a_plain_completion_is_raw_and_short():
    ask = only(completion())
    assert ask.is_raw
    assert ask.max_new_tokens == 16
    assert ask.prompt.text == "Hi"


SAMPLING = [
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.5, "top_k": 7}, {"temperature": 0.5, "top_k": 7}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_p": 0.25}, {"top_p": 0.25}),
    ({"top_p": 0}, {"top_p": 1.0, "temperature": 0.0}),
    ({"min_p": 0.1}, {"min_p": 0.1}),
    ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ({"logit_bias": {"9": -100, "3": 2.5}}, {"logit_bias": ((3, 2.5), (9, -100.0))}),
]


@pytest.mark.parametrize(("given", "wanted"), SAMPLING, ids=str)
def test_sampling_is_as_asked(given, wanted):
    sampling = only(chat(**given)).sampling
    assert sampling == dataclasses.replace(SamplingConfig(temperature=1.0), **wanted)


@pytest.mark.parametrize(
    ("given", "attribute", "value"),
    [
        ({"n": 3}, "num_choices", 3),
        ({"stop": "\n"}, "stop", ("\n",)),
        ({"stop": ["a", "bc"]}, "stop", ("a", "bc")),
        ({"max_tokens": 5}, "max_new_tokens", 5),
        ({"max_tokens": 5, "max_completion_tokens": 9}, "max_new_tokens", 9),
        ({"max_tokens": None}, "max_new_tokens", None),
        ({"logprobs": True}, "num_log_probs", 0),
        ({"logprobs": True, "top_logprobs": 20}, "num_log_probs", 20),
        ({"logprobs": False}, "num_log_probs", None),
        ({"speculative": {"enabled": False}}, "can_speculate", False),
        ({"learn": False}, "can_teach", False),
        ({"learn": False}, "informs", False),
        ({"learn": True}, "informs", True),
        ({"tenant": "a b"}, "scope", "/a b"),
    ],
    ids=str,
)
def test_a_parameter_is_as_asked(given, attribute, value):
    assert getattr(only(chat(**given)), attribute) == value


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40 + 5, -1, 2**63 - 1])
def test_seeds_of_64_bits_are_folded(seed):
    assert only(chat(seed=seed)).prompt.seed == seed % 2**32


def test_log_probs_of_completions_are_a_number():
    assert only(completion(logprobs=0)).num_log_probs == 0
    assert only(completion(logprobs=5)).num_log_probs == 5


def test_content_parts_and_roles():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "Yes.", "tool_calls": []},
        {"role": "user", "content": ""},
    ]
    assert only(chat(messages=messages)).prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo", "name": "Ada"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": ""},
    )


@pytest.mark.parametrize(
    "content",
    ["ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]],
    ids=["text", "parts"],
)
def test_predictions(content):
    wanted = chat(prediction={"type": "content", "content": content})
    assert only(wanted).prompt.prediction == "ab"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", [("a", ())]),
        (["a", "b"], [("a", ()), ("b", ())]),
        ([1, 2], [("", (1, 2))]),
        ([[1, 2], [3]], [("", (1, 2)), ("", (3,))]),
        (["a", [3]], [("a", ()), ("", (3,))]),
    ],
    ids=str,
)
def test_prompts_of_completions(prompt, found):
    asks = completion(prompt=prompt, n=2).asks
    assert [(ask.prompt.text, ask.prompt_ids) for ask in asks] == found
    assert {ask.num_choices for ask in asks} == {2}


def test_stream_options():
    options = {
        "include_usage": True,
        "continuous_usage_stats": True,
        "include_obfuscation": True,
    }
    wanted = chat(stream=True, stream_options=options)
    assert wanted.is_stream
    assert wanted.has_usage
    assert wanted.has_running_usage
    assert wanted.is_obfuscated
    assert not chat(stream=True).is_obfuscated


def test_options_of_the_server_are_the_defaults():
    config = HttpConfig(default_temperature=0.0, obfuscate=True)
    server = SERVER._replace(config=config, teaches=False)
    wanted = chat(server)
    assert only(wanted).sampling.temperature == 0
    assert wanted.is_obfuscated
    assert not only(wanted).can_teach
    assert only(chat(server, learn=True)).can_teach
    off = server._replace(can_teach=False)
    assert not only(chat(off, learn=True)).can_teach
    # Whom nobody asked not to, controllers hear of, whatever the draft learns from.
    assert only(chat(off)).informs


def test_a_tenant_is_one_of_its_key():
    wanted = read_wanted(CHAT | {"tenant": "b"}, "chat", "1", SERVER, key="a")
    assert only(wanted).scope == "a/b"
    assert only(read_wanted(CHAT, "chat", "1", SERVER, key="a")).scope == "a"


def test_what_changes_no_answer_is_passed_over():
    given = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "whatever": [1],
    }
    wanted = chat(**given)
    assert dataclasses.replace(wanted, ignored=()) == chat()
    assert set(wanted.ignored) == set(given)


def test_what_asks_for_nothing_is_no_obstacle():
    given = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "n": None,
        "best_of": 1,
        "modalities": ["text"],
        "audio": None,
    }
    assert chat(**given) == chat()


REFUSED = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "judge", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e-35}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 2.5}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": -0.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"256": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
    ),
    ({"prediction": "a"}, "prediction"),
    ({"prediction": {"type": "tokens", "content": "a"}}, "prediction.type"),
    ({"prediction": {"type": "content", "content": ""}}, "prediction.content"),
    ({"prediction": {"type": "content"}}, "prediction.content"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"guided_json": {}}, "guided_json"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"cache_salt": "x"}, "cache_salt"),
    ({"speculative": True}, "speculative"),
    ({"speculative": {"enabled": 1}}, "speculative.enabled"),
    ({"speculative": {"depth": 1}}, "speculative.depth"),
    (
        {"speculative": {"num_speculative_tokens": 3}},
        "speculative.num_speculative_tokens",
    ),
    ({"learn": "no"}, "learn"),
    ({"tenant": "a/b"}, "tenant"),
    ({"tenant": ""}, "tenant"),
    ({"tenant": "a\n"}, "tenant"),
]


@pytest.mark.parametrize(("given", "param"), REFUSED, ids=lambda x: str(x)[:50])
def test_what_cannot_be_is_refused_by_name(given, param):
    with pytest.raises(RequestError) as caught:
        chat(**given)
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert len(error.message) < 600
    assert param.rpartition(".")[2].partition("[")[0] in error.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "x"}, "suffix"),
    ],
    ids=str,
)
def test_what_completions_cannot_be_is_refused_by_name(given, param):
    with pytest.raises(RequestError) as caught:
        completion(**given)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused(kind):
    messages = [{"role": "user", "content": [{"type": kind, kind: {}}]}]
    with pytest.raises(RequestError, match="not supported") as caught:
        chat(messages=messages)
    assert caught.value.param == "messages[0].content[0]"


def test_an_unknown_model_is_not_found():
    with pytest.raises(RequestError, match="'fake'") as caught:
        chat(model="gpt-4o")
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_prompts_are_bounded_over_all_their_texts():
    config = HttpConfig(max_prompt_bytes=10)
    server = SERVER._replace(config=config)
    chat(server, messages=[{"role": "user", "content": "ö" * 5}])
    for given in (
        {"messages": [{"role": "user", "content": "ö" * 6}]},
        {"messages": [{"role": "user", "content": "12345"}] * 3},
        {"prediction": {"type": "content", "content": "123456789"}},
    ):
        with pytest.raises(RequestError, match="10 bytes") as caught:
            chat(server, **given)
        assert caught.value.status == 413
    with pytest.raises(RequestError, match="10 bytes"):
        completion(server, prompt=[1, 2, 3])


def test_turns_are_bounded():
    server = SERVER._replace(config=HttpConfig(max_messages=2))
    turn = {"role": "user", "content": ""}
    chat(server, messages=[turn] * 2)
    with pytest.raises(RequestError, match="3 turns"):
        chat(server, messages=[turn] * 3)


def test_who_proposed_a_token_is_not_told_everywhere():
    assert chat(speculative={"show": True}).shows_drafted
    server = SERVER._replace(config=HttpConfig(tell_acceptance=False))
    with pytest.raises(RequestError, match="does not tell"):
        chat(server, speculative={"show": True})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"n": NaN}',
        b"\xff{}",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda x: repr(x[:12]),
)
def test_bodies_that_are_no_object_are_refused(content):
    with pytest.raises(RequestError) as caught:
        parse_body(content)
    assert caught.value.status == 400
    json.dumps(caught.value.to_json(), ensure_ascii=False).encode()


def test_messages_do_not_give_the_body_back():
    with pytest.raises(RequestError) as caught:
        chat(temperature=["x" * 10_000] * 100)
    assert len(caught.value.message) < 600
    with pytest.raises(RequestError) as caught:
        chat(speculative={"x" * 10_000 + "\ud800": 1})
    said = caught.value.to_json()["error"]
    assert len(said["message"]) < 700
    json.dumps(said, ensure_ascii=False).encode()
