# SPDX-License-Identifier: Apache-2.0
r"""LTD by its paper (arXiv 2603.01639): how much to draft, taught in two stages.

    ospec train-control RECORDING --trees 10,8,60 --out POLICIES --config configs/ltd.py

The sizes are those of the recorded trees, where the paper has twelve from 20 to 240
nodes. What it does not say is as in Stable-Baselines3, which it used. 64 copies of the
environment go on at once, in rollouts of the same 2048 steps. The paper does not say
how long a turn is; here it is as long as what came before.

A million steps take hours on two cores. Without --config they take minutes.
"""

from ospec_jax.control.ltd import LtdConfig
from ospec_jax.control.ppo import PpoConfig


def get_config() -> LtdConfig:
    return LtdConfig(
        depth=PpoConfig(
            num_steps=1_000_000, discount=0.999, actor=(1024,), critic=(1024, 256)
        ),
        size=PpoConfig(
            num_steps=100_000, discount=0.9, actor=(1024, 256), critic=(1024, 256)
        ),
        turn=1.0,
        drafting="random",
        fixed_size=60,
    )
