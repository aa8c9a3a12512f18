# SPDX-License-Identifier: Apache-2.0
"""Policies within the step that go on learning: swapped, saved, and never heard of."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest
from drafted import random_head
from reference import forward

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax._platform import device_name
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.control.base import Action, Outcome, Row
from ospec_jax.control.clock import flat_clock
from ospec_jax.control.lessons import Cycle, LessonConfig
from ospec_jax.control.policy import Policies, PolicyShape, init_layers
from ospec_jax.control.taught import learning
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.request import Request
from ospec_jax.loading import load_draft
from ospec_jax.replay.cycles import build_cycles
from ospec_jax.replay.going_on import cycle_at
from ospec_jax.replay.record import record
from ospec_jax.replay.trees import TraceShape, grow_trees, open_trace, trace_folder
from ospec_jax.storage.policies import PolicyMeta, save_policies
from ospec_jax.testing import tiny_target

NEW_TOKENS = 20
LIMIT = 3.3
"""Standard deviations; chance alone leaves them once in 1,000 times."""
PROMPTS = [f"Why is {word} so?" for word in ("it", "the sea", "17", "a b c a b c a")]
SHAPE = PolicyShape(2, 3, (1, 2, 4, 8))
ROW = (Row(False, 40, 20),)
CONFIG = LessonConfig(num_cycles=8, deep_every=4)


def policies(seed=0, shape=SHAPE):
    """Networks that nobody taught: they say anything."""
    make = lambda kind, seed, last: init_layers(
        jax.random.key(seed), [shape.num_seen(kind), 16, last], 3.0
    )
    return Policies(
        make("depth", seed, 2), make("size", seed + 1, len(shape.sizes)), 1, 0, shape
    )


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return load_draft("self:exit-1", target)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a chain's policies, and of a tree's."""
    place = tmp_path_factory.mktemp("policies")
    chain = PolicyShape(1, 4, (1, 2, 4))
    for name, shape in (("tree", SHAPE), ("chain", chain)):
        save_policies(place / name, 1, policies(3, shape), PolicyMeta(), None)

    return place


def answers(session, sampling=SamplingConfig()):
    rows = [{"prompt": text, "id": text} for text in PROMPTS]
    found = {x.prompt.id: x for x in session.generate(rows, NEW_TOKENS, sampling)}
    return [found[text].token_ids for text in PROMPTS]


def open_session(target, draft, folder, learn_control=0.5, **given):
    # Answers of tiny targets go round in circles: long steps would take most of them.
    return Session(
        target,
        draft,
        controller=f"ltd:{folder}",
        learn_control=learn_control,
        **{"num_predicted_tokens": 0} | given,
    )


def hurry(session, interval=2):
    """Lets it learn after so many cycles."""
    state = session.chooser.state
    session.chooser.state = dataclasses.replace(state, interval=interval)


def with_policies(session, found):
    state = session.chooser.state
    session.chooser.state = dataclasses.replace(state, policies=found)


# The tests of what steps report and of checkpoints decode trees, one request at a time.
@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("chain", 2),
        pytest.param("chain", 1, marks=pytest.mark.thorough),
        pytest.param("tree", 1, marks=pytest.mark.thorough),
        pytest.param("tree", 2, marks=pytest.mark.thorough),
    ],
)
def test_output_never_depends_on_policies_and_one_program_serves_all(
    target, draft, folders, batch_size, name
):
    """Those that nobody taught, absurd ones, and those that learn between answers."""
    plain = answers(Session(target))
    session = open_session(target, draft, folders / name, batch_size=batch_size)
    assert answers(session) == plain
    hurry(session)
    step: Any = session.engine.compiled(session.engine.action, "greedy")
    num_programs = step._cache_size()
    before = session.chooser.state
    assert answers(session) == plain
    assert session.chooser.state.num_updates > before.num_updates
    assert session.chooser.state.policies is not before.policies

    found = session.chooser.state.policies
    # Lessons are no matter of what is absurd.
    hurry(session, 10_000)
    for absurd in (float("nan"), float("inf"), 0.0, -1e30):
        with_policies(session, jax.tree.map(lambda x, to=absurd: x * 0 + to, found))
        assert answers(session) == plain
    for seed in (11, 12):
        with_policies(session, policies(seed, found.shape))
        assert answers(session) == plain

    assert step._cache_size() == num_programs


def test_policies_that_do_not_learn_are_arguments_too(target, draft, folders):
    """Two sessions of other policies share their programs."""
    plain = answers(Session(target))
    save_policies(folders / "other", 1, policies(8), PolicyMeta(), None)
    sessions = [
        open_session(target, draft, folders / name, 0.0) for name in ("tree", "other")
    ]
    assert [answers(session) for session in sessions] == [plain, plain]
    one, other = (s.engine.compiled(s.engine.action, "greedy") for s in sessions)
    assert one is other
    assert one._cache_size() == 1  # type: ignore[attr-defined]
    assert not sessions[0].chooser.to_json()


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


# Greedy output, above, and steered draws (`test_steered.py`) hold it in `make test`;
# the rule of a policy by itself is enumerated in `decoding/test_laws.py`.
@pytest.mark.thorough
def test_answers_follow_the_target_while_policies_learn(folders):
    """After nearly every answer they are others, by what earlier ones had accepted."""
    target = tiny_target(16)
    draft = load_draft("self:exit-1", target)
    session = open_session(target, draft, folders / "tree", batch_size=2, ngrams=False)
    chooser = session.chooser
    chooser.set_costs(np.linspace(1.0, 2.0, len(chooser.controller.kinds)))
    hurry(session, 3)
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
            session.chooser.learn()
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
    assert session.chooser.state.num_updates > 50


def test_steps_report_what_the_record_says(target, draft, folders, tmp_path):
    """Of each cycle: what was drafted, what was verified, and which of it was right."""
    shape = TraceShape(topk=2, depth=3, num_nodes=8)
    rows = [parse_prompt({"prompt": text, "id": text}, "") for text in PROMPTS]
    record(target, rows, tmp_path, (1,), max_new_tokens=NEW_TOKENS)
    grow_trees(target, draft, tmp_path, shape)
    trace = open_trace(trace_folder(tmp_path, shape))
    cycles = build_cycles(trace, flat_clock(2, 3), SHAPE.sizes)
    host = jax.device_get(cycles.replace(clock=None))

    session = open_session(target, draft, folders / "tree", ngrams=False)
    inner = session.chooser.controller
    heard = []

    def observe(state, action, outcome):
        heard.append(outcome)
        return inner.observe(state, action, outcome)

    session.chooser.controller = inner._replace(observe=observe)
    met = set()

    for seed in (1, 5, 9):
        session.measure_costs()
        with_policies(session, policies(seed))
        for text in PROMPTS:
            heard.clear()
            list(session.generate([text], NEW_TOKENS))
            position = int(trace.starts[trace.ids.index(text)])
            for outcome in heard:
                found = Cycle.unpacked(outcome.evidence, SHAPE.depth)
                is_there = np.isfinite(found.scores[0])
                depth = int(SHAPE.place_depths[is_there].max())
                size = SHAPE.sizes.index(int(found.size[0]))
                wanted = cycle_at(host, position, depth, size)
                np.testing.assert_allclose(outcome.evidence, wanted, rtol=1e-5)
                position += outcome.num_accepted[0] + 1
                met.add((depth, int(found.size[0]), outcome.num_accepted[0]))

    assert len(met) > 3


def rule(budget=0.1, config=CONFIG, seed=0, shape=SHAPE):
    tree = TreeConfig("dynamic", 3, topk=2, num_draft_tokens=8, sizes=SHAPE.sizes)
    action = Action(tree)
    return learning(policies(seed, shape), (action,), budget, config), action


def outcome(rng, rows=1):
    """A cycle that was drafted to the deepest depth, with two right nodes."""
    scores = -np.sort(rng.uniform(0, 3, (rows, SHAPE.num_places)))
    right = np.tile([0, 2, -1], (rows, 1))
    found = Cycle(np.full(rows, 8), np.full(rows, 40), right, scores)
    return Outcome((2,) * rows, evidence=found.packed())


def ready(rule, interval=4, num_rows=1):
    state = rule.set_costs(rule.init(num_rows), np.linspace(1, 2, len(rule.kinds)))
    return dataclasses.replace(state, interval=interval)


def test_one_cycle_of_so_many_is_deep():
    controller, action = rule()
    state = ready(controller)
    rng = np.random.default_rng(0)
    depths = []
    for _ in range(12):
        told = controller.steer(state, ROW)
        depths.append(int(told.depth))
        assert int(told.size) == -1
        state = controller.observe(state, action, outcome(rng))
    assert depths == [3, 0, 0, 0] * 3


def test_cycles_are_kept_up_to_a_bound_and_learned_from_when_due():
    controller, action = rule()
    state = ready(controller)
    rng = np.random.default_rng(0)
    due = controller.learning.is_due
    for count in range(1, 13):
        state = controller.observe(state, action, outcome(rng))
        assert len(state.cycles) == min(count, CONFIG.num_cycles)
        assert due(state) == (count % 4 == 0)
        if due(state):
            before = state
            state = controller.learning.update(state)
            assert not due(state)
            assert state.cycles == before.cycles
            changed = jax.tree.map(
                lambda a, b: bool(np.any(a != b)), state.policies, before.policies
            )
            assert all(jax.tree.leaves(changed))
    assert state.num_updates == 3
    # Rows of a step count each.
    state = controller.observe(state, action, outcome(rng, rows=3))
    assert state.num_waiting == 3
    # Steps that report nothing are not heard of.
    assert controller.observe(state, action, Outcome((1,))) is state


@pytest.mark.parametrize("absurd", [float("nan"), float("inf"), 0.0])
def test_of_absurd_costs_nothing_is_learned(absurd):
    controller, action = rule()
    state = ready(controller)
    state = dataclasses.replace(state, seconds=(absurd,) * len(state.seconds))
    state = controller.observe(state, action, outcome(np.random.default_rng(0)))
    learned = controller.learning.update(state)
    leaves = jax.tree.leaves(learned.policies)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert not controller.learning.is_due(learned)


def test_a_budget_is_an_interval():
    """Of an update that takes as long as ten of the cheapest steps."""
    for budget, num_rows, wanted in ((0.1, 1, 90), (0.5, 1, 32), (0.1, 4, 360)):
        controller, _ = rule(budget)
        state = ready(controller, 0, num_rows)
        cheapest = min(state.seconds)
        assert not controller.learning.is_ready(state)
        state = controller.learning.set_cost(state, 10 * cheapest)
        assert state.interval == wanted
        assert controller.learning.is_ready(state)


def same(one, other):
    leaves = (jax.tree.leaves(vars(x)) for x in (one, other))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_saved_goes_on_bit_by_bit():
    controller, action = rule()
    state = ready(controller)
    rng = np.random.default_rng(0)
    later = [outcome(rng) for _ in range(20)]

    def go_on(state, outcomes):
        for one in outcomes:
            state = controller.observe(state, action, one)
            if controller.learning.is_due(state):
                state = controller.learning.update(state)
        return state

    state = go_on(state, later[:10])
    saved = json.loads(json.dumps(controller.pack(state)))
    again, _ = rule()
    resumed = again.resume(again.init(1), again.unpack(saved))
    same(resumed, state)
    same(go_on(resumed, later[10:]), go_on(state, later[10:]))

    # Batches of another size take other times; policies of another start are others.
    other = again.resume(again.init(2), again.unpack(saved))
    assert (other.seconds, other.interval, other.num_rows) == ((), 0, 2)
    assert other.num_updates == state.num_updates
    stranger, _ = rule(seed=7)
    same(stranger.resume(stranger.init(1), stranger.unpack(saved)), stranger.init(1))
    with pytest.raises(ConfigError, match="bytes of policies"):
        again.unpack(saved | {"policies": saved["policies"][:40]})


def test_a_session_goes_on_from_its_checkpoint(target, folders, tmp_path):
    """Learning of the draft and of policies stop and go on together."""
    head = random_head(target)
    learner = LearnerConfig("memory")

    def begin():
        return open_session(target, head, folders / "tree", learner=learner)

    rows = [{"prompt": text, "id": text} for text in PROMPTS]
    session = begin()
    session.measure_costs()
    hurry(session, 1)
    found = list(session.generate(rows[:2], NEW_TOKENS))
    assert session.chooser.state.num_updates > 0
    # Its time is learning's.
    assert sum(result.learning_seconds for result in found) > 0
    session.save(tmp_path)
    resumed = begin()
    resumed.resume(tmp_path)
    same(resumed.chooser.state, session.chooser.state)
    for one in (session, resumed):
        list(one.generate(rows[2:], NEW_TOKENS))
    same(resumed.chooser.state, session.chooser.state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"controller": "marginal"}, "teaches the policies of ltd:DIR on, and the con"),
        ({"controller": None}, "teaches the policies"),
        ({"draft": None}, "nothing is drafted"),
        ({"learn_control": 1.0}, "use a share from 0 on"),
        ({"learn_control": True}, "use a share from 0 on"),
        ({"tree": TreeConfig("dynamic", 2, 2, 4)}, "trees that they were taught on"),
        ({"tree": TreeConfig("dynamic", 3, 2, 8, sizes=(8,))}, "were taught on"),
    ],
)
def test_what_means_nothing_is_refused(target, draft, folders, given, message):
    with pytest.raises(ConfigError, match=message):
        Session(
            target,
            **{
                "draft": draft,
                "controller": f"ltd:{folders / 'tree'}",
                "learn_control": 0.1,
            }
            | given,
        )


def test_drawn_children_teach_nothing(target, draft, folders):
    tree = TreeConfig(num_steps=4, children="sampled")
    with pytest.raises(ConfigError, match="most probable children"):
        open_session(target, draft, folders / "chain", tree=tree)


def test_policies_out_of_their_element_are_warned_of(target, draft, folders, recwarn):
    chain = PolicyShape(1, 4, (1, 2, 4))
    clocks = {
        "mine": f"{device_name()}; least of 12 rounds",
        "older": "cpu; median of 12 rounds",
        "other": "An Abacus, 10 cores; median of 12 rounds",
        "flat": "flat; made up",
    }
    for name, clock in clocks.items():
        meta = PolicyMeta(clock=clock)
        save_policies(folders / name, 1, policies(3, chain), meta, None)

    def warned(name, **given):
        recwarn.clear()
        open_session(target, draft, folders / name, **{"learn_control": 0.0} | given)
        return [str(one.message) for one in recwarn]

    assert warned("mine") == warned("older") == []
    for name, taught_on in (("other", "An Abacus, 10 cores"), ("flat", "flat")):
        (message,) = warned(name)
        assert f"another clock ({taught_on}) than this machine's" in message
    # Those that learn on find out what steps take, of batches as well.
    assert warned("other", learn_control=0.1, batch_size=4) == []
    (message,) = warned("mine", batch_size=4)
    assert "one request at a time, and 4 are decoded together" in message
