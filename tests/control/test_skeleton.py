# SPDX-License-Identifier: Apache-2.0
"""The skeleton of a controller that the documentation shows works as it stands."""

import runpy
from pathlib import Path

import pytest

from ospec_jax import LoadedDraft, Session, TreeConfig
from ospec_jax.control.base import Action, Chooser, Outcome
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

FILE = Path(__file__).parents[2] / "docs" / "skeletons" / "controller.py"
DEPTHS = (0, 1, 3)
ACTIONS = tuple(Action(TreeConfig(num_steps=depth)) for depth in DEPTHS)
PROMPTS = ["What is 1 plus 2?", "Why is the sea blue, and the sky?"]


@pytest.fixture(scope="module")
def back_off():
    return runpy.run_path(str(FILE))["back_off"]


def depths_taken(rule, accepted):
    """Depths that a rule chooses while steps come to these outcomes."""
    chooser = Chooser.start(rule, 1)
    depths = []
    for number in accepted:
        action = chooser.choose(())
        depths.append(action.tree.num_steps)
        chooser.observe(action, Outcome((min(number, action.tree.num_steps),)))
    return depths


def test_it_drafts_less_where_nothing_is_accepted_and_more_where_all_is(back_off):
    rule = back_off(ACTIONS, patience=2)
    wrong = depths_taken(rule, [0] * 7)
    assert wrong == [3, 1, 0, 0, 1, 0, 0]
    assert depths_taken(rule, [0, 0, 3, 3, 3, 3, 1, 1]) == [3, 1, 0, 0, 1, 3, 3, 3]


def test_its_state_survives_a_checkpoint(back_off):
    chooser = Chooser.start(back_off(ACTIONS), 1)
    chooser.observe(ACTIONS[-1], Outcome((0,)))
    assert chooser.choose(()) == ACTIONS[1]

    resumed = Chooser.start(back_off(ACTIONS), 1)
    resumed.resume(chooser.to_json())
    assert resumed.state == chooser.state

    fewer = Chooser.start(back_off(ACTIONS[:1]), 1)
    fewer.resume(chooser.to_json())
    assert fewer.choose(()) == ACTIONS[0]


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_output_stays_that_of_plain_decoding(back_off, batch_size):
    target = tiny_target()
    config = tiny_draft_config(target.config, draft_vocab_size=200)
    params = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
    draft = LoadedDraft(params, Meta.create(target, config))

    def answers(session):
        return {r.prompt.id: r.token_ids for r in session.generate(PROMPTS, 24)}

    session = Session(
        target,
        draft,
        tree=TreeConfig.auto(DEPTHS),
        batch_size=batch_size,
        controller=back_off,
    )
    assert answers(session) == answers(Session(target))
    # It has drafted, and not always: the random draft is mostly wrong.
    assert 0 < session.stats.mean_draft_length < max(DEPTHS)
    assert session.chooser.controller.actions == ACTIONS
