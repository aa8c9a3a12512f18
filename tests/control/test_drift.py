# SPDX-License-Identifier: Apache-2.0
"""What steps take is followed by made-up clocks, and changes nothing but the steps."""

import itertools
import math

import numpy as np
import pytest
from drafted import random_head

from ospec_jax import Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.control.base import Action, Chooser, Outcome, Row
from ospec_jax.control.costs import kinds_of
from ospec_jax.control.depth import most_tokens_a_second
from ospec_jax.control.drift import Drift
from ospec_jax.control.marginal import Evidence, Steering
from ospec_jax.control.steered import marginal_rule, steerable
from ospec_jax.testing import tiny_target

PROMPTS = [f"Why is {word} so?" for word in ("it", "the sea", "a b c a b c a")]
MEASURED = (1.0, 1.1, 1.2, 1.3)
DEPTHS = (0, 1, 3, 5)
ROWS = (Row(False, 40, 20),)


def after(drift, kinds, factor_of):
    """The drift once steps of these kinds have taken so much longer."""
    for kind in kinds:
        drift = drift.observe(kind, factor_of(kind))
    return drift


def test_a_busier_machine_has_all_kinds_measured_again():
    """Until then all are believed to be slower alike; then each is what it took."""
    drift = after(Drift.start(MEASURED), [2] * 63, lambda kind: 2.0)
    assert drift.choose() == (None, drift)
    assert drift.now == pytest.approx([2 * x for x in MEASURED], rel=0.03)
    drift = drift.observe(2, 2.0)

    run = []
    slow = (1.0, 2.0, 2.0, 4.0)
    while True:
        kind, drift = drift.choose()
        if kind is None:
            break
        run.append(kind)
        # One step of each kind is struck by something else.
        pause = 7.0 if len(run) <= 4 else 1.0
        drift = drift.observe(kind, slow[kind] * pause)
    assert run == [0, 1, 2, 3] * 3
    # Steps that were under way are heard of, too.
    drift = after(drift, [2, 2], lambda kind: 2.0)
    assert drift.now == pytest.approx(np.multiply(MEASURED, slow))
    assert drift.is_news
    assert not drift.tell().is_news
    assert drift.choose()[0] is None


def test_from_time_to_time_they_are_measured_in_any_case():
    drift = after(Drift.start(MEASURED), [1] * 2047, lambda kind: 1.0)
    assert drift.choose()[0] is None
    assert drift.observe(1, 1.0).choose()[0] == 0


def test_a_quiet_machine_is_no_news_and_one_pause_is_little():
    start = Drift.start(MEASURED)
    noisy = lambda kind: math.exp(rng.normal(0, 0.1))
    rng = np.random.default_rng(0)
    drift = after(start, [0, 1, 2, 3] * 100, noisy)
    assert drift.choose()[0] is None
    assert not drift.is_news
    paused = start.observe(1, 1e6)
    assert paused.now[0] < 1.1 * MEASURED[0]
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
        action = chooser.choose(ROWS)
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
    assert set(chosen(chooser, stale, 200)[-50:]) == {1}
    assert set(chosen(chooser, measured.get, 2200)[-50:]) == {5}


def test_a_busier_machine_alone_changes_no_choice():
    chooser = auto(itertools.count().__next__)
    measured = dict(zip(DEPTHS, MEASURED, strict=True))
    chosen(chooser, measured.get, 100)
    before = chooser.state.costs
    depths = chosen(chooser, lambda depth: 4 * measured[depth], 300)
    # But for those steps by which that is known.
    assert depths.count(5) > 280
    assert chooser.state.costs == before
    assert chooser.drift.now == pytest.approx([4 * x for x in MEASURED])


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

    # All steps seem slower, and the deepest tree of most nodes turns out to be.
    for _ in range(64):
        observe(3, 8, 1.5)
    probed = set()
    for _ in range(3 * count + 2):
        action = chooser.choose(ROWS)
        told = chooser.steer(action, ROWS)
        if action.tree.num_steps:
            told = Steering.unpacked(told, 3, len(tree.sizes))
            depth, size = int(told.depth), tree.sizes[int(told.size)]
        else:
            depth, size = 0, tree.sizes[0]
        # Steps behind the measuring are those of the rule.
        if action.tree.num_steps and not depth:
            depth, size = 3, 8
        probed.add((depth, size))
        observe(depth, size, 3.0 if size == 8 else 1.0)
    assert probed == set(kinds_of(tree))
    now = chooser.state.costs.seconds
    assert now[3, -1] / before[3, -1] == pytest.approx(3.0, rel=0.1)
    assert now[2, 1] / before[2, 1] == pytest.approx(1.0, rel=0.1)


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


# Each depth is a program.
FEW = TreeConfig.auto((0, 1, 3))


def open_auto(target, draft, **given):
    # Answers of tiny targets go round in circles: long steps would take most of them.
    given = {"num_predicted_tokens": 0, "ngrams": False} | given
    return Session(target, draft, tree=FEW, controller="auto", **given)


@pytest.mark.crossed
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "name", ["auto", "joint", pytest.param("marginal", marks=pytest.mark.thorough)]
)
def test_output_depends_on_no_table_and_no_clock(target, draft, name, batch_size):
    plain = answers(Session(target))
    given = draft
    if name == "joint":
        given = load_draft("pool:ngram+suffix", target)
    session = Session(
        target,
        given,
        tree=None if name == "marginal" else FEW,
        ngrams=False,
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
    session = open_auto(target, draft, follow_clock=True)
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


def test_whoever_does_not_weigh_time_needs_no_clock(target, draft):
    with pytest.raises(ConfigError, match="None does not; use auto"):
        Session(target, draft, follow_clock=True)
    with pytest.raises(ConfigError, match="use True or False"):
        open_auto(target, draft, follow_clock="yes")
