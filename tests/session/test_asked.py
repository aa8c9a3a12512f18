# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask of single answers: how tokens are chosen, what is reported."""

import json

import numpy as np
import pytest

from ospec_jax import SamplingConfig, Session
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.loading import LoadedDraft
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(4)]
ENDLESS = ((2, -100.0),)
ASKED = SamplingConfig(presence_penalty=0.4, frequency_penalty=0.8, logit_bias=ENDLESS)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    config = tiny_draft_config(target.config, draft_vocab_size=200)
    params = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
    return LoadedDraft(params, Meta.create(target, config))


def tokens(session, how, **asked):
    return [r.token_ids for r in session.generate(PROMPTS, 24, how, **asked)]


def test_a_session_with_a_draft_answers_as_one_without(target, draft):
    """Learning in between, and with the prompts' n-grams as suggestions."""
    expected = tokens(Session(target), ASKED)
    assert expected != tokens(Session(target), SamplingConfig(logit_bias=ENDLESS))
    drafting = Session(target, draft, learner="head", batch_size=4)
    assert sorted(tokens(drafting, ASKED)) == sorted(expected)
    assert drafting.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("number", [0, 3])
def test_log_probs_are_reported_for_one_call(target, draft, number):
    session = Session(target, draft)
    (asked,) = session.generate(PROMPTS[0], 12, num_log_probs=number)
    (other,) = session.generate(PROMPTS[0], 12)
    assert asked.token_ids == other.token_ids
    assert not other.log_probs
    assert not other.alternatives
    assert len(asked.log_probs) == len(asked.alternatives) == len(asked.token_ids)
    for token, log_prob, found in zip(
        asked.token_ids, asked.log_probs, asked.alternatives, strict=True
    ):
        assert len(found) == number
        # A greedy token is the most probable one.
        if number:
            assert found[0][0] == token
            np.testing.assert_allclose(found[0][1], log_prob, atol=1e-6)

    written = json.loads(json.dumps(asked.to_json()))
    assert written["logprobs"] == asked.log_probs
    assert [len(one) for one in written["alternatives"]] == [number] * len(
        asked.token_ids
    )
    with pytest.raises(ConfigError, match="num_log_probs is 21; use 0"):
        session.generate(PROMPTS[0], num_log_probs=21)


def test_a_warmed_up_session_compiles_nothing_for_what_it_was_warmed_up_for(
    target, draft
):
    session = Session(target, draft)
    session.warm_up(sampling=ASKED)
    engine = session.engine
    functions = engine.compiled(engine.action, "full"), engine.compiled_prefill("full")
    before = [function._cache_size() for function in functions]
    list(session.generate(PROMPTS[:1], 12, ASKED))
    assert [function._cache_size() for function in functions] == before
