# SPDX-License-Identifier: Apache-2.0
"""LTD's episodes on made-up trees, against the trace's own accounting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rules import CLOCK, MENU, SHAPE, made_up_trace

from ospec_jax.config import ConfigError
from ospec_jax.control.clock import flat_clock
from ospec_jax.control.policy import (
    CONTINUE,
    STOP,
    Policies,
    PolicyShape,
    init_layers,
    newest_of,
    see_depth,
    see_size,
)
from ospec_jax.replay import episodes, rules
from ospec_jax.replay.cycles import Choice, build_cycles, verify

LENGTHS = (9, 2, 14)
POLICY_SHAPE = PolicyShape(SHAPE.topk, SHAPE.depth, MENU)


@pytest.fixture(scope="module")
def trace():
    return made_up_trace(LENGTHS)


@pytest.fixture(scope="module")
def cycles(trace):
    return build_cycles(trace, CLOCK, MENU)


def policies(seed=None, depth=2, size=1):
    """Networks that answer arbitrarily, or with a seed of None always the same."""
    if seed is None:
        return Policies(None, None, depth, size, POLICY_SHAPE)
    make = lambda kind, seed, last: init_layers(
        jax.random.key(seed), [POLICY_SHAPE.num_seen(kind), 16, last], 1.0
    )
    return Policies(
        make("depth", seed, 2), make("size", seed + 1, len(MENU)), 1, 0, POLICY_SHAPE
    )


def world(cycles, rate=1.0, **kwargs):
    return episodes.World(cycles, policies(**kwargs), jnp.float32(rate))


def walk(env, world, actions, seed=0):
    """States before each step, and what each came to."""
    state, seen = env.reset(world, jax.random.key(seed))

    def body(carry, action):
        state, seen = carry
        following, next_seen, reward, is_done = env.step(world, state, action)
        return (following, next_seen), (state, seen, reward, is_done)

    return jax.jit(lambda: jax.lax.scan(body, (state, seen), jnp.asarray(actions)))()[1]


def seconds_at(trace, position, depth, size):
    rows = 1 + min(MENU[size], SHAPE.first_place(depth + 1))
    return float(CLOCK.seconds(depth, rows if depth else 1, trace.contexts[position]))


def test_the_depth_is_paid_when_drafting_stops(trace, cycles):
    actions = np.random.default_rng(1).integers(0, 2, 400)
    env = episodes.depth_env(POLICY_SHAPE)
    states, _, rewards, is_done = walk(env, world(cycles, size=2), actions)
    positions = np.asarray(states.place.position)
    depths = np.asarray(states.depth)
    ends = np.cumsum(LENGTHS)
    deep = 0

    for i, action in enumerate(actions[:-1]):
        depth = depths[i] + (action == CONTINUE)
        over = action == STOP or depth == SHAPE.depth
        assert is_done[i] == over
        if not over:
            assert rewards[i] == 0
            assert (positions[i + 1], depths[i + 1]) == (positions[i], depth)
            continue
        emitted = len(trace.emitted(positions[i], depth, MENU[2]))
        plain = seconds_at(trace, positions[i], 0, 0)
        took = seconds_at(trace, positions[i], depth, 2)
        np.testing.assert_allclose(rewards[i], emitted / took * plain, rtol=1e-5)
        assert depths[i + 1] == 1
        if positions[i] + emitted in ends:
            assert positions[i + 1] in trace.starts
        else:
            assert positions[i + 1] == positions[i] + emitted
        deep += depth == SHAPE.depth
    assert deep > 10


def test_the_size_is_paid_at_once(trace, cycles):
    actions = np.random.default_rng(2).integers(0, len(MENU), 300)
    env = episodes.size_env(POLICY_SHAPE)
    states, seen, rewards, is_done = walk(env, world(cycles), actions)
    assert np.all(is_done)
    depths = np.asarray(states.depth)
    for i, action in enumerate(actions):
        position = int(states.place.position[i])
        emitted = len(trace.emitted(position, depths[i], MENU[action]))
        plain = seconds_at(trace, position, 0, 0)
        took = seconds_at(trace, position, depths[i], action)
        np.testing.assert_allclose(rewards[i], emitted / took * plain, rtol=1e-5)
        wanted = see_size(
            POLICY_SHAPE, cycles.scores[position], depths[i], cycles.contexts[position]
        )
        np.testing.assert_array_equal(seen[i], wanted)
    # Drawn evenly.
    counts = np.bincount(depths, minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 70


def test_the_size_may_be_taught_at_one_depth_or_at_a_policys(cycles):
    actions = np.zeros(40, int)
    deepest = episodes.size_env(POLICY_SHAPE, drafting="deepest")
    states = walk(deepest, world(cycles), actions)[0]
    assert set(np.asarray(states.depth).tolist()) == {SHAPE.depth}

    followed = episodes.size_env(POLICY_SHAPE, drafting="policy")
    taught = world(cycles, seed=4)
    states = walk(followed, taught, actions)[0]
    all_choices = episodes.choices_of(taught.policies, cycles)
    np.testing.assert_array_equal(
        states.depth, all_choices.depth[states.place.position]
    )
    assert len(set(np.asarray(states.depth).tolist())) > 1


@pytest.mark.parametrize("kind", ["length", "time", "surplus"])
def test_other_rewards(trace, cycles, kind):
    env = episodes.size_env(POLICY_SHAPE, kind, "deepest")
    states, _, rewards, _ = walk(env, world(cycles, rate=0.7), np.full(30, 3))
    for position, reward in zip(states.place.position, rewards, strict=True):
        emitted = len(trace.emitted(int(position), SHAPE.depth, MENU[3]))
        took = seconds_at(trace, int(position), SHAPE.depth, 3)
        plain = seconds_at(trace, int(position), 0, 0)
        wanted = {
            "length": emitted,
            "time": -took / plain,
            "surplus": emitted - 0.7 * took,
        }[kind]
        np.testing.assert_allclose(reward, wanted, rtol=1e-5, atol=1e-5)


def test_many_episodes_at_once(cycles):
    """Under vmap and scan; each goes on by itself."""
    env = episodes.depth_env(POLICY_SHAPE)
    one = functools.partial(walk, env, world(cycles, seed=3), np.tile([1, 0, 0], 20))
    keys = (0, 1, 2)
    together = jax.vmap(lambda key: _positions(env, world(cycles, seed=3), key))(
        jnp.stack([jax.random.key(k) for k in keys])
    )
    for i, seed in enumerate(keys):
        np.testing.assert_array_equal(together[i], one(seed=seed)[0].place.position)


def _positions(env, world, key):
    state, _ = env.reset(world, key)

    def body(state, action):
        return env.step(world, state, action)[0], state.place.position

    return jax.lax.scan(body, state, jnp.tile(jnp.asarray([1, 0, 0]), 20))[1]


def test_policies_see_what_was_drafted_and_no_more(trace, cycles):
    """Worked out anew, node by node."""
    position, context = 5, int(trace.contexts[5])
    for depth in (1, 2, 3):
        first, last = SHAPE.first_place(depth), SHAPE.first_place(depth + 1)
        newest = newest_of(POLICY_SHAPE, cycles.scores[position], depth)
        level = np.pad(trace.scores[position, first:last], (0, 4 - (last - first)))
        seen = see_depth(newest, depth, jnp.int32(context))
        np.testing.assert_allclose(
            seen, [*np.maximum(level, -20), context / 1000, depth / 10], rtol=1e-6
        )
        scores = np.where(SHAPE.depths <= depth, trace.scores[position], 0.0)
        seen = see_size(
            POLICY_SHAPE, cycles.scores[position], depth, jnp.int32(context)
        )
        np.testing.assert_allclose(
            seen, [*np.maximum(scores, -20), context / 1000, depth / 10], rtol=1e-6
        )


def test_the_paper_sees_as_many_numbers():
    """128 and 1268 of the released code's, at its width and depth."""
    shape = PolicyShape(10, 13, tuple(range(20, 260, 20)))
    assert shape.num_places == 10 + 12 * 100
    assert (shape.num_seen("depth"), shape.num_seen("size")) == (128, 1268)


def test_what_policies_chose_is_walked_as_a_rule_is(cycles):
    fixed = episodes.choices_of(policies(depth=2, size=1), cycles)
    score = rules.run_choices(cycles, fixed, "best fixed")
    same = rules.run_rule(cycles, rules.fixed(2, 1, "best fixed"))
    assert score.num_cycles == same.num_cycles
    assert score.tokens_per_second == pytest.approx(same.tokens_per_second)

    chosen = episodes.choices_of(policies(seed=5), cycles)
    score = rules.run_choices(cycles, chosen, "taught")
    position = seconds = count = 0
    while position < cycles.num_positions:
        choice = Choice(chosen.depth[position], chosen.size[position])
        result = verify(cycles, jnp.int32(position), choice)
        seconds += float(result.seconds)
        position += int(result.num_emitted)
        count += 1
    assert score.num_cycles == count
    assert score.tokens_per_second == pytest.approx(cycles.num_positions / seconds)
    assert len(set(np.asarray(chosen.size).tolist())) > 1


def test_trees_of_one_depth_leave_no_choice():
    with pytest.raises(ConfigError, match="record deeper"):
        episodes.depth_env(PolicyShape(4, 1, (1, 4)))


def test_policies_of_other_trees_are_refused(trace):
    cycles = build_cycles(trace, flat_clock(2, 3), (1, 6))
    with pytest.raises(ConfigError, match="sizes \\(1, 6\\)"):
        episodes.check_fits(policies(), cycles)
