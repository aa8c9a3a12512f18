# SPDX-License-Identifier: Apache-2.0
"""The baseline: Online Speculative Decoding's rule on an EAGLE-3 head.

    ospec learn --prompts FILE.jsonl --learner configs/osd_eagle3.py --no-ngrams

One Adam step of rate 1e-4 for eight requests, on the positions where the draft was
wrong alone.
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="osd",
        optimizer="adam",
        learning_rate=1e-4,
        buffer_requests=8,
        batch_size=2,
        ring_capacity=8,
        memory_slots=0,
    )
