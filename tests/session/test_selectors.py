# SPDX-License-Identifier: Apache-2.0
"""Whoever selects among drafters, and from whatever: output is the target's."""

import dataclasses
import itertools

import numpy as np
import pytest
from drafted import head
from reference import forward

from ospec_jax import LearnerConfig, SamplingConfig, Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.control import selection
from ospec_jax.control.base import Controller
from ospec_jax.control.selectors import BANDITS, JUDGING, build_selector
from ospec_jax.decoding.request import Request
from ospec_jax.loading import pool_draft
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

LIMIT = 3.3
"""Standard deviations; chance alone leaves them once in 1,000 times."""
NAMES = (*JUDGING, *BANDITS, "normalhedge:sample", "fixed:1", "ucb:request")
KEYED = (
    "normalhedge:opening",
    "share:scope:sample",
    "leader:domain",
    "normalhedge:similar",
    "hedge:scope:seldom",
)


@pytest.fixture(scope="module")
def target():
    return tiny_target(16)


@pytest.fixture(scope="module")
def pool(target):
    members = [head(target, "eagle3"), load_draft("ngram", target)]
    return pool_draft(members, target)


def session_of(target, pool, name, **how):
    how = dict(tree=TreeConfig(num_steps=2)) | how
    return Session(target, pool, controller=name, **how)


def requests(num_tokens=30, sampling=SamplingConfig(), count=3, **how):
    ids = np.random.default_rng(0).integers(3, 16, (count, 6)).tolist()
    return [
        Request(str(i), tuple(some), num_tokens, sampling, **how)
        for i, some in enumerate(ids)
    ]


def serve(session, asked, batch_size=1, ordinals=None):
    serving = session.engine.serve(
        asked,
        lambda: session.served_draft,
        batch_size,
        chooser=session.chooser,
        ordinals=ordinals,
    )
    return {done.request.id: done.token_ids for done in serving}


@pytest.mark.parametrize("name", [*NAMES, *KEYED])
def test_greedy_tokens_are_plain_decodings(target, pool, name):
    plain = serve(Session(target), requests())
    for batch_size in (1, 2):
        session = session_of(target, pool, name, batch_size=batch_size)
        assert serve(session, requests(), batch_size) == plain
        if name in JUDGING:
            assert session.chooser.state.num_windows >= 10
        if name in KEYED:
            assert session.chooser.state.shared.num_windows >= 10


def test_who_looks_seldom_has_one_answer_in_some_judged(monkeypatch):
    """Once enough is known; the chosen draft alone reads the others' prompts."""
    monkeypatch.setattr(selection, "SETTLED", 20)
    monkeypatch.setattr(selection, "ONE_IN", 4)
    target = tiny_target()
    pool = pool_draft([head(target, "eagle3"), load_draft("ngram", target)], target)
    session = session_of(target, pool, "normalhedge:domain:seldom")
    session.warm_up()
    compiled = count_programs(session.engine)
    known = []
    lengths = []
    asked = requests(count=16, domain="one")
    asked[9] = dataclasses.replace(asked[9], domain="another")
    for ordinal, one in enumerate(asked):
        answer = serve(session, [one], ordinals=iter([ordinal]))
        lengths += map(len, answer.values())
        known.append(session.chooser.state.shared.num_windows)

    grown = np.diff([0, *known]) > 0
    begin = int(np.argmax(np.asarray(known) >= 20)) + 1
    assert 1 <= begin <= 4
    # A kind of which nothing is known is looked at.
    is_judged = [i < begin or i % 4 == 0 or i == 9 for i in range(16)]
    # Shorter ones complete no window.
    expected = [is_judged[i] and lengths[i] > 2 for i in range(16)]
    assert grown.tolist() == expected
    assert sum(expected[begin:]) >= 3
    assert count_programs(session.engine) == compiled


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_rests_beside_others_gets_the_same_tokens(target, temperature):
    """Whoever drafts when; the draft that alone has read a row stays while it runs."""
    members = [head(target, "eagle3", seed) for seed in (0, 1)]
    pool = pool_draft([*members, load_draft("ngram", target)], target)
    steps = []

    def turning(actions):
        by_number = [action for action in actions if action.drafter >= 0]
        choices = itertools.cycle(by_number)
        return Controller(
            actions=tuple(by_number),
            init=lambda num_rows: None,
            choose=lambda state, rows: next(choices),
            observe=lambda state, action, outcome: steps.append(
                (action.drafter, {context.domain for context, _ in outcome.parts})
            ),
            is_judging=True,
            rests=lambda state, context, ordinal: context.domain == "rests",
        )

    sampling = SamplingConfig(temperature=temperature, seed=4)
    asked = [
        dataclasses.replace(one, domain="rests" if i % 3 == 0 else "", seed=i)
        for i, one in enumerate(requests(30, sampling, count=6))
    ]
    plain = serve(Session(target), asked)
    for batch_size in (1, 2):
        steps.clear()
        session = session_of(target, pool, turning, batch_size=batch_size)
        assert serve(session, asked, batch_size) == plain
        assert {number for number, _ in steps} == {0, 1, 2}
        if batch_size == 1:
            alone = [number for number, domains in steps if "rests" in domains]
            changes = np.count_nonzero(np.diff(alone))
            # Two of the answers rest, each with one draft.
            assert len(alone) > 4
            assert changes <= 1


def count_programs(engine):
    """Of passes over prompts and of steps."""
    passes = {*engine._prefills.values(), *engine._prefills_alone.values()}
    return sum(one._cache_size() for one in (*passes, *engine._steps.values()))


@pytest.mark.parametrize("clash", ["request", "sample", "similar"])
def test_who_chooses_by_each_answer_cannot_look_seldom(target, pool, clash):
    with pytest.raises(ConfigError, match=f"'{clash}' chooses by what an answer"):
        session_of(target, pool, f"share:seldom:{clash}")


def test_who_judges_nobody_or_each_step_cannot_look_seldom(target, pool):
    def rule(actions):
        return build_selector("ucb", actions)._replace(rests=lambda *args: True)

    with pytest.raises(ConfigError, match="is_judging is False"):
        session_of(target, pool, rule)
    with pytest.raises(ConfigError, match="judge_every is 1"):
        session_of(target, pool, "share:seldom", judge_every=1)


def test_what_is_kept_of_requests_of_one_kind_goes_with_their_scope(
    target, pool, tmp_path
):
    how = dict(learner=LearnerConfig(name="memory", memory_slots=64))
    session = session_of(target, pool, "normalhedge:scope", batch_size=2, **how)
    numbers = [session.enroll(name).number for name in ("ada", "bob")]
    asked = [
        dataclasses.replace(one, id=f"{number}-{one.id}", scope=number)
        for number in numbers
        for one in requests(12, count=2)
    ]
    serve(session, asked, 2)
    keys = [f"scope {number}" for number in numbers]
    assert sorted(session.chooser.state.keys) == sorted(keys)
    own = sum(one.num_windows for one in session.chooser.state.own)
    assert own == session.chooser.state.shared.num_windows > 0

    session.save(tmp_path)
    other = session_of(target, pool, "normalhedge:scope", batch_size=2, **how)
    other.resume(tmp_path)
    assert other.chooser.state == session.chooser.state
    other.forget_traffic("ada")
    assert other.chooser.state.keys == (keys[1],)
    other.forget_traffic()
    assert other.chooser.state.keys == ()


def test_requests_are_known_by_what_the_target_makes_of_their_prompts(tmp_path):
    """The mean of its final states, over all chunks; of its scope, and kept."""
    target = tiny_target()
    pool = pool_draft([head(target, "eagle3"), load_draft("ngram", target)], target)
    how = dict(learner=LearnerConfig(name="memory", memory_slots=64))
    session = session_of(target, pool, "share:similar", **how)
    numbers = [session.enroll(name).number for name in ("ada", "bob")]
    long = np.random.default_rng(1).integers(3, 250, (4, 100)).tolist()
    asked = [
        Request(f"{i}", tuple(ids), 20, SamplingConfig(), scope=numbers[i % 2])
        for i, ids in enumerate(long)
    ]
    answers = serve(session, asked)
    # Of an answer that ends at once nothing is learned, so it has no vote.
    heard = [one for one in asked if len(answers[one.id]) > 8]
    assert {one.scope for one in heard} == set(numbers)
    keys = session.chooser.state.keys
    vectors = {}
    for key in keys:
        kind, scope, text = key.split(" ")
        assert kind == "similar"
        vectors[int(scope), text] = np.frombuffer(bytes.fromhex(text), "<f2")

    for one in heard:
        layers = (target.config.num_layers,)
        states = forward(target.params, target.config, one.prompt_ids, layers)[1]
        mean = states.mean(axis=0)
        expected = mean / np.linalg.norm(mean)
        own = [x for (scope, _), x in vectors.items() if scope == one.scope]
        assert min(np.abs(vector - expected).max() for vector in own) < 2e-3

    session.save(tmp_path)
    other = session_of(target, pool, "share:similar", **how)
    other.resume(tmp_path)
    assert other.chooser.state == session.chooser.state
    other.forget_traffic("ada")
    left = tuple(k for k in keys if k.startswith(f"similar {numbers[1]} "))
    assert other.chooser.state.keys == left != keys
    # Nothing of it is computed where nobody asks.
    plain = session_of(target, pool, "share:opening")
    _, output = plain.engine.prefill(plain.served_draft, asked[0], 256)
    assert output.prompt_states is None


@pytest.mark.parametrize("dear", [0.0, 9.0], ids=["cheap", "dear"])
def test_drafter_and_depth_are_chosen_at_once(target, pool, dear):
    plain = serve(Session(target), requests())
    session = session_of(target, pool, "joint", tree=TreeConfig.auto((0, 1, 3)))
    actions = session.chooser.controller.actions
    kinds = {(action.drafter, action.tree.num_steps) for action in actions}
    assert kinds == {(drafter, depth) for drafter in (0, 1) for depth in (0, 1, 3)}
    # Depth is all that costs.
    session.chooser.set_costs([1.0 + dear * a.tree.num_steps for a in actions])
    assert serve(session, requests()) == plain
    state = session.chooser.state
    assert state.num_windows >= 10
    chosen = actions[int(np.argmax(state.weights))]
    assert chosen.tree.num_steps == (0 if dear else 3)


def test_with_one_draft_the_depth_is_chosen(target):
    session = Session(target, head(target, "eagle3"), controller="joint")
    depths = [action.tree.num_steps for action in session.chooser.controller.actions]
    assert depths == list(TreeConfig.auto().depths)
    assert session.chooser.controller.set_costs is not None


@pytest.mark.parametrize(
    "tree",
    [
        TreeConfig("dynamic", 2, topk=2, num_draft_tokens=4),
        pytest.param(
            TreeConfig("static", 2, branching=(3, 1)), marks=pytest.mark.thorough
        ),
    ],
    ids=["dynamic", "static"],
)
def test_trees_are_chosen_among_too(target, tree):
    members = [head(target, "eagle3", seed) for seed in (0, 1)]
    drafted = pool_draft(members, target)
    session = session_of(target, drafted, "normalhedge", tree=tree)
    assert serve(session, requests()) == serve(Session(target), requests())
    state = session.chooser.state
    # Both are worth at least a token, and at most what the tree may yield.
    assert all(1 < v / state.num_windows < 3 for v in state.values)


def likeliest(target, ids, top_k):
    """The tokens that top-k sampling may choose next, and their probabilities."""
    logits = forward(target.params, target.config, ids)[0][-1]
    tokens = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp(logits[tokens] - logits[tokens[0]])
    return tokens.tolist(), weights / weights.sum()


def law_of_answers(target, ids, length):
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*path, token): chance * p
            for path, chance in law.items()
            for token, p in zip(*likeliest(target, [*ids, *path], 2), strict=True)
        }
    return law


@pytest.mark.parametrize(
    ("name", "children", "judge_every"),
    [
        pytest.param("normalhedge:sample", "topk", 2, marks=pytest.mark.thorough),
        ("leader", "sampled", 1),
        pytest.param("exp3", "topk", 1, marks=pytest.mark.thorough),
    ],
)
def test_sampled_answers_keep_their_law(target, pool, name, children, judge_every):
    """Who drafts the last tokens depends on what the first ones were."""
    tree = TreeConfig(num_steps=1, children=children)
    members = [head(target, "eagle3", seed) for seed in (0, 1)]
    drafted = pool if children == "topk" else pool_draft(members, target)
    how = dict(tree=tree, num_predicted_tokens=0, judge_every=judge_every)
    session = session_of(target, drafted, name, **how)
    sampling = SamplingConfig(temperature=1.0, top_k=2)
    [asked] = requests(4, sampling, count=1)
    law = law_of_answers(target, asked.prompt_ids, 4)
    counts = dict.fromkeys(law, 0)
    ordinals = itertools.count()
    num_runs = 300
    begun = session.chooser.state
    # What draws are numbered by: evidence, or for bandits steps.
    seed_of = "num_steps" if name == "exp3" else "num_windows"
    taken = set()

    for run in range(num_runs):
        # Each answer is chosen for from the beginning, with draws of its own.
        again = {seed_of: 10 * run}
        session.chooser.state = dataclasses.replace(begun, **again)
        path = tuple(serve(session, [asked], ordinals=ordinals)["0"])
        # Stop tokens end an answer early.
        for whole in law:
            if whole[: len(path)] == path:
                counts[whole] += law[whole] / sum(
                    law[w] for w in law if w[: len(path)] == path
                )
        taken.add(session.chooser.state.last)

    assert taken == {0, 1}
    for path, chance in law.items():
        deviation = np.sqrt(num_runs * chance * (1 - chance))
        assert abs(counts[path] - num_runs * chance) < LIMIT * max(deviation, 1), path


def test_answers_whose_numbers_come_again_teach_nothing(target, pool, monkeypatch):
    """Where children are drawn: else answers depend on no draft."""
    session = session_of(target, pool, "normalhedge", batch_size=2)
    before = session.chooser.state
    sampling = SamplingConfig(temperature=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(session.engine), "is_drawn", True)
        serve(session, requests(12, sampling, seed=7), 2)
        assert session.chooser.state == before
    serve(session, requests(12, sampling, seed=7), 2)
    assert session.chooser.state.num_windows > 0


@pytest.mark.parametrize("name", ["normalhedge:sample", "normalhedge:domain:seldom"])
def test_a_checkpoint_keeps_what_was_learned_of_drafters(name, tmp_path, monkeypatch):
    # So that most of the answers behind the checkpoint are judged by nobody.
    monkeypatch.setattr(selection, "SETTLED", 10)
    monkeypatch.setattr(selection, "ONE_IN", 3)
    target = tiny_target()
    pool = pool_draft([head(target, "eagle3"), load_draft("ngram", target)], target)
    memory = LearnerConfig(name="memory", memory_slots=64)
    how = dict(learner=memory, ngrams=False)
    prompts = ["Who?", "What is it?", "Where are they now?", "When?", "Why?", "How?"]
    whole = session_of(target, pool, name, **how)
    answers = [r.token_ids for r in whole.generate(prompts, 20)]

    first = session_of(target, pool, name, **how)
    begun = [r.token_ids for r in first.generate(prompts[:2], 20)]
    first.save(tmp_path)
    known = num_windows(first)
    assert known > 0
    second = session_of(target, pool, name, **how)
    second.resume(tmp_path)
    assert second.chooser.state == first.chooser.state
    rest = []
    grown = []
    for prompt in prompts[2:]:
        rest += [r.token_ids for r in second.generate([prompt], 20)]
        grown.append(num_windows(second) > known)
        known = num_windows(second)
    assert begun + rest == answers
    assert second.chooser.state == whole.chooser.state
    # Every third answer is judged, by its number among all that were ever asked.
    assert grown == ([False, True, False, False] if "seldom" in name else [True] * 4)

    other = session_of(target, pool, "ucb", **how)
    fresh = other.chooser.state
    other.resume(tmp_path)
    assert other.chooser.state == fresh


def num_windows(session):
    """Of which it was seen what each draft would have had accepted."""
    state = session.chooser.state
    return getattr(state, "shared", state).num_windows


def test_time_is_measured_before_serving():
    target = tiny_target()
    pool = pool_draft([head(target, "eagle3"), load_draft("ngram", target)], target)
    session = session_of(target, pool, "normalhedge:time")
    assert not session.chooser.has_costs
    list(session.generate(["Who?"], 8))
    costs = session.chooser.state.costs
    assert len(costs) == 2
    assert all(0 < cost < 10 for cost in costs)
    assert dataclasses.asdict(session.chooser.state)["num_windows"] > 0
