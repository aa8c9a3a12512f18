# SPDX-License-Identifier: Apache-2.0
"""What cycles teach, against the record; and policies that learn along a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rules import CLOCK, MENU, SHAPE, made_up_trace

from ospec_jax.control.lessons import (
    LessonConfig,
    build_optimizer,
    build_update,
    lessons_of,
    log_chances,
    log_rate,
)
from ospec_jax.control.policy import Policies, init_layers
from ospec_jax.replay import rules
from ospec_jax.replay.cycles import build_cycles
from ospec_jax.replay.episodes import choices_of, drafted_by, shape_of
from ospec_jax.replay.going_on import cycle_at, run_learning

CONFIG = LessonConfig(learning_rate=5e-3)


@pytest.fixture(scope="module")
def trace():
    return made_up_trace((40, 30))


@pytest.fixture(scope="module")
def cycles(trace):
    return build_cycles(trace, CLOCK, MENU)


@pytest.fixture(scope="module")
def host(cycles):
    return jax.device_get(cycles.replace(clock=None))


def policies(shape, seed=0, gain=1.0, **fixed):
    make = lambda kind, seed, last: init_layers(
        jax.random.key(seed), [shape.num_seen(kind), 16, last], gain
    )
    found = Policies(
        make("depth", seed, 2), make("size", seed + 1, len(shape.sizes)), 1, 0, shape
    )
    return found.replace(**fixed)


def taught_by(shape, host, choices):
    """Lessons of cycles at the first positions, one of each choice."""
    rows = [cycle_at(host, i, d, s) for i, (d, s) in enumerate(choices)]
    told = jax.jit(lessons_of, static_argnums=0)
    return told(shape, np.concatenate(rows), np.ones(len(choices)))


def accepted(trace, position, depth, size):
    kept = trace.kept(position, depth, size)
    return int(np.sum(trace.is_right[position][kept]))


def test_deep_cycles_tell_of_all_choices(trace, cycles, host):
    """However little of them is verified, unless what is right was left out."""
    for size in range(len(MENU)):
        lessons = taught_by(shape_of(cycles), host, [(SHAPE.depth, size)] * 30)
        assert np.all(lessons.is_known)
        found = np.asarray(lessons.emitted) - 1
        wanted = [
            [[accepted(trace, i, d, count) for count in MENU] for d in (1, 2, 3)]
            for i in range(30)
        ]
        assert np.all(found <= wanted)
        # At least what was accepted, and one node more, is told.
        least = [accepted(trace, i, SHAPE.depth, MENU[size]) + 1 for i in range(30)]
        told = np.minimum(wanted, np.asarray(least)[:, None, None])
        np.testing.assert_array_equal(found, told)
        if size == len(MENU) - 1:
            assert np.mean(found == wanted) > 0.97


def test_what_is_known_is_what_was_drafted(cycles, host):
    shape = shape_of(cycles)
    choices = [(d, s) for d in (1, 2, 3) for s in range(len(MENU))]
    lessons = taught_by(shape, host, choices)
    for i, (depth, _) in enumerate(choices):
        known = np.broadcast_to(np.arange(1, 4)[:, None] <= depth, (3, len(MENU)))
        np.testing.assert_array_equal(lessons.is_known[i], known)


def test_chances_are_those_of_the_policies_asked_one_by_one(cycles):
    shape = shape_of(cycles)
    asked = policies(shape, 5)
    found = log_chances(asked, cycles.scores, cycles.contexts)
    total = jax.nn.logsumexp(found, axis=(1, 2))
    np.testing.assert_allclose(total, 0.0, atol=1e-5)

    # Of policies that are sure, the choice is theirs.
    sure = jax.tree.map(lambda x: 200.0 * x, asked)
    found = log_chances(sure, cycles.scores, cycles.contexts)
    best = np.argmax(found.reshape(len(found), -1), axis=1)
    depth, size = np.divmod(best, len(MENU))
    is_sure = np.max(np.exp(found), axis=(1, 2)) > 0.9
    chosen = choices_of(sure, cycles)
    assert np.mean(is_sure) > 0.5
    np.testing.assert_array_equal((depth + 1)[is_sure], chosen.depth[is_sure])
    np.testing.assert_array_equal(size[is_sure], chosen.size[is_sure])


def test_the_rate_is_all_tokens_over_all_seconds(cycles, host):
    shape = shape_of(cycles)
    seconds = np.random.default_rng(1).uniform(1, 2, (SHAPE.depth, len(MENU)))
    lessons = taught_by(shape, host, [(2, 2), (3, 3), (1, 0)])
    lessons = lessons.replace(weight=jnp.asarray([1.0, 1.0, 0.0]))
    chances = log_chances(policies(shape, 2), lessons.scores, lessons.context)
    tokens = taken = 0.0
    for i in range(2):
        known = np.asarray(lessons.is_known[i])
        weight = np.exp(np.asarray(chances[i], np.float64)) * known
        weight /= weight.sum()
        tokens += (weight * np.asarray(lessons.emitted[i])).sum()
        taken += (weight * seconds).sum()
    found = float(log_rate(chances, lessons, seconds))
    assert np.exp(found) == pytest.approx(tokens / taken, rel=1e-5)


def test_updates_reach_what_pays_most(cycles, host):
    """Policies that see nothing of use still find the best fixed choice."""
    shape = shape_of(cycles)
    lessons = taught_by(shape, host, [(SHAPE.depth, len(MENU) - 1)] * 60)
    lessons = lessons.replace(
        scores=jnp.full_like(lessons.scores, -1.0),
        context=jnp.full_like(lessons.context, 9),
    )
    seconds = 1.0 + 0.2 * np.arange(SHAPE.depth)[:, None] + 0.1 * np.arange(len(MENU))
    config = LessonConfig(num_gradients=400, learning_rate=1e-2, entropy=0.0)
    asked = policies(shape, 3, 0.1)
    state = build_optimizer(config).init(asked)
    update = jax.jit(build_update(config))
    taught, _, rate = update(asked, state, lessons, seconds)
    rates = np.sum(np.asarray(lessons.emitted), 0) / 60 / seconds
    assert np.exp(float(rate)) == pytest.approx(rates.max(), rel=0.02)
    depth, size = np.unravel_index(np.argmax(rates), rates.shape)
    deep = drafted_by(taught, lessons.scores, lessons.context)
    assert set(np.asarray(deep).tolist()) == {depth + 1}
    chosen = taught.size_for(lessons.scores, deep, lessons.context)
    assert set(np.asarray(chosen).tolist()) == {size}


@pytest.mark.parametrize("kind", ["depth", "size"])
def test_one_policy_alone_learns_beside_a_fixed_choice(cycles, host, kind):
    shape = shape_of(cycles)
    asked = policies(shape, 3, **{kind: None, "fixed_depth": 2, "fixed_size": 1})
    lessons = taught_by(shape, host, [(SHAPE.depth, len(MENU) - 1)] * 40)
    seconds = np.ones((SHAPE.depth, len(MENU)))
    state = build_optimizer(CONFIG).init(asked)
    taught, _, rate = jax.jit(build_update(CONFIG))(asked, state, lessons, seconds)
    leaves = jax.tree.leaves(taught)
    assert np.isfinite(rate)
    assert all(np.isfinite(x).all() for x in leaves)
    pairs = zip(leaves, jax.tree.leaves(asked), strict=True)
    changed = [np.any(a != b) for a, b in pairs]
    assert any(changed)


def test_cycles_that_tell_nothing_change_nothing(cycles, host):
    """Of one known choice each there is nothing to learn, and no NaN."""
    shape = shape_of(cycles)
    lessons = taught_by(shape, host, [(1, 0)] * 8)
    config = LessonConfig(entropy=0.0)
    asked = policies(shape, 3, size=None)
    seconds = np.ones((SHAPE.depth, len(MENU)))
    state = build_optimizer(config).init(asked)
    taught, _, _ = jax.jit(build_update(config))(asked, state, lessons, seconds)
    for a, b in zip(jax.tree.leaves(taught), jax.tree.leaves(asked), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_learning_along_a_trace_is_ahead_of_standing_still():
    """It begins with policies that nobody taught."""
    stream = build_cycles(made_up_trace((60,) * 30, 4), CLOCK, MENU)
    shape = shape_of(stream)
    asked = policies(shape, 9, 0.01)
    still = rules.run_choices(stream, choices_of(asked, stream), "still")
    trail = run_learning(stream, asked, CONFIG, interval=32)
    assert trail.state.num_updates > 10
    later = slice(15, None)
    rate = trail.tokens[later].sum() / trail.seconds[later].sum()
    assert rate > 1.2 * still.tokens_per_second
    assert trail.tokens.sum() == stream.num_positions
    again = run_learning(stream, asked, CONFIG, interval=32)
    assert again.score == trail.score


def test_without_updates_it_is_the_policies_and_deep_cycles(cycles):
    shape = shape_of(cycles)
    asked = policies(shape, 1)
    config = LessonConfig(deep_every=10**6)
    trail = run_learning(cycles, asked, config, interval=10**6)
    still = rules.run_choices(cycles, choices_of(asked, cycles), "")
    # The first cycles are deep ones: nothing was counted yet.
    assert abs(trail.score.num_cycles - still.num_cycles) < 4
    assert trail.state.num_updates == 0
