# SPDX-License-Identifier: Apache-2.0
"""Settings that update rules along gradients share: an optimizer and its rate."""

import dataclasses
from typing import ClassVar

import optax

from ospec_jax.config.base import ConfigError
from ospec_jax.config.learner import Method, check, check_finite
from ospec_jax.learners.optimizers import make_optimizer


def usual_rate(optimizer: str) -> float:
    """Of an optimizer whose rate is not given; Adam's steps are normalised."""
    return 0.1 if optimizer == "sgd" else 3e-4


@dataclasses.dataclass(frozen=True)
class OptimizedMethod(Method):
    """A rule that an optax optimizer moves.

    Attributes:
      optimizer: Any optax optimizer that takes a learning rate, or finds its own step
        size: mechanize, cocob, dog, prodigy, ... Unset, adam, or what the rule was
        published with.
      learning_rate: Unset, 3e-4, with plain SGD 0.1. Rules that were published with
        SGD take an `optimizer` beside it.
      published_optimizer: The optimizer where none is set.
      published_rate: The rate where none is set; None for the optimizer's usual one.
    """

    published_optimizer: ClassVar[str] = "adam"
    published_rate: ClassVar[float | None] = None

    optimizer: str | None = None
    learning_rate: float | None = None

    def __post_init__(self):
        self._check_optimizer()
        check_finite(self)
        check(self, "learning_rate", lambda x: x > 0, "above 0")

        own = self.published_optimizer
        if self.optimizer or self.learning_rate is None or own == "adam":
            return

        # Rates differ by orders of magnitude between optimizers: what suits Adam would
        # leave a rule that was published with plain SGD without any visible step.
        raise ConfigError(
            f"the learner {type(self).__name__.lower()!r} was published with {own!r} "
            f"at a rate of {usual_rate(own)}, and learning_rate {self.learning_rate} "
            f"does not say which optimizer it is for: set optimizer {own!r} "
            f"(--optimizer {own}){self.other_optimizers} beside it, or leave the "
            f"rate out"
        )

    def _check_optimizer(self):
        if self.optimizer is None or isinstance(self.optimizer, str):
            return

        # A checkpoint could not tell what the functions of one do.
        raise ConfigError(
            f"optimizer is {self.optimizer!r:.60}; name it, as optimizer='adam' with "
            f"learning_rate=..., or use it in a rule of your own: "
            f"LearnerConfig(rule=...)"
        )

    @property
    def other_optimizers(self) -> str:
        """For messages: what else goes beside a rate."""
        return ", or 'adam' (--optimizer adam)"

    @property
    def optimizer_and_rate(self) -> tuple[str, float]:
        """What moves the parameters; the rule's own where it is unset."""
        optimizer = self.optimizer or self.published_optimizer
        rate = self.learning_rate
        if rate is None:
            rate = self.published_rate
        if rate is None:
            rate = usual_rate(optimizer)

        return optimizer, rate

    def settled(self):
        """The same rule with its optimizer and its rate."""
        optimizer, rate = self.optimizer_and_rate
        return dataclasses.replace(self, optimizer=optimizer, learning_rate=rate)

    def make_optimizer(self, **options) -> optax.GradientTransformation:
        """The optimizer, with further arguments of its own."""
        return make_optimizer(*self.optimizer_and_rate, **options)
