# SPDX-License-Identifier: Apache-2.0
"""What a target writes for itself teaches the draft, and changes nobody's answer."""

import dataclasses

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.data.prompts import Prompt, parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.session import PracticeConfig
from ospec_jax.session.practice import Practice
from ospec_jax.testing import byte_tokenizer, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

TOKENIZER = byte_tokenizer()
STOP = TOKENIZER.eos_token_id
ASKED = [
    "Name three rivers of Italy that flow into the sea.",
    "Say which mountains of Peru are over six kilometres high.",
    "Tell me what the farmers of Kenya grow in the highlands.",
]
NEW_TOKENS = 16


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def practice_of(**changes):
    config = PracticeConfig(**changes)
    special = TOKENIZER.all_special_ids
    return Practice(TOKENIZER, decode, special, (STOP,), config)


def completed(request, text, has_ended=True):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    ids = [*ids, STOP] if has_ended else ids
    reason = "stop" if has_ended else "length"
    return Completion(request, ids, reason, DecodingStats(), [], 0.1)


def note(practice, asked, answer="It is so.", scope=0, is_shared=True, **request):
    prompt = parse_prompt({"prompt": asked}, "a")
    values = {"max_new_tokens": NEW_TOKENS, "scope": scope} | request
    done = completed(Request("a", encode(prompt, TOKENIZER), **values), answer)
    practice.note(prompt, done, answer, is_shared)


def exercises(practice, texts):
    """Writes these turns as they are asked for, and answers all; those kept."""
    texts = iter(texts)
    found = []
    while (request := practice.next_request()) is not None:
        is_turn = not request.can_speculate
        text = next(texts) if is_turn else "Yes."
        exercise = practice.take(completed(request, text))
        if exercise is not None:
            found.append(exercise)
    return found


def test_nothing_is_begun_from_one_exchange_alone():
    practice = practice_of()
    note(practice, ASKED[0])
    assert practice.next_request() is None
    note(practice, ASKED[1])
    assert practice.next_request() is not None


def test_a_turn_begins_as_a_recent_one_behind_another():
    practice = practice_of(num_per_answer=8)
    for asked in ASKED:
        note(practice, asked)

    for number in range(20):
        request = practice.next_request()
        shown = TOKENIZER.decode(request.prompt_ids)
        front, begin = shown.rsplit("<|im_start|>user\n", 1)
        (example,) = [asked for asked in ASKED if asked in front]
        (seed,) = [asked for asked in ASKED if asked.startswith(begin)]
        assert front == (
            f"<|im_start|>user\n{example}<|im_end|>\n"
            f"<|im_start|>assistant\nIt is so.<|im_end|>\n"
        )
        assert example != seed
        assert 0.1 < len(begin.split()) / len(seed.split()) < 0.6
        practice.take(completed(request, f" of number {number}.", has_ended=False))


def test_an_answer_is_asked_for_as_its_seed_was():
    hot = SamplingConfig(0.7, top_p=0.9, top_k=5, presence_penalty=1.0, seed=3)
    practice = practice_of(num_per_answer=1)
    for asked in ASKED[:2]:
        note(practice, asked, sampling=hot, scope=4, max_new_tokens=40)

    turn = practice.next_request()
    assert turn.scope == 4
    assert practice.take(completed(turn, " by night, and by day.")) is None
    answer = practice.next_request()
    law = answer.sampling
    assert (law.temperature, law.top_p, law.top_k) == (0.7, 0.9, 5)
    assert not law.is_adjusted
    assert (answer.max_new_tokens, answer.scope) == (40, 4)
    exercise = practice.take(completed(answer, "Yes."))
    assert exercise.prompt.text.endswith(" by night, and by day.")
    assert answer.prompt_ids == encode(exercise.prompt, TOKENIZER)
    assert exercise.completion.request is answer


def test_instructions_in_front_stay_in_front():
    practice = practice_of(num_per_answer=1)
    for asked in ASKED[:2]:
        turns = ({"role": "system", "content": "Be brief."},)
        prompt = Prompt("a", asked, (*turns, {"role": "user", "content": asked}))
        done = completed(Request("a", encode(prompt, TOKENIZER)), "So.")
        practice.note(prompt, done, "So.", True)

    assert TOKENIZER.decode(practice.next_request().prompt_ids).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n"
    )
    (exercise, *_) = exercises(practice, [" by day.", " by night."])
    assert exercise.prompt.messages[0] == turns[0]


def test_a_long_answer_is_cut_and_a_long_prompt_is_no_example():
    practice = practice_of(num_per_answer=1, max_example_tokens=100)
    note(practice, ASKED[0], answer="x" * 500)
    note(practice, ASKED[1] + " Really." * 40, answer="y")
    note(practice, ASKED[2], answer="x" * 500)
    practice.ask_for(12)
    num_turns = 0
    while (request := practice.next_request()) is not None:
        shown = TOKENIZER.decode(request.prompt_ids)
        front = shown.rsplit("<|im_start|>user\n", 1)[0]
        assert "Really." not in front
        assert 0 < front.count("x") < 101
        num_turns += 1
        practice.take(completed(request, "...", has_ended=False))
    assert num_turns > 4


@pytest.mark.parametrize(
    ("text", "has_ended"),
    [
        (" which goes on and on", False),
        ("<|im_start|>assistant", True),
        (" no no no no no no no no no no no no no no no no no no", True),
        (" \ufffd\ufffd\ufffd", True),
    ],
)
def test_what_is_no_turn_of_a_user_is_not_answered(text, has_ended):
    practice = practice_of(num_per_answer=1)
    for asked in ASKED[:2]:
        note(practice, asked)

    assert practice.take(completed(practice.next_request(), text, has_ended)) is None
    assert practice.counts.num_dropped == 1
    assert not practice.next_request().can_speculate  # the next one is a turn again


def test_no_turn_is_answered_twice():
    practice = practice_of(num_per_answer=1, least_begin=0.3, most_begin=0.3)
    for asked in ASKED[:2]:
        note(practice, asked)
    practice.ask_for(20)

    found = exercises(practice, [" by day."] * 30)
    assert sorted(one.prompt.text for one in found) == [
        "Name three rivers by day.",
        "Say which mountains by day.",
    ]
    # Nor is what was asked itself.
    practice.ask_for(20)
    rest = " of Italy that flow into the sea."
    assert rest in ASKED[0]
    found = exercises(practice, [rest] * 30)
    assert [one.prompt.text for one in found] == [f"Say which mountains{rest}"]


def test_nothing_of_one_scope_gets_into_another_ones_exercises():
    practice = practice_of(num_per_answer=10)
    for i in range(6):
        note(practice, f"The vault number {i} of Heron opens with a key.", scope=1)
        note(practice, f"Tell me number {i} of the tales of the sea.", scope=2)

    scopes = set()
    while (request := practice.next_request()) is not None:
        shown = TOKENIZER.decode(request.prompt_ids)
        scopes.add(request.scope)
        assert ("vault" in shown or "The" in shown) == (request.scope == 1)
        practice.take(completed(request, "...", has_ended=False))
    assert scopes == {1, 2}


def test_all_learn_from_what_both_exchanges_share_alone():
    for shared in ((True, True), (True, False), (False, True), (False, False)):
        practice = practice_of(num_per_answer=1)
        for asked, is_shared in zip(ASKED, shared, strict=False):
            note(practice, asked, is_shared=is_shared)
        found = exercises(practice, [" by day.", " by night."])
        assert found
        assert {one.is_shared for one in found} == {all(shared)}


def test_what_is_forgotten_is_written_no_more():
    practice = practice_of()
    for asked in ASKED:
        note(practice, asked, scope=1)
        note(practice, asked, scope=2)

    request = practice.next_request()
    practice.forget([request.scope])
    assert not practice.is_writing(request)
    left = practice.next_request()
    assert left.scope != request.scope
    practice.forget()
    assert practice.next_request() is None
    assert practice.num_due == 0


def test_an_idle_machine_comes_to_rest():
    practice = practice_of(num_per_answer=50)
    for scope in range(300):
        for asked in ASKED[:2]:
            note(practice, asked, scope=scope)
    assert practice.num_due <= 64
    assert len(exercises(practice, (f" in {i} years." for i in range(100)))) <= 64
    assert practice.next_request() is None


def test_random_numbers_are_those_of_no_request():
    keys = set()
    for i in range(4):
        for values in ({}, {"seed": i}, {"seed": 0, "choice": i}):
            request = Request("a", (1,), **values)
            keys.add(tuple(np.asarray(jax.random.key_data(request.key(i)))))
        practice = Request("a", (1,), choice=i, is_practice=True)
        other = tuple(np.asarray(jax.random.key_data(practice.key(0))))
        assert other not in keys


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_per_answer": 0}, "num_per_answer is 0"),
        ({"num_recent": 1.5}, "num_recent"),
        ({"least_begin": 0.6}, r"0\.6 to 0\.5"),
        ({"most_begin": 1.0}, r"0\.2 to 1\.0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PracticeConfig(**values)


# Within a session.


@pytest.fixture(scope="module")
def target():
    # One whose answers have characters, not special tokens alone.
    return tiny_target(seed=2)


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


def session_of(target, draft, learn_idle=2, **values):
    usual = dict(learner=LearnerConfig("head"), tree=TreeConfig(num_steps=2))
    values = usual | values
    return Session(target, draft, learn_idle=learn_idle, **values)


def with_turns(session, monkeypatch):
    """Takes whatever a random target writes for a turn of a user's."""
    numbers = iter(range(1000))

    def prompt_of(writing, completion):
        number = next(numbers)
        text = f"{writing.begin} number {number}."
        return parse_prompt({"prompt": text}, f"exercise-{number}")

    monkeypatch.setattr(session.practice, "_prompt_of", prompt_of)
    return session


def test_exercises_teach_and_leave_answers_and_counts_alone(target, draft, monkeypatch):
    plain = [r.token_ids for r in Session(target).generate(ASKED * 2, NEW_TOKENS)]
    session = with_turns(session_of(target, draft), monkeypatch)
    first = [r.token_ids for r in session.generate(ASKED, NEW_TOKENS)]
    before = session.state
    heard = []
    with monkeypatch.context() as patch:
        patch.setattr(session.chooser, "observe", lambda *args: heard.append(args))
        made = session.practise()

    assert len(made) == 2 * len(ASKED)
    assert session.version > before.version
    assert session.state.answered == before.answered
    assert session.num_admitted == before.num_admitted
    assert not heard
    # n-grams of exercises are remembered, too.
    memory = before.traffic.memory
    assert int(np.sum(session.memory.counts)) > int(np.sum(memory.counts))

    second = [r.token_ids for r in session.generate(ASKED, NEW_TOKENS)]
    assert first + second == plain


def test_sampled_traffic_is_practised_sampled_each_with_its_own_numbers(
    target, draft, monkeypatch
):
    hot = SamplingConfig(temperature=1.0)
    session = with_turns(session_of(target, draft), monkeypatch)
    list(session.generate(ASKED, NEW_TOKENS, hot))
    made = session.practise()
    assert {one.completion.request.sampling.temperature for one in made} == {1.0}
    keys = {one.completion.request.choice for one in made}
    assert len(keys) == len(made)


def test_what_is_given_up_is_begun_again(target, draft, monkeypatch):
    session = with_turns(session_of(target, draft, 1), monkeypatch)
    list(session.generate(ASKED, NEW_TOKENS))
    asked = iter([False, False, True])
    assert session.practise(should_stop=lambda: next(asked, True)) == []
    given_up = session.practice.next_request()
    (first, *_) = session.practise()
    assert session.practice.counts.num_exercises == 3
    assert first.completion.request.choice == given_up.choice + 1


def test_so_many_as_are_asked_for(target, draft, monkeypatch):
    session = with_turns(session_of(target, draft, 1), monkeypatch)
    list(session.generate(ASKED, NEW_TOKENS))
    session.practise()
    assert len(session.practise(5)) == 5
    assert session.practise() == []


def test_traffic_that_is_forgotten_is_not_practised(target, draft):
    session = session_of(target, draft)
    list(session.generate(ASKED, NEW_TOKENS))
    assert session.practice.num_due
    session.forget_traffic()
    assert session.practise(5) == []


def test_sessions_that_cannot_practise_say_so(target, draft):
    with pytest.raises(ConfigError, match="learn_idle=2"):
        session_of(target, draft, 0).practise()
    with pytest.raises(ConfigError, match="learn_idle is 2, and nothing learns"):
        Session(target, draft, learn_idle=2)
    with pytest.raises(ConfigError, match="learn_idle is 'much'"):
        session_of(target, draft, "much")
    with pytest.raises(ConfigError, match="count is -1"):
        session_of(target, draft).practise(-1)

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    silent = dataclasses.replace(target, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        session_of(silent, draft)
