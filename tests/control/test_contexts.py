# SPDX-License-Identifier: Apache-2.0
"""Requests of one kind have weights of their own, which begin from those of all."""

import json

import numpy as np
import pytest

from ospec_jax import TreeConfig
from ospec_jax.config import ConfigError
from ospec_jax.control.base import (
    SUGGESTIONS,
    Action,
    Chooser,
    Context,
    Outcome,
    Row,
    follow_predictions,
)
from ospec_jax.control.contexts import KEYS, OPENING, by_key, opening_of
from ospec_jax.control.lengths import Windows, join
from ospec_jax.control.selection import parts_of_selections, select
from ospec_jax.control.selectors import JUDGING, build_selector
from ospec_jax.control.weighting import fixed_hedge

DEPTH = 3
ACTIONS = tuple(Action(TreeConfig(num_steps=DEPTH), i) for i in range(2))
MATH, CODE, CHAT = (Context(domain=name) for name in ("math", "code", "chat"))


def row(context):
    return Row(False, 8, 8, context)


def hits_of(best, count=1):
    """Windows in which one drafter is always right, and the other never."""
    values = np.ones((count, DEPTH, 2)) * (np.arange(2) == best)
    return Windows(values, values)


def hear(chooser, *pairs):
    """One step of rows with these contexts, in which these drafters are right."""
    parts = tuple((context, Outcome((0,), hits_of(best))) for context, best in pairs)
    windows = join([part.windows for _, part in parts])
    whole = Outcome((0,) * len(parts), windows, parts=parts)
    chooser.observe(chooser.choose([row(context) for context, _ in pairs]), whole)


def chosen(chooser, *contexts):
    return chooser.choose([row(context) for context in contexts]).drafter


@pytest.mark.parametrize("name", JUDGING)
def test_each_domain_has_the_drafter_that_is_best_for_it(name):
    chooser = Chooser.start(build_selector(f"{name}:domain", ACTIONS), 1)
    plain = Chooser.start(build_selector(name, ACTIONS), 1)
    for _ in range(20):
        for one in (chooser, plain):
            hear(one, (MATH, 0))
            hear(one, (CODE, 1))
            hear(one, (CODE, 1))
    assert chosen(chooser, MATH) == 0
    assert chosen(chooser, CODE) == 1
    # Whoever is new, or says nothing, has what all have taught.
    assert chosen(chooser, CHAT) == chosen(chooser, Context()) == 1
    assert chosen(chooser) == chosen(plain) == 1
    assert chooser.state.shared.learner == plain.state.learner
    json.dumps(chooser.report())


def test_a_key_begins_with_what_all_have_taught_and_soon_has_its_own():
    for worth, is_soon in [(8, True), (1000, False)]:
        rule = select(ACTIONS, fixed_hedge(0.5), corrects=False)
        chooser = Chooser.start(
            by_key(rule, parts_of_selections(worth), KEYS["domain"]), 1
        )
        for _ in range(200):
            hear(chooser, (CODE, 1))
        hear(chooser, (MATH, 1))
        assert chosen(chooser, MATH) == 1
        for _ in range(20):
            hear(chooser, (MATH, 0))
        assert (chosen(chooser, MATH) == 0) == is_soon
        assert chosen(chooser, CODE) == 1


def test_rows_of_several_domains_are_weighed_together():
    chooser = Chooser.start(build_selector("hedge:domain", ACTIONS), 3)
    for _ in range(40):
        hear(chooser, (MATH, 0), (CODE, 1), (CODE, 1))
    assert chosen(chooser, MATH, MATH, CODE) == 0
    assert chosen(chooser, MATH, CODE, CODE) == 1


def test_evidence_goes_to_the_row_that_it_is_of():
    """One step brings both rows', and each key hears of its own alone."""
    chooser = Chooser.start(build_selector("normalhedge:domain", ACTIONS), 2)
    for _ in range(5):
        hear(chooser, (MATH, 0), (CODE, 1))
    own = dict(zip(chooser.state.keys, chooser.state.own, strict=True))
    assert own["domain math"].values == (5 * (1 + DEPTH), 5)
    assert own["domain code"].values == (5, 5 * (1 + DEPTH))
    assert chooser.state.shared.num_windows == 10


def test_the_key_that_was_heard_of_least_lately_goes():
    selection = select(ACTIONS, fixed_hedge(0.5))
    rule = by_key(selection, parts_of_selections(), KEYS["domain"], max_keys=2)
    chooser = Chooser.start(rule, 1)
    for context in (MATH, CODE, MATH, CHAT):
        hear(chooser, (context, 0))
    assert chooser.state.keys == ("domain math", "domain chat")
    # To choose is no change, and a step without evidence begins no key.
    chosen(chooser, CODE)
    nothing = Windows(*(np.zeros((0, DEPTH, 2)),) * 2)
    part = Outcome((2,), nothing)
    chooser.observe(ACTIONS[0], part._replace(parts=((CODE, part),)))
    assert chooser.state.keys == ("domain math", "domain chat")


def test_a_checkpoint_keeps_all_keys():
    rule = build_selector("share:time:domain", ACTIONS)
    chooser = Chooser.start(rule, 1)
    assert not chooser.has_costs
    chooser.set_costs((1.0, 2.0))
    for _ in range(3):
        hear(chooser, (MATH, 1))
        hear(chooser, (CODE, 0))
    saved = json.loads(json.dumps(chooser.to_json()))
    other = Chooser.start(rule, 1)
    other.resume(saved)
    assert other.state == chooser.state

    # Other costs are of another batch size; another pool begins anew.
    larger = Chooser.start(rule, 4)
    larger.resume(saved)
    assert larger.state.keys == chooser.state.keys
    assert all(one.costs == () for one in (larger.state.shared, *larger.state.own))
    three = (*ACTIONS, Action(ACTIONS[0].tree, 2))
    grown = Chooser.start(build_selector("share:time:domain", three), 1)
    before = grown.state
    grown.resume(saved)
    assert grown.state == before
    # Without keys it is another rule, in both directions.
    plain = Chooser.start(build_selector("share:time", ACTIONS), 1)
    before = plain.state
    plain.resume(saved)
    assert plain.state == before
    other.resume(json.loads(json.dumps(plain.to_json())))
    assert other.state == chooser.state


def test_a_scopes_weights_are_forgotten_with_it():
    chooser = Chooser.start(build_selector("normalhedge:scope", ACTIONS), 1)
    for number in (1, 2):
        hear(chooser, (Context(scope=number), 0))
    hear(chooser, (Context(), 0))
    assert chooser.state.keys == ("scope 1", "scope 2")
    assert not chooser.forget([7])
    assert chooser.forget([1])
    assert chooser.state.keys == ("scope 2",)
    assert chooser.forget(None)
    assert chooser.state.keys == chooser.state.own == ()
    assert chooser.state.shared.num_windows == 3
    assert not Chooser.start(build_selector("normalhedge", ACTIONS), 1).forget(None)


def test_openings_are_told_apart_by_their_first_tokens():
    first = tuple(range(OPENING))
    assert opening_of((*first, 1, 2)) == opening_of((*first, 3)) == opening_of(first)
    assert opening_of(first[:-1]) != opening_of(first)
    assert opening_of(first[::-1]) != opening_of(first)


def test_long_steps_of_a_prediction_are_evidence_of_their_row():
    long = Action(TreeConfig(num_steps=12), SUGGESTIONS)
    rule = follow_predictions(build_selector("normalhedge:domain", ACTIONS), long)
    part = Outcome((12,), hits_of(1, 4), expected=((1.0,) * 12,))
    state = rule.observe(rule.init(1), long, part._replace(parts=((MATH, part),)))
    assert state.own[0].weights == state.shared.weights == (0.0, 1.0)
    assert state.own[0].expected == state.shared.expected == (0.0,) * 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ucb:domain", "cannot read the selection"),
        ("hedge:domain:scope", "leave one of scope, domain, opening, similar, request"),
        ("hedge:similar:request", "leave one of scope, domain, opening, similar"),
    ],
)
def test_keys_that_mean_nothing_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        build_selector(name, ACTIONS)
