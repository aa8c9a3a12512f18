# SPDX-License-Identifier: Apache-2.0
"""Preferences by token while serving: what is recorded, and what is learned of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import ConfigError, LearnerConfig, SamplingConfig, Session, TreeConfig
from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.request import Completion
from ospec_jax.decoding.step import empty_state
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PREFERENCE = LearnerConfig("preference")
PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(6)]
TREES = {
    "chain": TreeConfig(),
    "static": TreeConfig("static", 3, branching=(2, 2, 1)),
    "dynamic": TreeConfig("dynamic", 3, 2, 6),
    "sized": TreeConfig("dynamic", 3, 2, 6, sizes=(3, 6)),
}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def loaded(target, draft_vocab_size=200):
    config = tiny_draft_config(target.config, draft_vocab_size)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))


def answers(session, prompts=PROMPTS, sampling=SamplingConfig()):
    return [r.token_ids for r in session.generate(prompts, 40, sampling)]


def kernel_of(session):
    return np.array(session.draft.params["lm_head"]["kernel"])


@pytest.fixture
def seen(monkeypatch):
    """Answers as they are handed to learning."""
    found: list[Completion] = []
    end = Batch._end
    monkeypatch.setattr(
        Batch, "_end", lambda *args: found.append(end(*args)) or found[-1]
    )
    return found


def own_choices(session, draft, completion):
    """The most probable token behind each recorded state, by the projection itself."""
    states = jnp.asarray(completion.feedback.states[0], jnp.float32)
    inputs = session.engine.drafter.head_inputs(draft.draft.params, states)
    logits = np.asarray(inputs) @ np.asarray(draft.draft.params["lm_head"]["kernel"]).T
    return np.asarray(draft.draft.token_ids)[np.argmax(logits, axis=1)]


@pytest.mark.crossed
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("ngrams", [False, True], ids=["alone", "suggested"])
def test_recorded_choices_are_the_drafts_own(target, seen, tree, ngrams):
    """Whatever was suggested in their place, which is something else at times."""
    draft = loaded(target)
    session = Session(target, draft, learner=PREFERENCE, tree=tree, ngrams=ngrams)
    prompt = "again and again and again and again"
    assert answers(session, [prompt]) == answers(Session(target), [prompt])
    (completion,) = seen[:1]
    first, last = len(completion.request.prompt_ids), completion.num_recorded
    is_real = np.asarray(completion.feedback.has_state[0])[first:last]
    found = np.asarray(completion.feedback.choices[0])[first:last]
    expected = own_choices(session, draft, completion)[first:last]
    np.testing.assert_array_equal(found[is_real], expected[is_real])
    assert np.sum(is_real) > 10
    if tree.is_chain and not ngrams:
        # One that is not the target's token is where a draft was rejected.
        emitted = np.array(completion.token_ids[1:])[: last - first]
        is_wrong = is_real[: len(emitted)] & (found[: len(emitted)] != emitted)
        stats = completion.stats
        assert np.sum(is_wrong) == sum(stats.acceptance_histogram[: tree.num_steps])


def test_it_learns_while_serving_and_never_changes_the_output(target, tmp_path):
    plain = answers(Session(target))
    session = Session(target, loaded(target), learner=PREFERENCE, ngrams=False)
    results = list(session.generate(PROMPTS * 6, 40))
    assert [r.token_ids for r in results] == plain * 6
    accepted = lambda part: sum(r.stats.num_accepted_tokens for r in part)
    assert accepted(results[-6:]) > 2 * accepted(results[:6])
    # What is served is what a load of the saved draft would serve.
    session.save(tmp_path)
    restored = Session(target, load_draft(tmp_path, target), ngrams=False)
    assert restored.served_draft is not None
    jax.tree.map(
        np.testing.assert_array_equal,
        restored.served_draft.params,
        session.served_draft.params,
    )


def test_the_reference_is_renewed_with_each_span_of_answers(target):
    learner = LearnerConfig("preference", reference_answers=2)
    session = Session(target, loaded(target), learner=learner, ngrams=False)
    before = [kernel_of(session)]
    for i, prompt in enumerate(PROMPTS[:5]):
        answers(session, [prompt])
        reference = np.asarray(session.state.trainer.learner.reference)
        np.testing.assert_array_equal(reference, before[i - i % 2])
        before.append(kernel_of(session))
    assert all(np.any(a != b) for a, b in zip(before, before[1:], strict=False))
    fresh = dataclasses.replace(PREFERENCE, reference_answers=0)
    session = Session(target, loaded(target), learner=fresh, ngrams=False)
    assert session.state.trainer.learner.reference is None


def test_one_answer_of_so_many_takes_a_softmax_step(target):
    learner = dataclasses.replace(PREFERENCE, softmax_every=3)
    session = Session(target, loaded(target), learner=learner, ngrams=False)
    session.warm_up()
    layer = session.trainer.update.__self__
    taken = []
    for name in ("_learn", "_prefer"):
        step = getattr(layer, name)
        assert step._cache_size() == 1
        note = lambda *args, name=name, step=step: taken.append(name) or step(*args)
        setattr(layer, name, note)
    answers(session)
    assert taken == ["_prefer", "_prefer", "_learn"] * 2


@pytest.mark.parametrize(
    "temperature", [1.0, pytest.param(0.6, marks=pytest.mark.thorough)]
)
def test_sampled_and_adjusted_answers_teach_nothing(target, temperature):
    session = Session(target, loaded(target), learner=PREFERENCE, ngrams=False)
    before = kernel_of(session)
    answers(session, PROMPTS[:1], SamplingConfig(temperature))
    answers(session, PROMPTS[:1], SamplingConfig(frequency_penalty=1.5))
    np.testing.assert_array_equal(kernel_of(session), before)
    assert session.version == 0
    # The most probable token of a row is no draw, whatever its temperature.
    answers(session, PROMPTS[:1], SamplingConfig(temperature, top_k=1))
    assert np.any(kernel_of(session) != before)


def test_drawn_children_are_refused(target):
    tree = TreeConfig(children="sampled")
    with pytest.raises(ConfigError, match="'preference' learns from the draft's most"):
        Session(target, loaded(target), learner=PREFERENCE, tree=tree)
    Session(target, loaded(target), learner="head", tree=tree)


def test_drafts_without_a_projection_of_their_own_are_refused(target):
    with pytest.raises(ConfigError, match="'preference' learns a draft's own output"):
        Session(target, loaded(target, draft_vocab_size=0), learner=PREFERENCE)


@pytest.mark.thorough
def test_a_fallback_learns_from_what_it_drafted_itself(target):
    plain = answers(Session(target))
    draft = dataclasses.replace(loaded(target), mix="fallback", suggestions="suffix")
    session = Session(target, draft, learner=PREFERENCE)
    before = kernel_of(session)
    assert answers(session, PROMPTS + PROMPTS[-2:]) == plain + plain[-2:]
    assert np.any(kernel_of(session) != before)


def test_resumed_run_equals_an_uninterrupted_one_bitwise(target, tmp_path):
    learner = dataclasses.replace(PREFERENCE, reference_answers=2, softmax_every=4)
    straight = Session(target, loaded(target), learner=learner)
    expected = answers(straight)
    first = Session(target, loaded(target), learner=learner)
    head = answers(first, PROMPTS[:3])
    first.save(tmp_path)
    second = Session(target, load_draft(tmp_path, target), learner=learner)
    assert len(second.resume(tmp_path)) == 3
    assert head + answers(second, PROMPTS[3:]) == expected
    for a, b in zip(
        jax.tree.leaves((straight.state.trainer, straight.draft.params)),
        jax.tree.leaves((second.state.trainer, second.draft.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_batches_learn(target):
    plain = answers(Session(target))
    session = Session(target, loaded(target), learner=PREFERENCE, batch_size=3)
    found = {r.prompt.id: r.token_ids for r in session.generate(PROMPTS, 40)}
    assert [found[f"prompt-{i}"] for i in range(len(PROMPTS))] == plain
    assert session.version >= len(PROMPTS)


def test_nothing_is_recorded_for_learners_that_do_not_read_it(target):
    for name in ("head", "gradient"):
        engine = Session(target, loaded(target), learner=name).engine
        state = empty_state(engine.config, engine.drafter, 1, 64, engine.recording)
        assert state.feedback is not None
        assert state.feedback.choices is None
