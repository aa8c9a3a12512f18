# SPDX-License-Identifier: Apache-2.0
"""What OnlineSPEC's released code runs as Opt-Hydra: SGD with momentum 0.9.

ospec learn --prompts FILE.jsonl --draft HYDRA --learner configs/momentum_hydra.py
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="momentum",
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.9,
        update_every_prompts=80,
        num_epochs=3,
        batch_size=16,
        ring_capacity=320,
        memory_slots=0,
    )
