# SPDX-License-Identifier: Apache-2.0
r"""LTD as its released scripts run it by default, not as its paper says.

    ospec train-control RECORDING --trees 10,8,60 --out POLICIES \
        --config configs/ltd_released.py

Smaller rollouts that are gone through once, a lower rate that stays, no reward for
trying, smaller networks with tanh, and the size taught on the deepest drafts alone.
Whether a turn follows is the user's there; here it is as in the paper. The scripts ask
the policy for the depth at every third depth while decoding; here it is always asked.
"""

from ospec_jax.control.ltd import LtdConfig
from ospec_jax.control.ppo import PpoConfig


def get_config() -> LtdConfig:
    common = {
        "rollout": 128,
        "num_envs": 1,
        "minibatch": 64,
        "num_epochs": 1,
        "learning_rate": 3e-4,
        "warm_up": 0.0,
        "has_decay": False,
        "entropy": 0.0,
        "discount": 0.99,
        "actor": (512, 256),
        "critic": (512, 256),
        "activation": "tanh",
    }
    return LtdConfig(
        depth=PpoConfig(num_steps=1_000_000, **common),
        size=PpoConfig(num_steps=100_000, **common),
        turn=1.0,
        drafting="deepest",
        fixed_size=60,
    )
