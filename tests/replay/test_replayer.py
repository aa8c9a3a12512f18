# SPDX-License-Identifier: Apache-2.0
"""A replay finds what the engine finds, and learns what a session learns."""

import dataclasses

import jax
import numpy as np
import pytest

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError
from ospec_jax.data.known import content_hash
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.config import build_learner
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.online import promotion
from ospec_jax.replay.hindsight import best_per_chunk_in_hindsight, dynamic_regret_proxy
from ospec_jax.replay.record import open_recording, read_meta, record
from ospec_jax.replay.replayer import DEFAULT_INTERVAL, Replayer
from ospec_jax.replay.results import stream_key
from ospec_jax.replay.score import walk
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

NEW_TOKENS, STEPS = 24, 3
LEARNER = LearnerConfig(
    memory_slots=0, update_interval=40, batch_size=4, window=32, ring_capacity=8,
    learning_rate=1e-2, num_epochs=3, replay_share=0.5,
)  # fmt: skip


def prompt(i):
    text = f"What is {i % 4} plus {i % 4}, and why is {'it ' * (i % 4)}so?"
    return parse_prompt({"prompt": text, "id": f"p{i}", "domain": "ab"[i % 2]}, "")


PROMPTS = [prompt(i) for i in range(24)]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    args = {"max_new_tokens": NEW_TOKENS, "batch_size": 4}
    assert record(target, PROMPTS[:7], folder, (1, 2), **args) == 7
    assert record(target, PROMPTS, folder, (1, 2), **args) == 17
    return folder


def make_draft(target, family="eagle3"):
    config = tiny_draft_config(target.config, 200, family)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config, family))


@pytest.fixture(scope="module")
def draft(target):
    return make_draft(target)


def serve(target, draft, learner):
    session = Session(
        target, draft, learner=learner, tree=TreeConfig(num_steps=STEPS), ngrams=False
    )
    return session, list(session.generate(PROMPTS, NEW_TOKENS))


def histograms(answers):
    """Steps by accepted tokens; a session has room for longer chains, never drafted."""
    for answer in answers:
        assert not any(answer.stats.acceptance_histogram[STEPS + 1 :])
    return [answer.stats.acceptance_histogram[: STEPS + 1] for answer in answers]


@pytest.mark.parametrize(
    ("family", "promoted"),
    [
        ("eagle3", "guarded"),
        pytest.param("eagle3", "always", marks=pytest.mark.thorough),
        pytest.param("hydra", "guarded", marks=pytest.mark.thorough),
        pytest.param("dflash", "always", marks=pytest.mark.thorough),
        # Drafts in one pass as dflash does, with layers as eagle3 has.
        pytest.param("peagle", "always", marks=pytest.mark.thorough),
    ],
)
def test_replay_equals_the_engine(target, folder, family, promoted, monkeypatch):
    """Per request and step; learner and served draft at the end, too."""
    # Random models hardly gain anything: half of what there is to gain is a gift.
    gain_of = promotion.gain_of
    monkeypatch.setattr(promotion, "gain_of", lambda *args: 0.5 + 0.5 * gain_of(*args))
    draft = make_draft(target, family)
    config = dataclasses.replace(LEARNER, promotion=promoted, promotion_level=0.9)
    session, results = serve(target, draft, config)
    replayer = Replayer(target, draft, folder, STEPS)
    run = replayer.run(config)
    assert [a.id for a in run.answers] == [r.prompt.id for r in results]
    assert histograms(run.answers) == histograms(results)
    assert sum(sum(h[1:]) for h in histograms(run.answers)) > 10
    assert run.answers[-1].version > 0
    assert [a.version for a in run.answers] == [r.version for r in results]
    assert [r.decision for r in run.reports] == [r.decision for r in session.reports]
    assert len(run.reports) > 5
    # The logsumexp that a session records is summed in passes of other shapes, which
    # may round its last bit otherwise; all else that learning reads is the same.
    for found, expected in zip(
        jax.tree.leaves((run.state, run.draft.params)),
        jax.tree.leaves((session.state.trainer, session.draft.params)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["head", pytest.param("preference", marks=pytest.mark.thorough)]
)
def test_replaying_the_last_layers_learner_equals_the_engine(
    target, folder, draft, name
):
    """Its states are those of the chains that the engine would have drafted."""
    config = LearnerConfig(name=name, memory_slots=0)
    session, results = serve(target, draft, config)
    run = Replayer(target, draft, folder, STEPS).run(config)
    assert histograms(run.answers) == histograms(results)
    assert [a.version for a in run.answers] == [r.version for r in results]
    infos = [[report.info for report in x.reports] for x in (run, session)]
    assert [i.num_samples for i in infos[0]] == [i.num_samples for i in infos[1]]
    assert sum(i.num_samples for i in infos[0]) > 200
    found, expected = (
        np.asarray(draft.params["lm_head"]["kernel"])
        for draft in (run.draft, session.draft)
    )
    before = np.asarray(draft.draft.params["lm_head"]["kernel"])
    assert np.abs(found - expected).max() < 0.01 * np.abs(found - before).max()


def test_a_static_draft_is_replayed_in_batches(target, folder, draft):
    _, results = serve(target, draft, None)
    run = Replayer(target, draft, folder, STEPS).run(None)
    assert histograms(run.answers) == histograms(results)
    assert not run.reports
    assert run.draft is draft.draft


def test_another_order_and_a_subset(target, folder, draft):
    whole = Replayer(target, draft, folder, STEPS, has_losses=True).run(None)
    ids = [p.id for p in PROMPTS[::-3]]
    some = Replayer(target, draft, folder, STEPS, ids, has_losses=True).run(None)
    assert [a.id for a in some.answers] == ids
    of = {a.id: a for a in whole.answers}
    for answer in some.answers:
        assert answer.stats == of[answer.id].stats
        assert answer.loss == pytest.approx(of[answer.id].loss, rel=1e-4)


def test_losses_are_those_of_forward_kl(target, folder, draft):
    """Scored whole, an answer's loss is that of one window over its pairs."""
    replayer = Replayer(target, draft, folder, STEPS, has_losses=True)
    run = replayer.run(None)
    learner = dataclasses.replace(LEARNER, loss="forward_kl")
    evaluate = jax.jit(build_learner(learner, replayer.drafter.unroll).evaluate)
    for entry, answer in list(zip(replayer.order, run.answers, strict=True))[:4]:
        e = replayer.store.entries[entry]
        segments = replayer.store.segments(
            [(entry, e.num_prompt - 1)], LEARNER.num_context, LEARNER.window, STEPS
        )
        info, _ = evaluate(
            draft.draft.params, segments, replayer.shared, draft.draft.token_ids
        )
        assert answer.loss == pytest.approx(float(info.loss), rel=1e-3)


def test_walk_takes_the_engines_steps():
    # Root 0 gets 2 accepted, root 3 none, root 4 two, of which the answer ends one.
    stats = walk([2, 9, 9, 0, 2, 9, 9], num_tokens=7, num_steps=3)
    assert stats.acceptance_histogram == [1, 0, 2, 0]
    assert (stats.num_drafts, stats.num_draft_tokens) == (3, 9)
    assert walk([], num_tokens=1, num_steps=3).num_drafts == 0


def test_stopping_keeps_what_was_replayed(target, folder, draft):
    answers = []
    run = Replayer(target, draft, folder, STEPS).run(
        LEARNER, answers.append, should_stop=lambda: len(answers) >= 5
    )
    assert 5 <= len(run.answers) < len(PROMPTS)
    assert run.answers == answers


def test_a_recording_keeps_the_streams_order(target, folder):
    store, order = open_recording(folder, target, (1, 2))
    assert [store.entries[i].id for i in order] == [p.id for p in PROMPTS]
    assert read_meta(folder).max_new_tokens == NEW_TOKENS


def test_what_does_not_fit_is_refused(target, folder, draft, tmp_path):
    with pytest.raises(ConfigError, match="max_new_tokens 24, not 25"):
        record(target, PROMPTS, folder, (1, 2), max_new_tokens=25)
    with pytest.raises(ConfigError, match="with taps"):
        open_recording(folder, target, (0, 1, 2))
    with pytest.raises(ConfigError, match="with fingerprint"):
        open_recording(folder, tiny_target(seed=1), (1, 2))
    with pytest.raises(ConfigError, match="the first is 'other'"):
        open_recording(folder, target, (1, 2), ["p1", "other"])
    with pytest.raises(FileNotFoundError, match="ospec record"):
        open_recording(tmp_path, target, (1, 2))
    with pytest.raises(ConfigError, match="trained draft alone"):
        Replayer(target, load_draft("ngram", target), folder)
    replayer = Replayer(target, draft, folder, STEPS)
    with pytest.raises(ConfigError, match="update_interval"):
        replayer.run(dataclasses.replace(LEARNER, update_interval=0))
    auto = LearnerConfig(name="auto", memory_slots=0, learning_rate=1e-3)
    assert replayer.trainer(auto)[0].update_interval == DEFAULT_INTERVAL
    with pytest.raises(ConfigError, match="knows no n-grams"):
        replayer.run(LearnerConfig(name="memory"))
    hydra = Replayer(target, make_draft(target, "hydra"), folder, STEPS)
    with pytest.raises(ConfigError, match="output projection"):
        hydra.run(LearnerConfig(name="head"))


def test_drafts_in_hindsight_beat_the_one_they_start_from(target, folder, draft):
    replayer = Replayer(target, draft, folder, STEPS, has_losses=True)
    static = [answer.loss for answer in replayer.run(None).answers]
    counts = []
    args = {"num_epochs": 6, "learning_rate": 1e-2, "batch_size": 4, "window": 32}
    hindsight = best_per_chunk_in_hindsight(
        replayer, 10, on_chunk=counts.append, **args
    )
    assert counts == [10, 20, 24]
    assert len(hindsight) == len(static)
    regret = dynamic_regret_proxy(static, hindsight)
    assert regret[-1] > 0.5
    learned = [answer.loss for answer in replayer.run(LEARNER).answers]
    assert dynamic_regret_proxy(learned, hindsight)[-1] < regret[-1]


def test_a_recording_knows_prompts_by_their_content(target, tmp_path):
    args = {"max_new_tokens": NEW_TOKENS, "batch_size": 4}
    row = lambda name, text: parse_prompt({"prompt": text}, name)
    first = [row("f-1", "one"), row("f-2", "two")]
    assert record(target, first, tmp_path, (1, 2, 3), **args) == 2
    other = [row("f-1", "three"), row("g-2", "two")]
    with pytest.warns(UserWarning, match="the first is 'g-2'.*the first is 'f-1'"):
        assert record(target, other, tmp_path, (1, 2, 3), **args) == 1

    store, order = open_recording(tmp_path, target, (1, 2, 3), other)
    assert [store.entries[i].content for i in order] == [content_hash(p) for p in other]
    assert len({entry.id for entry in store.entries}) == 3
    with pytest.raises(ConfigError, match="1 prompts of the stream are not in"):
        open_recording(tmp_path, target, (1, 2, 3), [row("f-1", "four")])


def test_streams_of_one_name_and_other_prompts_differ():
    assert stream_key(["f-1"], ["aa"]) != stream_key(["f-1"], ["bb"])
    assert stream_key(["f-1"], [""]) == stream_key(["f-1"])  # as older versions
