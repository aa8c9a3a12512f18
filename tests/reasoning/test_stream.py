# SPDX-License-Identifier: Apache-2.0
"""A drafting model learns between chunks of problems, and drafts otherwise then."""

import jax
import numpy as np
import pytest

from ospec_jax import Session
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.reasoning.lookahead import Reasoner
from ospec_jax.reasoning.preferences import PreferenceConfig, preference_learner
from ospec_jax.reasoning.steps import StepRule
from ospec_jax.reasoning.stream import OnlineReasoner
from ospec_jax.reasoning.verifiers import exact
from ospec_jax.reasoning.writing import Writer
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

RULE = StepRule(max_tokens=4)
NUM_TOKENS = 16
CONFIG = PreferenceConfig(
    num_layers=4, rank=16, learning_rate=1e-2, num_epochs=12, batch_size=4
)


def test_what_was_rejected_is_drafted_no_more():
    target = tiny_target()
    other = tiny_target(seed=1)
    drafting = Session(other)
    before = drafting.engine.target_params
    reasoner = Reasoner(
        Writer(drafting, RULE), Writer(Session(target, batch_size=2), RULE), exact(), 1
    )
    online = OnlineReasoner(reasoner, preference_learner(other, CONFIG), chunk_size=2)
    names = ("One", "Two", "One", "Two", "One")
    prompts = [
        parse_prompt({"prompt": text}, f"{text}-{i}") for i, text in enumerate(names)
    ]
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
