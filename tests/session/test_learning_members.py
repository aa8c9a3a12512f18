# SPDX-License-Identifier: Apache-2.0
"""Members of a pool learn from what others drafted, as they would alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from drafted import head, in_turns

from ospec_jax import LearnerConfig, SamplingConfig, Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.loading import pool_draft
from ospec_jax.online.trainer import go_on_from, learn_from
from ospec_jax.reports.telemetry import Telemetry, read_rows
from ospec_jax.storage.checkpoint import CheckpointError, load, read_meta
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(4)]
WINDOWS = LearnerConfig(
    update_interval=40, batch_size=2, window=32, ring_capacity=8, num_steps=2,
    learning_rate=3e-3, memory_slots=0,
)  # fmt: skip
HEAD = LearnerConfig("head", memory_slots=0)
TREE = TreeConfig(num_steps=2)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def members(target):
    """Two families that learn, and what does not; one reads fewer taps."""
    return [
        head(target, "eagle3"),
        load_draft("ngram", target),
        head(target, "hydra"),
        head(target, "eagle3", seed=1, taps=(2,)),
    ]


def pooled(target, members, learner, controller="fixed:1", **how):
    return Session(
        target,
        pool_draft(members, target),
        learner=learner,
        tree=TREE,
        controller=controller,
        ngrams=False,
        **how,
    )


def answers(session, count=1):
    found = session.generate(PROMPTS * count, 30)
    return [r.token_ids for r in sorted(found, key=lambda r: r.prompt.id)]


def host(tree):
    return jax.tree.map(np.array, tree)


def is_same(left, right):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, left, right)))


def assert_close(left, right, atol):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def plain(target):
    return answers(Session(target), 2)


@pytest.mark.parametrize(
    ("learner", "controller", "learning", "batch_size"),
    [
        (WINDOWS.replace(members="all"), "normalhedge", (0, 2, 3), 2),
        # That output stays plain decoding's with projections that learn is held for one
        # that is swapped below, and by whoever learns with that learner alone.
        pytest.param(
            *(HEAD.replace(members="all"), in_turns, (0, 3), 2),
            marks=pytest.mark.thorough,
        ),
        # Windows of a single member are learned by the next test, and who else stands
        # beside one keeps its bits by the same code whatever it learns from.
        pytest.param(
            *(WINDOWS.replace(members="2"), in_turns, (2,), 1),
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["families", "head", "one"],
)
def test_greedy_output_is_plain_decodings_and_the_others_keep_their_bits(
    target, members, plain, learner, controller, learning, batch_size
):
    session = pooled(target, members, learner, controller, batch_size=batch_size)
    before = host((session.draft.params.items, session.served_draft.params.items))
    assert answers(session, 2) == plain
    assert session.version > 0
    assert set(session.reports[0].members) <= set(learning)
    after = session.draft.params.items, session.served_draft.params.items
    for old, new in zip(before, after, strict=True):
        for number in range(len(members)):
            assert is_same(old[number], new[number]) == (number not in learning)


# A projection is compared with what it learns alone in the next test, by the tokens
# that it gets accepted; windows are compared here.
@pytest.mark.parametrize(
    "learner",
    [WINDOWS, pytest.param(HEAD, marks=pytest.mark.thorough)],
    ids=["windows", "head"],
)
def test_it_learns_from_what_another_drafted_as_it_does_alone(target, members, learner):
    """Its states are those that it would have drafted from."""
    alone = Session(target, members[3], learner=learner, tree=TREE, ngrams=False)
    expected = answers(alone, 2)
    session = pooled(target, members, learner.replace(members="3"))
    assert answers(session, 2) == expected
    assert session.version == alone.version > 1
    ours = session.state.trainer.members[0]
    assert int(ours.num_updates) == int(alone.state.trainer.num_updates)
    # States are rounded to halves, and passes of other shapes sum in another order.
    learned, expected = session.draft.params.items[3].params, alone.draft.params
    before = members[3].draft.params["lm_head"]["kernel"]
    moved = np.abs(np.asarray(expected["lm_head"]["kernel"] - before)).max()
    assert moved > 1e-3
    assert_close(learned, expected, 0.03 * moved)


@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(
            WINDOWS.replace(learning_rate=0.03, update_interval=10),
            marks=pytest.mark.thorough,
        ),
        HEAD,
    ],
    ids=["windows", "head"],
)
def test_a_learned_member_is_swapped_wherever_it_stands(target, members, learner):
    """What it learned is what it drafts with: it gets accepted what it does alone."""
    how = dict(num_predicted_tokens=0)
    alone = Session(target, members[3], learner=learner, tree=TREE, ngrams=False, **how)
    session = pooled(target, members, learner.replace(members="3"), "fixed:3", **how)
    assert answers(session, 2) == answers(alone, 2)
    assert session.version > 0
    assert session.stats == alone.stats
    static = pooled(target, members, None, "fixed:3", **how)
    answers(static, 2)
    assert static.stats != session.stats


def test_of_the_chosen_ones_only_who_drafted_most_learns(target, members):
    session = pooled(target, members, HEAD.replace(members="chosen"), "fixed:3")
    first = host(session.draft.params.items[0])
    answers(session)
    state = session.state.trainer
    assert [int(one.num_prompts) for one in state.members] == [0, 4]
    assert {report.members for report in session.reports} == {(3,)}
    assert is_same(session.draft.params.items[0], first)
    # Who drafted most does not learn: nobody does.
    session = pooled(target, members, HEAD.replace(members="chosen"), "fixed:1")
    answers(session)
    assert (session.version, session.reports) == (0, [])
    assert int(session.state.trainer.num_prompts) == 4


@pytest.mark.parametrize(
    ("learner", "promote"),
    [
        (WINDOWS.replace(members="all", memory_slots=64), "automatic"),
        (HEAD.replace(members="0,3"), "manual"),
    ],
    ids=["windows", "head"],
)
def test_a_resumed_run_goes_on_bit_by_bit(target, members, tmp_path, learner, promote):
    how = dict(controller="normalhedge", promote=promote)
    straight = pooled(target, members, learner, **how)
    answers(straight, 2)
    first = pooled(target, members, learner, **how)
    answers(first)
    assert first.version + first.num_waiting > 0
    first.save(tmp_path)

    second = pooled(target, members, learner, **how)
    second.resume(tmp_path)
    assert second.chooser.state == first.chooser.state
    assert is_same(second.draft, first.draft)
    answers(second)
    for name in ("trainer", "draft", "waiting", "traffic"):
        mine, theirs = (getattr(one.state, name) for one in (second, straight))
        assert is_same(mine, theirs), name
    assert is_same(second.served_draft, straight.served_draft)
    assert second.chooser.state == straight.chooser.state
    assert second.version == straight.version

    # Others than they were cannot go on from there.
    others = [*members[:3], members[0]]
    with pytest.raises(CheckpointError, match="the pool's members"):
        pooled(target, others, learner, **how).resume(tmp_path)


def test_a_checkpoint_holds_those_that_learned_and_is_a_pool(target, members, tmp_path):
    named = [members[0], load_draft("ngram", target)]
    names = []
    for number, one in enumerate(named[:1]):
        session = Session(target, one, learner=HEAD)
        session.save(tmp_path / f"{number}")
        names.append(str(tmp_path / f"{number}"))
    pool = load_draft(f"pool:{names[0]}+ngram", target)
    learner = HEAD.replace(members="all")
    session = Session(target, pool, learner=learner, tree=TREE, ngrams=False)
    answers(session)
    session.save(tmp_path / "learned")
    assert set(load(tmp_path / "learned", target).draft.params) == {0}

    found = load_draft(tmp_path / "learned", target)
    assert is_same(found.draft.params, session.draft.params)
    again = Session(target, found, learner=LearnerConfig("memory"))
    again.save(tmp_path / "again")
    kept = load_draft(tmp_path / "again", target)
    assert is_same(kept.draft.params, session.draft.params)


def test_what_older_versions_stored_is_read(target, members, tmp_path):
    """Of pools whose members do not learn, and of learners that know no members."""
    session = pooled(target, members, LearnerConfig("memory", memory_slots=64))
    answers(session)
    session.save(tmp_path)
    stored = load(tmp_path, target).meta
    values = json.loads(json.dumps(dataclasses.asdict(stored)))
    del values["members"], values["learner"]["members"]
    assert read_meta(values) == dataclasses.replace(stored, learner=values["learner"])
    assert LearnerConfig.from_flat(values["learner"]) == session.learner
    other = pooled(target, members, LearnerConfig("memory", memory_slots=64))
    assert len(other.resume(tmp_path)) == 4
    # Whose members learn does not go on from where none did.
    other = pooled(target, members, HEAD.replace(members="all"))
    with pytest.raises(CheckpointError, match="was learned with"):
        other.resume(tmp_path)

    values["members"] = {"first": {}}
    with pytest.raises(ConfigError, match="no number"):
        read_meta(values)
    values["members"] = {"0": {"family": "eagle3"}}
    with pytest.raises(ConfigError, match="lacks 'vocab_size'"):
        read_meta(values)


# A member's windows are the slices of `online/test_slices.py`; how those of several are
# put together is the same code for all learners.
@pytest.mark.parametrize(
    "learner",
    [pytest.param(WINDOWS, marks=pytest.mark.thorough), HEAD],
    ids=["windows", "head"],
)
def test_slices_come_to_what_an_update_does(target, members, learner):
    session = pooled(target, members, learner.replace(members="0,3"))
    trainer, draft = session.trainer, pool_draft(members, target).draft
    found = []
    prompts = [parse_prompt({"prompt": text}, text) for text in PROMPTS]
    asked = [one for _, one in session.requests(prompts, 80, SamplingConfig())]
    completions = list(session.engine.serve(asked, lambda: session.served_draft))

    for in_slices in (False, True):
        now = go_on_from(trainer, *trainer.init(draft), draft)
        count = 0
        for completion in completions:
            if not in_slices:
                now = learn_from(trainer, now, completion)
                continue
            kept, served = host(now.draft), host(now.served)
            args = now.state, now.traffic, now.draft, completion
            state, traffic = trainer.observe(*args)
            if not trainer.is_due(state):
                now = now._replace(state=state, traffic=traffic)
                continue
            slices = trainer.update_in_slices(
                state, traffic, now.draft, now.served, completion
            )
            while True:
                try:
                    next(slices)
                except StopIteration as end:
                    updated = end.value
                    break
                count += 1
                # Until the end it has never been.
                assert is_same((now.draft, now.served), (kept, served))
            state, draft_now, served_now, report = updated
            now = now._replace(
                state=state, traffic=traffic, draft=draft_now, served=served_now,
                report=report,
            )  # fmt: skip
        assert count >= 2 * in_slices
        found.append(now)

    assert int(found[0].state.num_updates) == int(found[1].state.num_updates) > 0
    assert_close(found[0].draft, found[1].draft, 1e-4)


def test_an_update_that_is_not_finite_stops_them_all(target, members):
    learner = WINDOWS.replace(
        members="0,2", optimizer="sgd", learning_rate=1e38, update_interval=20
    )
    session = pooled(target, members, learner)
    with pytest.warns(UserWarning, match="learning has stopped.*members 0, 2"):
        answers(session, 2)
    assert session.reports[-1].decision == "stopped"
    for leaf in jax.tree.leaves(session.draft.params):
        assert np.all(np.isfinite(leaf))
    count = len(session.reports)
    answers(session)
    assert len(session.reports) == count


def test_what_is_kept_of_a_scope_goes_for_all_members(target, members):
    session = pooled(target, members, WINDOWS.replace(members="0,2"))
    answers(session)
    rings = [one.ring for one in session.state.traffic.members]
    assert len(rings) == 2
    # Each keeps what its member reads.
    widths = [ring.segments.feedback.taps.shape[-1] for ring in rings]
    assert widths[0] == len(members[0].taps) * target.config.hidden_size
    assert all(np.any(np.asarray(ring.segments.weight)) for ring in rings)
    session.drop_text([0])
    for one in session.state.traffic.members:
        assert not np.any(np.asarray(one.ring.segments.weight))


def test_telemetry_says_who_was_updated(target, members, tmp_path):
    session = pooled(target, members, WINDOWS.replace(members="0,2"))
    writer = Telemetry(tmp_path / "rows.jsonl")
    session.on_update = writer.update
    answers(session)
    writer.close()
    (row, *_) = read_rows(tmp_path / "rows.jsonl")
    assert row["members"] == [0, 2]
    assert row["step_length"] > 0


def test_who_cannot_learn_is_named(target, members):
    def refused(text, of=members, **how):
        with pytest.raises(ConfigError, match=text):
            pooled(target, of, LearnerConfig(memory_slots=0, **how), in_turns)

    suggestions = [load_draft("ngram", target), load_draft("suffix", target)]
    refused("no member .*ngram has no parameters.*suffix has", suggestions,
            name="head", members="all")  # fmt: skip
    refused("hydra, the member 2, .* no output projection", name="head", members="2")
    refused("ngram, the member 1, cannot learn", name="gradient", members="0,1")
    refused("there is no member 7; the pool's are 0 to 3", members="7")
    refused("changes no draft", name="memory", members="all")
    refused("adds no differences", name="head", members="all", delta_rank=4)
    with pytest.raises(ConfigError, match="the draft 'eagle3' has none"):
        Session(target, members[0], learner=HEAD.replace(members="all"))
    for wrong in ("some", "1,", "-1", 3, "all,1"):
        with pytest.raises(ConfigError, match="members is"):
            LearnerConfig("head", members=wrong)


def test_auto_is_what_all_that_learn_can_do(target, members):
    name = lambda spec: (
        pooled(target, members, LearnerConfig("auto", members=spec)).learner.name
    )
    assert name("0,3") == "head"
    assert name("0,2") == "gradient"
    assert name("all") == "gradient"
    # As it ever was, where nobody asks for it.
    assert pooled(target, members, LearnerConfig("auto")).learner.name == "memory"


def test_a_budget_is_that_of_all(target, members):
    learner = WINDOWS.replace(update_interval=None, budget=0.06)
    session = pooled(target, members, learner.replace(members="0,2,3"))
    assert session.learner.budget == 0.06
    answers(session)
    assert all(int(one.update_interval) > 0 for one in session.state.trainer.members)
