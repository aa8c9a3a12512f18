# SPDX-License-Identifier: Apache-2.0
"""What one tenant wrote is suggested to no other, nor learned from against its will."""

import dataclasses

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.learners import deltas
from ospec_jax.online.scopes import MAX_SCOPES
from ospec_jax.session.arguments import as_prompts
from ospec_jax.session.live import Live
from ospec_jax.storage import checkpoint
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

SECRET = "The vault opens with 7-19-42-heron."
NEW_TOKENS = 24
LEARNER = LearnerConfig(
    "gradient", update_every_prompts=1, batch_size=2, ring_capacity=8
)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    (result,) = Session(target).generate([SECRET], NEW_TOKENS)
    return result.token_ids


def session_of(target, draft="ngram", **values):
    usual = dict(learner=LearnerConfig(), tree=TreeConfig(num_steps=2), batch_size=4)
    values = usual | values
    return Session(target, draft, **values)


def ask(session, *scopes, text=SECRET, learns=True, is_shared=True):
    """Answers one text to several scopes at once: how many tokens were accepted."""
    live = Live(session, (256,))
    pairs = session.requests(as_prompts([text] * len(scopes)), 24, SamplingConfig())
    order = {}
    for scope, (prompt, request) in zip(scopes, pairs, strict=True):
        busy = {one.scope for one, _ in order.values()}
        number = session.enroll(scope, busy).number
        request = dataclasses.replace(request, scope=number)
        order[id(request)] = request, prompt
        live.join(request)

    found = {}
    while len(found) < len(scopes):
        for done in live.turn():
            text = session.text_of(done)
            prompt = order[id(done.request)][1]
            session.take_in(prompt, done, text, learns, is_shared)
            found[id(done.request)] = done

    done = [found[key] for key in order]
    return [d.stats.num_accepted_tokens for d in done], [d.token_ids for d in done]


def accepted(session, *scopes, **values):
    return ask(session, *scopes, **values)[0]


@pytest.mark.parametrize(
    "name", [pytest.param("ngram", marks=pytest.mark.thorough), "suffix"]
)
def test_a_planted_secret_is_suggested_to_nobody_else(target, plain, name):
    (fresh,) = accepted(session_of(target, name), "bob")
    session = session_of(target, name)
    for _ in range(3):
        assert ask(session, "ada", is_shared=False)[1] == [plain]

    # All at once, in rows of one batch. Were it not for scopes, all would be Ada's.
    scopes = ("bob", "ada", "", "ada/x", "ada")
    scopes, last = scopes[:4], scopes[4:]
    counts, tokens = ask(session, *scopes, learns=False)
    assert tokens == [plain] * 4
    assert counts[0] == counts[2] == counts[3] == fresh
    assert counts[1] > fresh + NEW_TOKENS // 3
    assert accepted(session, *last, learns=False)[0] == counts[1]


def test_a_lent_memory_suggests_to_its_scope_alone(target, draft, plain):
    """Beside a draft with layers, whose tokens it takes the places of."""
    (fresh,) = accepted(session_of(target, draft, learner=LEARNER), "bob")
    session = session_of(target, draft, learner=LEARNER)
    for _ in range(3):
        accepted(session, "ada", is_shared=False)

    counts, tokens = ask(session, "bob", "ada", learns=False)
    assert tokens == [plain] * 2
    assert counts[0] == fresh < counts[1]


@pytest.mark.parametrize("name", ["gradient", "head"])
def test_what_is_not_shared_does_not_move_the_draft(target, draft, name):
    learner = LEARNER if name == "gradient" else LearnerConfig(name)
    session = session_of(target, draft, learner=learner)
    state = lambda: jax.device_get((session.draft, session.state.trainer))
    before = state()
    for _ in range(2):
        accepted(session, "ada", is_shared=False)

    assert jax.tree.all(jax.tree.map(np.array_equal, before, state()))
    assert int(session.memory.counts.sum()) > 0
    assert session.version == 0
    assert not session.scopes.find("ada").has_taught
    accepted(session, "bob")
    assert session.version == 1
    assert session.scopes.find("bob").has_taught
    assert not session.scopes.find("ada").has_taught
    if name == "gradient":
        owners = session.state.traffic.ring.owners
        assert set(np.unique(owners)) == {0, session.scopes.find("bob").number}


def test_scopes_are_told_apart_after_a_resume(target, plain, tmp_path):
    (fresh,) = accepted(session_of(target), "bob")
    first = session_of(target)
    for _ in range(3):
        accepted(first, "ada/x", is_shared=False)
    first.save(tmp_path)

    resumed = session_of(target)
    resumed.resume(tmp_path)
    assert resumed.scopes == first.scopes
    # Numbers are asked for in another order now.
    counts, tokens = ask(resumed, "bob", "ada/x", learns=False)
    assert tokens == [plain] * 2
    assert counts[0] == fresh < counts[1]


def test_names_are_stored_with_the_traffic_alone(target, draft, tmp_path):
    session = session_of(target, draft, learner=LearnerConfig("head"))
    accepted(session, "ada/secret-project")
    names = lambda folder: [
        path
        for path in folder.rglob("*")
        if path.is_file() and b"secret-project" in path.read_bytes()
    ]
    session.save(tmp_path / "without", with_feedback=False)
    session.save(tmp_path / "with")
    assert checkpoint.load(tmp_path / "without").scopes == ()
    assert names(tmp_path / "with")
    assert not names(tmp_path / "without")
    resumed = session_of(target, draft, learner=LearnerConfig("head"))
    resumed.resume(tmp_path / "with")
    assert resumed.scopes.find("ada/secret-project").has_taught


def test_a_scope_is_forgotten_with_its_tenants(target, draft):
    session = session_of(target, draft, learner=LEARNER)
    for scope in ("ada", "ada/x", "bob", "adalbert"):
        accepted(session, scope)

    numbers = {one.name: one.number for one in session.scopes.known}
    gone = session.forget_traffic("ada")
    assert [one.name for one in gone] == ["ada", "ada/x"]
    assert all(one.has_taught for one in gone)
    kept = {numbers["bob"], numbers["adalbert"]}
    assert set(np.unique(session.memory.owners)) == {0, *kept}
    assert set(np.unique(session.state.traffic.ring.owners)) == {0, *kept}
    assert session.served_draft.memory is session.state.traffic.memory
    assert session.forget_traffic("nobody-knows") == ()


def test_a_number_is_used_again_without_its_text(target):
    (fresh,) = accepted(session_of(target), "bob")
    session = session_of(target)
    for _ in range(3):
        accepted(session, "ada", is_shared=False)

    number = session.scopes.find("ada").number
    for i in range(MAX_SCOPES - 1):
        assert session.enroll(f"tenant-{i}").dropped is None
    assert session.enroll("bob").dropped.name == "ada"
    assert session.scopes.find("bob").number == number
    assert accepted(session, "bob", learns=False) == [fresh]


OWN = LearnerConfig("memory", delta_rank=4, memory_slots=0)


@pytest.fixture
def few_inputs(monkeypatch):
    """Directions are there after the first answer."""
    monkeypatch.setattr(deltas, "_NUM_SEEN", 8)


def taught(target, draft, num_answers=6, learner=OWN):
    """A session in which Ada has asked the same question, and shares nothing."""
    session = session_of(target, draft, learner=learner, ngrams=False)
    for _ in range(num_answers):
        accepted(session, "ada", is_shared=False)
    return session


@pytest.mark.parametrize("name", ["memory", "head"])
def test_a_scopes_draft_is_its_own(target, draft, plain, few_inputs, name):
    learner = LearnerConfig(name, delta_rank=4, memory_slots=0)
    static = session_of(target, draft, learner=None, ngrams=False)
    (fresh,) = accepted(static, "")
    session = taught(target, draft, learner=learner)
    served = session.served_draft
    assert served.deltas is session.state.traffic.deltas
    for a, b in zip(
        jax.tree.leaves(session.draft), jax.tree.leaves(draft.draft), strict=True
    ):
        np.testing.assert_array_equal(a, b)

    # All at once, in rows of one batch.
    counts, tokens = ask(session, "bob", "ada", "", "ada/x", learns=False)
    assert tokens == [plain] * 4
    assert counts[0] == counts[2] == counts[3] == fresh
    assert counts[1] > fresh + 2
    assert session.version == 0
    assert not session.scopes.find("ada").has_taught


def test_a_scopes_draft_is_kept_and_forgotten(target, draft, few_inputs, tmp_path):
    session = taught(target, draft)
    (own,) = accepted(session, "ada", learns=False)
    session.save(tmp_path / "with")
    session.save(tmp_path / "without", with_feedback=False)

    resumed = session_of(target, draft, learner=OWN, ngrams=False)
    resumed.resume(tmp_path / "with")
    fresh, again = accepted(resumed, "bob", "ada", learns=False)
    assert again == own > fresh
    # Going on, both learn the same.
    for one in (session, resumed):
        accepted(one, "ada", is_shared=False)
    states = jax.device_get([one.state.traffic for one in (session, resumed)])
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))

    blank = session_of(target, draft, learner=OWN, ngrams=False)
    with pytest.warns(UserWarning, match="holds no feedback"):
        blank.resume(tmp_path / "without")
    assert accepted(blank, "ada", learns=False) == [fresh]

    resumed.forget_traffic("ada")
    assert not any(x.any() for x in jax.tree.leaves(resumed.state.traffic.deltas))
    assert accepted(resumed, "ada", learns=False) == [fresh]
    # They are differences to a draft that is no more served then.
    session.begin_again(session.draft)
    assert accepted(session, "ada", learns=False) == [fresh]


def test_a_tenants_number_is_used_again_without_its_draft(target, draft, few_inputs):
    session = taught(target, draft)
    number = session.scopes.find("ada").number
    for i in range(MAX_SCOPES - 1):
        session.enroll(f"tenant-{i}")
    session.enroll("bob")
    assert session.scopes.find("bob").number == number
    assert number not in np.asarray(session.state.traffic.deltas.owners)


def test_sampled_answers_teach_a_scopes_draft(target, draft, few_inputs):
    session = session_of(target, draft, learner=OWN, ngrams=False)
    session.warm_up()
    live = Live(session, (256,))
    for turn, sampling in enumerate(
        (
            SamplingConfig(1.0),
            SamplingConfig(0.7, top_p=0.9),
            SamplingConfig(1.0, frequency_penalty=0.5),
        )
    ):
        prompts = as_prompts([SECRET])
        ((prompt, request),) = session.requests(prompts, 24, sampling)
        scope = session.enroll("ada").number
        live.join(dataclasses.replace(request, scope=scope))
        done = []
        while not done:
            done = live.turn()
        before = np.asarray(session.state.traffic.deltas.energy)
        session.take_in(prompt, done[0], "", True, False)
        after = np.asarray(session.state.traffic.deltas.energy)
        # Adjusted logits follow another law than the target's own.
        assert (after > before).any() == (turn < 2)


def test_differences_are_refused_where_nobody_adds_them(target, draft):
    with pytest.raises(ConfigError, match="adds no differences"):
        session_of(target, "ngram", learner=OWN)
    with pytest.raises(ConfigError, match="use --learner head, preference or memory"):
        session_of(target, draft, learner=LEARNER.replace(delta_rank=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"tree": TreeConfig.auto((0, 1, 3))},
        pytest.param(
            {"tree": TreeConfig("dynamic", 3, topk=4, num_draft_tokens=8)},
            marks=pytest.mark.thorough,
        ),
        # Its steps are those of a tree that `control/test_steered.py` drafts with.
        pytest.param({"controller": "marginal"}, marks=pytest.mark.thorough),
    ],
    ids=["auto", "dynamic", "marginal"],
)
def test_own_drafts_change_no_answer_whatever_is_drafted(
    target, draft, plain, few_inputs, changes
):
    """Also where the draft rests in plain steps, and catches up from its backlog."""
    learner = LearnerConfig("head", delta_rank=4)
    session = session_of(target, draft, learner=learner, **changes)
    session.warm_up()
    for turn in range(4):
        _, tokens = ask(session, "ada", "bob", "", is_shared=turn % 2 == 0)
        assert tokens == [plain] * 3
    assert np.asarray(session.served_draft.deltas.owners).any()


def test_who_teaches_nothing_takes_nobodys_place(target, draft, few_inputs):
    session = taught(target, draft, num_answers=1)
    owners = np.asarray(session.state.traffic.deltas.owners)
    live = Live(session, (256,))
    sampling = SamplingConfig(frequency_penalty=0.5)
    ((prompt, request),) = session.requests(as_prompts([SECRET]), 24, sampling)
    live.join(dataclasses.replace(request, scope=session.enroll("bob").number))
    done = []
    while not done:
        done = live.turn()
    session.take_in(prompt, done[0], "", True, False)
    assert np.array_equal(owners, session.state.traffic.deltas.owners)
