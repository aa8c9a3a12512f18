# SPDX-License-Identifier: Apache-2.0
"""Opt-Hydra: optimistic online learning of Hydra heads, by the paper's two-state rule.

    ospec learn --prompts FILE.jsonl --draft HYDRA --learner configs/opt_hydra.py

SGD of rate 0.1 on chunks of 80 prompts, three epochs each, as OnlineSPEC reports.
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="optimistic",
        optimizer="sgd",
        learning_rate=0.1,
        loss="forward_kl",
        update_every_prompts=80,
        num_epochs=3,
        batch_size=16,
        ring_capacity=320,
        memory_slots=0,
    )
