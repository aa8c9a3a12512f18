# SPDX-License-Identifier: Apache-2.0
"""Settings of LTD (arXiv 2603.01639): two policies, taught apart and then in turns."""

import dataclasses
from typing import Literal

from ospec_jax.config import ConfigError, check_types
from ospec_jax.control.ppo import PpoConfig

PolicyKind = Literal["depth", "size"]
Reward = Literal["speed", "length", "time", "surplus"]
Drafting = Literal["random", "deepest", "policy"]

_SHORT_DEPTH = PpoConfig(
    num_steps=131_072, num_epochs=4, actor=(128,), critic=(128, 64)
)
_SHORT_SIZE = PpoConfig(
    num_steps=65_536,
    num_epochs=4,
    discount=0.9,
    actor=(128, 64),
    critic=(128, 64),
)


@dataclasses.dataclass(frozen=True)
class LtdConfig:
    """How policies for how much to draft are taught; the defaults take minutes.

    Attributes:
      depth: How PPO teaches the policy for the depth.
      size: Likewise for the size.
      apart: Policies that are taught by themselves first: that for the depth with
        `fixed_size`, that for the size with `drafting`.
      in_turns: Then taught again, one after the other, beside the other as it is.
      turn: Share of their steps that a turn takes.
      reward: What a cycle is paid: `speed`, tokens a second, as LTD; `length`, tokens,
        and `time`, which are the paper's ablations; `surplus`, tokens beyond what the
        best fixed choice makes in that time, which is not the paper's.
      drafting: How deep drafts are while the size is taught by itself.
      fixed_size: Nodes to verify while the depth is taught by itself; the largest size
        that is no larger; 0 for that of the best fixed choice.
      validation: Share of the training answers that nothing is taught on: the policies
        that are fastest there are kept.
      num_validations: Looks at them while a policy is taught.
      seed: Of all random numbers.
    """

    depth: PpoConfig = _SHORT_DEPTH
    size: PpoConfig = _SHORT_SIZE
    apart: tuple[PolicyKind, ...] = ("size", "depth")
    in_turns: tuple[PolicyKind, ...] = ("size", "depth", "size")
    turn: float = 0.5
    reward: Reward = "speed"
    drafting: Drafting = "random"
    fixed_size: int = 0
    validation: float = 0.2
    num_validations: int = 8
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        if not self.apart or len(set(self.apart)) < len(self.apart):
            raise ConfigError(
                f"apart is {self.apart}; use 'size', 'depth' or both of them, once each"
            )
        if missing := set(self.in_turns) - set(self.apart):
            raise ConfigError(
                f"in_turns teaches {sorted(missing)} again, which apart {self.apart} "
                f"never taught; name them there, too"
            )
        if self.drafting == "policy":
            raise ConfigError(
                "drafting is 'policy', which is not there yet while the size is taught "
                "by itself; use 'random' or 'deepest'"
            )
        if self.depth.activation != self.size.activation:
            raise ConfigError(
                f"the policies' networks have {self.depth.activation!r} and "
                f"{self.size.activation!r} between layers; use one for both"
            )
        for name in ("turn", "validation"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; use a share above 0, up to 1"
                )
        if self.num_validations < 1:
            raise ConfigError(
                f"num_validations is {self.num_validations}; use 1 or more"
            )

    def replace(self, **changes) -> "LtdConfig":
        """With some settings changed."""
        return dataclasses.replace(self, **changes)

    @property
    def stages(self) -> tuple["Stage", ...]:
        """What is taught, one after the other."""
        first = [Stage(kind, self._ppo(kind), True) for kind in self.apart]
        turns = [Stage(kind, self._short(kind), False) for kind in self.in_turns]

        return (*first, *turns)

    def _ppo(self, kind: PolicyKind) -> PpoConfig:
        return self.depth if kind == "depth" else self.size

    def _short(self, kind: PolicyKind) -> PpoConfig:
        ppo = self._ppo(kind)
        return dataclasses.replace(
            ppo, num_steps=max(1, round(self.turn * ppo.num_steps))
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One policy's turn.

    Attributes:
      is_apart: The other one is not there yet.
    """

    kind: PolicyKind
    ppo: PpoConfig
    is_apart: bool

    def __str__(self) -> str:
        return f"{self.kind} {'by itself' if self.is_apart else 'in turn'}"
