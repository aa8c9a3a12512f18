# SPDX-License-Identifier: Apache-2.0
"""Where a session stands: what is saved, and what resuming brings back."""

import dataclasses

from ospec_jax.online.scopes import Scopes
from ospec_jax.online.trainer import Traffic, TrainerState
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.types import Draft
from ospec_jax.typing import short_repr


@dataclasses.dataclass(frozen=True)
class SessionState:
    """All that a session has become; the rest of it was built, and never changes.

    Attributes:
      meta: What the draft belongs to; its `draft_version` is that of the draft which
        this learner began with. None without a draft.
      draft: In float32, rows in the mesh's order; None without one.
      trainer: What learning counts and remembers; None without learning.
      traffic: What learning keeps of users' prompts and answers; None without learning.
      controller: State of what chooses each step's action, as JSON.
      answered: Ids of the answered prompts, in order.
      contents: Hashes of these prompts; empty where an older version kept none.
      num_admitted: Requests that were ever begun; see `decoding.request.Request.key`.
      scopes: Whose text is kept, by name.
    """

    __repr__ = short_repr

    meta: Meta | None = None
    draft: Draft | None = None
    trainer: TrainerState | None = None
    traffic: Traffic | None = None
    controller: dict = dataclasses.field(default_factory=dict)
    answered: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    num_admitted: int = 0
    scopes: Scopes = Scopes()

    @property
    def version(self) -> int:
        """How often learning has changed the served draft; see `TrainerState`."""
        return int(self.trainer.version) if self.trainer is not None else 0
