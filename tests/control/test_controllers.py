# SPDX-License-Identifier: Apache-2.0
"""Controllers choose among their actions, from what they were told."""

import dataclasses

import pytest

from ospec_jax import Session, TreeConfig, load_draft
from ospec_jax.cli.arguments import Decoding
from ospec_jax.config import ConfigError
from ospec_jax.control.base import (
    SUGGESTIONS,
    Action,
    Chooser,
    Outcome,
    Row,
    fixed,
    follow_predictions,
)
from ospec_jax.control.registry import CONTROLLERS, find_controller
from ospec_jax.testing import tiny_target

ACTIONS = tuple(Action(TreeConfig(num_steps=depth)) for depth in (0, 1, 3))
LONG = Action(TreeConfig(num_steps=12), SUGGESTIONS)
SURE, UNSURE = Row(True, 40, 8), Row(False, 40, 8)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_rule_keeps_to_its_actions(name):
    """It is a function of its state, and that survives JSON."""
    actions = ACTIONS[-1:] if name == "fixed" else ACTIONS
    chooser = Chooser.start(CONTROLLERS[name](actions), 2)
    if not chooser.has_costs:
        chooser.set_costs((1.0, 1.2, 1.5))
    assert chooser.has_costs

    for accepted in (0, 1, 0, 3, 2) * 4:
        state = chooser.state
        action = chooser.choose((UNSURE, SURE))
        assert action in actions
        assert chooser.choose((UNSURE, SURE)) == action
        assert chooser.choose(()) in actions
        num_accepted = min(accepted, action.tree.num_steps)
        chooser.observe(action, Outcome((num_accepted, 0)))
        assert chooser.controller.choose(state, (UNSURE, SURE)) == action

    resumed = Chooser.start(CONTROLLERS[name](actions), 2)
    resumed.resume(chooser.to_json())
    assert resumed.state == chooser.state
    other = Chooser.start(CONTROLLERS[name](actions), 4)
    before = other.state
    other.resume(chooser.to_json() | {"unknown": 1})
    assert other.state == before


def test_predictions_are_followed_while_all_rows_are_sure():
    rule = follow_predictions(CONTROLLERS["auto"](ACTIONS), LONG)
    state = dataclasses.replace(rule.init(2), costs=(1.0, 1.2, 1.5))
    assert rule.choose(state, (SURE, SURE)) == LONG
    assert rule.choose(state, (SURE, UNSURE)) in ACTIONS
    assert rule.choose(state, ()) in ACTIONS
    assert rule.observe(state, LONG, Outcome((12, 12))) == state
    assert rule.observe(state, ACTIONS[-1], Outcome((3, 0))) != state


def test_fixed_has_no_state():
    rule = fixed(ACTIONS)
    assert rule.init(3) is None
    assert rule.choose(None, ()) == ACTIONS[-1]


@pytest.mark.parametrize(
    ("name", "actions", "message"),
    [
        ("fixed", ACTIONS, "cannot choose among the depths"),
        ("auto", ACTIONS[-1:], "nothing to choose from"),
        ("hedge?", ACTIONS, "unknown controller 'hedge\\?'"),
    ],
)
def test_rules_that_cannot_be_are_refused(name, actions, message):
    with pytest.raises(ConfigError, match=message):
        find_controller(name, actions)


def test_a_session_refuses_a_rule_without_a_choice():
    target = tiny_target(32)
    draft = load_draft("ngram", target)
    with pytest.raises(ConfigError, match="nothing to choose from"):
        Session(target, draft, controller="auto")
    with pytest.raises(ConfigError, match="cannot choose among"):
        Session(target, draft, tree=TreeConfig.auto(), controller="fixed")
    session = Session(target, draft, tree=TreeConfig.auto(), controller="auto")
    assert len(session.chooser.controller.actions) == len(TreeConfig.auto().depths)


@pytest.mark.parametrize(
    ("flags", "depths"),
    [
        ({}, ()),
        ({"controller": "fixed", "num_speculative_tokens": 2}, ()),
        ({"controller": "auto"}, TreeConfig.auto().depths),
        ({"num_speculative_tokens": "auto"}, TreeConfig.auto().depths),
        (
            {"controller": "auto", "num_speculative_tokens": "auto"},
            TreeConfig.auto().depths,
        ),
    ],
)
def test_flags_that_agree(flags, depths):
    assert Decoding(**flags).tree_config.depths == depths


@pytest.mark.parametrize(
    "flags",
    [
        {"controller": "fixed", "num_speculative_tokens": "auto"},
        {"controller": "auto", "num_speculative_tokens": 3},
    ],
)
def test_flags_that_contradict_each_other(flags):
    with pytest.raises(ConfigError, match="contradicts"):
        _ = Decoding(**flags).tree_config
