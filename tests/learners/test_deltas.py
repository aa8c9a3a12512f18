# SPDX-License-Identifier: Apache-2.0
"""The rule of scopes' own differences: its step, its directions, and whose they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import ConfigError, LearnerConfig
from ospec_jax.drafters.deltas import rows_of
from ospec_jax.learners import deltas as rule
from ospec_jax.learners.projection import HeadSamples, HeadSampling

WIDTH, VOCAB, RANK, NUM_SEEN = 12, 9, 3, 16
ADA, BOB = 5, 7

learn = jax.jit(rule.learn)


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.setattr(rule, "_NUM_SEEN", NUM_SEEN)


def scope(number):
    return jnp.int32(number)


def started(*owners):
    deltas = rule.init_deltas(RANK, WIDTH, VOCAB)
    for owner in owners:
        deltas = rule.claim(deltas, scope(owner))
    return deltas


def drawn(seed, num=NUM_SEEN, labels=None, **values):
    """Inputs of a few directions, with logits that know nothing of the labels."""
    rng = np.random.default_rng(seed)
    # They have a mean, as real ones do.
    inputs = (1 + rng.normal(size=(num, RANK))) @ rng.normal(size=(RANK, WIDTH))
    labels = rng.integers(0, VOCAB, num) if labels is None else labels
    return HeadSamples(
        inputs=jnp.asarray(inputs, jnp.float32),
        logits=jnp.asarray(0.1 * rng.normal(size=(num, VOCAB)), jnp.float32),
        labels=jnp.asarray(labels, jnp.int32),
        is_real=jnp.ones(num, bool),
        **values,
    )


def place_of(deltas, owner):
    (place,) = np.flatnonzero(np.asarray(deltas.owners) == owner)
    return jax.tree.map(lambda x: np.asarray(x[place], float), deltas)


def test_nothing_is_learned_before_enough_was_seen():
    deltas = learn(started(ADA), scope(ADA), drawn(0, NUM_SEEN - 1))
    own = place_of(deltas, ADA)
    assert own.num_seen == NUM_SEEN - 1
    assert not own.shifts.any()
    assert not own.directions.any()
    # Those that are no samples are no inputs, either.
    padded = drawn(1, 4).replace(is_real=jnp.asarray([False, True, False, False]))
    own = place_of(learn(deltas, scope(ADA), padded), ADA)
    assert own.num_seen == NUM_SEEN
    assert own.directions.any()
    np.testing.assert_array_equal(own.seen[-1], padded.inputs[1])


def test_directions_are_those_of_most_energy_and_alike():
    samples = drawn(2)
    own = place_of(learn(started(ADA), scope(ADA), samples), ADA)
    inputs = np.asarray(samples.inputs, float)
    _, _, axes = np.linalg.svd(inputs)
    # All inputs lie in as many directions as there are, so nothing of them is lost.
    left = inputs - inputs @ np.linalg.pinv(own.directions) @ own.directions
    assert np.abs(left).max() < 1e-4
    for axis, direction in zip(axes[:RANK], own.directions, strict=True):
        cosine = axis @ direction / np.linalg.norm(direction)
        assert abs(cosine) == pytest.approx(1, abs=1e-4)
    energy = np.mean((inputs @ own.directions.T) ** 2, axis=0)
    assert energy.max() < 1.0
    assert energy.min() > 0.3


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_a_step_moves_a_samples_logits_by_its_error(temperature):
    sampling = None if temperature is None else HeadSampling(jnp.float32(temperature))
    deltas = learn(started(ADA), scope(ADA), drawn(3, sampling=sampling))
    sample = drawn(3, 1, sampling=sampling)
    before = place_of(deltas, ADA)
    after = place_of(learn(deltas, scope(ADA), sample), ADA)

    x = np.asarray(sample.inputs[0], float) @ before.directions.T
    scale = temperature or 1.0
    logits = (np.asarray(sample.logits[0], float) + x @ before.shifts) / scale
    error = np.exp(logits) / np.exp(logits).sum()
    error[int(sample.labels[0])] -= 1
    steps = scale / np.sqrt(1 + 0.999 * before.energy / rule._PATIENCE)
    moved = x @ after.shifts - x @ before.shifts
    np.testing.assert_allclose(moved, -steps * error, rtol=1e-4, atol=1e-6)
    expected = 0.999 * before.energy + error**2
    np.testing.assert_allclose(after.energy, expected, rtol=1e-4, atol=1e-6)


def test_a_token_outside_the_vocabulary_pulls_nothing_up():
    deltas = learn(started(ADA), scope(ADA), drawn(4))
    outside = drawn(5, 1, labels=[-1])
    before, after = (
        place_of(d, ADA) for d in (deltas, learn(deltas, scope(ADA), outside))
    )
    x = np.asarray(outside.inputs[0], float) @ before.directions.T
    assert (x @ (after.shifts - before.shifts) < 0).all()


def test_what_a_scope_says_is_learned_and_drafts_once_it_is_right():
    deltas = started(ADA, BOB)
    rows = jnp.asarray([ADA, BOB, 0, 3])
    for turn in range(12):
        deltas = learn(deltas, scope(ADA), drawn(6, labels=[4] * NUM_SEEN))
        # Before it was asked it does not draft.
        if turn == 0:
            assert not np.asarray(rows_of(deltas, rows).shifts).any()

    samples = drawn(6)
    found = rows_of(deltas, rows)
    shifts = np.asarray(found.shifts)
    assert shifts[0].any()
    assert not shifts[1:].any()
    x = np.asarray(samples.inputs) @ np.asarray(found.directions[0]).T
    logits = np.asarray(samples.logits) + x @ shifts[0]
    assert (logits.argmax(axis=1) == 4).mean() > 0.9
    assert float(place_of(deltas, ADA).leads) > 0
    # Once the shared draft is right and it is not, it drafts no more, and learns on.
    right = drawn(6).replace(
        labels=jnp.full(NUM_SEEN, 2),
        logits=jnp.zeros((NUM_SEEN, VOCAB)).at[:, 2].set(1),
    )
    own = place_of(deltas, ADA)
    x = np.asarray(right.inputs, float) @ own.directions.T
    with_own = (np.asarray(right.logits) + x @ own.shifts).argmax(axis=1) == 2
    behind = place_of(learn(deltas, scope(ADA), right), ADA)
    expected = 0.9 * own.leads + with_own.sum() - NUM_SEEN
    assert behind.leads == pytest.approx(expected, rel=1e-5)
    assert with_own.sum() < NUM_SEEN
    deltas = deltas.replace(leads=-jnp.abs(deltas.leads))
    assert not np.asarray(rows_of(deltas, rows).shifts).any()


def test_others_places_stay_bitwise():
    deltas = learn(started(ADA, BOB), scope(BOB), drawn(8))
    before = place_of(deltas, BOB)
    after = place_of(learn(deltas, scope(ADA), drawn(9)), BOB)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_what_would_not_be_finite_is_not_learned():
    deltas = learn(started(ADA), scope(ADA), drawn(10))
    bad = drawn(11, 1)
    bad = bad.replace(inputs=bad.inputs.at[0, 0].set(jnp.nan))
    after = learn(deltas, scope(ADA), bad)
    same = jax.tree.map(np.array_equal, deltas, after)
    assert jax.tree.all(same)


def test_who_was_not_heard_of_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(rule, "NUM_PLACES", 2)
    deltas = started(ADA)
    deltas = learn(deltas, scope(ADA), drawn(12))
    deltas = rule.claim(deltas, scope(BOB))
    assert place_of(deltas, ADA).shifts.any()
    deltas = rule.claim(deltas, scope(ADA))
    deltas = rule.claim(deltas, scope(9))
    assert sorted(np.asarray(deltas.owners)) == [ADA, 9]
    assert place_of(deltas, ADA).shifts.any()
    assert not place_of(deltas, 9).shifts.any()
    deltas = rule.claim(deltas, scope(BOB))
    assert sorted(np.asarray(deltas.owners)) == [BOB, 9]
    # Nothing is left of who had the place before.
    assert not any(x.any() for x in jax.tree.leaves(place_of(deltas, BOB))[2:])


def test_a_forgotten_scope_leaves_nothing():
    deltas = started(ADA, BOB)
    for owner in (ADA, BOB):
        deltas = learn(deltas, scope(owner), drawn(13))
    is_gone = jnp.zeros(257, bool).at[jnp.asarray([0, ADA])].set(True)
    left = rule.forget(deltas, is_gone)
    assert ADA not in np.asarray(left.owners)
    assert place_of(left, BOB).shifts.any()
    count = lambda tree: sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(tree))
    assert count(left) == count(place_of(left, BOB))


def test_a_rank_is_a_whole_number():
    with pytest.raises(ConfigError, match="delta_rank is -1"):
        LearnerConfig("head", delta_rank=-1)
