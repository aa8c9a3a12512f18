# SPDX-License-Identifier: Apache-2.0
"""Learners by name: one line each. All lists of learners are read from here."""

from ospec_jax.config.learner import Method
from ospec_jax.learners.ensemble import Ensemble
from ospec_jax.learners.gradient import Gradient
from ospec_jax.learners.last_layer import LastLayer
from ospec_jax.learners.memory import Memory
from ospec_jax.learners.momentum import Momentum
from ospec_jax.learners.optimistic import Optimistic
from ospec_jax.learners.osd import OSD
from ospec_jax.learners.preference import Preference
from ospec_jax.learners.shared_ensemble import SharedEnsemble

LEARNERS: dict[str, type[Method]] = {
    "gradient": Gradient,
    "momentum": Momentum,
    "optimistic": Optimistic,
    "ensemble": Ensemble,
    "shared_ensemble": SharedEnsemble,
    "osd": OSD,
    "head": LastLayer,
    "preference": Preference,
    "memory": Memory,
}

LEARNER_NAMES: tuple[str, ...] = (*LEARNERS, "auto")
"""`auto` is `head` or `gradient`; which, a session decides (`session.build`)."""
