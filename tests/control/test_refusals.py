# SPDX-License-Identifier: Apache-2.0
"""A controller of one's own that is none is refused before anything is decoded."""

import dataclasses

import pytest

from ospec_jax import Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.control.base import Action, Chooser, Outcome, fixed
from ospec_jax.testing import tiny_target


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def session(target, rule):
    return Session(target, load_draft("ngram", target), controller=rule)


def test_a_rule_that_returns_nothing_is_refused(target):
    def forgetful(actions):
        fixed(actions)

    with pytest.raises(ConfigError, match="'forgetful' returned NoneType; a function"):
        session(target, forgetful)


def test_a_state_that_cannot_be_kept_is_refused(target):
    rule = lambda actions: fixed(actions)._replace(init=lambda num_rows: {"number": 0})
    with pytest.raises(ConfigError, match="state is {'number': 0}; use None, or"):
        session(target, rule)


def test_an_action_of_ones_own_is_refused_in_few_words(target):
    other = Action(TreeConfig(num_steps=7))
    rule = lambda actions: fixed(actions)._replace(choose=lambda state, rows: other)
    message = "^chain of depth 7 by draft 0 is not .* here chain of depth 3 by draft 0"
    with pytest.raises(ConfigError, match=message):
        next(session(target, rule).generate(["Hi"]))


def test_a_number_is_no_action(target):
    rule = lambda actions: fixed(actions)._replace(choose=lambda state, rows: 3)
    with pytest.raises(ConfigError, match="`choose` .* returned 3; return one of its"):
        next(session(target, rule).generate(["Hi"]))


def test_an_observation_that_forgets_the_state_is_refused():
    rule = fixed((Action(TreeConfig(num_steps=1)),))
    rule = rule._replace(observe=lambda state, action, outcome: None)
    chooser = Chooser(rule, TreeConfig(num_steps=1))
    with pytest.raises(ConfigError, match="returned NoneType; .* a TreeConfig"):
        chooser.observe(rule.actions[0], Outcome((1,)))


def test_a_controller_that_nobody_builds_is_refused_in_few_words(target):
    with pytest.raises(ConfigError, match="^the controller is a `Controller` already"):
        session(target, fixed((Action(TreeConfig(num_steps=1)),)))


def test_only_what_learns_goes_on_from_a_checkpoint(target, tmp_path):
    with pytest.raises(ValueError, match="only a session that learns goes on"):
        session(target, None).resume(tmp_path)


def test_prompts_without_names_are_known_without_a_word(target, recwarn):
    ours = Session(target, load_draft("ngram", target), learner="memory")
    prompts = ["What is it?", "Who is it?"]
    list(ours.generate(prompts, 4))
    left = ours.unanswered([*prompts[::-1], "Where is it?"])
    assert [prompt.text for prompt in left] == ["Where is it?"]
    assert not [w for w in recwarn if "other names" in str(w.message)]
    named = [dataclasses.replace(left[0], id="it")]
    assert ours.unanswered(named) == named
