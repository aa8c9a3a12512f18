# SPDX-License-Identifier: Apache-2.0
"""Heavy-ball momentum: what OnlineSPEC's released code runs as optimism.

It is `gradient` with one optimizer; see `optimistic` for the rule of its paper.
"""

import dataclasses
from typing import Any, ClassVar

from ospec_jax.config import ConfigError
from ospec_jax.config.learner import check
from ospec_jax.learners.base import Learner
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.method import OptimizedMethod
from ospec_jax.learners.objective import Objective


@dataclasses.dataclass(frozen=True)
class Momentum(OptimizedMethod):
    """SGD with momentum.

    Attributes:
      momentum: Part of the last step that the next one goes on with.
    """

    published_optimizer: ClassVar[str] = "sgd"
    defaults: ClassVar[dict[str, Any]] = {"loss": "forward_kl"}

    momentum: float = 0.9

    def __post_init__(self):
        if self.optimizer not in (None, "sgd"):
            raise ConfigError(
                f"the momentum learner is SGD with momentum, not {self.optimizer!r}; "
                f"leave the optimizer out, or use the gradient learner"
            )

        super().__post_init__()
        check(self, "momentum", lambda x: 0 <= x < 1, "0 to below 1")

    @property
    def other_optimizers(self) -> str:
        """There are none."""
        return ""

    def build(self, objective: Objective) -> Learner:
        """The learner."""
        return gradient(objective, self.make_optimizer(momentum=self.momentum))
