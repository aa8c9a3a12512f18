# SPDX-License-Identifier: Apache-2.0
"""A cautious learner: plain gradient steps, served only once they proved better.

ospec learn --prompts FILE.jsonl --learner configs/guarded_sgd.py --checkpoint DIR
"""

from ospec_jax import LearnerConfig


def get_config() -> LearnerConfig:
    return LearnerConfig(
        name="gradient",
        optimizer="sgd",
        learning_rate=0.3,
        promotion="guarded",
        promotion_level=0.1,
        budget=0.05,
    )
