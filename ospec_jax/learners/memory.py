# SPDX-License-Identifier: Apache-2.0
"""Learning n-grams alone: all other learners learn them beside what they train."""

import dataclasses
from typing import ClassVar

from ospec_jax.config.learner import Method, Recording


@dataclasses.dataclass(frozen=True)
class Memory(Method):
    """The learner `memory`, which has no settings of its own; see `online.memory`."""

    parts: ClassVar[tuple[type, ...]] = ()
    recording: ClassVar[Recording] = "nothing"
