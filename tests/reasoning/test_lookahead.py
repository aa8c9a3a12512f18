# SPDX-License-Identifier: Apache-2.0
"""Steps that are drafted ahead: what an answer is made of, by each kind of verifier."""

import dataclasses

import pytest

from ospec_jax import Session
from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.reasoning.lookahead import Reasoner
from ospec_jax.reasoning.steps import StepRule
from ospec_jax.reasoning.verifiers import Judgement, Verifier, build_verifier, exact
from ospec_jax.reasoning.writing import Writer
from ospec_jax.testing import byte_tokenizer, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

RULE = StepRule(max_tokens=5)
NUM_AHEAD = 2
NUM_TOKENS = 37
PROMPTS = ("Add 1.", "Say it again: one, two, one, two.")


def says(is_same):
    """A verifier that says the same of every pair."""
    compare = lambda pairs: [Judgement(is_same)] * len(pairs)
    return Verifier("says", False, compare)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def other():
    return tiny_target(seed=1)


@pytest.fixture(scope="module", params=["plain", "ngram"])
def writers(request, target, other):
    """The draft's and the target's, which speculate by tokens or do not."""
    draft = None if request.param == "plain" else "ngram"
    rows = NUM_AHEAD + 1
    return (
        Writer(Session(other, draft), RULE),
        Writer(Session(target, draft, batch_size=rows), RULE),
    )


@pytest.fixture(scope="module")
def plain(target, other):
    """What both models say by themselves, by prompt."""
    of = lambda one: [r.token_ids for r in Session(one).generate(PROMPTS, NUM_TOKENS)]
    return {"draft": of(other), "target": of(target)}


def ids_of(prompt, target):
    return encode(parse_prompt({"prompt": prompt}, "p"), target.tokenizer)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_with_equal_tokens_alone_an_answer_is_plain_decodings(
    writers, plain, target, number
):
    reasoner = Reasoner(*writers, exact(), NUM_AHEAD)
    answer = reasoner.answer(ids_of(PROMPTS[number], target), NUM_TOKENS)
    assert list(answer.token_ids) == plain["target"][number]
    assert answer.is_lossless


def test_a_draft_that_is_always_believed_writes_all_but_one_step_of_a_cycle(
    writers, plain, target
):
    reasoner = Reasoner(*writers, says(True), NUM_AHEAD)
    answer = reasoner.answer(ids_of(PROMPTS[0], target), NUM_TOKENS)
    first = answer.cycles[0]
    drafted = [token for step in first.drafted for token in step]
    assert drafted == plain["draft"][0][: len(drafted)]
    assert first.num_accepted == len(first.drafted) == NUM_AHEAD
    # The target's step behind them goes on from what the draft wrote.
    assert len(first.tokens) == (NUM_AHEAD + 1) * RULE.max_tokens
    assert not answer.is_lossless


def test_a_draft_that_is_never_believed_changes_nothing(writers, plain, target):
    reasoner = Reasoner(*writers, says(False), NUM_AHEAD)
    answer = reasoner.answer(ids_of(PROMPTS[1], target), NUM_TOKENS)
    assert list(answer.token_ids) == plain["target"][1]
    assert answer.num_accepted == 0
    # A step of the target a cycle.
    assert len(answer.cycles) == -(-NUM_TOKENS // RULE.max_tokens)


def test_a_target_that_drafts_for_itself_is_always_right(target, plain):
    rows = NUM_AHEAD + 1
    draft = Writer(Session(target), RULE)
    writer = Writer(Session(target, batch_size=rows), RULE)
    answer = Reasoner(draft, writer, exact(), NUM_AHEAD).answer(
        ids_of(PROMPTS[0], target), NUM_TOKENS
    )
    assert list(answer.token_ids) == plain["target"][0]
    assert answer.num_accepted == answer.num_drafted
    num_tokens = len(plain["target"][0])
    assert len(answer.cycles) == -(-num_tokens // (rows * RULE.max_tokens))


@pytest.mark.parametrize("name", ["text", "states", "states:0.5", "judge"])
def test_verifiers_know_equal_steps(target, writers, name):
    verifier = build_verifier(name, writers[1].session)
    a, b = (
        tuple(target.tokenizer.encode(text)) for text in ("x = 2 \n\n", "X = 2\n\n")
    )
    assert verifier.compare([(a, b)]) == [Judgement(True)]
    assert not verifier.is_lossless


def test_unlike_states_are_unlike_steps(target, writers):
    a, b = (tuple(target.tokenizer.encode(text)) for text in ("x = 2", "Hello, world"))
    (found,) = build_verifier("states:1", writers[1].session).compare([(a, b)])
    assert not found.is_same
    assert -1 <= found.score < 1
    (found,) = build_verifier("states:-1", writers[1].session).compare([(a, b)])
    assert found.is_same


def test_what_a_judge_does_not_say_clearly_was_not_judged(target, writers):
    # A model of random weights says neither yes nor no.
    a, b = (tuple(target.tokenizer.encode(text)) for text in ("x = 2", "x = 3"))
    (found,) = build_verifier("judge", writers[1].session).compare([(a, b)])
    assert found == Judgement(False, is_judged=False)


@pytest.mark.parametrize("name", ["nobody", "states:high", "states:2", "exact:1"])
def test_verifiers_that_are_not_there_are_refused(writers, name):
    with pytest.raises(ConfigError, match="verifier|cosine"):
        build_verifier(name, writers[1].session)


def test_models_of_other_tokens_are_refused(target, writers):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["two"])
    stranger = dataclasses.replace(target, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="different tokenizers"):
        Reasoner(Writer(Session(stranger), RULE), writers[1], exact(), NUM_AHEAD)


def test_too_few_rows_are_refused(writers):
    with pytest.raises(ConfigError, match="batch_size=4"):
        Reasoner(*writers, exact(), num_ahead=3)
