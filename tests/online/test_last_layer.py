# SPDX-License-Identifier: Apache-2.0
"""Learning the output projection: the rule, and its way into the served draft."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import (
    ConfigError,
    LearnerConfig,
    SamplingConfig,
    Session,
    TreeConfig,
)
from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.request import Completion
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.last_layer import HeadSamples, head_learner
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models.layers import Numerics
from ospec_jax.online.last_layer import LastLayer
from ospec_jax.online.samples import as_drawn
from ospec_jax.sampling import processed_probs
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

HEAD = LearnerConfig(name="head")
PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(6)]


def samples_of(kernel, inputs, labels, is_real=None):
    is_real = jnp.ones(len(labels), bool) if is_real is None else is_real
    return HeadSamples(inputs, inputs @ kernel.T, jnp.asarray(labels), is_real)


def stretched(rng, count, width=12):
    """Inputs with a few directions of much energy."""
    return jnp.asarray(
        rng.normal(size=(count, width)) * np.geomspace(10, 0.1, width), jnp.float32
    )


def compiled(**settings):
    """The learner, whose update is not compiled operation by operation."""
    learner = head_learner(**settings)
    return learner._replace(update=jax.jit(learner.update))


def test_a_step_moves_a_sample_by_its_own_error():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.1 * rng.normal(size=(9, 12)), jnp.float32)
    learner = compiled(rate=1.0, num_candidates=9)
    samples = samples_of(kernel, stretched(rng, 1), [4])
    state, rows, info = learner.update(learner.init(kernel), samples)
    moved = (state.kernel - kernel) @ samples.inputs[0]
    probs = jax.nn.softmax(samples.logits[0])
    expected = jax.nn.one_hot(4, 9) - probs
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    assert sorted(rows.tolist()) == list(range(9))
    np.testing.assert_allclose(info.loss, -np.log(probs[4]), rtol=1e-5)


def test_rows_go_back_while_the_projection_they_began_with_is_ahead():
    """Learned on other text, where it is ahead; then the first kind of text again."""
    rng = np.random.default_rng(3)
    origin = jnp.asarray(rng.normal(size=(9, 12)), jnp.float32)
    home = lambda inputs: np.argmax(inputs @ origin.T, axis=1)
    away = lambda inputs: (home(inputs) + 1) % 9
    plain, pulled = (compiled(num_candidates=9, pull=x) for x in (0.0, 0.2))
    states = [plain.init(origin), pulled.init(origin)]
    distance = lambda state: float(jnp.linalg.norm(state.kernel - origin))

    def learn(label, count):
        for _ in range(count):
            inputs = jnp.asarray(rng.normal(size=(64, 12)), jnp.float32)
            for i, learner in enumerate((plain, pulled)):
                samples = samples_of(states[i].kernel, inputs, label(inputs))
                states[i], *_ = learner.update(states[i], samples)

    learn(away, 20)
    far = distance(states[1])
    assert states[1].lead > 0
    np.testing.assert_array_equal(states[0].kernel, states[1].kernel)

    # Of what was learned all is in the way now, and the lead is soon used up.
    learn(home, 12)
    assert states[1].lead < 0
    assert distance(states[1]) < 0.6 * far
    assert distance(states[1]) < 0.6 * distance(states[0])
    # Where it began it stays, but for what it learns there.
    learn(home, 40)
    inputs = jnp.asarray(rng.normal(size=(512, 12)), jnp.float32)
    right = lambda state: np.mean(home(inputs) == np.argmax(inputs @ state.kernel.T, 1))
    assert right(states[1]) > right(states[0])


LAWS = {
    "cold": (0.7, 0, 1.0),
    "hot": (1.5, 0, 1.0),
    "top-p": (1.0, 0, 0.9),
    "cold top-k": (0.7, 3, 1.0),
    "min-p": (1.0, 0, 1.0, 0, 0.2),
}


@jax.jit
def processed(logits, temperature, top_k, top_p, seed=0, min_p=0.0):
    one = lambda value, dtype: jnp.full(len(logits), value, dtype)
    params = SamplingParams(
        one(temperature, float),
        one(top_k, jnp.int32),
        one(top_p, float),
        one(min_p, float),
    )
    return processed_probs(logits, params)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_targets_own_projection_is_where_sampled_labels_leave_it(law):
    """The expected step is zero there, over all labels that the target may draw."""
    rng = np.random.default_rng(5)
    kernel = jnp.asarray(0.5 * rng.normal(size=(9, 12)), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(1, 12)), jnp.float32)
    learner = compiled(rate=1.0, num_candidates=9)

    def expected_step(sampling, law_of_labels):
        probs = processed(inputs @ kernel.T, *law_of_labels)[0]
        total = 0.0
        for label, chance in enumerate(np.asarray(probs)):
            samples = samples_of(kernel, inputs, [label]).replace(sampling=sampling)
            state, _, _ = learner.update(learner.init(kernel), samples)
            total += chance * (state.kernel - kernel)
        return total

    config = SamplingConfig(*law)
    sampling = as_drawn(config)
    assert sampling is not None
    np.testing.assert_allclose(expected_step(sampling, law), 0.0, atol=1e-5)
    # Taken for draws of the softmax they would move it.
    assert np.max(np.abs(expected_step(None, law))) > 0.01
    assert np.max(np.abs(expected_step(sampling, (1.0, 0, 1.0)))) > 0.01


@pytest.mark.parametrize(
    ("temperature", "factor"), [(1.5, 1.5), (0.7, 0.7), (0.2, 0.5)]
)
def test_a_step_is_as_long_as_the_temperature_down_to_a_half(temperature, factor):
    rng = np.random.default_rng(6)
    kernel = jnp.asarray(0.1 * rng.normal(size=(9, 12)), jnp.float32)
    samples = samples_of(kernel, stretched(rng, 1), [4])
    samples = samples.replace(sampling=as_drawn(SamplingConfig(temperature)))
    learner = compiled(rate=1.0, num_candidates=9)
    state, _, info = learner.update(learner.init(kernel), samples)
    moved = (state.kernel - kernel) @ samples.inputs[0]
    probs = jax.nn.softmax(samples.logits[0] / temperature)
    expected = factor * (jax.nn.one_hot(4, 9) - probs)
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    np.testing.assert_allclose(info.loss, -np.log(probs[4]), rtol=1e-5)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_drawn_children_stay_accepted_at_any_temperature(law):
    """A draft that begins at the target stays there but for the steps' noise."""
    rng = np.random.default_rng(7)
    truth = jnp.asarray(0.6 * rng.normal(size=(6, 8)), jnp.float32)
    learner = compiled(rate=0.3)
    update, state = learner.update, learner.init(truth)
    law_of = lambda kernel, x: processed(x @ kernel.T, *law)
    fresh = jnp.asarray(rng.normal(size=(1000, 8)), jnp.float32)
    accepted = lambda kernel: float(
        np.minimum(law_of(truth, fresh), law_of(kernel, fresh)).sum(1).mean()
    )
    for _ in range(200):
        inputs = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
        sums = np.cumsum(law_of(truth, inputs), axis=1)
        labels = (sums < rng.random((64, 1)) * sums[:, -1:]).sum(1).astype(np.int32)
        samples = samples_of(state.kernel, inputs, labels)
        samples = samples.replace(sampling=as_drawn(SamplingConfig(*law)))
        state, _, _ = update(state, samples)
    assert accepted(state.kernel) > 0.95
    # Not the projection whose softmax is what was sampled.
    scale = float(jnp.sum(state.kernel * truth) / jnp.sum(truth**2))
    assert scale == pytest.approx(1.0, abs=0.05)


def test_what_was_asked_tells_the_law_of_an_answer():
    for config in (
        SamplingConfig(),
        SamplingConfig(0.0, top_p=0.9),
        SamplingConfig(0.7, top_k=1),
        SamplingConfig(1.0),
    ):
        assert as_drawn(config) is None
    warm = as_drawn(SamplingConfig(0.7))
    assert warm is not None
    assert warm.top_k is warm.top_p is None
    cut = as_drawn(SamplingConfig(0.7, top_p=0.9))
    assert cut is not None
    values = cut.temperature, cut.top_k, cut.top_p
    np.testing.assert_allclose(values, (0.7, 0, 0.9), rtol=1e-6)


def test_only_candidates_change_and_emitted_tokens_are_among_them():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(50, 12)), jnp.float32)
    learner = compiled(num_candidates=6)
    labels = [3, 17, 31, -1]
    state, rows, _ = learner.update(
        learner.init(kernel), samples_of(kernel, stretched(rng, 4), labels)
    )
    changed = np.flatnonzero(np.any(np.asarray(state.kernel != kernel), axis=1))
    assert set(changed) <= set(rows.tolist())
    assert {3, 17, 31} <= set(changed)


def test_nothing_real_changes_nothing():
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.normal(size=(9, 12)), jnp.float32)
    learner = compiled()
    samples = samples_of(kernel, stretched(rng, 5), [1] * 5, jnp.zeros(5, bool))
    state, _, info = learner.update(learner.init(kernel), samples)
    np.testing.assert_array_equal(state.kernel, kernel)
    assert int(info.num_samples) == 0


def test_preconditioning_learns_faster_than_plain_steps():
    """A stream whose labels depend on directions of little energy."""
    rng = np.random.default_rng(3)
    teacher = rng.normal(size=(6, 12)) / np.geomspace(10, 0.1, 12)

    def agreement(damping, rate):
        learner = compiled(rate=rate, damping=damping, num_candidates=6)
        update = learner.update
        state, found = learner.init(jnp.zeros((6, 12))), []
        draws = np.random.default_rng(4)
        for _ in range(60):
            x = stretched(draws, 16)
            labels = np.argmax(3 * np.asarray(x) @ teacher.T, axis=1)
            state, _, info = update(state, samples_of(state.kernel, x, labels))
            found.append(float(info.agreement))
        return np.mean(found[30:])

    plain = max(agreement(1e4, rate) for rate in (0.03, 0.1, 0.3, 1.0))
    assert agreement(0.1, 0.3) > plain + 0.05


@pytest.mark.parametrize(
    ("answers", "lead", "every", "is_due"),
    [
        (16, -9.0, 4, True),  # the first ones are all learned from
        (17, 0.0, 4, False),
        (20, 0.0, 4, True),
        (17, 5.5, 4, True),  # where learning leads, nothing is missed
        (17, 0.0, 1, True),
        (68, 0.0, 4, False),  # where it has not led for long, it comes more seldom
        (80, 0.0, 4, True),
        (68, 5.5, 4, True),
        (68, 0.0, 1, True),
    ],
)
def test_it_learns_seldom_while_that_gains_nothing(answers, lead, every, is_due):
    config = LearnerConfig("head", head_every=every)
    learner = LastLayer(config, lambda params, states: states, Numerics(), 40)
    state, _ = learner.init(Draft({"lm_head": {"kernel": jnp.zeros((40, 12))}}))
    known = state.learner.replace(lead=jnp.float32(lead))
    state = state.replace(num_prompts=jnp.int32(answers), learner=known)
    assert learner.is_due(state) == is_due
    # What batches ask beforehand is the same thing.
    before = state.replace(num_prompts=jnp.int32(answers - 1))
    if answers > 17:
        assert (learner.answers_until_due(before, [9] * 8) == 1) == is_due


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module", params=["float32", "int8"])
def any_target(request):
    return tiny_target(precision=request.param)


def loaded(target, family="eagle3", draft_vocab_size=200):
    config = tiny_draft_config(target.config, draft_vocab_size, family)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config, family))


def answers(session, prompts=PROMPTS):
    return [r.token_ids for r in session.generate(prompts, 40)]


TREES = {
    "chain": TreeConfig(),
    "static": TreeConfig("static", 3, branching=(2, 2, 1)),
    "dynamic": TreeConfig("dynamic", 3, 2, 6),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_recorded_states_are_those_that_the_draft_predicted_from(
    monkeypatch, target, tree
):
    """The head over a recorded state drafts what was accepted there, and no more."""
    seen: list[Completion] = []
    end = Batch._end
    monkeypatch.setattr(
        Batch, "_end", lambda *args: seen.append(end(*args)) or seen[-1]
    )
    draft = loaded(target)
    session = Session(target, draft, learner=HEAD, tree=tree, ngrams=False)
    head_inputs = session.engine.drafter.head_inputs
    answers(session, PROMPTS[:1])
    completion = seen[0]
    states = jnp.asarray(completion.feedback.states[0], jnp.float32)
    known = np.asarray(completion.feedback.has_state[0])
    inputs = np.asarray(head_inputs(draft.draft.params, states))
    logits = inputs @ np.asarray(draft.draft.params["lm_head"]["kernel"]).T
    ids = [*completion.request.prompt_ids, *completion.token_ids]
    width = {"chain": 1, "static": 2, "dynamic": 2}[tree.kind]
    first, stats = len(completion.request.prompt_ids), completion.stats
    position, hits = first, 0
    while position < completion.num_recorded:
        # From a root on: as long as the next token is among the children, it was
        # accepted, and the state after it is that of its node.
        for _ in range(tree.num_steps):
            assert known[position]
            best = np.argsort(-logits[position], kind="stable")[:width]
            drafted = np.asarray(draft.draft.token_ids)[best]
            position += 1
            if position >= len(ids) or ids[position] not in drafted:
                break
            hits += 1
        else:
            assert position >= completion.num_recorded or not known[position]
            position += 1
    if tree.kind == "chain":
        assert hits == stats.num_accepted_tokens


@pytest.mark.parametrize(
    "any_target",
    ["float32", pytest.param("int8", marks=pytest.mark.thorough)],
    indirect=True,
)
def test_it_learns_while_serving_and_never_changes_the_output(any_target, tmp_path):
    target = any_target
    plain = answers(Session(target))
    session = Session(target, loaded(target), learner=HEAD, ngrams=False)
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


def test_each_answer_is_learned_by_its_own_law(target):
    session = Session(target, loaded(target), learner=HEAD, ngrams=False)
    head = session.trainer.update.__self__
    laws, learn = [], head._learn
    head._learn = lambda state, served, law, *args: (
        laws.append(law) or learn(state, served, law, *args)
    )
    for sampling in (SamplingConfig(), SamplingConfig(0.5), SamplingConfig(1.5)):
        list(session.generate(PROMPTS[:1], 24, sampling))
    greedy, cold, hot = laws
    assert greedy is None
    assert (float(cold.temperature), float(hot.temperature)) == (0.5, 1.5)
    # A temperature is a number like others: another one compiles nothing.
    assert learn._cache_size() == 2
    list(session.generate(PROMPTS[:1], 24, SamplingConfig(0.5, top_p=0.8)))
    assert float(laws[-1].top_p) == pytest.approx(0.8)
    assert np.isfinite(session.reports[-1].info.loss)


def test_nothing_is_learned_from_tokens_of_another_law(target):
    """Those of adjusted logits are neither the target's choice nor its draws."""
    session = Session(target, loaded(target), learner=HEAD, ngrams=False)
    kernel = lambda: np.asarray(session.draft.params["lm_head"]["kernel"])
    before = kernel().copy()
    endless = SamplingConfig(frequency_penalty=1.5, logit_bias=((2, -100),))
    (answer,) = session.generate(PROMPTS[:1], 24, endless)
    assert len(answer.token_ids) == 24
    np.testing.assert_array_equal(kernel(), before)
    assert session.version == 0
    assert session.reports[-1].info.num_samples == 0
    list(session.generate(PROMPTS[:1], 24))
    assert np.any(kernel() != before)


def test_a_loaded_draft_serves_two_sessions(target):
    draft = loaded(target)
    kept = np.array(draft.draft.params["lm_head"]["kernel"])
    for _ in range(2):
        session = Session(target, draft, learner=HEAD)
        session.warm_up()
        answers(session)
    np.testing.assert_array_equal(draft.draft.params["lm_head"]["kernel"], kept)


@pytest.mark.parametrize("mix", ["", "longer"])
def test_resumed_run_equals_an_uninterrupted_one_bitwise(target, tmp_path, mix):
    def opened(draft):
        suggestions = "suffix" if mix else ""
        draft = dataclasses.replace(draft, mix=mix, suggestions=suggestions)
        return Session(target, draft, learner=HEAD)

    straight = opened(loaded(target))
    expected = answers(straight)
    first = opened(loaded(target))
    head = answers(first, PROMPTS[:3])
    first.save(tmp_path)
    second = opened(load_draft(tmp_path, target))
    assert len(second.resume(tmp_path)) == 3
    assert head + answers(second, PROMPTS[3:]) == expected
    for a, b in zip(
        jax.tree.leaves((straight.state.trainer, straight.draft.params)),
        jax.tree.leaves((second.state.trainer, second.draft.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_drafts_without_such_a_projection_are_refused(target):
    for draft in (loaded(target, "hydra"), loaded(target, draft_vocab_size=0)):
        with pytest.raises(ConfigError, match="output projection"):
            Session(target, draft, learner=HEAD)


@pytest.mark.parametrize("mix", ["fallback", "longer"])
def test_a_mixture_learns_from_what_it_drafted_itself(target, mix):
    """And from the state before a suggestion, but not from those that it never had."""
    plain = answers(Session(target))
    draft = dataclasses.replace(loaded(target), mix=mix, suggestions="suffix")
    session = Session(target, draft, learner=LearnerConfig(name="auto"))
    assert session.learner.name == "head"
    # Of suggested tokens there are states at the roots alone; the last prompts repeat.
    assert answers(session, PROMPTS + PROMPTS[-2:]) == plain + plain[-2:]
    counts = [report.info.num_samples for report in session.reports]
    alone = Session(target, loaded(target), learner=HEAD, ngrams=False)
    answers(alone)
    assert 0 < counts[-1] < alone.reports[-1].info.num_samples


def test_batches_learn(target):
    plain = answers(Session(target))
    learner = dataclasses.replace(HEAD, head_rate=0.5)
    session = Session(target, loaded(target), learner=learner, batch_size=3)
    found = {r.prompt.id: r.token_ids for r in session.generate(PROMPTS, 40)}
    assert [found[f"prompt-{i}"] for i in range(len(PROMPTS))] == plain
    assert session.version >= len(PROMPTS)


def test_each_answer_is_reported(target):
    session = Session(target, loaded(target), learner=HEAD, ngrams=False)
    kernels = [np.array(session.draft.params["lm_head"]["kernel"])]
    told = []

    def note(report, before, after):
        kernels.append(np.array(after.params["lm_head"]["kernel"]))
        told.append(report)

    session.on_update = note
    results = list(session.generate(PROMPTS, 40))
    assert told == session.reports
    assert len(told) == len(results)
    for report, result, before, after in zip(
        told, results, kernels[:-1], kernels[1:], strict=True
    ):
        # Answers of fewer tokens than one step looks at.
        moved = np.linalg.norm(after - before)
        assert report.step_length == pytest.approx(moved, rel=1e-3)
        stats, info = result.stats, report.info
        assert info.num_samples >= stats.num_accepted_tokens
        accepted = info.agreement * info.num_samples
        assert round(float(accepted)) == stats.num_accepted_tokens
        assert report.seconds > 0
