# SPDX-License-Identifier: Apache-2.0
"""Learners by name."""

from collections.abc import Callable

from ospec_jax.config import ConfigError, LearnerConfig
from ospec_jax.control import weighting
from ospec_jax.learners.base import Learner
from ospec_jax.learners.ensemble import ensemble, step_grid
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.losses import named_loss
from ospec_jax.learners.objective import Objective, build_objective
from ospec_jax.learners.optimistic import optimistic
from ospec_jax.learners.optimizers import is_parameter_free, make_optimizer
from ospec_jax.learners.osd import osd
from ospec_jax.learners.shared_ensemble import shared_ensemble


def build_learner(config: LearnerConfig, unroll: Callable) -> Learner:
    """The learner that a configuration describes, of those that train along gradients.

    Args:
      unroll: The drafter's training forward pass.

    Raises:
      ConfigError: The configuration names something that there is not, or that does
        not go together, or the user's rule makes no learner.
    """
    objective = build_objective(
        unroll, config.num_context, config.num_steps,
        named_loss(config.loss, config.forward_share), config.decay,
        config.num_candidates,
        "rejected" if config.name == "osd" else config.positions,
        config.position_decay, config.token_share,
    )  # fmt: skip
    if config.rule is None:
        return _LEARNERS[config.name](objective, config)

    learner = config.rule(objective)
    if not isinstance(learner, Learner):
        raise ConfigError(
            f"the rule {config.rule_name!r} returned {learner!r}; it must return a "
            f"`learners.base.Learner` for the `Objective` that it is given"
        )
    return learner


def _gradient(objective: Objective, config: LearnerConfig) -> Learner:
    return gradient(objective, make_optimizer(config.optimizer, config.learning_rate))


def _momentum(objective: Objective, config: LearnerConfig) -> Learner:
    """Heavy-ball momentum: what OnlineSPEC's released code runs as optimism."""
    return gradient(
        objective,
        make_optimizer("sgd", config.learning_rate, momentum=config.momentum),
    )


def _optimistic(objective: Objective, config: LearnerConfig) -> Learner:
    optimizer = make_optimizer(config.optimizer, config.learning_rate)
    return optimistic(objective, optimizer, config.hint_decay, config.radius)


def _osd(objective: Objective, config: LearnerConfig) -> Learner:
    optimizer = make_optimizer(config.optimizer, config.learning_rate)
    return osd(objective, optimizer, config.buffer_requests)


def _ensemble(objective: Objective, config: LearnerConfig) -> Learner:
    return ensemble(
        objective, *_grid(config), _meta(config), config.static_expert,
        config.reset_experts,
    )  # fmt: skip


def _shared_ensemble(objective: Objective, config: LearnerConfig) -> Learner:
    if not config.static_expert or config.reset_experts:
        raise ConfigError(
            "experts that share a gradient are never reset, and the static draft is "
            "one of them; use the learner `ensemble`"
        )
    if not config.expert_pull and not config.radius:
        raise ConfigError(
            "experts that share a gradient would lie on one line; set expert_pull or "
            "radius above 0"
        )
    return shared_ensemble(
        objective, *_grid(config), _meta(config), config.expert_pull, config.radius,
        config.num_scored, config.round_length,
    )  # fmt: skip


def _grid(config: LearnerConfig):
    """An optimizer of step 1 and the experts' steps."""
    if is_parameter_free(config.optimizer):
        raise ConfigError(
            f"{config.optimizer!r} finds its own step size: there is no grid of them "
            f"for an ensemble; use it with the gradient learner"
        )
    steps = step_grid(config.learning_rate, config.step_ratio, config.num_experts - 1)
    return make_optimizer(config.optimizer, 1.0), steps


def _meta(config: LearnerConfig) -> weighting.Meta:
    prior = (float(config.static_expert), *(1.0,) * (config.num_experts - 1))
    if config.meta == "last_chunk":
        return weighting.last_chunk(config.temperature, prior)
    return weighting.hedge(config.meta_rate, config.meta_discount, prior)


_LEARNERS: dict[str, Callable[[Objective, LearnerConfig], Learner]] = {
    "gradient": _gradient,
    "momentum": _momentum,
    "optimistic": _optimistic,
    "ensemble": _ensemble,
    "shared_ensemble": _shared_ensemble,
    "osd": _osd,
}
