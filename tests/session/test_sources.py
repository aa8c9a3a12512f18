# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from, and who asks: endless sources, and several threads."""

import itertools
import threading

import pytest

from ospec_jax import LearnerConfig, Session
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.request import PromptTooLongError
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))


def endless(taken):
    for number in itertools.count():
        taken.append(number)
        yield f"What is {number}?"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_endless_source_is_read_as_it_goes(target, batch_size):
    session = Session(target, "ngram", batch_size=batch_size)
    taken = []
    results = session.generate(endless(taken), 6)
    assert taken == []
    for count, result in enumerate(itertools.islice(results, 5), 1):
        assert len(result.token_ids) == 6
        assert len(taken) <= count + 2 * batch_size


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_source_is_answered_as_a_list_is(target, batch_size):
    """Also where a later prompt needs a larger cache than those before it."""
    prompts = ["a", "b", "long " * 60, "c"]
    answers = lambda source: {
        result.prompt.id: result.token_ids
        for result in Session(target, batch_size=batch_size).generate(source, 8)
    }
    assert answers(iter(prompts)) == answers(prompts)


def test_of_a_source_only_the_prompt_that_is_too_long_is_refused(target):
    results = Session(target).generate(iter(["a", "long " * 200]), 8)
    assert len(next(results).token_ids) == 8
    with pytest.raises(PromptTooLongError, match="lower max_new_tokens"):
        next(results)


def test_predictions_come_with_their_prompts(target):
    session = Session(target, "prediction")
    predictions = itertools.repeat("It is so.")
    results = session.generate(endless([]), 6, predictions=predictions)
    assert next(results).prompt.prediction == "It is so."
    with pytest.raises(ConfigError, match=r"no prediction for the prompt .prompt-\d"):
        list(session.generate(iter("ab"), 6, predictions=iter(["x"])))


def test_threads_share_a_learning_session(target, draft):
    session = Session(target, draft, learner=LearnerConfig("head"), ngrams=False)
    prompts = [f"What is {i}?" for i in range(4)]
    expected = {
        r.prompt.text: r.token_ids for r in Session(target).generate(prompts, 24)
    }
    found = {}
    errors = []

    def answer(mine):
        try:
            for result in session.generate(mine, 24):
                found[result.prompt.text] = result.token_ids
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=answer, args=(prompts[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert found == expected
    assert session.num_admitted == len(prompts)
