# SPDX-License-Identifier: Apache-2.0
"""The newer API means what the chat does, and OpenAI's client understands it."""

import openai
import pytest
from served import ANSWER, FakeService, refused, serving

from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.prompting import Server
from ospec_jax.serving.responses import read_response
from ospec_jax.serving.settings import HttpConfig

SERVER = Server(HttpConfig(), "fake", vocab_size=256)
HI = {"role": "user", "content": "Hi"}
LOG_PROBS = "message.output_text.logprobs"


def read(**changes):
    """The one ask of a body."""
    (ask,) = read_response({"model": "fake", "input": "Hi"} | changes, "1", SERVER).asks
    return ask


@pytest.fixture(scope="module")
def place():
    """A service, and a client of the server in front of it."""
    service = FakeService()
    with serving(service) as address:
        base = f"{address}/v1"
        with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
            yield service, client


@pytest.fixture
def client(place):
    """The client; its service does as it did in the beginning."""
    service, client = place
    service.error = None
    service.failure = None
    service.tickets.clear()
    return client


def test_a_body_is_read_as_a_chat_is():
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    said = [{"type": "output_text", "text": "c", "annotations": []}]
    ask = read(
        instructions="Be brief.",
        input=[
            {"role": "user", "content": parts},
            {"type": "message", "id": "m", "role": "assistant", "content": said},
            HI,
        ],
        max_output_tokens=9,
        temperature=0.5,
        seed=7,
        learn=False,
        tenant="t",
    )
    assert ask.prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        HI,
    )
    assert ask.max_new_tokens == 9
    assert ask.sampling.temperature == 0.5
    assert ask.prompt.seed == 7
    assert not ask.can_teach
    assert ask.scope == "/t"


def test_what_clients_send_of_themselves_is_no_obstacle():
    given = {
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "truncation": "disabled",
        "prompt_cache_key": "x",
        "top_logprobs": 0,
        "background": False,
    }
    assert read(**given) == read()


def test_log_probs_are_included():
    assert read().num_log_probs is None
    assert read(include=[LOG_PROBS]).num_log_probs == 0
    assert read(include=[LOG_PROBS], top_logprobs=3).num_log_probs == 3


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": "\ud800"}, "input[0].content"),
        ({"input": [HI, {"role": "x", "content": ""}]}, "input[1].role"),
        (
            {"instructions": "a", "input": [HI, {"role": "x", "content": ""}]},
            "input[1].role",
        ),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"instructions": 3}, "instructions"),
        ({"instructions": "\ud800"}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"messages": [HI]}, "messages"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"include": "x"}, "include"),
        ({"include": [[]]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"speculative": {"show": True}}, "speculative.show"),
        ({"temperature": 3}, "temperature"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_what_cannot_be_is_refused_by_its_name_here(given, param):
    with pytest.raises(RequestError) as caught:
        read(**given)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "messages[" not in caught.value.message


def test_a_whole_response(client):
    answer = client.responses.create(model="fake", input="Hi", instructions="Be brief.")
    assert answer.id.startswith("resp_")
    assert answer.object == "response"
    assert answer.status == "completed"
    assert answer.output_text == ANSWER
    assert answer.instructions == "Be brief."
    assert answer.output[0].role == "assistant"
    assert answer.usage.output_tokens == len(ANSWER.encode())
    details = answer.usage.input_tokens_details
    assert details.cached_tokens == answer.usage.input_tokens // 2 > 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + len(ANSWER.encode())
    assert answer.metrics["speculative_decoding"]["num_spec_tokens"] == 2


def test_a_response_that_is_cut_short_says_so(client):
    answer = client.responses.create(model="fake", input="Hi", max_output_tokens=4)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_a_stream_of_a_response(client):
    events = list(client.responses.create(model="fake", input="Hi", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == ANSWER
    assert events[-4].text == ANSWER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == ANSWER
    assert events[-1].response.usage.output_tokens == len(ANSWER.encode())


def test_the_client_s_stream_helper(client):
    with client.responses.stream(
        model="fake", input="Hi", stream_options={"include_obfuscation": True}
    ) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == ANSWER


def test_log_probs_of_a_response(client):
    answer = client.responses.create(
        model="fake", input="Hi", include=[LOG_PROBS], top_logprobs=1
    )
    found = answer.output[0].content[0].logprobs
    assert bytes(byte for entry in found for byte in entry.bytes).decode() == ANSWER
    assert len(found[0].top_logprobs) == 1


def test_errors_of_responses(client, place):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="fake", input="Hi", max_output_tokens=511)
    assert caught.value.param == "input"
    place[0].error = refused()
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="fake", input="Hi", stream=True)


def test_a_stream_that_fails_says_so(client, place):
    place[0].failure = RuntimeError("secret")
    events = list(client.responses.create(model="fake", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert "secret" not in events[-1].response.error.message
