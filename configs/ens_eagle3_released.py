# SPDX-License-Identifier: Apache-2.0
r"""Ens-EAGLE-3 as the released commands of OnlineSPEC run it, not as its paper says.

    ospec learn --prompts FILE.jsonl --no-ngrams \
        --learner configs/ens_eagle3_released.py

Weights are a softmax of the last chunk's mean training loss, every expert begins each
chunk at the merged parameters, and the static draft gets no weight. (Optimizer states
are kept over chunks here; there they are lost.)
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="ensemble",
        optimizer="adam",
        learning_rate=2e-4,
        num_experts=4,
        step_ratio=2.0,
        static_expert=False,
        reset_experts=True,
        meta="last_chunk",
        loss="forward_kl",
        temperature=0.2,
        update_every_prompts=40,
        num_epochs=2,
        batch_size=4,
        ring_capacity=160,
        memory_slots=0,
    )
