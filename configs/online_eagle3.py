# SPDX-License-Identifier: Apache-2.0
"""Online-EAGLE-3 with gradient steps and nothing else, as the paper runs it.

    ospec learn --prompts FILE.jsonl --learner configs/online_eagle3.py --no-ngrams

A learner is a frozen `LearnerConfig`; flags given beside it win over its values.
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="gradient",
        optimizer="adam",
        learning_rate=3e-4,
        loss="forward_kl",
        num_steps=3,
        batch_size=4,
        window=64,
        budget=0.05,
        promotion="always",
        memory_slots=0,
    )
