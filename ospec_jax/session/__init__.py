# SPDX-License-Identifier: Apache-2.0
"""A target, its draft and what the draft has learned: the library's front door."""

from ospec_jax.session.practice import Exercise, PracticeConfig
from ospec_jax.session.result import Result
from ospec_jax.session.session import Session

__all__ = ["Exercise", "PracticeConfig", "Result", "Session"]
