# SPDX-License-Identifier: Apache-2.0
"""PPO (arXiv 1707.06347): policies from what their own choices were paid.

As Stable-Baselines3 does it, which LTD was trained with: advantages by GAE (arXiv
1506.02438), normalised within each minibatch; a clipped objective; a value network of
its own; clipped gradients; a rate that warms up and falls to nothing.

An environment is a pair of pure functions, as in gymnax. Many go on at once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from ospec_jax.config import ConfigError, check_types
from ospec_jax.control.policy import Activation, Layers, init_layers, run_layers
from ospec_jax.typing import struct


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """Settings; the defaults are what LTD's paper names, else Stable-Baselines3's.

    Attributes:
      num_steps: Of the environment, in all.
      rollout: Steps between two updates, of all copies of the environment together.
      num_envs: Copies that go on at once.
      minibatch: Steps of one gradient.
      num_epochs: Times that an update goes through its steps.
      learning_rate: At its highest.
      warm_up: Share of the updates in which the rate rises.
      has_decay: Whether it falls to nothing afterwards, in a line.
      entropy: Weight of the policy's entropy, which keeps it trying.
      discount: Of what comes a step later.
      gae_lambda: How far an advantage trusts rewards more than values.
      clip: A choice counts until it is so much more or less probable than it was.
      clip_value: Likewise values, by what they may move; 0 lets them.
      value_weight: Of the value's error.
      max_grad_norm: Longer gradients are shortened to it.
      target_kl: An update's epochs end once the policy has moved half as far again; 0
        goes through all of them.
      actor: Widths of the policy network's layers.
      critic: Of the value network's.
      activation: Between layers.
    """

    num_steps: int = 1_000_000
    rollout: int = 2048
    num_envs: int = 64
    minibatch: int = 256
    num_epochs: int = 20
    learning_rate: float = 1e-3
    warm_up: float = 0.01
    has_decay: bool = True
    entropy: float = 0.01
    discount: float = 0.999
    gae_lambda: float = 0.95
    clip: float = 0.2
    clip_value: float = 0.0
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float = 0.0
    actor: tuple[int, ...] = (1024,)
    critic: tuple[int, ...] = (1024, 256)
    activation: Activation = "relu"

    def __post_init__(self):
        check_types(self)
        counts = "num_steps", "rollout", "num_envs", "minibatch", "num_epochs"
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; use a share from 0 to 1"
                )
        if self.rollout % self.num_envs or self.rollout % self.minibatch:
            raise ConfigError(
                f"a rollout of {self.rollout} steps does not divide into "
                f"{self.num_envs} environments and minibatches of {self.minibatch}; "
                f"use a multiple of both"
            )

    @property
    def num_updates(self) -> int:
        """How often the networks are updated."""
        return max(1, self.num_steps // self.rollout)

    @property
    def num_gradients(self) -> int:
        """Minibatches of all updates."""
        return self.num_updates * self.num_epochs * (self.rollout // self.minibatch)


class Env(NamedTuple):
    """An environment whose episodes follow each other without end.

    Attributes:
      reset: `(world, key) -> (state, seen [o])`.
      step: `(world, state, action) -> (state, seen [o], reward, is_done)`; where an
        episode is done, state and `seen` are the next one's.
      num_seen: o.
      num_actions: To choose from.
    """

    reset: Callable[[Any, Key[Array, ""]], tuple[Any, Float[Array, " o"]]]
    step: Callable[[Any, Any, Int[Array, ""]], tuple]
    num_seen: int
    num_actions: int


@struct
class Networks:
    """What PPO learns."""

    actor: Layers
    critic: Layers


@struct
class Learning:
    """Where PPO stands; all that is needed to go on.

    Attributes:
      envs: States of the environments, `[e, ...]`.
      seen: `[e, o]`.
      num_updates: Made so far.
    """

    networks: Networks
    optimizer: Any
    envs: Any
    seen: Float[Array, "e o"]
    key: Key[Array, ""]
    num_updates: Int[Array, ""]


class Rollout(NamedTuple):
    """Steps of the environments, `[t, e, ...]`.

    Attributes:
      log_probs: Of the actions, as they were chosen.
      values: That the critic expected.
      is_done: Whether the step ended an episode.
    """

    seen: Float[Array, "*s o"]
    actions: Int[Array, "*s"]
    log_probs: Float[Array, "*s"]
    values: Float[Array, "*s"]
    rewards: Float[Array, "*s"]
    is_done: Bool[Array, "*s"]


class Batch(NamedTuple):
    """Steps to learn from, with what they turned out to be worth."""

    seen: Float[Array, "*s o"]
    actions: Int[Array, "*s"]
    log_probs: Float[Array, "*s"]
    values: Float[Array, "*s"]
    advantages: Float[Array, "*s"]
    returns: Float[Array, "*s"]


class Told(NamedTuple):
    """What an update tells of itself: means over its minibatches.

    Attributes:
      reward: Mean of the rollout's episodes.
      kl: How far the policy moved, by Schulman's estimate.
      clipped: Share of steps whose objective was clipped.
    """

    reward: Float[Array, ""]
    policy_loss: Float[Array, ""]
    value_loss: Float[Array, ""]
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Float[Array, ""]


def advantages_of(
    rewards: Float[Array, "t e"],
    values: Float[Array, "t e"],
    is_done: Bool[Array, "t e"],
    last_value: Float[Array, " e"],
    discount: float,
    gae_lambda: float,
) -> Float[Array, "t e"]:
    """Generalised advantages (GAE): how much better each step was than expected.

    Args:
      last_value: Expected behind the last step, where the rollout is cut off.
    """
    goes_on = 1.0 - is_done
    following = jnp.concatenate([values[1:], last_value[None]])
    surprises = rewards + discount * goes_on * following - values

    def body(later, step):
        surprise, goes_on = step
        found = surprise + discount * gae_lambda * goes_on * later
        return found, found

    first = jnp.zeros_like(last_value)
    return jax.lax.scan(body, first, (surprises, goes_on), reverse=True)[1]


def policy_loss(
    log_probs: Float[Array, " n"],
    old_log_probs: Float[Array, " n"],
    advantages: Float[Array, " n"],
    clip: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """PPO's clipped objective, negated, and the share of steps that it clips."""
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    loss = -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))

    return loss, jnp.mean(jnp.abs(ratio - 1.0) > clip)


def value_loss(
    values: Float[Array, " n"],
    old_values: Float[Array, " n"],
    returns: Float[Array, " n"],
    clip: float,
) -> Float[Array, ""]:
    """Mean squared error of values, which move by `clip` at most; 0 lets them."""
    if clip:
        values = old_values + jnp.clip(values - old_values, -clip, clip)

    return jnp.mean((returns - values) ** 2)


def init_networks(key: Key[Array, ""], config: PpoConfig, env: Env) -> Networks:
    """Networks that know nothing: all actions are about as probable."""
    key_actor, key_critic = jax.random.split(key)
    widths = lambda hidden, last: [env.num_seen, *hidden, last]

    return Networks(
        actor=init_layers(key_actor, widths(config.actor, env.num_actions), 0.01),
        critic=init_layers(key_critic, widths(config.critic, 1), 1.0),
    )


def begin(
    config: PpoConfig, env: Env, world: Any, key: Key[Array, ""], networks=None
) -> Learning:
    """PPO's first state.

    Args:
      networks: To go on from; new ones by default.
    """
    key, key_networks, key_envs = jax.random.split(key, 3)
    if networks is None:
        networks = init_networks(key_networks, config, env)
    reset = jax.vmap(env.reset, in_axes=(None, 0))
    envs, seen = reset(world, jax.random.split(key_envs, config.num_envs))

    # Optax knows of pytrees, its types only of some.
    params: Any = networks
    return Learning(
        networks=networks,
        optimizer=build_optimizer(config).init(params),
        envs=envs,
        seen=seen,
        key=key,
        num_updates=jnp.int32(0),
    )


def build_optimizer(config: PpoConfig) -> optax.GradientTransformation:
    """Adam on clipped gradients, at a rate that rises and falls."""
    total = config.num_gradients
    rising = round(config.warm_up * total)
    highest = config.learning_rate
    rate = optax.schedules.constant_schedule(highest)
    if config.has_decay:
        rate = optax.schedules.linear_schedule(highest, 0.0, total - rising)
    if rising:
        rise = optax.schedules.linear_schedule(0.0, highest, rising)
        rate = optax.schedules.join_schedules([rise, rate], [rising])

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(rate, eps=1e-5)
    )


def build_update(config: PpoConfig, env: Env) -> Callable:
    """Builds `(world, Learning) -> (Learning, Told)`: a rollout and what it says."""
    optimizer = build_optimizer(config)
    step = jax.vmap(env.step, in_axes=(None, 0, 0))
    slopes_of = jax.grad(functools.partial(_loss_of, config), has_aux=True)

    def learn_batch(carry, batch: Batch):
        networks, state, is_over = carry
        slopes, told = slopes_of(networks, batch)
        if config.target_kl:
            is_over = is_over | (told[3] > 1.5 * config.target_kl)
        changes, moved = optimizer.update(slopes, state)
        stepped = optax.apply_updates(networks, changes), moved
        if config.target_kl:
            stepped = jax.tree.map(
                lambda old, new: jnp.where(is_over, old, new),
                (networks, state),
                stepped,
            )

        return (*stepped, is_over), told

    def update(world, learning: Learning) -> tuple[Learning, Told]:
        learning, rollout = _roll_out(config, step, world, learning)
        flat = _steps_of(config, learning, rollout)

        def epoch(carry, key):
            order = jax.random.permutation(key, config.rollout)
            num_batches = config.rollout // config.minibatch
            shuffled = jax.tree.map(
                lambda x: x[order].reshape(num_batches, -1, *x.shape[1:]), flat
            )
            return jax.lax.scan(learn_batch, carry, shuffled)

        key, key_epochs = jax.random.split(learning.key)
        keys = jax.random.split(key_epochs, config.num_epochs)
        carry = learning.networks, learning.optimizer, jnp.asarray(False)
        (networks, state, _), told = jax.lax.scan(epoch, carry, keys)
        episodes = jnp.maximum(jnp.sum(rollout.is_done), 1)
        learning = learning.replace(
            networks=networks,
            optimizer=state,
            key=key,
            num_updates=learning.num_updates + 1,
        )

        return learning, Told(
            jnp.sum(rollout.rewards) / episodes, *(jnp.mean(x) for x in told)
        )

    return update


def _value_of(config: PpoConfig, networks: Networks, seen):
    """What the critic expects of what is seen."""
    return run_layers(networks.critic, seen, config.activation)[..., 0]


def _log_probs_of(config: PpoConfig, networks: Networks, seen):
    """The actor's log-probabilities of all actions, `[..., a]`."""
    said = run_layers(networks.actor, seen, config.activation)
    return jax.nn.log_softmax(said, axis=-1)


def _roll_out(
    config: PpoConfig, step: Callable, world, learning: Learning
) -> tuple[Learning, Rollout]:
    """Steps of all environments, as the actor chooses."""
    networks = learning.networks

    def body(carry, key):
        envs, seen = carry
        chances = _log_probs_of(config, networks, seen)
        actions = jax.random.categorical(key, chances, axis=-1)
        log_probs = jnp.take_along_axis(chances, actions[:, None], axis=-1)[:, 0]
        values = _value_of(config, networks, seen)
        envs, following, rewards, is_done = step(world, envs, actions)
        found = Rollout(seen, actions, log_probs, values, rewards, is_done)
        return (envs, following), found

    key, key_rollout = jax.random.split(learning.key)
    keys = jax.random.split(key_rollout, config.rollout // config.num_envs)
    carry = learning.envs, learning.seen
    (envs, seen), rollout = jax.lax.scan(body, carry, keys)

    return learning.replace(envs=envs, seen=seen, key=key), rollout


def _steps_of(config: PpoConfig, learning: Learning, rollout: Rollout) -> Batch:
    """A rollout's steps in one row, with what they turned out to be worth.

    Args:
      learning: Behind the rollout.
    """
    last_value = _value_of(config, learning.networks, learning.seen)
    advantages = advantages_of(
        rollout.rewards,
        rollout.values,
        rollout.is_done,
        last_value,
        config.discount,
        config.gae_lambda,
    )
    batch = Batch(
        seen=rollout.seen,
        actions=rollout.actions,
        log_probs=rollout.log_probs,
        values=rollout.values,
        advantages=advantages,
        returns=advantages + rollout.values,
    )

    return jax.tree.map(lambda x: x.reshape(config.rollout, *x.shape[2:]), batch)


def _loss_of(config: PpoConfig, networks: Networks, batch: Batch):
    """The whole loss of a minibatch, and what `Told` has beside the reward."""
    chances = _log_probs_of(config, networks, batch.seen)
    log_probs = jnp.take_along_axis(chances, batch.actions[:, None], axis=-1)[:, 0]
    spread = jnp.std(batch.advantages, ddof=1) + 1e-8
    advantages = (batch.advantages - jnp.mean(batch.advantages)) / spread
    actor, clipped = policy_loss(log_probs, batch.log_probs, advantages, config.clip)
    critic = value_loss(
        _value_of(config, networks, batch.seen),
        batch.values,
        batch.returns,
        config.clip_value,
    )
    entropy = -jnp.mean(jnp.sum(jnp.exp(chances) * chances, axis=-1))
    total = actor + config.value_weight * critic - config.entropy * entropy
    moved = log_probs - batch.log_probs
    kl = jnp.mean(jnp.exp(moved) - 1.0 - moved)

    return total, (actor, critic, entropy, kl, clipped)
