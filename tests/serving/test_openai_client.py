# SPDX-License-Identifier: Apache-2.0
"""OpenAI's own client against a real server on loopback."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served import ANSWER, PROPOSERS, FakeService, refused, serving

from ospec_jax.serving.settings import HttpConfig

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def place():
    """A service, and a client of the server in front of it."""
    service = FakeService()
    config = HttpConfig(port=0, keep_alive=0.2)
    with serving(service, config) as address:
        base = f"{address}/v1"
        with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
            yield service, client


@pytest.fixture
def service(place):
    """The service, as it was in the beginning."""
    service = place[0]
    service.answer = ANSWER
    service.error = None
    service.failure = None
    service.is_ready = True
    service.may_go.set()
    service.tickets.clear()
    return service


@pytest.fixture
def client(place, service):
    """The client; its service does as it did in the beginning."""
    return place[1]


def chat(client, **options):
    """A chat request."""
    options = {"model": "fake", "messages": HI} | options
    return client.chat.completions.create(**options)


def complete(client, **options):
    """A completion request."""
    options = {"model": "fake", "prompt": "Hi", "max_tokens": 99} | options
    return client.completions.create(**options)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert model.max_model_len == 512
    assert model.draft_version == 3
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_chat(client):
    answer = chat(client)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake"
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.system_fingerprint.endswith("draft-3")


def test_usage_and_metrics_of_a_chat(client):
    answer = chat(client)
    count = len(ANSWER.encode())
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == count
    assert answer.usage.total_tokens == count + 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 0
    stats = answer.metrics["speculative_decoding"]
    assert len(stats["acceptance_histogram"]) == stats["num_spec_tokens"] + 1
    assert answer.metrics["time_to_first_token_ms"] == pytest.approx(20)


def test_what_is_asked_arrives(client, service):
    chat(
        client,
        temperature=0.5,
        seed=7,
        n=2,
        stop=["#"],
        max_completion_tokens=9,
        extra_body={"learn": False, "tenant": "t", "speculative": {"enabled": False}},
    )
    (ask,) = service.asks
    assert ask.sampling.temperature == 0.5
    assert ask.prompt.seed == 7
    assert ask.num_choices == 2
    assert ask.stop == ("#",)
    assert ask.max_new_tokens == 9
    assert not ask.can_teach
    assert not ask.can_speculate
    assert ask.scope == "/t"


def test_several_answers_are_in_order(client, service):
    service.answer = lambda ask, choice: f"answer {choice}"
    answer = chat(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    said = [choice.message.content for choice in answer.choices]
    assert said == ["answer 0", "answer 1", "answer 2"]
    assert "mean_itl_ms" not in answer.metrics


def test_a_stream_says_the_same(client):
    chunks = list(chat(client, stream=True))
    said = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert said == ANSWER
    assert "\ufffd" not in said
    assert len(chunks) > 5
    assert len({(c.id, c.created, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert "speculative_decoding" in chunks[-1].metrics


def test_the_role_is_said_once(client):
    chunks = list(chat(client, stream=True, n=2))
    roles = [c.choices[0].delta.role for c in chunks]
    assert roles == ["assistant", "assistant"] + [None] * (len(chunks) - 2)


def test_choices_are_opened_in_order(client, service):
    service.answer = lambda ask, choice: f"answer {choice}"
    chunks = list(chat(client, stream=True, n=3))
    assert [c.choices[0].index for c in chunks[:3]] == [0, 1, 2]
    # The service says the last one first.
    assert chunks[3].choices[0].index == 2


def test_the_client_s_stream_helper(client, service):
    service.answer = lambda ask, choice: f"answer {choice}"
    with client.chat.completions.stream(model="fake", messages=HI, n=3) as stream:
        stream.until_done()
        answer = stream.get_final_completion()
    said = [(c.message.role, c.message.content) for c in answer.choices]
    assert said == [("assistant", f"answer {i}") for i in range(3)]


def test_usage_at_the_end_of_a_stream(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *others, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == len(ANSWER.encode())
    assert "speculative_decoding" in last.metrics
    assert all(c.usage is None for c in others)
    assert others[-1].choices[0].finish_reason == "stop"


def test_usage_all_along_a_stream(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, n=2, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts[:2] == [0, 0]
    assert counts == sorted(counts)
    assert counts[-2:] == [2 * len(ANSWER.encode())] * 2


def test_padding_hides_sizes(client):
    response = client.chat.completions.with_raw_response.create(
        model="fake",
        messages=HI,
        stream=True,
        stream_options={"include_obfuscation": True},
    )
    lines = [line for line in response.http_response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    sizes = {len(line.removeprefix("data: ").encode()) % 256 for line in lines}
    assert sizes == {0}
    assert all("obfuscation" in line for line in lines)


def test_no_padding_unless_asked_for(client):
    for chunk in chat(client, stream=True):
        assert chunk.obfuscation is None


def test_stop_strings_are_not_told(client, service):
    service.answer = "one two three"
    for is_stream in (False, True):
        answer = chat(client, stop=" two", stream=is_stream)
        if is_stream:
            chunks = list(answer)
            said = "".join(c.choices[0].delta.content or "" for c in chunks)
        else:
            said = answer.choices[0].message.content
        assert said == "one"


def test_a_short_answer_says_that_it_is(client):
    answer = chat(client, max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_log_probs(client):
    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    raw = bytes(byte for entry in content for byte in entry.bytes)
    assert raw.decode() == ANSWER
    assert {entry.logprob for entry in content} == {-0.25}
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -1.75]
    assert content[0].top_logprobs[0].token == content[0].token == "G"


def test_log_probs_in_a_stream_miss_no_token(client):
    chunks = list(chat(client, stream=True, logprobs=True))
    found = [c.choices[0].logprobs for c in chunks]
    raw = bytes(b for one in found if one for entry in one.content for b in entry.bytes)
    assert raw.decode() == ANSWER


def test_who_proposed_each_token(client):
    extra = {"speculative": {"show": True}}
    chunks = list(chat(client, stream=True, extra_body=extra))
    found = [getattr(c.choices[0], "speculative", None) for c in chunks]
    tokens = [token for one in found if one for token in one["tokens"]]
    assert bytes(b for token in tokens for b in token["bytes"]).decode() == ANSWER
    assert [token["drafted"] for token in tokens[:3]] == [True, True, False]
    assert [token["step"] for token in tokens[:4]] == [0, 0, 0, 1]
    first, second = PROPOSERS[:2]
    told = [token["source"] for token in tokens[:6]]
    assert told == [first, first, "target", second, second, "target"]
    whole = chat(client, extra_body=extra).choices[0].speculative["tokens"]
    assert whole == tokens


def test_a_prediction(client, service):
    prediction = {"type": "content", "content": [{"type": "text", "text": "Grüße"}]}
    answer = chat(client, prediction=prediction)
    details = answer.usage.completion_tokens_details
    assert service.asks[0].prompt.prediction == "Grüße"
    assert details.accepted_prediction_tokens == 4
    assert details.rejected_prediction_tokens == 2


def test_a_completion(client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"


def test_a_completion_s_stream(client):
    chunks = list(complete(client, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == ANSWER
    assert chunks[0].object == "text_completion"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_prompts_with_several_answers(client, service):
    service.answer = lambda ask, choice: f"{ask.prompt.text}{choice}"
    answer = complete(client, prompt=["a", "b"], n=2)
    said = [(choice.index, choice.text) for choice in answer.choices]
    assert said == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 8
    streamed = {i: "" for i in range(4)}
    for chunk in complete(client, prompt=["a", "b"], n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_ids", [False, True])
def test_an_echo_begins_with_the_prompt(client, service, is_stream, is_ids):
    prompt = service.tokenizer.encode("Hö ") if is_ids else "Hö "
    answer = complete(client, prompt=prompt, echo=True, n=2, stream=is_stream)
    said = ["", ""]
    for part in answer if is_stream else [answer]:
        for choice in part.choices:
            said[choice.index] += choice.text
    assert said == ["Hö " + ANSWER] * 2


def test_log_probs_of_a_completion(client, service):
    service.answer = "aé"
    found = complete(client, logprobs=1).choices[0].logprobs
    assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found.token_logprobs == [-0.25] * 3
    assert found.text_offset[:2] == [0, 1]
    assert found.top_logprobs[0] == {"a": -0.25}
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_what_is_wrong_is_named(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=3)
    error = caught.value
    assert error.param == "temperature"
    assert error.type == "invalid_request_error"
    assert "0 to 2" in error.message
    assert error.request_id.startswith("req_")


def test_what_there_is_not_is_named(client):
    for name, value in (
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **{name: value})
        assert caught.value.param == name
        assert caught.value.code == "unsupported_parameter"


def test_a_template_may_refuse(client):
    with pytest.raises(openai.BadRequestError, match="refuses it"):
        chat(client, messages=[{"role": "user", "content": "refuse me"}])


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4o")
    assert caught.value.param == "model"
    assert caught.value.code == "model_not_found"


def test_a_context_that_does_not_fit(client):
    with pytest.raises(openai.BadRequestError, match="512.*2.*511") as caught:
        chat(client, max_tokens=511)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_full_queue(client, service, is_stream):
    service.error = refused()
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, stream=is_stream)
    assert caught.value.status_code == 503
    assert caught.value.code == "overloaded"
    assert caught.value.response.headers["retry-after"] == "7"
    assert "x-should-retry" not in caught.value.response.headers


def test_while_programs_are_compiled(client, service):
    service.is_ready = False
    with pytest.raises(openai.InternalServerError, match="not ready") as caught:
        chat(client)
    assert caught.value.response.headers["retry-after"] == "5"


def test_a_failure_says_nothing_of_the_inside(client, service):
    service.failure = RuntimeError("secret")
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client)
    assert caught.value.status_code == 500
    assert "secret" not in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_stream_that_fails_ends_as_one(client, service):
    service.failure = RuntimeError("secret")
    said = []
    with pytest.raises(openai.APIError, match="failed") as caught:
        said += [chunk.choices[0].delta.content for chunk in chat(client, stream=True)]
    assert "secret" not in str(caught.value)


def test_an_error_in_a_stream_is_followed_by_its_end(client, service):
    service.failure = refused()
    response = client.chat.completions.with_raw_response.create(
        model="fake", messages=HI, stream=True
    )
    *_, error, last = [line for line in response.http_response.iter_lines() if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "overloaded"
    assert last == "data: [DONE]"


def test_a_client_that_leaves_a_stream_frees_its_row(client, service):
    service.answer = "x" * 300
    service.may_go.clear()
    stream = chat(client, stream=True)
    stream.close()
    (ticket,) = service.tickets
    assert ticket.is_cancelled.wait(5)


def test_a_client_that_does_not_wait_frees_its_row(client, service):
    service.may_go.clear()
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.3))
    (ticket,) = service.tickets
    assert ticket.is_cancelled.wait(5)


def test_whole_answers_are_not_cancelled(client, service):
    chat(client)
    list(chat(client, stream=True))
    assert not any(ticket.is_cancelled.is_set() for ticket in service.tickets)


def test_silence_is_broken_by_comments(client, service):
    service.may_go.clear()
    response = client.chat.completions.with_raw_response.create(
        model="fake", messages=HI, stream=True
    )
    lines = response.http_response.iter_lines()
    for line in lines:
        if line.startswith(":"):
            break
    service.may_go.set()
    rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"


def test_a_request_id_is_kept(client):
    response = client.chat.completions.with_raw_response.create(
        model="fake", messages=HI, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert response.headers["x-request-id"] == "mine-1"
    response = client.chat.completions.with_raw_response.create(
        model="fake", messages=HI, extra_headers={"X-Request-Id": "not one!"}
    )
    assert response.headers["x-request-id"].startswith("req_")


def test_many_at_once(client, service):
    service.answer = lambda ask, choice: ask.prompt.text * 3

    def ask(i):
        messages = [{"role": "user", "content": f"<{i}>"}]
        return chat(client, messages=messages).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [f"<{i}>" * 3 for i in range(16)]
