# SPDX-License-Identifier: Apache-2.0
"""Several answers of one request read its prompt once, and are what they were."""

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import SamplingConfig
from ospec_jax.decoding.request import Request
from ospec_jax.serving.service import CompileCounter
from ospec_jax.session.live import Live
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

MIB = 2**20
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=1.0)
NUM_PROMPT = 150
NUM_CHUNKS = 3


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def live_of(target, batch_size=4, kept_bytes=0, capacities=(256, 512), **options):
    # It looks back no farther than at the last 24 tokens.
    draft = random_head(target, sliding_window=24)
    tree = TreeConfig(num_steps=2)
    session = Session(target, draft, tree=tree, batch_size=batch_size, **options)
    return Live(session, capacities, kept_bytes=kept_bytes)


def text(seed, length=NUM_PROMPT):
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(3, 250, length).tolist())


def choices_of(ids, count, sampling=GREEDY, seed=None, **options):
    return [
        Request(str(i), ids, 20 + i, sampling, seed=seed, choice=i, **options)
        for i in range(count)
    ]


def finish(live, waiting=()):
    """Runs until nobody is left; the answers by id."""
    waiting = list(waiting)
    found = {}
    while waiting or not live.is_idle:
        while waiting and live.num_free:
            live.join(waiting.pop(0))
        found |= {done.request.id: done for done in live.turn()}

    return found


def one_by_one(target, requests):
    """Each alone in its batch, whose prompt nobody else has run."""
    live = live_of(target, batch_size=1)
    return {id: done.token_ids for id, done in finish(live, requests).items()}


def tokens_of(found):
    return {id: done.token_ids for id, done in found.items()}


def count_chunks(live, monkeypatch):
    """A list that grows with each chunk of a prompt that is run."""
    engine = live._session.engine
    read_on = engine.read_on
    chunks = []

    def watch(draft, reading):
        chunks.append(reading.request.id)
        return read_on(draft, reading)

    monkeypatch.setattr(engine, "read_on", watch)
    return chunks


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("sampling", "seed"), [(GREEDY, None), (SAMPLED, 7), (SAMPLED, None)]
)
@pytest.mark.parametrize("kept_bytes", [0, 64 * MIB])
def test_a_prompt_is_read_once_and_answers_stay_the_same(
    target, monkeypatch, sampling, seed, kept_bytes
):
    requests = choices_of(text(0), 4, sampling, seed)
    live = live_of(target, kept_bytes=kept_bytes)
    chunks = count_chunks(live, monkeypatch)
    found = finish(live, requests)
    assert tokens_of(found) == one_by_one(target, requests)
    # Each has a first token of its own, for which the prompt's last one is run.
    assert chunks == ["0"] * NUM_CHUNKS + ["1", "2", "3"]
    reused = [found[one.id].num_reused for one in requests]
    assert reused == [0] + [NUM_PROMPT - 1] * 3
    if sampling is SAMPLED:
        assert len({tuple(ids[:20]) for ids in tokens_of(found).values()}) == 4


@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("int8", marks=pytest.mark.thorough)]
)
def test_what_is_taken_over_has_the_bits_of_what_is_run(precision):
    target = tiny_target(precision=precision)
    requests = choices_of(text(1), 3, SAMPLED, seed=3)
    learner = LearnerConfig("gradient", update_every_prompts=100)
    live = live_of(target, learner=learner)
    found = finish(live, requests)
    alone = finish(live_of(target, batch_size=1, learner=learner), requests)
    assert tokens_of(found) == tokens_of(alone)
    for one in requests:
        length = found[one.id].num_recorded
        pair = (done[one.id].feedback for done in (found, alone))
        for own, other in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_array_equal(own[:, :length], other[:, :length])


def test_rows_that_become_free_one_by_one_are_enough(target, monkeypatch):
    requests = choices_of(text(2), 5)
    live = live_of(target, batch_size=2)
    chunks = count_chunks(live, monkeypatch)
    other = Request("other", text(3, 20), 12)
    # A neighbour has one of the rows at first.
    found = finish(live, [other, *requests])
    assert tokens_of(found) == one_by_one(target, [other, *requests])
    assert len(chunks) == 1 + NUM_CHUNKS + 4


@pytest.mark.parametrize("num_turns", [1, 2, NUM_CHUNKS, NUM_CHUNKS + 1])
def test_whoever_leaves_takes_nothing_from_the_others(target, num_turns):
    """The first in the middle of the prompt, or behind it; then another one."""
    requests = choices_of(text(4), 4)
    expected = one_by_one(target, requests)
    live = live_of(target)
    for one in requests:
        live.join(one)
    found = {}
    for _ in range(num_turns):
        found |= {done.request.id: done for done in live.turn()}

    assert live.leave(requests[0])
    assert live.leave(requests[2])
    found |= finish(live)
    assert tokens_of(found) == {id: expected[id] for id in ("1", "3")}
    # Somebody has to run it: the second one, unless it had begun.
    assert (found["1"].num_reused == 0) == (num_turns <= NUM_CHUNKS)
    assert found["3"].num_reused == NUM_PROMPT - 1


def test_no_scope_takes_over_what_another_one_has_read(target, monkeypatch):
    ids = text(5)
    requests = [Request(str(i), ids, 20, scope=i // 2) for i in range(4)]
    live = live_of(target)
    chunks = count_chunks(live, monkeypatch)
    found = finish(live, requests)
    assert tokens_of(found) == one_by_one(target, requests)
    assert chunks == ["0"] * NUM_CHUNKS + ["1"] + ["2"] * NUM_CHUNKS + ["3"]


def test_what_was_forgotten_or_written_by_another_draft_is_not_taken_over(
    target, monkeypatch
):
    session_changes = (
        lambda session: session.forget_traffic(),
        lambda session: session.begin_again(
            jax.tree.map(lambda x: x + 0, session.draft)
        ),
    )
    for change in session_changes:
        live = live_of(target)
        chunks = count_chunks(live, monkeypatch)
        for one in choices_of(text(6), 2):
            live.join(one)
        for _ in range(NUM_CHUNKS):
            live.turn()
        change(live._session)
        finish(live)
        assert chunks == ["0"] * NUM_CHUNKS + ["1"] * NUM_CHUNKS


def test_a_short_prompt_is_run_by_each(target, monkeypatch):
    requests = choices_of(text(7, 60), 2)
    live = live_of(target)
    monkeypatch.setattr(
        live._session.engine, "keep", lambda *args: pytest.fail("copied for nothing")
    )
    found = finish(live, requests)
    assert tokens_of(found) == one_by_one(target, requests)
    assert [found[one.id].num_reused for one in requests] == [0, 0]


# Where rows are kept there are more programs.
@pytest.mark.parametrize(
    "kept_bytes", [pytest.param(0, marks=pytest.mark.thorough), 64 * MIB]
)
def test_nothing_is_compiled_for_it(target, kept_bytes):
    live = live_of(target, kept_bytes=kept_bytes, capacities=(256,))
    live.warm_up(["greedy"])
    compiles = CompileCounter()
    for length in (NUM_PROMPT, 190):
        found = finish(live, choices_of(text(length, length), 3))
        assert [found[id].num_reused for id in "012"] == [0, length - 1, length - 1]
    assert compiles.count == 0
