# SPDX-License-Identifier: Apache-2.0
"""PPO against plain loops, and on an environment whose best policy is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.control import ppo
from ospec_jax.control.policy import run_layers
from ospec_jax.control.ppo import Env, PpoConfig

SMALL = PpoConfig(
    num_steps=8192,
    rollout=256,
    num_envs=16,
    minibatch=64,
    num_epochs=4,
    actor=(16,),
    critic=(16, 8),
)


def test_advantages_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 12, 3))
    is_done = rng.uniform(size=(12, 3)) < 0.3
    last = rng.normal(size=3)
    discount, weight = 0.97, 0.8
    found = ppo.advantages_of(
        *map(jnp.asarray, (rewards, values, is_done, last)), discount, weight
    )
    for e in range(3):
        for t in range(12):
            total, factor = 0.0, 1.0
            for i in range(t, 12):
                following = values[i + 1, e] if i < 11 else last[e]
                following = 0.0 if is_done[i, e] else following
                total += factor * (rewards[i, e] + discount * following - values[i, e])
                if is_done[i, e]:
                    break
                factor *= discount * weight
            np.testing.assert_allclose(found[t, e], total, rtol=1e-5, atol=1e-6)
    assert is_done.any()


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_the_objective_is_clipped(clip):
    rng = np.random.default_rng(1)
    new, old = rng.normal(scale=0.3, size=(2, 40)) - 1
    advantages = rng.normal(size=40)
    found, share = ppo.policy_loss(*map(jnp.asarray, (new, old, advantages)), clip)
    terms = []
    for a, b, advantage in zip(new, old, advantages, strict=True):
        ratio = np.exp(a - b)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        terms.append(min(ratio * advantage, bounded * advantage))
    np.testing.assert_allclose(found, -np.mean(terms), rtol=1e-5)
    outside = [abs(np.exp(a - b) - 1) > clip for a, b in zip(new, old, strict=True)]
    np.testing.assert_allclose(share, np.mean(outside))
    assert 0 < np.mean(outside) < 1

    # What has moved as far as it may has no slope left, where it would go further.
    slope = jax.grad(lambda x: ppo.policy_loss(x, jnp.zeros(2), jnp.ones(2), clip)[0])
    slopes = slope(jnp.asarray([1.0, 0.0]))
    assert slopes[0] == 0 > slopes[1]


def test_values_move_no_further_than_they_may():
    values = jnp.asarray([1.0, 2.0, -3.0])
    old = jnp.asarray([0.5, 1.9, 0.0])
    returns = jnp.asarray([2.0, 2.0, 2.0])
    free = ppo.value_loss(values, old, returns, 0.0)
    np.testing.assert_allclose(free, (1 + 0 + 25) / 3)
    clipped = ppo.value_loss(values, old, returns, 0.2)
    wanted = np.mean([(2 - 0.7) ** 2, 0.0, (2 + 0.2) ** 2])
    np.testing.assert_allclose(clipped, wanted, rtol=1e-6)


def test_the_rate_rises_and_falls():
    config = PpoConfig(num_steps=2048 * 10, warm_up=0.1)
    assert config.num_gradients == 1600
    # With gradients of one size Adam's step is the rate.
    optimizer = optax.chain(ppo.build_optimizer(config))
    params = jnp.zeros(())
    state = optimizer.init(params)
    rates = []
    step = jax.jit(lambda state: optimizer.update(jnp.ones(()), state, params))
    for _ in range(1600):
        change, state = step(state)
        rates.append(-float(change))
    np.testing.assert_allclose(rates[80], 0.5e-3, rtol=1e-3)
    np.testing.assert_allclose(rates[160], 1e-3, rtol=1e-3)
    np.testing.assert_allclose(rates[880], 0.5e-3, rtol=1e-3)
    assert 0 < rates[-1] < 2e-6


def corridor(length=3):
    """Going on `length` times and stopping then is paid; stopping earlier less."""

    def see(state):
        return jax.nn.one_hot(state, length + 1)

    def reset(world, key):
        return jnp.int32(0), see(jnp.int32(0))

    def step(world, state, action):
        further = state + action
        is_done = (action == 0) | (further > length)
        reward = jnp.where(action == 0, jnp.where(state == length, 1.0, 0.2), -0.5)
        state = jnp.where(is_done, 0, further)
        return state, see(state), jnp.where(is_done, reward, 0.0), is_done

    return Env(reset, step, length + 1, 2)


def taught(config, env, seed=0):
    learning = ppo.begin(config, env, None, jax.random.key(seed))
    update = jax.jit(ppo.build_update(config, env))
    told = []
    for _ in range(config.num_updates):
        learning, one = update(None, learning)
        told.append(one)
    return learning, told


def test_it_learns_what_pays_late():
    config = dataclasses.replace(SMALL, learning_rate=5e-3)
    env = corridor()
    learning, told = taught(config, env)
    said = run_layers(learning.networks.actor, jnp.eye(4), "relu")
    assert np.argmax(said, axis=-1).tolist() == [1, 1, 1, 0]
    assert told[-1].reward > 0.8 > told[0].reward
    # Values are what is still to come, which is certain by now.
    values = run_layers(learning.networks.critic, jnp.eye(4), "relu")[:, 0]
    np.testing.assert_allclose(values, 1.0, atol=0.3)


def test_epochs_end_where_the_policy_has_moved_far():
    """From then on nothing changes: a single gradient is left of many."""
    config = dataclasses.replace(SMALL, target_kl=1e-12, warm_up=0.0)
    env = corridor()
    learning = ppo.begin(config, env, None, jax.random.key(0))
    learning, _ = jax.jit(ppo.build_update(config, env))(None, learning)
    counts = [int(x) for x in jax.tree.leaves(learning.optimizer) if x.ndim == 0]
    # The first gradient does not know yet that it moves; the second one sees it.
    assert set(counts) == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": 100}, "does not divide"),
        ({"discount": 1.5}, "discount is 1.5"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PpoConfig(**settings)
