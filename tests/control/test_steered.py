# SPDX-License-Identifier: Apache-2.0
"""The marginal rule while decoding: it learns, chooses, and never changes an answer."""

import dataclasses
import itertools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import forward

from ospec_jax import Session, TreeConfig
from ospec_jax.config import ConfigError, SamplingConfig, from_dict
from ospec_jax.control.base import Action, Outcome, Row
from ospec_jax.control.clock import flat_clock
from ospec_jax.control.marginal import Evidence, Steering
from ospec_jax.control.steered import (
    MarginalState,
    marginal_rule,
    menu_of,
    steerable,
)
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.request import Request
from ospec_jax.loading import load_draft
from ospec_jax.replay.cycles import Choice, build_cycles, look, verified_mass
from ospec_jax.replay.record import record
from ospec_jax.replay.trees import TraceShape, grow_trees, open_trace, trace_folder
from ospec_jax.testing import tiny_target

NEW_TOKENS = 20
LIMIT = 3.3
"""Standard deviations; chance alone leaves them once in 1,000 times."""
PROMPTS = [f"Why is {word} so?" for word in ("it", "the sea", "17", "a b c a b c a")]
TREE = TreeConfig("dynamic", 3, topk=2, num_draft_tokens=8)
ROW = (Row(False, 40, 20),)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return load_draft("self:exit-1", target)


def answers(session, sampling=SamplingConfig()):
    rows = [{"prompt": text, "id": text} for text in PROMPTS]
    results = session.generate(rows, NEW_TOKENS, sampling)
    found = {x.prompt.id: x.token_ids for x in results}
    return [found[text] for text in PROMPTS]


def rule_of(tree=TREE):
    tree = steerable(tree)
    actions = tuple(Action(tree.of_depth(depth)) for depth in tree.depths)
    return marginal_rule(actions), actions


def with_costs(state, by_depth, by_size=0.0):
    depth = np.arange(state.depth + 1)[:, None]
    size = np.arange(len(state.sizes))
    seconds = 1.0 + by_depth * depth + by_size * size
    return dataclasses.replace(state, seconds=tuple(seconds.ravel().tolist()))


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_absurd_costs_never_change_output_and_compile_nothing(
    target, draft, batch_size
):
    """Each table leads to other steps; all steps are those of one program."""
    plain = answers(Session(target))
    # Answers of tiny targets go round in circles: long steps would take most of them.
    session = Session(
        target,
        draft,
        tree=TREE,
        controller="marginal",
        batch_size=batch_size,
        num_predicted_tokens=0,
    )
    chooser = session.chooser
    fresh = chooser.state
    deep = session.engine.action
    steps = set()
    chooser.state = with_costs(fresh, 0.1)
    assert answers(session) == plain
    step: Any = session.engine.compiled(deep, "greedy")
    num_programs = step._cache_size()

    for costs in [(1e-9, 0.0), (1e-9, 1e9), (1e9, 1e9), (-0.4, -0.01), (0.1, 0.05)]:
        chooser.state = with_costs(fresh, *costs)
        assert answers(session) == plain
        steps.add((chooser.state.depth_counts, chooser.state.size_counts))
    assert len(steps) > 2

    for absurd in (float("nan"), 0.0, float("inf")):
        count = len(with_costs(fresh, 0.0).seconds)
        chooser.state = dataclasses.replace(fresh, seconds=(absurd,) * count)
        assert answers(session) == plain

    assert step._cache_size() == num_programs


# The next test counts draws from the same trees, the first one steers this draft.
@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("tree", [TREE, None])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_drawn_answers_are_steered_too(target, draft, tree, penalty, batch_size):
    """Where one token alone may be drawn, it is the one that plain decoding takes."""
    only_one = SamplingConfig(1.0, top_k=1, presence_penalty=penalty)
    how = {"batch_size": batch_size, "num_predicted_tokens": 0}
    session = Session(target, draft, tree=tree, controller="marginal", **how)
    session.chooser.state = with_costs(session.chooser.state, 0.1)
    assert answers(session, only_one) == answers(Session(target), only_one)
    assert sum(session.chooser.state.depth_counts[1:]) > 0


def law_of(target, ids, length):
    """Chance of each answer of so many tokens, of which two may come each time."""
    if not length:
        return {(): 1.0}

    logits = forward(target.params, target.config, ids)[0][-1]
    tokens = np.argsort(-logits, kind="stable")[:2]
    weights = np.exp(logits[tokens] - logits[tokens[0]])
    return {
        (token, *rest): weight / weights.sum() * chance
        for token, weight in zip(tokens.tolist(), weights, strict=True)
        for rest, chance in law_of(target, [*ids, token], length - 1).items()
    }


def test_steered_answers_follow_the_target():
    """Two rows share steps whose depth and size follow from what both have drafted."""
    target = tiny_target(16)
    draft = load_draft("self:exit-1", target)
    session = Session(
        target, draft, tree=TREE, controller="marginal", batch_size=2, ngrams=False
    )
    session.chooser.state = with_costs(session.chooser.state, 0.01, 0.04)
    prompts = (3, 9, 4, 7, 7, 5), (8, 3, 11, 6)
    laws = [law_of(target, list(ids), 4) for ids in prompts]
    counts = [dict.fromkeys(law, 0) for law in laws]
    ordinals = itertools.count()
    num_runs = 300

    for _ in range(num_runs):
        sampling = SamplingConfig(temperature=1.0, top_k=2)
        asked = [Request(str(i), ids, 4, sampling) for i, ids in enumerate(prompts)]
        serving = session.engine.serve(
            asked,
            lambda: session.served_draft,
            2,
            chooser=session.chooser,
            ordinals=ordinals,
        )
        for done in serving:
            number = int(done.request.id)
            path = tuple(done.token_ids)
            # A token that ends an answer leaves what would have followed open.
            like = [whole for whole in laws[number] if whole[: len(path)] == path]
            chance = sum(laws[number][whole] for whole in like)
            for whole in like:
                counts[number][whole] += laws[number][whole] / chance

    for law, found in zip(laws, counts, strict=True):
        for path, chance in law.items():
            deviation = np.sqrt(num_runs * chance * (1 - chance))
            missed = abs(found[path] - num_runs * chance)
            assert missed < LIMIT * max(deviation, 1), path
    state = session.chooser.state
    assert sum(count > 20 for count in state.size_counts) > 1


def test_costs_are_measured_before_the_first_answer_and_kept(target, draft):
    # With the steps of the first test.
    how = dict(tree=TREE, batch_size=2, num_predicted_tokens=0)
    session = Session(target, draft, controller="marginal", **how)
    assert not session.chooser.has_costs
    answers(session)
    state = session.chooser.state
    assert len(state.seconds) == 4 * len(menu_of(8))
    assert min(state.seconds) > 0
    # As a checkpoint has it.
    saved = json.loads(json.dumps(session.chooser.to_json()))
    other = Session(target, draft, controller="marginal", **how).chooser
    other.resume(saved)
    assert other.state == state == from_dict(MarginalState, saved)
    # Batches of another size have other costs; what the draft is worth is the same.
    how["batch_size"] = 3
    batch = Session(target, draft, controller="marginal", **how).chooser
    batch.resume(saved)
    assert not batch.has_costs
    assert batch.state.hits == state.hits
    # Of other trees nothing can be said.
    tree = Session(target, draft, controller="marginal", batch_size=2).chooser
    tree.resume(saved)
    assert not any(tree.state.trials)


def test_noise_in_costs_is_taken_out():
    """Of more work that seems to take less; what is clean stays as it is."""
    rule, _ = rule_of(TreeConfig(num_steps=3))
    # Plain, depths 1 and 2 of one node, and depth 3 of one, two and three.
    clean = rule.set_costs(rule.init(1), [1.0, 1.2, 1.3, 1.4, 1.5, 1.6])
    expected = [[1.0] * 3, [1.2] * 3, [1.3, 1.4, 1.4], [1.4, 1.5, 1.6]]
    np.testing.assert_allclose(clean.costs.seconds, expected, rtol=1e-4)
    noisy = rule.set_costs(rule.init(1), [1.0, 1.2, 1.9, 1.4, 1.6, 1.5])
    seconds = noisy.costs.seconds
    assert (np.diff(seconds, axis=0) >= 0).all()
    assert (np.diff(seconds, axis=1) >= 0).all()


def test_evidence_is_what_the_record_says(target, draft, tmp_path):
    """Of every step: path probabilities of what was verified, and how sure it was."""
    shape = TraceShape(topk=2, depth=3, num_nodes=8)
    rows = [parse_prompt({"prompt": text, "id": text}, "") for text in PROMPTS]
    record(target, rows, tmp_path, (1,), max_new_tokens=NEW_TOKENS)
    grow_trees(target, draft, tmp_path, shape)
    trace = open_trace(trace_folder(tmp_path, shape))
    cycles = build_cycles(trace, flat_clock(2, 3), menu_of(8))

    session = Session(target, draft, tree=TREE, controller="marginal", ngrams=False)
    inner = session.chooser.controller
    heard = []

    def observe(state, action, outcome):
        heard.append(outcome)
        return state

    session.chooser.controller = inner._replace(observe=observe)
    session.chooser.state = with_costs(session.chooser.state, 0.1, 0.05)
    met = set()

    for text in PROMPTS:
        heard.clear()
        list(session.generate([text], NEW_TOKENS))
        position = int(trace.starts[trace.ids.index(text)])
        for outcome in heard:
            found = Evidence.unpacked(outcome.evidence)
            depth = found.depth
            choice = Choice(jnp.int32(depth), jnp.int32(menu_of(8).index(found.size)))
            mass = verified_mass(cycles, jnp.int32(position), choice)
            np.testing.assert_allclose(found.mass[0], mass, rtol=1e-5, atol=1e-7)
            best = look(cycles, jnp.int32(position)).frontier[:depth, 0]
            sure = np.exp(np.diff(best, prepend=0.0))
            np.testing.assert_allclose(found.sure[0, :depth], sure, rtol=1e-5)
            position += outcome.num_accepted[0] + 1
            met.add((depth, found.size))

    assert len(met) > 1


def evidence(rows, depth, size=8):
    mass = np.full((rows, 3), 0.5) * (np.arange(3) < depth)
    found = Evidence(depth, size, mass, np.full((rows, 3), 0.7))
    return np.asarray(found.packed())


def told(rule, state, rows=ROW):
    return Steering.unpacked(rule.steer(state, rows), 3, len(state.sizes))


def run(state, accepted, num_steps=300):
    """Actions that are chosen while so many tokens are accepted, always."""
    rule, _ = rule_of()
    depths = []
    for _ in range(num_steps):
        action = rule.choose(state, ROW)
        depth = action.tree.num_steps
        depths.append(depth)
        found = evidence(1, depth) if depth else None
        outcome = Outcome((min(depth, accepted),), evidence=found)
        state = rule.observe(state, action, outcome)
    return np.asarray(depths), state


def test_drafts_that_are_never_right_are_given_up_and_tried_again():
    rule, _ = rule_of()
    depths, state = run(with_costs(rule.init(1), 0.2, 0.02), accepted=0)
    assert 0 < np.mean(depths[100:] > 0) < 0.2
    assert state.depth_counts[0] + state.depth_counts[3] == 300
    depths, _ = run(state, accepted=3, num_steps=200)
    assert set(depths[-20:]) == {3}


def test_what_is_learned_corrects_the_draft():
    """Half was promised at each depth; all of it came, then none."""
    rule, actions = rule_of()
    state = with_costs(rule.init(2), 0.2)
    start = told(rule, state)
    np.testing.assert_allclose(start.factor, 1.0)
    for accepted, expected in (((3, 3), 2.0), ((0, 0), 0.0)):
        for _ in range(1500):
            outcome = Outcome(accepted, evidence=evidence(2, 3))
            state = rule.observe(state, actions[1], outcome)
        now = told(rule, state)
        assert now.factor[0] == pytest.approx(expected, abs=0.1)
        # Of depths that are not reached nothing is learned any more.
        assert expected == 0 or now.odds[5] == pytest.approx(1.0, abs=0.05)
    # Both rows of a step are told of, and fade as one.
    assert state.trials[0] == pytest.approx(400, rel=0.02)


def test_two_rows_of_the_same_numbers_are_steered_to_the_whole_tree():
    rule, _ = rule_of()
    state = with_costs(rule.init(2), 0.2)
    assert told(rule, state).depth == 0
    now = told(rule, state, ())
    assert (int(now.depth), int(now.size)) == (3, len(menu_of(8)) - 1)


def test_a_session_without_anything_to_draft_takes_the_name(target):
    assert Session(target, controller="marginal").tree.num_steps == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(stop_fn=lambda progress: True), "brings its own rules"),
        (dict(tree=TreeConfig("static", 1, branching=(2,))), "only chains and dynamic"),
        (dict(controller="ltd:nowhere"), "nowhere"),
        (dict(draft="ngram"), "have no logits"),
    ],
)
def test_what_contradicts_it_is_refused(target, draft, given, message):
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        Session(target, **{"draft": draft, "controller": "marginal"} | given)
