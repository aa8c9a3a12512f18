# SPDX-License-Identifier: Apache-2.0
"""A session's checkpoints: its draft, its learner, and where they stand."""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from ospec_jax.config import DraftConfig
from ospec_jax.drafters.base import Family
from ospec_jax.drafters.pool import with_members
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import freely_placed
from ospec_jax.models.hub import Target
from ospec_jax.online.ring import numbers_in_turn
from ospec_jax.online.scopes import Scopes
from ospec_jax.online.trainer import Traffic, Trainer, describe_stop
from ospec_jax.session.build import grouped
from ospec_jax.session.state import SessionState
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.types import Draft


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


def save(
    folder: str | Path,
    state: SessionState,
    learner: LearnerConfig | None,
    mesh: jax.sharding.Mesh | None = None,
    with_feedback: bool = True,
    last: Saved | None = None,
    num_kept: int = 2,
) -> Saved:
    """Writes a checkpoint, unless it is there already.

    Args:
      with_feedback: Also store recent traffic and remembered n-grams.
      last: What the session wrote or read before.
      num_kept: Steps that are there afterwards, this one among them.

    Raises:
      CheckpointError: There is no draft, or the folder is of another run.
    """
    if state.meta is None or state.draft is None:
        raise CheckpointError("there is no draft to save")

    meta = current_meta(state, learner)
    config = state.meta.draft
    place = step_folder(folder, state)
    if last is not None and last.holds(place, meta, with_feedback):
        return last

    # Files hold rows in the order of a single device, so a run may go on with another
    # number of them.
    draft = grouped(state.draft, config, mesh, is_inverse=True)
    trainer = state.trainer
    traffic = None
    waiting = None
    if state.num_waiting:
        waiting = grouped(state.waiting, config, mesh, is_inverse=True)
    if trainer is not None:
        trainer = grouped(trainer, config, mesh, is_inverse=True)
        traffic = state.traffic if with_feedback else None

    scopes = state.scopes.to_json()
    checkpoint.save(
        folder,
        int(place.name),
        meta,
        draft,
        trainer,
        traffic,
        num_kept,
        scopes,
        waiting,
    )

    return Saved(place, meta, with_feedback and state.trainer is not None)


def step_folder(folder: str | Path, state: SessionState) -> Path:
    """Where a checkpoint of this state lies: by the number of answers learned from."""
    step = 0 if state.trainer is None else int(state.trainer.num_prompts)
    return Path(folder).resolve() / str(step)


def current_meta(state: SessionState, learner: LearnerConfig | None) -> Meta:
    """The record that a checkpoint of this state holds."""
    assert state.meta is not None, "there is a draft"
    meta = dataclasses.replace(
        state.meta,
        storage="float32",
        controller=state.controller,
        num_admitted=state.num_admitted,
        num_waiting=state.num_waiting,
    )
    if learner is None:
        return meta

    return dataclasses.replace(
        meta,
        draft_version=meta.draft_version + state.version,
        learner=learner.to_json(),
        answered=state.answered,
        contents=state.contents,
    )


def resume(
    folder: str | Path,
    target: Target,
    learner: LearnerConfig | None,
    trainer: Trainer | None,
    like: SessionState,
    family: Family | None = None,
) -> SessionState:
    """Reads where a session stood that learned with the same settings.

    Args:
      learner: The settings; `trainer`, what they built.
      like: A state that this session could be in, whose traffic stands in for what the
        checkpoint does not hold.
      family: Of the user's own that the draft is of.

    Raises:
      CheckpointError: There is no such state.
    """
    if learner is None or trainer is None:
        raise CheckpointError(
            f"{folder}: only a session that learns goes on from a checkpoint; give it "
            f"the same learner, or take the draft alone, with load_draft"
        )

    # Only shapes are traced: nothing is trained or allocated to read a checkpoint.
    def learner_like(meta: Meta, draft: Draft):
        check_settings(folder, meta, learner)
        _check_members(folder, meta, like.meta)
        return jax.eval_shape(lambda: trainer.init(_whole(meta, draft, like))[0])

    mesh = target.mesh
    found = checkpoint.load(
        folder, target, learner_like=learner_like, mesh=mesh, family=family
    )
    # Newer steps could not be read; left under their names, they would keep this run
    # from saving.
    checkpoint.set_aside(folder, found.step)
    place = lambda tree: grouped(freely_placed(tree, mesh), found.meta.draft, mesh)
    whole = lambda draft: _whole(found.meta, place(draft), like)
    state = place(_completed(found.learner, trainer, whole(found.draft)))
    if bool(state.is_stopped):
        warnings.warn(f"{folder}: {describe_stop(trainer, state)}", stacklevel=3)

    traffic, scopes = _past_traffic(folder, found.step, like.traffic, mesh, family)
    # The stored version counts on from earlier runs, the trainer's from the beginning
    # of this one.
    served_version = int(state.version) - found.meta.num_waiting
    version = found.meta.draft_version - served_version
    answered = found.meta.answered
    num_nameless = len(answered) - len(found.meta.contents)

    ours = like.meta.draft if like.meta is not None else None

    return SessionState(
        meta=dataclasses.replace(
            found.meta,
            draft=_served_architecture(folder, found.meta.draft, ours),
            draft_version=version,
        ),
        draft=whole(found.draft),
        trainer=state,
        traffic=traffic,
        controller=found.meta.controller,
        answered=answered,
        contents=("",) * num_nameless + found.meta.contents,
        num_admitted=found.meta.num_admitted,
        scopes=scopes,
        waiting=None if found.waiting is None else whole(found.waiting),
        served_version=None if found.waiting is None else served_version,
    )


def _past_traffic(
    folder: str | Path,
    step: int,
    like: Traffic | None,
    mesh: jax.sharding.Mesh | None,
    family: Family | None,
) -> tuple[Traffic | None, Scopes]:
    """A step's traffic, and whose it is; `like` and nobody's where it holds none."""
    try:
        # Older traffic than the learner's would not be what it counted.
        # By its shapes, so that what an older version did not store comes back as such.
        shapes = jax.eval_shape(lambda: like)
        kept = checkpoint.load(
            folder, feedback_like=shapes, mesh=mesh, step=step, family=family
        )
        scopes = Scopes.from_json(kept.scopes)
        return freely_placed(_with_owners(kept.feedback), mesh), scopes
    except CheckpointError:
        warnings.warn(
            f"step {step} of {folder} holds no feedback that can be read; "
            f"learning goes on without past traffic",
            stacklevel=4,
        )
        return like, Scopes()


def _whole(meta: Meta, stored: Draft, like: SessionState) -> Draft:
    """A stored draft with what no checkpoint holds, which the session has itself: a
    language model that drafts, members of a pool that do not learn."""
    if meta.draft is not None:
        return stored

    assert like.draft is not None, "a session that learns has a draft"
    return with_members(like.draft, stored.params) if meta.members else like.draft


def _check_members(folder: str | Path, meta: Meta, ours: Meta | None) -> None:
    """Refuses a pool other members of which have learned.

    Raises:
      CheckpointError: It is such a one.
    """
    if ours is None or meta.members == ours.members:
        return

    shown = lambda one: ", ".join(
        f"{number} ({record.get('family')})" for number, record in one.members.items()
    )
    raise CheckpointError(
        f"{folder} was learned by the pool's members {shown(meta) or 'none'}, and here "
        f"{shown(ours) or 'none'} learn, or of another architecture; give the same "
        f"pool again: {meta.card.get('model')}"
    )


def _served_architecture(
    folder: str | Path, stored: DraftConfig | None, ours: DraftConfig | None
) -> DraftConfig | None:
    """The draft's architecture as this session serves it.

    A draft may be given another window than it was stored with: no array tells.
    """
    if stored is None or ours is None or stored.sliding_window == ours.sliding_window:
        return stored

    shown = lambda config: config.sliding_window or "all"
    warnings.warn(
        f"{folder} was learned with a draft that sees {shown(stored)} tokens "
        f"(sliding_window); it goes on seeing {shown(ours)}, as the draft that this "
        f"session was given",
        stacklevel=4,
    )

    return dataclasses.replace(stored, sliding_window=ours.sliding_window)


def check_settings(folder: str | Path, meta: Meta, learner: LearnerConfig) -> None:
    """Refuses a checkpoint that was learned in another way.

    Raises:
      CheckpointError: It holds no learner, or one of other settings.
    """
    if not meta.learner:
        raise CheckpointError(
            f"{folder} holds a draft but no learner; start from it with --draft"
        )

    rule = meta.learner.get("rule", "")
    if rule != learner.rule_name:
        ours = f"the rule {learner.rule_name!r}" if learner.rule else "a built-in one"
        remedy = f"give Session(learner=...) the same rule {rule!r} again, whose code "
        remedy += "a checkpoint does not hold"
        if not rule:
            remedy = f"resume with the learner {meta.learner.get('name')!r}"
        theirs = f"the rule {rule!r}" if rule else "a built-in learner"
        raise CheckpointError(
            f"{folder} was learned with {theirs}, not with {ours}; {remedy}"
        )

    saved = saved_config(meta.learner, learner)
    if saved != learner:
        raise CheckpointError(
            f"{folder} was learned with {saved}, not {learner}; resume with the same "
            f"settings"
        )


def _completed(state, trainer: Trainer, draft: Draft):
    """Adds what an older version did not store, as it is at the start."""
    is_missing = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    if not any(map(is_missing, jax.tree.leaves(state))):
        return state

    start = trainer.init(draft)[0]
    fill = lambda found, new: new if is_missing(found) else found
    return jax.tree.map(fill, state, start)


def _with_owners(traffic: Traffic) -> Traffic:
    """Says of traffic that an older version stored whose it is: nobody's."""
    is_missing = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    ring = traffic.ring
    if ring is not None and is_missing(ring.owners):
        numbers = numbers_in_turn(ring.num_added, ring.capacity)
        traffic = traffic.replace(
            ring=ring.replace(numbers=numbers, owners=jnp.zeros_like(numbers))
        )

    memory = traffic.memory
    if memory is not None and is_missing(memory.owners):
        owned = memory.replace(owners=jnp.zeros_like(memory.counts))
        traffic = traffic.replace(memory=owned)

    return traffic


def saved_config(settings: dict, ours: LearnerConfig | None = None) -> LearnerConfig:
    """A checkpoint's learner, of older versions, too.

    Args:
      ours: Settings with the rule that the checkpoint names, if it names one.
    """
    return LearnerConfig.from_flat(settings, ours.rule if ours else None)
