# SPDX-License-Identifier: Apache-2.0
"""Ens-EAGLE-3 by the paper's rule: independent experts, Hedge on cumulative losses.

    ospec learn --prompts FILE.jsonl --learner configs/ens_eagle3.py --no-ngrams

Adam at 1e-4, 2e-4 and 4e-4 and the static draft, two epochs on chunks of 40 prompts.
The rate of Hedge is for normalised losses; the paper's 10 is for its own.
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="ensemble",
        optimizer="adam",
        learning_rate=2e-4,
        num_experts=4,
        step_ratio=2.0,
        meta="hedge",
        loss="forward_kl",
        update_every_prompts=40,
        num_epochs=2,
        batch_size=4,
        ring_capacity=160,
        memory_slots=0,
    )
