# SPDX-License-Identifier: Apache-2.0
"""A session's checkpoints: its draft, its learner, and where they stand."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from ospec_jax.config import LearnerConfig, from_dict
from ospec_jax.loading import freely_placed
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.types import Draft

if TYPE_CHECKING:
    from ospec_jax.online.trainer import Learning
    from ospec_jax.session import Session


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a learning session last wrote or read.

    Attributes:
      place: The step's folder.
      meta: Its record; what was answered since would change it.
      has_all_feedback: Nothing that the session remembers is missing there.
    """

    place: Path
    meta: Meta
    has_all_feedback: bool

    def holds(self, place: Path, meta: Meta, with_feedback: bool) -> bool:
        """Whether saving would change nothing."""
        if (self.place, self.meta) != (place, meta) or not place.is_dir():
            return False
        if with_feedback:
            return self.has_all_feedback
        return not (place / "feedback").exists()


def save(session: Session, folder: str | Path, with_feedback: bool = True) -> Path:
    """See `Session.save`."""
    if session.meta is None:
        raise checkpoint.CheckpointError("there is no draft to save")
    meta = _current_meta(session)
    if session.learning is None:
        draft = session.grouped(session.draft, is_inverse=True)
        return checkpoint.save(folder, 0, meta, draft)

    step = int(session.learning.state.num_prompts)
    place = Path(folder).resolve() / str(step)
    if session.saved is not None and session.saved.holds(place, meta, with_feedback):
        return place

    draft = session.grouped(session.draft, is_inverse=True)
    state = session.grouped(session.learning.state, is_inverse=True)
    traffic = session.learning.traffic if with_feedback else None
    checkpoint.save(folder, step, meta, draft, state, traffic)
    session.saved = Saved(place, meta, with_feedback)
    return place


def _current_meta(session: Session) -> Meta:
    """The record that a checkpoint of the session as it is now would hold."""
    assert session.meta is not None, "there is a draft"
    meta = dataclasses.replace(
        session.meta,
        storage="float32",
        controller=session.chooser.to_json(),
        num_admitted=session.num_admitted,
    )
    if session.learning is None:
        return meta
    return dataclasses.replace(
        meta, draft_version=meta.draft_version + session.version,
        learner=dataclasses.asdict(session.learning.config),
        answered=tuple(session.answered),
    )  # fmt: skip


def resume(session: Session, folder: str | Path) -> list[str]:
    """See `Session.resume`."""
    learning = session.learning
    if learning is None:
        raise checkpoint.CheckpointError("this session does not learn")

    def learner_like(meta: Meta, draft: Draft):
        if not meta.learner:
            raise checkpoint.CheckpointError(
                f"{folder} holds a draft but no learner; start from it with --draft"
            )
        saved = saved_config(meta.learner)
        if saved != learning.config:
            raise checkpoint.CheckpointError(
                f"{folder} was learned with {saved}, not {learning.config}; "
                f"resume with the same settings"
            )
        return jax.eval_shape(lambda: learning.adaptation.init(draft)[0])

    mesh = session.target.mesh
    restored = checkpoint.load(
        folder, session.target, learner_like=learner_like, mesh=mesh,
        family=session.own_family,
    )  # fmt: skip
    checkpoint.set_aside(folder, restored.step)
    state = _completed(restored.learner, learning, restored.draft)
    learning.state = session.grouped(freely_placed(state, mesh))
    if bool(learning.state.is_stopped):
        warnings.warn(f"{folder}: {learning.describe_stop()}", stacklevel=3)
    try:
        traffic = learning.traffic
        # Older traffic than the learner's would not be what it counted.
        found = checkpoint.load(
            folder,
            feedback_like=traffic,
            mesh=mesh,
            step=restored.step,
            family=session.own_family,
        )
        learning.traffic = freely_placed(found.feedback, mesh)
    except checkpoint.CheckpointError:
        warnings.warn(
            f"step {restored.step} of {folder} holds no feedback that can be read; "
            f"learning goes on without past traffic",
            stacklevel=2,
        )
    version = restored.meta.draft_version - session.version
    session.meta = dataclasses.replace(restored.meta, draft_version=version)
    session.serve(session.grouped(freely_placed(restored.draft, mesh)))
    session.answered = list(restored.meta.answered)
    session.num_admitted = restored.meta.num_admitted
    session.chooser.resume(restored.meta.controller)
    place = Path(folder).resolve() / str(restored.step)
    session.saved = Saved(place, _current_meta(session), has_all_feedback=True)
    return session.answered


def _completed(state, learning: Learning, draft: Draft):
    """Adds what an older version did not store, as it is at the start."""
    is_missing = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    if not any(map(is_missing, jax.tree.leaves(state))):
        return state
    start = learning.adaptation.init(draft)[0]
    fill = lambda found, new: new if is_missing(found) else found
    return jax.tree.map(fill, state, start)


def saved_config(settings: dict) -> LearnerConfig:
    """A checkpoint's learner, of older versions, too."""
    # Guarded promotion once waited for so many windows; now it tests at every request.
    gone = {"min_windows"}
    if settings["name"] in ("head", "memory"):  # a loss was written once, and not read
        gone.add("loss")
    settings = {key: x for key, x in settings.items() if key not in gone}
    return from_dict(LearnerConfig, settings)
