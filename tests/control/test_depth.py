# SPDX-License-Identifier: Apache-2.0
"""Depths chosen step by step: by what pays, from the past alone, and exactly."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.cli.notation import parse_tree
from ospec_jax.config import ConfigError, from_dict
from ospec_jax.control.base import Action, Chooser, Context, Controller, Outcome, Row
from ospec_jax.control.depth import (
    DepthState,
    chances,
    expected_emitted,
    most_tokens_a_second,
)
from ospec_jax.control.registry import find_controller
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.testing import tiny_target
from ospec_jax.types import Draft

DEPTHS = (0, 1, 3, 5)
CHEAP = (1.0, 1.1, 1.2, 1.4)
DEAR = (1.0, 1.6, 3.0, 5.0)
PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(5)]
LEARNER = LearnerConfig(
    update_interval=60, batch_size=2, window=32, num_context=64, ring_capacity=8,
    learning_rate=3e-3,
)  # fmt: skip


def chains(depths):
    return tuple(Action(TreeConfig(num_steps=depth)) for depth in depths)


def run(costs, accepted, num_steps=600, remembered=50.0, state=None):
    """Depths chosen while drafts are accepted up to `accepted` tokens, always."""
    rule = most_tokens_a_second(chains(DEPTHS), remembered)
    state = state or dataclasses.replace(rule.init(1), costs=costs)
    chosen = []
    for _ in range(num_steps):
        action = rule.choose(state, ())
        depth = action.tree.num_steps
        chosen.append(depth)
        state = rule.observe(state, action, Outcome((min(depth, accepted),)))
    return chosen, state


def test_drafts_that_are_right_are_drafted_deep():
    assert set(run(CHEAP, accepted=5)[0][20:]) == {5}


def test_drafts_that_are_right_three_tokens_deep():
    assert np.mean(np.asarray(run(CHEAP, accepted=3)[0][20:]) == 3) > 0.8


def test_drafts_that_are_never_right_are_given_up_and_tried_again():
    chosen, state = run(CHEAP, accepted=0)
    tried = np.asarray(chosen[100:]) > 0
    assert 0 < tried.mean() < 0.2
    # As soon as they are right, they are drafted again.
    again, _ = run(CHEAP, accepted=5, state=state, num_steps=200)
    assert set(again[-20:]) == {5}


def by_domain(costs=CHEAP):
    """A chooser of depths by domain, that knows what steps cost."""
    rule = find_controller("auto:domain", chains(DEPTHS))(chains(DEPTHS))
    chooser = Chooser.start(rule, 1)
    chooser.set_costs(costs)
    return chooser


def rows_of(*domains):
    return [Row(False, 8, 8, Context(domain=domain)) for domain in domains]


def take(chooser, accepted, *domains):
    """A step of rows of these domains, each with drafts right to its own depth."""
    action = chooser.choose(rows_of(*domains))
    depth = action.tree.num_steps
    parts = tuple(
        (Context(domain=domain), Outcome((min(depth, accepted[domain]),)))
        for domain in domains
    )
    found = tuple(part.num_accepted[0] for _, part in parts)
    chooser.observe(action, Outcome(found, parts=parts))
    return depth


def test_each_kind_of_request_has_the_depth_that_pays_for_it():
    right = {"easy": 5, "hard": 0}
    chooser = by_domain()
    for _ in range(30):
        easy = [take(chooser, right, "easy") for _ in range(10)]
        hard = [take(chooser, right, "hard") for _ in range(10)]
    assert set(easy) == {5}
    assert np.mean(np.asarray(hard) == 0) > 0.5
    # One that is new begins with what all have shown.
    assert chooser.choose(rows_of("new")) == chooser.choose(())


def test_rows_of_several_kinds_are_drafted_for_together():
    """The depth that maximises the sum of what is expected of all of them."""
    right = {"deep": 5, "one": 1}
    chooser = by_domain(DEAR)
    for _ in range(200):
        take(chooser, right, "deep")
        take(chooser, right, "one")
    own = dict(zip(chooser.state.keys, chooser.state.own, strict=True))
    for domains in (["deep", "one"], ["deep", "one", "one"], ["deep", "deep", "one"]):
        emitted = sum(
            expected_emitted(chances(own[f"domain {domain}"])) for domain in domains
        )
        best = np.argmax(emitted[list(DEPTHS)] / np.asarray(DEAR))
        assert chooser.choose(rows_of(*domains)).tree.num_steps == DEPTHS[best]


def test_depths_by_kind_are_kept_and_forgotten_with_their_scope():
    rule = find_controller("auto:scope", chains(DEPTHS))(chains(DEPTHS))
    chooser = Chooser.start(rule, 1)
    chooser.set_costs(CHEAP)
    for scope in (3, 4):
        part = Outcome((2,))
        whole = part._replace(parts=((Context(scope=scope), part),))
        chooser.observe(chains(DEPTHS)[-1], whole)
    other = Chooser.start(rule, 1)
    other.resume(json.loads(json.dumps(chooser.to_json())))
    assert other.state == chooser.state
    assert other.has_costs
    assert chooser.forget([3])
    assert chooser.state.keys == ("scope 4",)
    # Depths that are chosen for all alike are another rule.
    plain = Chooser.start(most_tokens_a_second(chains(DEPTHS)), 1)
    before = plain.state
    plain.resume(chooser.to_json())
    assert plain.state == before


def test_what_costs_more_than_it_yields_is_not_drafted():
    """One token of two is worth 1.5 plain steps, and costs 1.6."""
    rule = most_tokens_a_second(chains(DEPTHS))
    state = dataclasses.replace(rule.init(16), costs=DEAR)
    chosen = []
    for _ in range(400):
        action = rule.choose(state, ())
        depth = action.tree.num_steps
        chosen.append(depth)
        accepted = tuple(min(depth, row % 2) for row in range(16))
        state = rule.observe(state, action, Outcome(accepted))
    assert np.mean(np.asarray(chosen) > 0) < 0.05


def test_chances_are_of_tokens_whose_predecessors_were_accepted():
    deepest = chains((0, 3))[1]
    rule = most_tokens_a_second(chains((0, 3)), 1e9)
    state = rule.init(4)
    for _ in range(5000):
        state = rule.observe(state, deepest, Outcome((0, 1, 2, 3)))
    np.testing.assert_allclose(chances(state), [3 / 4, 2 / 3, 1 / 2], atol=1e-3)
    emitted = expected_emitted(chances(state))
    np.testing.assert_allclose(emitted, [1, 1.75, 2.25, 2.5], atol=1e-2)
    # Those that were not drafted are judged by those before them.
    state = rule.init(4)
    for _ in range(500):
        state = rule.observe(state, chains((1,))[0], Outcome((0, 1)))
    np.testing.assert_allclose(chances(state), 0.5, atol=1e-2)


def test_states_are_kept_in_json_exactly():
    state = run(CHEAP, accepted=2)[1]
    text = json.dumps(dataclasses.asdict(state))
    assert from_dict(DepthState, json.loads(text)) == state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeConfig(num_steps=3, depths=(0, 2)), "largest of the depths"),
        (lambda: TreeConfig(num_steps=3, depths=(3, 0)), "ascend"),
        (
            lambda: TreeConfig("static", 1, branching=(2,), depths=(0, 1)),
            "only chains vary",
        ),
        (lambda: parse_tree("dynamic:2,4", "auto"), "instead of auto"),
    ],
)
def test_depths_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    return answers(Session(target))


def answers(session, prompts=PROMPTS):
    done = sorted(session.generate(prompts, 40), key=lambda result: result.prompt.id)
    return [result.token_ids for result in done]


def switching(actions):
    """A rule that changes its mind at every step."""
    cycle = itertools.cycle(actions)
    rule = most_tokens_a_second(actions)
    return rule._replace(choose=lambda state, rows: next(cycle))


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.thorough), 3])
@pytest.mark.usefixtures("own_programs")
def test_greedy_output_does_not_depend_on_depths(target, draft, plain, batch_size):
    session = Session(
        target, draft, tree=TreeConfig.auto(DEPTHS), batch_size=batch_size,
        controller=switching,
    )  # fmt: skip
    assert answers(session) == plain
    for action in chains(DEPTHS):
        step = session.engine.compiled(action, "greedy")
        # One executable for each capacity, here one.
        assert step._cache_size() == 1
    assert 0 < session.stats.mean_draft_length < 3
    assert session.stats.num_accepted_tokens > 0


def test_by_load_the_tree_is_drafted_or_nothing(target, draft, plain):
    session = Session(target, draft, num_speculative_tokens=2, controller="load")
    assert session.tree.depths == (0, 2)
    assert answers(session) == plain
    deep = Session(target, draft, controller="load")
    assert deep.tree.depths == (0, 3)
    assert Session(target, controller="load").tree == TreeConfig(num_steps=0)
    with pytest.raises(ConfigError, match="drafts a tree or nothing"):
        Session(target, draft, tree=TreeConfig.auto(), controller="load")


def test_drafts_are_right_after_plain_steps():
    """A model that drafts for itself is always right, unless its cache has holes."""
    target, depths = tiny_target(16), (0, 1, 3)
    build = lambda tree: build_drafter("model", target.config, tree, target.numerics)
    *shallow, deepest = chains(depths)
    menu = {action: build(action.tree) for action in shallow}
    config = StepConfig(target.config, target.numerics, deepest.tree)
    engine = Engine(config, target.params, build(deepest.tree), menu=menu)
    chooser = Chooser.start(switching(chains(depths)), 2)
    requests = [Request(str(i), (1, 2, 3 + i), 40) for i in range(3)]
    draft = Draft(target.params)
    for done in engine.serve(requests, lambda: draft, 2, chooser=chooser):
        stats = done.stats
        # But for the steps that the limit cut short.
        assert stats.num_accepted_tokens >= stats.num_draft_tokens - 6
        assert stats.num_accepted_tokens > 15


def test_costs_are_measured_once_and_kept(target, draft, tmp_path):
    session = Session(target, draft, tree=TreeConfig.auto(DEPTHS[:2]))
    assert session.chooser.state.costs == ()
    session.warm_up()
    costs = session.chooser.state.costs
    assert len(costs) == len(DEPTHS[:2])
    assert all(0 < cost < 10 for cost in costs)
    assert session.chooser.state.trials == (0.0,)
    session.warm_up()
    answers(session, PROMPTS[:1])
    assert session.chooser.state.costs == costs
    # Whether drafting pays by the measured clock is the machine's affair; by these
    # costs it does.
    state = dataclasses.replace(session.chooser.state, costs=CHEAP[:2])
    session.chooser.state = state
    answers(session, PROMPTS[:1])
    assert session.chooser.state.costs == CHEAP[:2]
    assert session.chooser.state.trials[0] > 0
    saved = load_draft(session.save(tmp_path).parent, target).meta.controller
    assert from_dict(DepthState, saved) == session.chooser.state


@pytest.mark.thorough
def test_resumed_run_equals_an_uninterrupted_one_bitwise(target, draft, tmp_path):
    few = TreeConfig.auto(DEPTHS[:2])

    def opened():
        session = Session(target, draft, learner=LEARNER, tree=few)
        state = dataclasses.replace(session.chooser.state, costs=CHEAP[:2])
        session.chooser.state = state
        return session

    straight, first = opened(), opened()
    expected = answers(straight)
    head = answers(first, PROMPTS[:3])
    first.save(tmp_path)
    second = Session(target, draft, learner=LEARNER, tree=few)
    second.resume(tmp_path)
    assert head + answers(second, PROMPTS[3:]) == expected
    assert second.chooser.state == straight.chooser.state
    for a, b in zip(
        jax.tree.leaves((second.state.trainer, second.state.traffic)),
        jax.tree.leaves((straight.state.trainer, straight.state.traffic)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_useless_draft_is_given_up_while_serving(target, draft, plain):
    never = max(set(range(target.config.vocab_size)) - set(sum(plain, [])))
    wrong = np.full_like(draft.draft.token_ids, never)
    useless = LoadedDraft(draft.draft.replace(token_ids=wrong), draft.meta)
    few = TreeConfig.auto(DEPTHS[:2])
    session = Session(target, useless, tree=few, ngrams=False)
    session.chooser.state = dataclasses.replace(session.chooser.state, costs=CHEAP[:2])
    assert answers(session) == plain
    assert session.stats.mean_draft_length < 0.4


def test_users_rules_may_choose(target, draft, plain):
    """Anything from actions to a controller; here one without a state."""

    def never(actions):
        return Controller(
            actions=actions,
            init=lambda num_rows: None,
            choose=lambda state, rows: actions[0],
            observe=lambda state, action, outcome: state,
        )

    few = TreeConfig.auto(DEPTHS[:2])
    session = Session(target, draft, tree=few, controller=never)
    assert answers(session, PROMPTS[:2]) == plain[:2]
    assert session.stats.mean_draft_length == 0
