# SPDX-License-Identifier: Apache-2.0
"""A drafting model learns between chunks of problems, and drafts otherwise then."""

import dataclasses

import jax
import numpy as np
import pytest

from ospec_jax import Session
from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.reasoning.lookahead import Reasoner
from ospec_jax.reasoning.preferences import PreferenceConfig, preference_learner
from ospec_jax.reasoning.steps import StepRule
from ospec_jax.reasoning.stream import OnlineReasoner
from ospec_jax.reasoning.verifiers import exact
from ospec_jax.reasoning.writing import Writer
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

RULE = StepRule(max_tokens=4)
NUM_TOKENS = 16
CONFIG = PreferenceConfig(
    num_layers=4, rank=16, learning_rate=1e-2, num_epochs=12, batch_size=4
)


NAMES = ("One", "Two", "One", "Two", "One")
PROMPTS = [
    parse_prompt({"prompt": text}, f"{text}-{i}") for i, text in enumerate(NAMES)
]


def open_stream(target, other, config: PreferenceConfig | None = CONFIG, chunk_size=2):
    """A stream, and the session that drafts for it."""
    drafting = Session(other)
    reasoner = Reasoner(
        Writer(drafting, RULE), Writer(Session(target, batch_size=2), RULE), exact(), 1
    )
    learner = config and preference_learner(other, config)
    return OnlineReasoner(reasoner, learner, chunk_size), drafting


def test_what_was_rejected_is_drafted_no_more():
    target = tiny_target()
    online, drafting = open_stream(target, tiny_target(seed=1))
    before = drafting.engine.target_params
    prompts = PROMPTS
    found = list(online.answer(prompts, NUM_TOKENS))

    plain = {
        r.prompt.text: r.token_ids
        for r in Session(target).generate(["One", "Two"], NUM_TOKENS)
    }
    # Whatever is learned, with equal tokens alone an answer stays the target's.
    for solved in found:
        assert list(solved.answer.token_ids) == plain[solved.prompt.text]

    assert [solved.version for solved in found] == [0, 0, 1, 1, 2]
    learned = [solved.info for solved in found if solved.info is not None]
    assert len(learned) == 2
    assert learned[0].num_pairs > 0
    assert learned[0].last_loss < learned[0].first_loss
    assert not all(
        jax.tree.leaves(
            jax.tree.map(np.array_equal, drafting.engine.target_params, before)
        )
    )
    # The same prompts come again: other steps are drafted now.
    first, again = found[0].answer.cycles[0], found[2].answer.cycles[0]
    assert first.prefix == again.prefix
    assert first.drafted != again.drafted


def test_a_stream_that_was_saved_goes_on_as_if_nothing_had_happened(tmp_path):
    """Also within a chunk, whose first pairs are learned from behind its last ones."""
    target, other = tiny_target(), tiny_target(seed=1)
    whole, drafting = open_stream(target, other)
    expected = list(whole.answer(PROMPTS, NUM_TOKENS))

    first, _ = open_stream(target, other)
    list(first.answer(PROMPTS[:3], NUM_TOKENS))
    first.save(tmp_path)
    second, resumed = open_stream(target, other)
    second.resume(tmp_path)
    assert second.answered == [prompt.id for prompt in PROMPTS[:3]]
    assert second.version == 1
    found = list(second.answer(PROMPTS[3:], NUM_TOKENS))

    assert [solved.info for solved in found] == [s.info for s in expected[3:]]
    cycles = lambda solved: [one.drafted for one in solved.answer.cycles]
    assert [cycles(s) for s in found] == [cycles(s) for s in expected[3:]]
    same = jax.tree.map(
        np.array_equal, resumed.engine.target_params, drafting.engine.target_params
    )
    assert all(jax.tree.leaves(same))


def test_streams_of_others_are_not_gone_on_with(tmp_path):
    target, other = tiny_target(), tiny_target(seed=1)
    online, _ = open_stream(target, other)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        online.resume(tmp_path / "nothing")
    online.save(tmp_path)

    changed = dataclasses.replace(CONFIG, learning_rate=1e-3)
    for stream, message in (
        (open_stream(target, tiny_target(seed=2))[0], "with the draft model 'tiny-1'"),
        (open_stream(target, other, chunk_size=3)[0], "with the chunk_size 2, not 3"),
        (open_stream(target, other, changed)[0], "learning_rate': 0.01"),
        (open_stream(target, other, None)[0], "nothing to go on with"),
    ):
        with pytest.raises(ConfigError, match=message):
            stream.resume(tmp_path)
    with pytest.raises(ConfigError, match="nothing to save"):
        open_stream(target, other, None)[0].save(tmp_path)
