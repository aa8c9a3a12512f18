# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client against a server that decodes and learns: nothing is made up."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from drafted import random_head
from served import serving, wait_for

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import SamplingConfig
from ospec_jax.serving.service import Service
from ospec_jax.serving.settings import ServiceConfig
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"Tell {i} stories of {i * i} men." for i in range(10)]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    """What `ospec generate` answers, and why it ends."""
    session = Session(target, batch_size=2)
    results = session.generate(PROMPTS, NEW_TOKENS)
    return {r.prompt.text: (r.text, r.finish_reason) for r in results}


@pytest.fixture(scope="module")
def place(target, draft):
    learner = LearnerConfig("head")
    session = Session(
        target,
        draft,
        learner=learner,
        tree=TreeConfig(num_steps=2),
        batch_size=2,
        num_predicted_tokens=0,
    )
    service = Service(session, ServiceConfig("tiny", max_model_len=240))
    service.start()
    service.wait_until_ready()
    with serving(service) as address:
        base = f"{address}/v1"
        with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
            yield service, client
    service.stop()


@pytest.fixture
def client(place):
    return place[1]


def ask(client, text, **options):
    turns = [{"role": "user", "content": text}]
    options = {"temperature": 0, "max_completion_tokens": NEW_TOKENS} | options
    return client.chat.completions.create(model="tiny", messages=turns, **options)


def test_alone_and_under_load_answers_are_the_target_s_own(place, plain):
    service, client = place
    compiled = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
    before = compiled()
    choices = [ask(client, text).choices[0] for text in PROMPTS[:3]]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda text: ask(client, text), PROMPTS)
        choices += [answer.choices[0] for answer in answers]

    found = [(choice.message.content, choice.finish_reason) for choice in choices]
    assert found == [plain[text] for text in [*PROMPTS[:3], *PROMPTS]]
    # All of it with drafts that were learned meanwhile, of which the last may still be
    # under way, and without a new program.
    wait_for(lambda: service.version > 3)
    assert compiled() == before


def test_a_next_turn_runs_only_what_is_new(place, target):
    service, client = place
    compiled = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
    before = compiled()
    turns = [{"role": "user", "content": "Tell me of the sea. " * 4}]
    options = {"model": "tiny", "temperature": 0, "max_completion_tokens": NEW_TOKENS}
    first = client.chat.completions.create(messages=turns, **options)
    turns += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And?"},
    ]
    second = client.chat.completions.create(messages=turns, **options)
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in (first, second)]
    assert cached[0] == 0
    assert cached[1] >= first.usage.prompt_tokens - 1
    assert compiled() == before

    (plain,) = Session(target).generate([{"messages": turns}], NEW_TOKENS)
    assert second.choices[0].message.content == plain.text
    assert service.status()["kept"]["num_rows"] > 0


def test_answers_of_one_request_read_its_prompt_once(place, target):
    service, client = place
    compiled = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
    before = compiled()
    text = "Tell me of the woods. " * 4
    first = ask(client, text, n=3)
    again = ask(client, text, n=3)
    # Of the first time nothing had been run before, of the second one all but a token.
    details = [one.usage.prompt_tokens_details for one in (first, again)]
    assert details[0].cached_tokens == 0
    assert details[1].cached_tokens == first.usage.prompt_tokens - 1
    assert compiled() == before

    (plain,) = Session(target).generate([text], NEW_TOKENS)
    choices = [*first.choices, *again.choices]
    assert {choice.message.content for choice in choices} == {plain.text}


def test_a_stream_is_the_whole_answer(client, plain):
    chunks = list(ask(client, PROMPTS[1], stream=True))
    deltas = [choice.delta.content or "" for c in chunks for choice in c.choices]
    assert "".join(deltas) == plain[PROMPTS[1]][0]
    assert chunks[-1].choices[0].finish_reason == plain[PROMPTS[1]][1]


def test_bytes_of_a_character_are_told_together(client, plain):
    # A byte a token: characters of several bytes come in several tokens.
    text = max((text for text, _ in plain.values()), key=lambda t: len(t.encode()))
    asked = next(prompt for prompt, (answer, _) in plain.items() if answer == text)
    chunks = list(ask(client, asked, stream=True))
    deltas = [choice.delta.content or "" for c in chunks for choice in c.choices]
    assert "".join(deltas) == text


def test_a_seed_repeats_its_answers_and_choices_differ(place):
    service, client = place
    options = {"temperature": 1.0, "seed": 11, "n": 2, "extra_body": {"learn": False}}
    service.administer("pause")
    first = ask(client, "Invent.", **options)
    again = ask(client, "Invent.", **options)
    service.administer("resume")
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    assert first.system_fingerprint == again.system_fingerprint


def test_log_probabilities_are_the_target_s(client, target):
    told = ask(client, PROMPTS[2], logprobs=True, top_logprobs=2).choices[0]
    session = Session(target, has_log_probs=True)
    (own,) = session.generate(PROMPTS[2], NEW_TOKENS)
    found = [token.logprob for token in told.logprobs.content]
    assert found == pytest.approx(own.log_probs, abs=1e-4)
    assert all(len(token.top_logprobs) == 2 for token in told.logprobs.content)


def test_penalties_are_the_session_s_own(client, target):
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    told = ask(client, PROMPTS[3], **penalties).choices[0].message.content
    session = Session(target, num_speculative_tokens=0)
    sampling = SamplingConfig(presence_penalty=1.5, frequency_penalty=0.5)
    (own,) = session.generate(PROMPTS[3], NEW_TOKENS, sampling)
    assert told == own.text


def test_a_prediction_changes_no_answer(client, plain):
    # Bytes that are no text cannot be predicted.
    text, reason = min(plain.values(), key=lambda pair: pair[0].count("\ufffd"))
    asked = next(prompt for prompt, pair in plain.items() if pair == (text, reason))
    predicted = {"type": "content", "content": text}
    answer = ask(client, asked, prediction=predicted)
    assert answer.choices[0].message.content == text
    # Some of it was drafted before it was written, and hardly any was in vain.
    details = answer.usage.completion_tokens_details
    assert 0 < details.accepted_prediction_tokens < answer.usage.completion_tokens
    wrong = predicted | {"content": "~" * 40}
    details = ask(client, asked, prediction=wrong).usage.completion_tokens_details
    assert details.accepted_prediction_tokens == 0
    assert details.rejected_prediction_tokens == 40


def test_completions_take_texts_and_token_ids(client, target):
    text = "Once upon"
    ids = target.tokenizer.encode(text)
    both = [
        client.completions.create(model="tiny", prompt=p, max_tokens=12, temperature=0)
        for p in (text, ids)
    ]
    session = Session(target)
    (own,) = session.generate(text, 12, is_raw=True)
    assert [answer.choices[0].text for answer in both] == [own.text] * 2


def test_who_leaves_a_stream_frees_the_row(place, plain):
    service, client = place
    with ask(client, "Go on.", stream=True, max_completion_tokens=200) as stream:
        next(iter(stream))
    assert ask(client, PROMPTS[0]).choices[0].message.content == plain[PROMPTS[0]][0]
    service.call(lambda: None)
    assert service.status()["queue"]["num_running"] == 0


def test_a_row_without_speculation_has_no_drafts(client, plain):
    body = {"speculative": {"enabled": False}}
    answer = ask(client, PROMPTS[4], extra_body=body)
    assert answer.choices[0].message.content == plain[PROMPTS[4]][0]
    assert answer.metrics["speculative_decoding"]["num_draft_tokens"] == 0


def test_what_does_not_fit_is_named(client):
    with pytest.raises(openai.BadRequestError, match="context is 240 tokens"):
        ask(client, "Hi.", max_completion_tokens=400)
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        ask(client, "Hi.", logit_bias={"4000": 1})
