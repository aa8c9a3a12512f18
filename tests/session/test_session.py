# SPDX-License-Identifier: Apache-2.0
"""Learning while serving: exact output, exact resume, no second target pass."""

import dataclasses

import jax
import numpy as np
import pytest
from drafted import random_head
from model_files import hf_tensors, model_config, write_folder
from reference import random_params

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.config import TreeConfig as Tree
from ospec_jax.control.base import SUGGESTIONS
from ospec_jax.decoding.request import PromptTooLongError
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.base import LearnerState
from ospec_jax.learners.last_layer import HeadState
from ospec_jax.learners.registry import LEARNER_NAMES
from ospec_jax.loading import LoadedDraft, load_draft, with_sliding_window
from ospec_jax.models import finite
from ospec_jax.models.hub import load_target
from ospec_jax.session import resume
from ospec_jax.session import session as session_module
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.testing import byte_tokenizer, tiny_draft, tiny_draft_config, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

LEARNER = LearnerConfig(
    update_interval=60, batch_size=2, window=32, num_context=64, ring_capacity=8,
    num_steps=2, learning_rate=3e-3,
)  # fmt: skip
PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(8)]
NEW_TOKENS = 28
# As many as a guard needs to come to what it decides.
GUARDED_TOKENS = 40


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in Session(target).generate(PROMPTS, NEW_TOKENS)]


def answers(session, prompts=PROMPTS, num_tokens=NEW_TOKENS):
    return [r.token_ids for r in session.generate(prompts, num_tokens)]


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("promotion", ["always", "guarded"])
def test_learning_never_changes_the_output(target, draft, plain, promotion):
    learner = dataclasses.replace(LEARNER, promotion=promotion)
    session = Session(target, draft, learner=learner)
    assert answers(session) == plain
    assert int(session.state.trainer.learner.num_updates) > 0
    if promotion == "always":
        assert session.version == len(session.reports)


def windows_of(session):
    """What a session's trainer runs, to watch it at work."""
    return session.trainer.update.__self__


def leaves_of(params):
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "own",
    [{}, pytest.param({"update_every_prompts": 3}, marks=pytest.mark.thorough)],
)
def test_what_is_promoted_was_scored_on_what_nobody_trained_on(target, draft, own):
    """Bitwise: not what the learner has become since."""
    session = guarded(target, draft, 0.9, batch_size=4, replay_share=0.5, **own)
    windows = windows_of(session)
    scored, trained, promoted, counts = [], set(), [], []
    accepted, learn = windows._accepted, windows._learn

    def windows_in(batch):
        for tokens, start, weight in zip(
            batch.feedback.tokens, batch.start, batch.weight, strict=True
        ):
            if weight.sum() > 0:
                # Prompts come again: those of one answer alone are told apart.
                yield np.asarray(tokens).tobytes() + bytes([int(start) % 251])

    def watch_score(params, served, batch):
        scored.append(leaves_of(params))
        counts.append(len(list(windows_in(batch))))
        assert not trained & set(windows_in(batch))
        return accepted(params, served, batch)

    def watch_learning(state, served, batch):
        trained.update(windows_in(batch))
        return learn(state, served, batch)

    def note(report, before, after):
        if report.decision == "promote":
            promoted.append(leaves_of(after.params))
        else:
            assert leaves_of(before.params) == leaves_of(after.params)

    windows._accepted, windows._learn = watch_score, watch_learning
    session.on_update = note
    prompts = [f"What is {i} plus {i % 7}?" for i in range(24)]
    results = list(session.generate(prompts, NEW_TOKENS))
    assert len(promoted) > 1
    assert {*promoted} <= {*scored}
    assert len({*promoted}) == len(promoted) == session.version
    # Candidate and served draft, on at most one answer for each update or on all.
    limit = len(results) if "update_every_prompts" in own else len(session.reports)
    assert len(scored) <= 2 * limit
    assert min(counts) > 0


def guarded(target, draft, gain, **own):
    """A session whose candidates gain so much: random models hardly gain anything."""
    learner = dataclasses.replace(
        LEARNER, promotion="guarded", promotion_level=0.9, update_interval=30, **own
    )
    session = Session(target, draft, learner=learner, ngrams=False)
    windows = windows_of(session)
    windows._batching = windows._batching._replace(
        gain_of=lambda *args: jax.numpy.float32(gain)
    )
    return session


def test_a_guarded_run_resumes_bitwise(target, draft, tmp_path):
    straight = guarded(target, draft, 0.9)
    answers(straight, PROMPTS * 2, GUARDED_TOKENS)
    first = guarded(target, draft, 0.9)
    answers(first, PROMPTS, GUARDED_TOKENS)
    guard = first.state.trainer.guard
    assert guard.is_open
    assert int(guard.num_requests) > 0
    first.save(tmp_path)
    second = guarded(target, draft, 0.9)
    second.resume(tmp_path)
    answers(second, PROMPTS, GUARDED_TOKENS)
    assert_same(second.state.trainer, straight.state.trainer)
    assert_same(second.draft, straight.draft)
    assert straight.version > 0


def test_what_is_worse_is_rolled_back(target, draft):
    session = guarded(target, draft, -0.9, optimizer="sgd", learning_rate=0.1)
    windows, starts, ends = windows_of(session), [], []
    learn = windows._learn

    def watch(state, served, batch):
        starts.append(leaves_of(state.params))
        result = learn(state, served, batch)
        ends.append(leaves_of(result[0].params))
        return result

    windows._learn = watch
    answers(session, PROMPTS * 2, GUARDED_TOKENS)
    decisions = [report.decision for report in session.reports]
    assert decisions[:4] == ["wait", "wait", "wait", "rollback"]
    assert "promote" not in decisions
    served = leaves_of(draft.draft.params)
    assert leaves_of(session.draft.params) == served
    for i, decision in enumerate(decisions):
        # The learner goes on from its last iterate, or begins anew.
        before = served if decision == "rollback" or i == 0 else ends[i - 1]
        assert starts[i] == before


def test_what_stays_unclear_makes_way_for_the_newest_iterate(target, draft):
    session = guarded(target, draft, 0.0, promotion_patience=2)
    answers(session, PROMPTS, GUARDED_TOKENS)
    decisions = [report.decision for report in session.reports]
    assert decisions[:5] == ["wait", "wait", "expire", "wait", "expire"]
    assert session.version == 0
    state = session.state.trainer
    assert int(state.guard.number) == 1 + decisions.count("expire")
    if decisions[-1] == "expire":
        assert leaves_of(state.guard.candidate) == leaves_of(state.learner.params)


# What is not finite is found in the windows' update, whatever the learner is.
@pytest.mark.crossed
@pytest.mark.parametrize(
    "name",
    [
        "gradient",
        pytest.param("ensemble", marks=pytest.mark.thorough),
        pytest.param("optimistic", marks=pytest.mark.thorough),
        pytest.param("osd", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("promotion", ["always", "guarded"])
def test_an_update_that_is_not_finite_ends_learning(
    target, draft, plain, tmp_path, name, promotion
):
    learner = LEARNER.renamed(
        name,
        optimizer="adam",
        loss="jsd",
        learning_rate=1e38,
        promotion=promotion,
        **(
            {"buffer_requests": 1, "update_every_prompts": None}
            if name == "osd"
            else {}
        ),
    )
    session = Session(target, draft, learner=learner, ngrams=False)
    with pytest.warns(UserWarning, match=f"stopped.*'{name}' with learning_rate 1e.38"):
        assert answers(session) == plain
    *_, last = session.reports
    assert last.decision == "stopped"
    assert [r.decision for r in session.reports].count("stopped") == 1
    served, state = session.served_draft.params, session.state.trainer
    assert not finite.find_not_finite((served, session.draft.params))
    assert not finite.find_not_finite(state)
    session.save(tmp_path)
    assert_same(load_draft(tmp_path, target).draft.params, session.draft.params)
    resumed = Session(target, draft, learner=learner, ngrams=False)
    with pytest.warns(UserWarning, match=f"{tmp_path}: learning has stopped.*--draft"):
        resumed.resume(tmp_path)
    assert answers(resumed, PROMPTS[:3]) == plain[:3]
    assert not resumed.reports
    assert_same(resumed.draft.params, session.draft.params)


def test_a_good_draft_outlives_the_update_that_is_not_finite(target, draft):
    session = Session(target, draft, learner=LEARNER, ngrams=False)
    answers(session, PROMPTS[:4])
    assert session.version > 0
    before, version = leaves_of(session.draft.params), session.version
    windows = windows_of(session)
    learn = windows._learn
    windows._learn = lambda learner, served, batch: learn(
        learner,
        served,
        batch.replace(
            feedback=batch.feedback.replace(logsumexp=batch.feedback.logsumexp * np.nan)
        ),
    )
    with pytest.warns(UserWarning, match="stopped"):
        answers(session, PROMPTS[4:])
    assert leaves_of(session.draft.params) == before
    assert session.version == version


def shared_structure(state):
    """As it was stored when all trainers' states had one structure."""
    zero = jax.numpy.zeros((), int)
    fields = {"num_waiting": zero, "num_fresh": zero, "update_interval": zero}
    fields |= {"learner": LearnerState({}, (), zero), "guard": None}
    fields |= {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }
    if isinstance(fields["learner"], HeadState):
        head = fields["learner"]
        fields["learner"] = LearnerState({}, head, head.num_updates)
    return fields


def older_state(state):
    """As it was stored before promotion was a test by betting."""
    fields = shared_structure(state)
    del fields["is_stopped"]
    zero = np.zeros((), np.float32)
    counts = {"count": np.int32(3), "total": zero, "total_square": zero}
    return fields | {"guard": {k: jax.numpy.asarray(x) for k, x in counts.items()}}


def older_traffic(traffic):
    """As it was stored before text had owners, and windows knew if they are fresh."""
    memory = {
        name: getattr(traffic.memory, name)
        for name in ("fingerprints", "tokens", "counts", "hits", "trials")
    }
    fields = {"memory": memory, "ring": traffic.ring}
    if traffic.ring is None:
        return fields
    segments = traffic.ring.segments
    kept = {name: getattr(segments, name) for name in ("feedback", "start", "weight")}
    ring = {"segments": kept, "num_added": traffic.ring.num_added}
    return fields | {"ring": ring}


@pytest.mark.crossed
@pytest.mark.parametrize("structure", [shared_structure, older_state])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"promotion": "guarded"},
        {"pace": "pays"},
        {"name": "head"},
        pytest.param({"name": "head", "pace": "pays"}, marks=pytest.mark.thorough),
        {"name": "memory"},
    ],
)
def test_a_checkpoint_of_an_older_version_resumes(
    target, draft, tmp_path, own, structure
):
    learner = LearnerConfig(**own)
    if learner.is_training:
        learner = dataclasses.replace(LEARNER, **own)
    session = Session(target, draft, learner=learner)
    answers(session, PROMPTS[:4])
    state, folder = session.state.trainer, tmp_path / "old"
    settings = learner.to_json() | {"min_windows": 8}
    for name in ("promotion_level", "promotion_patience"):
        settings.pop(name, None)
    meta = dataclasses.replace(session.meta, learner=settings)
    checkpoint.save(
        folder, int(state.num_prompts), meta, session.draft, structure(state),
        older_traffic(session.state.traffic),
    )  # fmt: skip
    resumed = Session(target, draft, learner=learner)
    resumed.resume(folder)
    found = resumed.state.trainer
    assert not found.is_stopped
    is_guarded = own.get("promotion") == "guarded"
    if is_guarded and structure is older_state:
        assert not found.guard.is_open
        found, state = found.replace(guard=None), state.replace(guard=None)
    assert_same(found, state)
    assert_same(resumed.state.traffic, session.state.traffic)
    answers(resumed, PROMPTS[4:])
    assert bool(resumed.reports) == (learner.name != "memory")


def test_learning_raises_acceptance_on_repeated_traffic(target, draft):
    session = Session(target, draft, learner=LEARNER, ngrams=False)
    results = list(session.generate(PROMPTS[:2] * 12, NEW_TOKENS))
    accepted = lambda part: sum(r.stats.num_accepted_tokens for r in part)
    assert accepted(results[-6:]) > 2 * accepted(results[:6])


# How each family's training follows its drafting is held by `drafters/test_trained.py`
# and `learners/test_gradient.py`, that it learns by `learners/test_conformance.py`;
# eagle3 is learned by the other tests.
@pytest.mark.thorough
@pytest.mark.parametrize("family", ["eagle1", "hydra", "dflash", "peagle"])
def test_every_trained_family_learns_while_serving(target, plain, family, tmp_path):
    config = tiny_draft_config(target.config, 200, family)
    drafter = build_drafter(family, config, Tree(num_steps=1))
    made = LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config, family))
    eager = dataclasses.replace(LEARNER, update_interval=20, learning_rate=1e-2)
    session = Session(target, made, learner=eager, ngrams=False)
    longest = max(range(len(plain)), key=lambda i: len(plain[i]))
    results = list(session.generate([PROMPTS[longest]] * 10, NEW_TOKENS))
    assert [r.token_ids for r in results] == [plain[longest]] * 10
    accepted = lambda part: sum(r.stats.num_accepted_tokens for r in part)
    assert accepted(results[-3:]) > 2 * accepted(results[:3])
    session.save(tmp_path)
    restored = load_draft(tmp_path, target)
    assert (restored.meta.family, restored.meta.draft) == (family, config)
    assert_same(restored.draft.params, session.draft.params)


def test_memory_alone_raises_acceptance_on_repeated_traffic(target, draft, plain):
    learner = LearnerConfig(name="memory")
    session = Session(target, draft, learner=learner)
    assert answers(session) == plain
    first = session.stats.mean_acceptance_length
    session.stats = DecodingStats(num_spec_tokens=3)
    assert answers(session) == plain
    assert session.stats.mean_acceptance_length > 1.5 * first
    assert session.version == 0  # the draft itself is as it was
    np.testing.assert_array_equal(
        session.draft.params["fc"]["kernel"], draft.draft.params["fc"]["kernel"]
    )


def test_resumed_run_equals_an_uninterrupted_one_bitwise(target, draft, tmp_path):
    straight = Session(target, draft, learner=LEARNER)
    expected = answers(straight)

    first = Session(target, draft, learner=LEARNER)
    head = answers(first, PROMPTS[:5])
    first.save(tmp_path)
    second = Session(target, draft, learner=LEARNER)
    assert second.resume(tmp_path) == [f"prompt-{i}" for i in range(5)]
    tail = answers(second, PROMPTS[5:])

    assert head + tail == expected
    assert_same(second.state.trainer, straight.state.trainer)
    assert_same(second.state.traffic, straight.state.traffic)
    assert_same(second.draft, straight.draft)


def test_a_save_that_changes_nothing_writes_nothing(target, draft, tmp_path):
    learner = LearnerConfig(name="memory")
    first = Session(target, draft, learner=learner)
    answers(first, PROMPTS[:2])
    place = first.save(tmp_path, with_feedback=False)
    written = lambda: place.stat().st_ino  # another folder has another number
    before = written()
    assert first.save(tmp_path, with_feedback=False) == place
    assert written() == before
    first.save(tmp_path)  # now with feedback
    assert written() != before

    second = Session(target, draft, learner=learner)
    second.resume(tmp_path)
    before = written()
    assert second.save(tmp_path) == place
    assert written() == before
    second.save(tmp_path, with_feedback=False)
    assert not (place / "feedback").exists()

    third = Session(target, draft, learner=learner)
    with pytest.warns(UserWarning, match="holds no feedback"):
        third.resume(tmp_path)
    before = written()
    third.save(tmp_path)
    assert written() == before
    answers(third, PROMPTS[2:3])
    assert third.save(tmp_path) == tmp_path / "3"
    third.save(tmp_path / "elsewhere")
    assert checkpoint.steps(tmp_path / "elsewhere") == [3]


# Two are the learner `gradient` with another optimizer, and two are ensembles, whose
# states round trips and resumed trainers hold: `learners/test_conformance.py`,
# `online/test_trainers.py`. Those of the last layer resume in `online/`.
HELD = (
    *("momentum", "optimistic", "ensemble", "shared_ensemble"),
    *("head", "preference"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough) if name in HELD else name
        for name in sorted({*LEARNER_NAMES} - {"memory", "auto"})
    ],
)
def test_every_learner_serves_exactly_and_resumes_bitwise(
    target, draft, plain, tmp_path, name
):
    windows = {"batch_size": 2, "window": 32, "ring_capacity": 4}
    rounds = {"update_every_prompts": 1, "num_epochs": 2}
    learner = LearnerConfig(name=name, num_steps=2)
    if learner.is_training:
        learner = learner.replace(**windows, **rounds)
    if name == "osd":
        learner = learner.replace(buffer_requests=2)
    session = Session(target, draft, learner=learner, ngrams=False)
    assert answers(session, PROMPTS[:3]) == plain[:3]
    session.save(tmp_path)
    resumed = Session(target, draft, learner=learner, ngrams=False)
    resumed.resume(tmp_path)
    for one in (session, resumed):
        assert answers(one, PROMPTS[3:5]) == plain[3:5]
    assert_same(resumed.state.trainer, session.state.trainer)
    assert_same(resumed.draft, session.draft)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), session.draft.params,
        draft.draft.params,
    )  # fmt: skip
    assert max(jax.tree.leaves(moved)) > 1e-6
    np.testing.assert_array_equal(session.draft.token_ids, draft.draft.token_ids)


def test_a_chunk_of_prompts_is_learned_from_as_a_whole(target, draft, plain):
    """Every window of the chunk, oldest first, in each epoch."""
    learner = dataclasses.replace(LEARNER, update_every_prompts=3, num_epochs=2)
    session = Session(target, draft, learner=learner, ngrams=False)
    state = lambda: session.state.trainer
    windows, seen = windows_of(session), []
    learn = windows._learn

    def watch(learner, served, batch):
        seen.append(batch)
        return learn(learner, served, batch)

    windows._learn = watch
    assert answers(session, PROMPTS[:2]) == plain[:2]
    assert not seen
    assert answers(session, PROMPTS[2:4]) == plain[2:4]
    ring = session.state.traffic.ring
    num_windows = int(ring.num_added - state().num_fresh)  # those of three prompts
    num_batches = -(-num_windows // learner.batch_size)
    assert 3 <= num_windows <= ring.capacity
    assert len(seen) == 2 * num_batches
    trained = [
        (int(start), np.asarray(tokens).tobytes())
        for batch in seen
        for start, tokens, weight in zip(
            batch.start, batch.feedback.tokens, batch.weight, strict=True
        )
        if weight.sum() > 0
    ]
    assert len(trained) == 2 * num_windows
    assert trained[:num_windows] == trained[num_windows:]
    assert len(set(trained)) == num_windows


def test_experts_are_not_judged_by_what_they_were_trained_on(target, draft):
    learner = dataclasses.replace(
        LEARNER, name="ensemble", loss="jsd", update_every_prompts=4, num_epochs=3,
        step_ratio=4.0,
    )  # fmt: skip
    session = Session(target, draft, learner=learner, ngrams=False)
    windows, seen, changes = windows_of(session), set(), []
    learn = windows._learn

    def watch(learner, served, batch):
        tokens = np.asarray(batch.feedback.tokens).tobytes()
        before = np.asarray(learner.opt_state.weights)
        result = learn(learner, served, batch)
        is_same = np.array_equal(result[0].opt_state.weights, before)
        changes.append((tokens in seen, is_same))
        seen.add(tokens)
        return result

    windows._learn = watch
    answers(session)
    assert {is_same for is_old, is_same in changes if is_old} == {True}
    assert [is_same for is_old, is_same in changes if not is_old].count(False) > 2
    assert windows._learning.update._cache_size() == 1


@pytest.mark.parametrize(
    "family", ["ngram", pytest.param("suffix", marks=pytest.mark.thorough)]
)
def test_an_ngram_draft_learns_and_resumes_without_parameters(
    target, plain, tmp_path, family
):
    draft = load_draft(family, target)
    straight = Session(target, draft, learner=LearnerConfig())
    assert answers(straight) == plain
    first = Session(target, draft, learner=LearnerConfig())
    assert answers(first, PROMPTS[:5]) == plain[:5]
    first.save(tmp_path)
    second = Session(target, load_draft(tmp_path, target), learner=LearnerConfig())
    assert second.resume(tmp_path) == [f"prompt-{i}" for i in range(5)]
    assert_same(second.memory, first.memory)
    assert answers(second, PROMPTS[5:]) == plain[5:]
    assert_same(second.memory, straight.memory)
    assert_same(second.state.trainer, straight.state.trainer)


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = model_config()
    return [
        write_folder(folder / str(seed), config, hf_tensors(config, params))
        for seed, params in enumerate((random_params(config), random_params(config, 1)))
    ]


def test_a_model_drafts_and_its_memory_resumes(model_folders, tmp_path):
    target = load_target(model_folders[0], "float32")
    draft = load_draft(f"model:{model_folders[1]}", target)
    expected = answers(Session(target), PROMPTS[:4])
    session = Session(target, draft, learner=LearnerConfig())
    assert answers(session, PROMPTS[:4]) == expected
    session.save(tmp_path)
    with pytest.raises(CheckpointError, match="pass --draft model:"):
        load_draft(tmp_path, target)
    resumed = Session(target, draft, learner=LearnerConfig())
    resumed.resume(tmp_path)
    assert_same(resumed.memory, session.memory)


@pytest.mark.parametrize(
    "name",
    [
        "self:int4",
        pytest.param("self:exit-1", marks=pytest.mark.thorough),
        "mixed:ngram,self:exit-1",
    ],
)
def test_a_target_is_loaded_as_its_own_draft(target, plain, tmp_path, name):
    draft = load_draft(name, target)
    session = Session(target, draft, learner=LearnerConfig())
    assert answers(session, PROMPTS[:2]) == plain[:2]
    session.save(tmp_path)
    with pytest.raises(CheckpointError, match="pass --draft self:"):
        load_draft(tmp_path, target)


@pytest.mark.thorough
def test_two_drafts_are_loaded_by_name(target, draft, plain, tmp_path):
    checkpoint.save(tmp_path, 0, draft.meta, draft.draft)
    fallback = load_draft(f"fallback:suffix,{tmp_path}", target)
    session = Session(target, fallback, learner=LEARNER)
    assert session.memory.max_match == 8
    assert answers(session, PROMPTS[:3]) == plain[:3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("self:exit-2", "with N from 1 to 1"),
        ("self:exit-x", "use self:int4"),
        ("self:half", "use self:int4"),
        ("mixed:ngram", "cannot mix 'ngram'"),
        ("mixed:ngram,suffix", "cannot mix 'ngram,suffix'"),
        ("fallback:shipped,ngram", "the first one of ngram, suffix, prediction"),
    ],
)
def test_drafts_that_cannot_be_are_refused(target, name, message):
    with pytest.raises(ConfigError, match=message):
        load_draft(name, target)


def test_a_model_with_another_tokenizer_is_refused(model_folders):
    target = load_target(model_folders[0], "float32")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|another|>"])
    tokenizer.save_pretrained(model_folders[1])
    with pytest.raises(CheckpointError, match="another tokenizer than"):
        load_draft(f"model:{model_folders[1]}", target)


def test_a_model_whose_vocabulary_is_padded_further_drafts(model_folders, tmp_path):
    """Qwen's models of several sizes have one tokenizer, and heads of other sizes."""
    target = load_target(model_folders[0], "float32")
    config = dataclasses.replace(
        model_config(), vocab_size=target.config.vocab_size + 9
    )
    tensors = hf_tensors(config, random_params(config, 1))
    folder = write_folder(tmp_path / "padded", config, tensors)
    expected = answers(Session(target), PROMPTS[:2])
    draft = load_draft(f"model:{folder}", target)
    session = Session(target, draft, ngrams=False)
    assert answers(session, PROMPTS[:2]) == expected
    assert session.stats.num_draft_tokens > 0


def test_resume_without_feedback_warns_and_starts_an_empty_ring(
    target, draft, tmp_path
):
    session = Session(target, draft, learner=LEARNER)
    answers(session, PROMPTS[:2])
    session.save(tmp_path, with_feedback=False)
    assert not list(tmp_path.glob("*/feedback"))
    resumed = Session(target, draft, learner=LEARNER)
    with pytest.warns(UserWarning, match="holds no feedback"):
        resumed.resume(tmp_path)
    assert int(resumed.state.traffic.ring.num_added) == 0


def test_a_budget_is_measured_before_the_first_answer(target, draft):
    """Without a warm-up by hand, too: or every answer would bring an update."""
    learner = LearnerConfig(batch_size=2, window=32, ring_capacity=4, budget=0.001)
    session = Session(target, draft, learner=learner)
    assert not session.trainer.is_ready(session.state.trainer)
    answers(session, PROMPTS[:3])
    assert int(session.state.trainer.update_interval) > 3 * NEW_TOKENS
    assert not session.reports


def test_a_budget_counts_passes_which_cost_the_same_however_much_they_yield(
    target, draft
):
    learner = LearnerConfig(batch_size=2, window=32, ring_capacity=4, budget=0.001)
    session = Session(target, draft, learner=learner)
    (result,) = session.generate(PROMPTS[:1], NEW_TOKENS)
    assert result.stats.num_drafts < len(result.token_ids)
    assert int(session.state.trainer.num_waiting) == result.stats.num_drafts


def test_a_budget_counts_the_work_of_all_rows(target, draft):
    learner = LearnerConfig(batch_size=2, window=32, ring_capacity=4)
    session = Session(target, draft, learner=learner, batch_size=2)
    asked, warm_up = [], session.trainer.warm_up

    def watch(*args):
        asked.append(args[-2:])
        return warm_up(*args)

    session.trainer = session.trainer._replace(warm_up=watch)
    session.warm_up(capacities=[None, 256])
    [(_, nothing), (done, speed)] = asked
    assert nothing is None
    seconds = done.seconds / 2
    per_token, per_step = seconds / len(done.token_ids), seconds / done.stats.num_drafts
    assert speed == pytest.approx((per_token, per_step))


def test_older_feedback_is_not_taken_for_the_newest_steps(target, draft, tmp_path):
    session = Session(target, draft, learner=LEARNER)
    answers(session, PROMPTS[:1])
    session.save(tmp_path)
    answers(session, PROMPTS[1:2])
    session.save(tmp_path, with_feedback=False)
    resumed = Session(target, draft, learner=LEARNER)
    with pytest.warns(UserWarning, match="step 2 .* holds no feedback"):
        resumed.resume(tmp_path)
    assert int(resumed.state.traffic.ring.num_added) == 0
    assert_same(resumed.state.trainer, session.state.trainer)


def test_settings_that_were_never_read_do_not_hinder_a_resume():
    ours = LearnerConfig(name="head")
    unread = {"loss": "forward_kl", "optimizer": "", "meta_rate": 1.0, "window": 64}
    older = ours.to_json() | unread
    assert resume.saved_config(older) == ours
    with pytest.warns(UserWarning, match="does not read window"):
        assert resume.saved_config(older | {"window": 8}) == ours


def test_resume_with_other_settings_is_refused(target, draft, tmp_path):
    session = Session(target, draft, learner=LEARNER)
    answers(session, PROMPTS[:1])
    session.save(tmp_path)
    other = dataclasses.replace(LEARNER, learning_rate=1.0)
    with pytest.raises(CheckpointError, match="resume with the same settings"):
        Session(target, draft, learner=other).resume(tmp_path)


def test_a_resumed_session_serves_and_records_the_window_that_it_was_given(
    target, draft, tmp_path
):
    """No array tells which one it was: shipped drafts may get another one."""
    session = Session(target, draft, learner=LEARNER)
    answers(session, PROMPTS[:1])
    session.save(tmp_path)
    windowed = with_sliding_window(draft, 50)
    resumed = Session(target, windowed, learner=LEARNER)
    with pytest.warns(UserWarning, match="sees all tokens .* goes on seeing 50"):
        resumed.resume(tmp_path)
    resumed.save(tmp_path / "again")
    meta = checkpoint.load(tmp_path / "again").meta
    assert meta.draft == windowed.architecture


def test_one_target_pass_a_step_whether_learning_or_not(target, draft, monkeypatch):
    """Every target pass is a prefill chunk or a verification; learning adds none."""

    def count(learner):
        session = Session(target, draft, learner=learner)
        passes = []
        for name in ("compiled", "compiled_prefill"):
            found = getattr(session.engine, name)

            def counted(*key, name=name, found=found):
                function = found(*key)
                return lambda *args: (passes.append(name), function(*args))[1]

            monkeypatch.setattr(session.engine, name, counted)
        results = list(session.generate(PROMPTS[:3], NEW_TOKENS))
        steps = sum(r.stats.num_drafts for r in results)
        # One step may have been sent ahead of a stop token.
        assert steps <= passes.count("compiled") <= steps + len(results)
        return len(passes)

    slow = dataclasses.replace(LEARNER, update_interval=10**6)
    # But for what was sent ahead.
    assert abs(count(None) - count(slow)) <= 3


def test_sampling_without_a_draft_follows_the_seed(target):
    def draw(seed):
        sampling = SamplingConfig(1.0, seed=seed)
        answers = Session(target).generate(PROMPTS[:2], NEW_TOKENS, sampling)
        return [answer.token_ids for answer in answers]

    assert draw(1) == draw(1) != draw(2)


def test_too_long_a_prompt_is_refused_before_anything_is_decoded(target):
    session = Session(target)
    with pytest.raises(PromptTooLongError, match="lower max_new_tokens"):
        next(session.generate(["short", "long " * 200], NEW_TOKENS))


def test_stop_string_ends_and_trims_the_answer(target, draft):
    session = Session(target, draft, learner=LEARNER)
    whole = next(session.generate(PROMPTS[:1], NEW_TOKENS))
    text = whole.text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    stopped = Session(target, draft, learner=LEARNER, stop=(stop,))
    result = next(stopped.generate(PROMPTS[:1], NEW_TOKENS))
    assert result.finish_reason == "stop"
    assert stop not in result.text
    assert text.startswith(result.text)
    assert whole.token_ids[: len(result.token_ids)] == result.token_ids
    # What was trimmed is not learned from either.
    assert int(stopped.state.trainer.num_waiting) == len(result.token_ids)


def test_streamed_text_adds_up(target, draft):
    session = Session(target, draft, tree=TreeConfig(num_steps=3))
    pieces = []
    results = list(
        session.generate(PROMPTS[:1], NEW_TOKENS, on_text=lambda _, t: pieces.append(t))
    )
    assert "".join(pieces) == results[0].text


def test_collapsed_acceptance_warns(target, draft, plain, monkeypatch):
    # Random weights may end most answers early: how early differs between machines.
    monkeypatch.setattr("ospec_jax.session.session._COLLAPSE_STEPS", 40)
    never = max(set(range(target.config.vocab_size)) - set(sum(plain, [])))
    wrong = np.full_like(draft.draft.token_ids, never)
    useless = LoadedDraft(draft.draft.replace(token_ids=wrong), draft.meta)
    session = Session(target, useless, ngrams=False)
    with pytest.warns(UserWarning, match="mean acceptance length is 1.0"):
        list(session.generate(PROMPTS, NEW_TOKENS))


# `decoding/test_exactness.py` holds by how many tokens.
@pytest.mark.thorough
def test_predicted_answers_come_faster(target, draft, plain):
    """Somewhat: random bytes are no text, so little of it is the answer's own."""
    texts = [r.text for r in Session(target).generate(PROMPTS[:2], NEW_TOKENS)]
    for drafted in (draft, load_draft("prediction", target)):
        session = Session(target, drafted, ngrams=False)
        assert answers(session, PROMPTS[:2]) == plain[:2]
        before, session.stats = session.stats, DecodingStats(num_spec_tokens=12)
        results = session.generate(PROMPTS[:2], NEW_TOKENS, predictions=texts)
        assert [r.token_ids for r in results] == plain[:2]
        length = session.stats.mean_acceptance_length
        assert length > before.mean_acceptance_length


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
def test_counts_go_on_after_a_look_at_them(target, draft, monkeypatch):
    monkeypatch.setattr("ospec_jax.session.session._COLLAPSE_STEPS", 1)
    session = Session(target, draft, ngrams=False)
    results = list(session.generate(PROMPTS[:3], NEW_TOKENS))
    counts = [result.stats.num_drafts for result in results]
    assert session.stats.num_drafts == sum(counts) > max(counts)


@pytest.mark.crossed
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["prediction", "suffix"])
@pytest.mark.usefixtures("own_programs")
def test_nothing_is_compiled_after_warming_up(target, name, batch_size):
    """Not even what runs only once a prediction, or memory, has proved right."""
    session = Session(target, load_draft(name, target), batch_size=batch_size)
    has_predictions = name == "prediction"
    session.warm_up(has_predictions=has_predictions)
    count = lambda: {
        action: session.engine.compiled(action, "greedy")._cache_size()
        for action in session.engine.actions
    }
    before = count()
    [longer] = [action for action in before if action.drafter == SUGGESTIONS]
    assert before[longer] == 1
    texts = [r.text for r in session.generate(PROMPTS[:2], NEW_TOKENS)]
    predictions = texts if has_predictions else None
    list(session.generate(PROMPTS[:2], NEW_TOKENS, predictions=predictions))
    assert count() == before


def test_predictions_need_a_draft(target):
    with pytest.raises(ConfigError, match="give it a draft"):
        next(Session(target).generate(["a"], predictions=["b"]))


def test_session_without_draft_has_nothing_to_save(target, tmp_path):
    with pytest.raises(CheckpointError, match="no draft"):
        Session(target).save(tmp_path)
    assert checkpoint.steps(tmp_path) == []


def test_prompts_are_known_by_their_content_behind_a_resume(target, draft, tmp_path):
    learner = LearnerConfig(name="memory")
    session = Session(target, draft, learner=learner)
    answers(session, PROMPTS[:2])
    answers(session, PROMPTS[2:4])
    assert session.answered == [f"prompt-{i}" for i in range(4)]
    session.save(tmp_path)

    resumed = Session(target, draft, learner=learner)
    resumed.resume(tmp_path)
    left = resumed.unanswered(["another", *PROMPTS[1:3]])
    assert [(prompt.id, prompt.text) for prompt in left] == [("prompt-4", "another")]
    named = [{"id": f"row-{i}", "prompt": text} for i, text in enumerate(PROMPTS[1:3])]
    with pytest.warns(UserWarning, match="2 prompts are there under other names"):
        assert resumed.unanswered(named) == []


def test_a_checkpoint_without_contents_knows_prompts_by_name(target, draft, tmp_path):
    learner = LearnerConfig(name="memory")
    session = Session(target, draft, learner=learner)
    answers(session, [{"id": "a", "prompt": "one"}])
    session._move_on(contents=())  # as an older version saves
    session.save(tmp_path)
    resumed = Session(target, draft, learner=learner)
    resumed.resume(tmp_path)
    answers(resumed, [{"id": "b", "prompt": "two"}])
    rows = [{"id": name, "prompt": "other"} for name in ("a", "b", "c")]
    with pytest.warns(UserWarning, match="1 prompts have names .* the first is 'b'"):
        left = [prompt.id for prompt in resumed.unanswered(rows)]
    assert left[0].startswith("b-")
    assert left[1:] == ["c"]


def test_a_session_that_serves_for_long_forgets_old_reports(target, draft, monkeypatch):
    monkeypatch.setattr(session_module, "_MAX_REPORTS", 1)
    session = Session(target, draft, learner=LEARNER)
    told = []
    session.on_update = lambda report, *_: told.append(report)
    answers(session)
    assert len(told) > 1
    assert session.reports == told[-1:]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_is_dropped_is_answered_as_it_would_have_been(target, draft, batch_size):
    learner = LearnerConfig(name="memory")
    sampling = SamplingConfig(temperature=1.0, seed=3)
    make = lambda: Session(target, draft, learner=learner, batch_size=batch_size)
    straight = list(make().generate(PROMPTS[:4], NEW_TOKENS, sampling))

    asked = []

    def is_late():
        asked.append(1)
        return len(asked) > 40

    session = make()
    found = list(
        session.generate(PROMPTS[:4], NEW_TOKENS, sampling, should_stop=is_late)
    )
    assert 0 < len(found) < 4
    assert len(asked) == 41
    assert session.answered == [r.prompt.id for r in found]
    if batch_size == 1:
        rest = session.generate(PROMPTS[len(found) : 4], NEW_TOKENS, sampling)
        found += rest
        assert [r.token_ids for r in found] == [r.token_ids for r in straight]
        assert session.num_admitted == 4
    else:
        # Neighbours have taught since: numbers of dropped requests never come again.
        assert session.num_admitted > len(found)
