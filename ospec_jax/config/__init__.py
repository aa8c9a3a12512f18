# SPDX-License-Identifier: Apache-2.0
"""Frozen configurations. Builders take plain arguments; these are for borders.

`from_dict` refuses keys that it does not know, and names the nearest known one.
"""

from ospec_jax.config.base import (
    ConfigError,
    InputError,
    UnforeseenError,
    check_types,
    from_dict,
    naming,
    whole_number,
)
from ospec_jax.config.decoding import (
    AUTO_DEPTHS,
    MAX_ALTERNATIVES,
    ChildrenKind,
    SamplingConfig,
    StepKind,
    TreeConfig,
    Verification,
)
from ospec_jax.config.learner import RECORDS_STATES, Recording
from ospec_jax.config.model import (
    AttentionKind,
    DFlashConfig,
    DraftConfig,
    ExitConfig,
    FactorScaling,
    HydraConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    PEagleConfig,
    Precision,
    RopeScaling,
    YarnScaling,
    check_draft_vocab,
    draft_config_from,
)

__all__ = [
    "AUTO_DEPTHS",
    "MAX_ALTERNATIVES",
    "AttentionKind",
    "ChildrenKind",
    "ConfigError",
    "DFlashConfig",
    "DraftConfig",
    "ExitConfig",
    "FactorScaling",
    "HydraConfig",
    "InputError",
    "LinearScaling",
    "Llama3Scaling",
    "ModelConfig",
    "PEagleConfig",
    "Precision",
    "Recording",
    "RECORDS_STATES",
    "RopeScaling",
    "SamplingConfig",
    "StepKind",
    "TreeConfig",
    "UnforeseenError",
    "Verification",
    "YarnScaling",
    "check_draft_vocab",
    "check_types",
    "draft_config_from",
    "from_dict",
    "naming",
    "whole_number",
]
