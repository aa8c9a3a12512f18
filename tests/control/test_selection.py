# SPDX-License-Identifier: Apache-2.0
"""Selectors find the drafter that is worth most, and keep to what they may know."""

import dataclasses
import json

import numpy as np
import pytest

from ospec_jax import TreeConfig
from ospec_jax.cli.arguments import Decoding
from ospec_jax.config import ConfigError
from ospec_jax.control.bandits import BanditState, agreement, exp3, meta_sd, ucb
from ospec_jax.control.base import (
    SUGGESTIONS,
    Action,
    Chooser,
    Outcome,
    follow_predictions,
)
from ospec_jax.control.lengths import Windows
from ospec_jax.control.registry import find_controller
from ospec_jax.control.selectors import BANDITS, JUDGING, build_selector

DEPTH = 3
CHAIN = TreeConfig(num_steps=DEPTH)
NAMES = (*JUDGING, *BANDITS, "normalhedge:sample:product", "ucb:request", "exp3:time")


def actions_of(num_drafters, depths=(DEPTH,)):
    return tuple(
        Action(TreeConfig(num_steps=depth), i)
        for i in range(num_drafters)
        for depth in depths
    )


def play(name, rates, num_steps=400, seed=0, costs=None):
    """Serves drafters whose tokens are right at these rates, `[n]` or `[steps, n]`."""
    rates = np.broadcast_to(rates, (num_steps, np.shape(rates)[-1]))
    actions = actions_of(rates.shape[1])
    chooser = Chooser.start(build_selector(name, actions), 1)
    if not chooser.has_costs:
        chooser.set_costs(costs)
    rng = np.random.default_rng(seed)
    taken = []
    for row in rates:
        hits = (rng.uniform(size=(2, DEPTH, len(row))) < row) * 1.0
        action = chooser.choose(())
        number = actions.index(action)
        accepted = int(np.cumprod(hits[0, :, number]).sum())
        chooser.observe(action, Outcome((accepted,), Windows(hits, hits)))
        taken.append(number)
    return np.asarray(taken), chooser


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_is_a_function_of_a_state_that_json_keeps(name):
    costs = (1.0, 1.1, 1.2)
    _, chooser = play(name, [0.2, 0.8, 0.5], 30, costs=costs)
    saved = json.loads(json.dumps(chooser.to_json()))
    rule = build_selector(name, actions_of(3))
    other = Chooser.start(rule, 1)
    other.resume(saved)
    assert other.state == chooser.state
    for _ in range(3):
        assert other.choose(()) == chooser.choose(()) in rule.actions

    # Another batch size has other costs; other drafters have another worth.
    larger = Chooser.start(rule, 4)
    larger.resume(saved)
    assert larger.state.costs == ()
    assert larger.state.num_steps == 30
    fewer = Chooser.start(build_selector(name, actions_of(2)), 1)
    before = fewer.state
    fewer.resume(saved)
    assert fewer.state == before
    json.dumps(chooser.report())


@pytest.mark.parametrize("name", JUDGING)
@pytest.mark.parametrize("num_drafters", [2, 16])
def test_the_best_drafter_is_found_among_few_and_many(name, num_drafters):
    rates = np.full(num_drafters, 0.4)
    rates[num_drafters // 2] = 0.8
    taken, chooser = play(name, rates, 200)
    assert np.mean(taken[40:] == num_drafters // 2) > 0.9
    # In tokens, of 400 drafts: the best one is ahead by 1.3 each.
    assert chooser.report()["regret"] < 60


@pytest.mark.parametrize("name", BANDITS)
def test_bandits_find_it_later(name):
    taken, _ = play(name, [0.2, 0.8, 0.4], 3000)
    shares = np.bincount(taken, minlength=3) / 3000
    assert shares.argmax() == 1
    assert shares[1] > 0.5
    assert set(taken[:200]) == {0, 1, 2}


@pytest.mark.parametrize("name", ["share", "leader"])
def test_rules_that_forget_follow_the_stream(name):
    early = np.tile([0.8, 0.3], (200, 1))
    taken, chooser = play(name, np.concatenate([early, early[:, ::-1]]))
    assert np.mean(taken[20:200] == 0) > 0.9
    assert np.mean(taken[300:] == 1) > 0.9
    assert chooser.report()["switches"] == np.count_nonzero(np.diff(taken))


@pytest.mark.parametrize("name", ["normalhedge", "thompson"])
def test_time_weighs_what_drafters_cost(name):
    rates = [0.8, 0.6]
    for costs, best in [((1.0, 1.0), 0), ((3.0, 1.0), 1), ((1.1, 1.0), 0)]:
        taken, _ = play(f"{name}:time", rates, 600, costs=costs)
        assert np.mean(taken[300:] == best) > 0.7, costs


def test_by_time_depth_is_chosen_as_well():
    actions = actions_of(2, (0, 1, 3))
    chooser = Chooser.start(build_selector("normalhedge:time", actions), 1)
    assert not chooser.has_costs
    chooser.set_costs((1.0, 1.2, 2.0, 1.0, 1.2, 1.5))
    rng = np.random.default_rng(0)
    wanted = [((0.1, 0.9), Action(CHAIN, 1)), ((0.01, 0.01), 0)]
    for rates, best in wanted:
        for _ in range(300):
            hits = (rng.uniform(size=(4, DEPTH, 2)) < rates) * 1.0
            chooser.observe(chooser.choose(()), Outcome((1,), Windows(hits, hits)))
        chosen = chooser.choose(())
        assert best in (chosen, chosen.tree.num_steps)
        chooser.state = dataclasses.replace(chooser.state, **vars(fresh(chooser)))


def fresh(chooser):
    state = chooser.controller.init(1)
    return dataclasses.replace(state, costs=chooser.state.costs)


@pytest.mark.parametrize("name", ["normalhedge", "ucb"])
def test_an_answer_may_begin_anew(name):
    hits = np.ones((5, DEPTH, 2)) * [0.0, 1.0]
    end = Outcome((), Windows(hits, hits), 1)
    for option, is_new in [("", False), (":request", True)]:
        rule = build_selector(name + option, actions_of(2))
        assert rule.hears_ends == is_new
        chooser = Chooser.start(rule, 1)
        begun = chooser.state
        for accepted in (0, 3, 2):
            action = chooser.choose(())
            chooser.observe(action, Outcome((accepted,), Windows(hits, hits)))
        chooser.observe(chooser.choose(()), end)
        memory = "weights" if name == "normalhedge" else "rewards"
        is_blank = getattr(chooser.state, memory) == getattr(begun, memory)
        assert is_blank == is_new


def test_steps_without_evidence_change_no_weights():
    chooser = Chooser.start(build_selector("normalhedge", actions_of(2)), 1)
    before = chooser.state
    nothing = np.zeros((0, DEPTH, 2))
    chooser.observe(chooser.choose(()), Outcome((2,), Windows(nothing, nothing)))
    assert chooser.state.weights == before.weights
    assert chooser.state.learner == before.learner


def test_long_steps_of_a_prediction_are_evidence_too():
    long = Action(TreeConfig(num_steps=12), SUGGESTIONS)
    hits = np.ones((5, DEPTH, 2)) * [0.0, 1.0]
    rule = follow_predictions(build_selector("normalhedge", actions_of(2)), long)
    state = rule.observe(rule.init(1), long, Outcome((12,), Windows(hits, hits)))
    assert state.weights == (0.0, 1.0)
    rule = follow_predictions(build_selector("ucb:request", actions_of(2)), long)
    state = rule.observe(rule.init(1), long, Outcome((12,)))
    assert state == rule.init(1)


def test_deep_tokens_are_worth_what_drafting_shows():
    """Judged alike; but one has lost every second token, and the other none."""
    hits = np.ones((1, DEPTH, 2)) * [1.0, 0.9]
    for name, best in [("normalhedge", 1), ("normalhedge:raw", 0)]:
        chooser = Chooser.start(build_selector(name, actions_of(2)), 1)
        for _ in range(100):
            action = chooser.choose(())
            outcome = Outcome((3,), Windows(hits, hits), 0, ((0.9, 0.9, 0.9),))
            if action.drafter == 0:
                outcome = Outcome((1,), Windows(hits, hits), 0, ((1.0, 1.0),))
            chooser.observe(action, outcome)
        assert chooser.choose(()).drafter == best
    # The first token is what it is judged to be.
    assert chooser.state.hits == (0.0,) * 6
    chooser = Chooser.start(build_selector("leader:acceptance", actions_of(2)), 1)
    chooser.observe(
        chooser.choose(()), Outcome((0,), Windows(hits, hits), 0, ((1.0,),))
    )
    assert chooser.state.values == (1.0, 0.9)


@pytest.mark.parametrize("name", ["exp3:time", "ucb:time"])
@pytest.mark.parametrize("absurd", [0.0, -1.0, float("nan"), float("inf")])
def test_bandits_weigh_all_alike_by_a_clock_that_cannot_be(name, absurd):
    rule = build_selector(name, actions_of(2))
    outcome = Outcome(num_accepted=(2,), num_ended=0)
    told = []
    for seconds in (absurd, 1.0):
        state = rule.set_costs(rule.init(1), [seconds] * 2)
        told.append(rule.observe(state, rule.actions[0], outcome))
    assert told[0].rewards == told[1].rewards
    assert told[0].losses == told[1].losses
    assert sum(told[0].rewards) > 0
    rule.choose(told[0], None)


def test_ucb_by_hand():
    state = BanditState(("a", "b"), 1, (4.0, 9.0), (2.0, 4.0), (0.0, 0.0))
    rounds = 2 * 14**2
    index = [
        mean
        + 0.5 * np.sqrt((1 + n) / n**2 * (1 + 2 * np.log(rounds * (1 + n) ** 0.5 * 2)))
        for mean, n in ((2 / 4, 4), (4 / 9, 9))
    ]
    assert ucb(state, None).argmax() == np.argmax(index) == 0
    unheard = dataclasses.replace(state, counts=(4.0, 0.0))
    assert ucb(unheard, None).tolist() == [0.0, 1.0]


def test_meta_sd_by_hand():
    state = BanditState(("a", "b"), 1, (16.0, 4.0), (12.0, 1.0), (0.0, 0.0))
    index = [m + np.sqrt(2 * np.log(21) / n) for m, n in ((12 / 16, 16), (1 / 4, 4))]
    assert meta_sd(state, None).argmax() == np.argmax(index) == 1
    assert meta_sd(state, None, beta=0.0).argmax() == 0
    unheard = dataclasses.replace(state, counts=(4.0, 0.0))
    assert meta_sd(unheard, None).tolist() == [0.0, 1.0]
    # Of a draft of three tokens whose second is wrong the third is not looked at.
    counts = np.asarray([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(agreement(counts, 3.0), (0, 1 / 2, 2 / 3, 1))
    rule = build_selector("metasd", actions_of(2))
    told = rule.observe(rule.init(2), rule.actions[0], Outcome((1, 3)))
    assert told.rewards == (0.75, 0.0)


def test_exp3_by_hand():
    """A loss is divided by the chance that the step was drawn with."""
    rule = build_selector("exp3", actions_of(2))
    state = rule.observe(rule.init(1), rule.actions[0], Outcome((0,)))
    assert state.losses == (2.0, 0.0)
    rate = np.sqrt(np.log(2) / (2 * 2))
    chances = exp3(state, None)
    np.testing.assert_allclose(chances[0], 1 / (1 + np.exp(2 * rate)))
    # The step was on its way before the first outcome was known: at even chances.
    state = rule.observe(state, rule.actions[1], Outcome((1,)))
    np.testing.assert_allclose(state.losses, (2.0, (1 - 1 / DEPTH) / 0.5))
    state = rule.observe(state, rule.actions[0], Outcome((3,)))
    np.testing.assert_allclose(
        state.chances[0],
        exp3(
            dataclasses.replace(
                state, counts=(1.0, 1.0), losses=(2.0, (1 - 1 / DEPTH) / 0.5)
            ),
            None,
        )[0],
    )


def test_each_drafter_may_be_asked_always():
    assert find_controller("fixed:1", actions_of(3))(actions_of(3)).actions == (
        Action(CHAIN, 1),
    )
    deep = actions_of(2, (0, 1, 3))
    rule = find_controller("fixed:1", deep)(deep)
    assert {action.drafter for action in rule.actions} == {1}
    assert len(rule.actions) == 3


@pytest.mark.parametrize(
    ("name", "actions", "message"),
    [
        ("normalhedge", actions_of(1), "nothing to select"),
        ("ucb", actions_of(1), "nothing to select"),
        ("normalhedge", actions_of(2, (0, 3)), "cannot choose among depths"),
        ("ucb", actions_of(2, (0, 3)), "cannot choose among depths"),
        ("normalhedge:tme", actions_of(2), "cannot read the selection"),
        ("ucb:sample", actions_of(2), "cannot read the selection"),
        ("hedge:time:length", actions_of(2), "gives 2 losses"),
        ("hedge:acceptance:product", actions_of(2), "there is no product"),
        ("metasd:time", actions_of(2), "leave 'time' out, or use ucb:time"),
        ("fixed:2", actions_of(2), "fixed:0 to fixed:1"),
        ("fixed:0", actions_of(1), "nothing to select"),
        ("nohedge", actions_of(2), "unknown controller 'nohedge'.*normalhedge"),
    ],
)
def test_selections_that_mean_nothing_are_refused(name, actions, message):
    with pytest.raises(ConfigError, match=message):
        find_controller(name, actions)(actions)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"select": "hedge"}, "chooses among the drafts of a pool"),
        (
            {"select": "hedge", "draft": "pool:ngram+suffix", "controller": "fixed"},
            "leave",
        ),
        ({"select": "hedg", "draft": "pool:ngram+suffix"}, "cannot read the selection"),
        (
            {"select": "hedge", "draft": "pool:ngram+suffix", "controller": "auto"},
            "hedge:time|normalhedge:time",
        ),
        ({"select": "fixed:2", "draft": "pool:ngram+suffix"}, "fixed:0 to fixed:1"),
        ({"judge_every": 4}, "nothing is selected"),
        (
            {"judge_every": 0, "select": "hedge", "draft": "pool:ngram+suffix"},
            "--judge-every",
        ),
    ],
)
def test_flags_that_contradict_a_selection(flags, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**flags).load()
