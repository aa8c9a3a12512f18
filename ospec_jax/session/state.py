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
      draft: That is served, in float32, rows in the mesh's order; None without one.
      trainer: What learning counts and remembers; None without learning.
      traffic: What learning keeps of users' prompts and answers; None without learning.
      controller: State of what chooses each step's action, as JSON.
      answered: Ids of the answered prompts, in order.
      contents: Hashes of these prompts; empty where an older version kept none.
      num_admitted: Requests that were ever begun; see `decoding.request.Request.key`.
      scopes: Whose text is kept, by name.
      waiting: The draft as it has been learned, where somebody has to say that it is
        served; None where that is done at once.
      served_version: Of `draft` then, among the trainer's versions.
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
    waiting: Draft | None = None
    served_version: int | None = None

    @property
    def learned_version(self) -> int:
        """How often learning has changed its draft; see `TrainerState`."""
        return int(self.trainer.version) if self.trainer is not None else 0

    @property
    def version(self) -> int:
        """Of the served draft: that which learning had come to when it was served."""
        if self.served_version is None:
            return self.learned_version

        return self.served_version

    @property
    def num_waiting(self) -> int:
        """Changes that learning is ahead of the served draft."""
        return self.learned_version - self.version

    @property
    def learned(self) -> Draft | None:
        """The draft that learning goes on with, in float32."""
        return self.draft if self.waiting is None else self.waiting

    def serving(self, is_by_hand: bool) -> "SessionState":
        """As it is gone on with where promotion is by hand, or at once.

        What waited is served at once where nobody has to say so any more.
        """
        if self.trainer is None or is_by_hand == (self.waiting is not None):
            return self
        if not is_by_hand:
            return dataclasses.replace(
                self, draft=self.waiting, waiting=None, served_version=None
            )

        return dataclasses.replace(
            self, waiting=self.draft, served_version=self.learned_version
        )
