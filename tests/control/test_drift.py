# SPDX-License-Identifier: Apache-2.0
"""What steps take is followed by made-up clocks, and changes nothing but the steps."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from drafted import random_head

from ospec_jax import Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.control.base import Action, Chooser, Outcome
from ospec_jax.control.depth import most_tokens_a_second
from ospec_jax.control.drift import Drift
from ospec_jax.control.marginal import Evidence
from ospec_jax.control.steered import marginal_rule, steerable
from ospec_jax.testing import tiny_target

PROMPTS = [f"Why is {word} so?" for word in ("it", "the sea", "a b c a b c a")]
MEASURED = (1.0, 1.1, 1.2, 1.3)
DEPTHS = (0, 1, 3, 5)


def after(drift, kinds, factor_of):
    """The drift once steps of these kinds have taken so much longer."""
    for kind in kinds:
        drift = drift.observe(kind, factor_of(kind))
    return drift


def test_what_slows_down_all_steps_is_shared():
    """One kind alone is run: of the others most of it is believed, too."""
    drift = after(Drift.start(MEASURED), [2] * 200, lambda kind: 2.0)
    assert drift.now[2] == pytest.approx(2 * MEASURED[2], rel=0.02)
    for kind in (0, 1, 3):
        assert 1.6 * MEASURED[kind] < drift.now[kind] < 2 * MEASURED[kind]

    drift = after(Drift.start(MEASURED), [0, 1, 2, 3] * 100, lambda kind: 3.0)
    np.testing.assert_allclose(drift.now, 3 * np.asarray(MEASURED), rtol=0.02)


def test_what_slows_down_one_kind_is_its_own():
    slow = lambda kind: 3.0 if kind == 3 else 1.0
    drift = after(Drift.start(MEASURED), [0, 1, 2, 3] * 200, slow)
    for kind in range(4):
        wanted = MEASURED[kind] * slow(kind)
        assert drift.now[kind] == pytest.approx(wanted, rel=0.15)
    # Of what is not run any more it is forgotten.
    drift = after(drift, [0, 1, 2] * 1000, lambda kind: 1.0)
    assert drift.now[3] == pytest.approx(MEASURED[3], rel=0.2)


def test_a_quiet_machine_is_no_news_and_one_pause_is_little():
    start = Drift.start(MEASURED)
    noisy = lambda kind: math.exp(rng.normal(0, 0.03))
    rng = np.random.default_rng(0)
    assert not after(start, [0, 1, 2, 3] * 50, noisy).is_news
    paused = start.observe(1, 1e6)
    assert paused.now[0] < 1.1 * MEASURED[0]
    assert after(paused, [0, 1, 2, 3] * 30, lambda kind: 1.0).logs == pytest.approx(
        (0.0,) * 4, abs=0.02
    )
    for absurd in (0.0, -1.0, math.nan, math.inf):
        assert start.observe(1, absurd) is start


def auto(now=None):
    actions = tuple(Action(TreeConfig(num_steps=depth)) for depth in DEPTHS)
    chooser = Chooser.start(most_tokens_a_second(actions), 1)
    chooser.now = now
    chooser.set_costs(MEASURED)
    return chooser


def chosen(chooser, seconds_of, num_steps, accepted=5):
    """Depths that are chosen where steps take what a made-up clock says."""
    found = []
    for _ in range(num_steps):
        action = chooser.choose(())
        depth = action.tree.num_steps
        found.append(depth)
        seconds = seconds_of(depth)
        chooser.observe(action, Outcome((min(depth, accepted),), seconds=seconds))
    return found


def test_a_stale_table_is_left_behind():
    """Deep drafts take ten times what was measured: depth 1 is best, then 5 again."""
    measured = dict(zip(DEPTHS, MEASURED, strict=True))
    stale = lambda depth: measured[depth] * (10 if depth > 1 else 1)
    now = itertools.count().__next__
    blind = auto()
    assert set(chosen(blind, stale, 400)[-50:]) == {5}
    chooser = auto(now)
    assert set(chosen(chooser, measured.get, 100)[-50:]) == {5}
    tail = chosen(chooser, stale, 1500)[-300:]
    assert np.mean(np.asarray(tail) == 1) > 0.8
    tail = chosen(chooser, measured.get, 3000)[-300:]
    assert np.mean(np.asarray(tail) == 5) > 0.8


def test_a_busier_machine_alone_changes_no_choice():
    chooser = auto(itertools.count().__next__)
    measured = dict(zip(DEPTHS, MEASURED, strict=True))
    chosen(chooser, measured.get, 100)
    depths = chosen(chooser, lambda depth: 4 * measured[depth], 300)
    assert set(depths) == {5}
    # And yet it is known; of what is not run most of it is believed.
    assert chooser.drift.now[-1] == pytest.approx(4 * MEASURED[-1], rel=0.05)


def test_the_marginal_rule_is_told_by_depth_and_size():
    tree = steerable(TreeConfig("dynamic", 3, topk=2, num_draft_tokens=8))
    actions = tuple(Action(tree.of_depth(depth)) for depth in tree.depths)
    chooser = Chooser.start(marginal_rule(actions), 1)
    chooser.now = itertools.count().__next__
    count = len(chooser.controller.kinds)
    chooser.set_costs(np.linspace(1.0, 2.0, count))
    before = chooser.state.costs.seconds

    def observe(depth, size, factor):
        nothing = np.zeros((1, 3))
        found = np.asarray(Evidence(depth, size, nothing, nothing).packed())
        seconds = before[depth, tree.sizes.index(size) if depth else 0] * factor
        outcome = Outcome((0,), evidence=found if depth else None, seconds=seconds)
        chooser.observe(actions[-1] if depth else actions[0], outcome)

    for _ in range(300):
        observe(3, 8, 2.0)
        observe(2, 2, 1.0)
        observe(0, 0, 1.0)
    now = chooser.state.costs.seconds
    assert now[3, -1] / before[3, -1] > 1.5
    assert now[2, 1] / before[2, 1] < 1.15
    assert now[0, 0] / before[0, 0] < 1.15


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


def answers(session):
    rows = [{"prompt": text, "id": text} for text in PROMPTS]
    found = {x.prompt.id: x.token_ids for x in session.generate(rows, 16)}
    return [found[text] for text in PROMPTS]


def open_auto(target, draft, **given):
    tree = TreeConfig.auto()
    # Answers of tiny targets go round in circles: long steps would take most of them.
    given = {"num_predicted_tokens": 0} | given
    return Session(target, draft, tree=tree, controller="auto", **given)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["auto", "joint", "marginal"])
def test_output_depends_on_no_table_and_no_clock(target, draft, name, batch_size):
    plain = answers(Session(target))
    given = draft
    if name == "joint":
        given = load_draft("pool:ngram+suffix", target)
    session = Session(
        target,
        given,
        tree=TreeConfig.auto() if name == "auto" else None,
        controller=name,
        batch_size=batch_size,
        num_predicted_tokens=0,
        follow_clock=True,
    )
    chooser = session.chooser
    count = len(chooser.controller.kinds)
    rng = np.random.default_rng(0)
    erratic = lambda: float(rng.choice([1.0, 1e-9, 1e9, -5.0, math.nan, math.inf]))
    chooser.now = erratic
    # The marginal rule fits a clock to what was measured: that is finite and positive.
    # Tables that are not are given to it by a test of its own.
    absurd = () if name == "marginal" else (0.0, -1.0, math.nan, math.inf)
    for costs in (1e-9, 1e9, *absurd):
        chooser.set_costs([costs] * count)
        assert answers(session) == plain
    for _ in range(3):
        chooser.set_costs(rng.uniform(1e-6, 1.0, count))
        assert answers(session) == plain


def test_steps_are_timed_where_nothing_comes_between(target, draft):
    """A clock that ticks once a step; the first step of an answer is never timed."""
    session = open_auto(target, draft, follow_clock=True, ngrams=False)
    session.measure_costs()
    heard = []
    inner = session.chooser.controller

    def observe(state, action, outcome):
        heard.append(outcome.seconds)
        return inner.observe(state, action, outcome)

    session.chooser.controller = inner._replace(observe=observe, hears_ends=True)
    session.chooser.now = itertools.count(0, 0.25).__next__
    answers(session)
    assert heard.count(None) == len(PROMPTS)
    assert set(heard) == {None, 0.25}


def test_without_a_clock_nothing_is_timed(target, draft):
    session = open_auto(target, draft)
    session.measure_costs()
    assert session.chooser.drift is None
    followed = open_auto(target, draft, follow_clock=True)
    # What a checkpoint tells may have been measured beside other work.
    followed.chooser.resume(session.chooser.to_json())
    assert not followed.chooser.has_costs
    followed.measure_costs()
    assert followed.chooser.has_costs
    assert followed.chooser.drift == Drift.start(followed.chooser.state.costs)
    assert dataclasses.asdict(followed.chooser.state).keys() == vars(
        session.chooser.state
    )


def test_whoever_does_not_weigh_time_needs_no_clock(target, draft):
    with pytest.raises(ConfigError, match="None does not; use auto"):
        Session(target, draft, follow_clock=True)
    with pytest.raises(ConfigError, match="use True or False"):
        open_auto(target, draft, follow_clock="yes")
