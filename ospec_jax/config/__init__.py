# SPDX-License-Identifier: Apache-2.0
"""Frozen configurations. Builders take plain arguments; these are for borders.

`from_dict` refuses keys that it does not know, and names the nearest known one.
"""

from ospec_jax.config.base import ConfigError, from_dict
from ospec_jax.config.decoding import (
    AUTO_DEPTHS,
    ChildrenKind,
    SamplingConfig,
    TreeConfig,
    Verification,
)
from ospec_jax.config.learner import (
    LEARNER_NAMES,
    LearnerConfig,
    LearnerName,
    Recording,
    as_learner_config,
)
from ospec_jax.config.model import (
    AttentionKind,
    DraftConfig,
    ExitConfig,
    HydraConfig,
    ModelConfig,
    Precision,
    RopeScaling,
    draft_config_from,
)

__all__ = [
    "AUTO_DEPTHS",
    "LEARNER_NAMES",
    "AttentionKind",
    "ChildrenKind",
    "ConfigError",
    "DraftConfig",
    "ExitConfig",
    "HydraConfig",
    "LearnerConfig",
    "LearnerName",
    "ModelConfig",
    "Precision",
    "Recording",
    "RopeScaling",
    "SamplingConfig",
    "TreeConfig",
    "Verification",
    "as_learner_config",
    "draft_config_from",
    "from_dict",
]
