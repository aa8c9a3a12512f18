# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding whose draft model learns from the traffic it serves."""

from ospec_jax import _platform  # noqa: F401, I001 - sets XLA's flags before JAX reads them
from ospec_jax.config import (
    ConfigError,
    SamplingConfig,
    TreeConfig,
)
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models.hub import Target, load_target
from ospec_jax.session import Result, Session

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "LearnerConfig",
    "LoadedDraft",
    "Result",
    "SamplingConfig",
    "Session",
    "Target",
    "TreeConfig",
    "load_draft",
    "load_target",
]
