# SPDX-License-Identifier: Apache-2.0
"""Requests join and leave one batch; each is answered as it would be alone."""

import dataclasses
import itertools

import jax
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import SamplingConfig
from ospec_jax.session.arguments import as_prompts
from ospec_jax.session.live import Live
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"Add {i}." for i in range(4)] + ["Say it again: " + "one, two, " * 20]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target, sliding_window=24)


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in Session(target).generate(PROMPTS, 30)]


@pytest.mark.parametrize(
    ("batch_size", "learner"),
    [
        (3, "head"),
        pytest.param(1, None, marks=pytest.mark.thorough),
        pytest.param(1, "head", marks=pytest.mark.thorough),
        pytest.param(3, None, marks=pytest.mark.thorough),
    ],
)
def test_whoever_comes_when_is_answered_as_alone(
    target, draft, plain, batch_size, learner
):
    if learner is not None:
        learner = LearnerConfig(learner)
    tree = TreeConfig(num_steps=2)
    session = Session(target, draft, tree=tree, learner=learner, batch_size=batch_size)
    live = Live(session, (256, 512))
    pairs = list(session.requests(as_prompts(PROMPTS), 30, SamplingConfig()))
    arriving = iter(pairs)
    prompt_of = {id(request): prompt for prompt, request in pairs}
    answers = {}
    capacities = set()
    for turn in itertools.count():
        # One comes every few turns, the long one last: caches grow for it.
        if turn % 4 == 0 and live.num_free and (pair := next(arriving, None)):
            live.join(pair[1])
        for done in live.turn():
            prompt = prompt_of[id(done.request)]
            session.take_in(prompt, done, session.text_of(done))
            answers[prompt.id] = done.token_ids
        capacities.add(live.capacity)
        if len(answers) == len(pairs):
            break

    assert live.is_idle
    assert [answers[prompt.id] for prompt, _ in pairs] == plain
    assert capacities == {0, 256, 512}
    assert session.num_admitted == len(pairs)
    if learner is not None:
        assert session.version > 0


@pytest.mark.thorough
@pytest.mark.parametrize("judge_every", [1, 4])
def test_a_pool_is_judged_while_rows_come_and_go(target, plain, judge_every):
    session = Session(
        target,
        "pool:ngram+suffix",
        tree=TreeConfig(num_steps=2),
        batch_size=3,
        controller="normalhedge",
        judge_every=judge_every,
    )
    live = Live(session, (256, 512))
    pairs = list(session.requests(as_prompts(PROMPTS), 30, SamplingConfig()))
    arriving = iter(pairs)
    prompt_of = {id(request): prompt for prompt, request in pairs}
    answers = {}
    for turn in itertools.count():
        if turn % 4 == 0 and live.num_free and (pair := next(arriving, None)):
            live.join(pair[1])
        for done in live.turn():
            answers[prompt_of[id(done.request)].id] = done.token_ids
        if len(answers) == len(pairs):
            break

    assert [answers[prompt.id] for prompt, _ in pairs] == plain
    # What was emitted was heard of.
    assert session.chooser.report()["windows"] > 0


def test_what_steps_take_is_weighed_by_the_number_of_rows(target, plain):
    """Alone drafting pays, beside another request it does not."""
    session = Session(target, "ngram", tree=TreeConfig.auto((0, 2)), batch_size=2)
    live = Live(session, (256,))
    live.warm_up(["greedy"])
    assert set(session.chooser.costs) == {1, 2}
    assert all(min(costs) > 0 for costs in session.chooser.costs.values())

    cheap, dear = (1.0, 1.0), (1.0, 9.0)
    session.chooser.costs = {1: cheap, 2: dear}
    (_, first), (_, second), *_ = session.requests(
        as_prompts(PROMPTS), 30, SamplingConfig()
    )
    seen = []
    answers = {}
    live.join(first)
    while not live.is_idle:
        seen.append((live.num_rows, session.chooser.state.costs))
        answers |= {done.request.id: done.token_ids for done in live.turn()}
        if len(seen) == 2:
            live.join(second)

    assert set(seen) == {(1, cheap), (2, dear)}
    assert [answers[first.id], answers[second.id]] == plain[:2]


def test_steps_that_nobody_weighs_are_not_timed(target):
    session = Session(target, "ngram", batch_size=2)
    Live(session, (256,)).warm_up(["greedy"])
    assert not session.chooser.costs


@pytest.mark.parametrize(
    ("draft", "options"),
    [
        ("ngram", {"tree": TreeConfig.auto((0, 2))}),
        ("pool:ngram+suffix", {"controller": "normalhedge"}),
        pytest.param(
            *("pool:ngram+suffix", {"controller": "ucb"}), marks=pytest.mark.thorough
        ),
    ],
)
def test_nothing_is_learned_of_who_is_left_out(target, plain, draft, options):
    session = Session(target, draft, learner="memory", batch_size=2, **options)
    # Told, not measured: drafting costs nothing, so there is something to hear of.
    session.chooser.set_costs([1.0] * len(session.chooser.controller.kinds))
    live = Live(session, (256,))
    prompts = as_prompts(PROMPTS[:4])
    pairs = list(session.requests(prompts, 30, SamplingConfig()))
    observe = session.chooser.observe
    told = []

    def watch(action, outcome):
        told.append(len(outcome.num_accepted))
        observe(action, outcome)

    def answer(asked):
        answers = {}
        for request in asked:
            live.join(request)
        while not live.is_idle:
            for done in live.turn():
                answers[done.request.id] = done.token_ids
                prompt = next(p for p, r in pairs if r.id == done.request.id)
                session.take_in(prompt, done, session.text_of(done))
        return [answers[request.id] for request in asked]

    session.chooser.observe = watch
    leave_out = lambda request: dataclasses.replace(request, is_left_out=True)
    first, second, third, fourth = (request for _, request in pairs)
    before = session.chooser.to_json(), session.memory
    assert answer([leave_out(first), leave_out(second)]) == plain[:2]
    assert not told
    assert session.chooser.to_json() == before[0]
    # Nor are its n-grams kept, or how often they were right.
    for old, new in zip(
        *map(jax.tree.leaves, (before[1], session.memory)), strict=True
    ):
        assert (old == new).all()

    # Beside one that is left out the other informs.
    assert answer([leave_out(third), fourth]) == plain[2:4]
    assert set(told) <= {0, 1}
    assert session.chooser.to_json() != before[0]
