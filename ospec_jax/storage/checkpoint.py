# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of drafts and of what learns them.

A checkpoint folder holds numbered steps with up to six items. `draft` (parameters and
draft vocabulary, of families that are trained) and `meta` (what they belong to) can be
loaded alone. `learner` is the state of online learning; `feedback` is the traffic it
keeps (recorded features and n-grams), from which users' prompts and answers can be read
back: it is kept apart so that a draft can be given away without it. `scopes` says whose
that traffic is, by name, and is there with it alone. `waiting` is a draft that was
learned and is not served yet, where promotion is by hand.

Whenever a save is killed, each step that was complete before can still be loaded. A new
step is renamed into place by Orbax once it is written. One that replaces a step `N` is
written into `N.writing`; then `N` becomes `N.replaced`, and the new one becomes `N`. A
`N.replaced` without `N` is what a kill between these two renames leaves: whoever opens
the folder next gives it back its name. Other leftovers are removed by the next save
alone, since someone may be reading.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from ospec_jax import atomic, sharding
from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    InputError,
    Precision,
    TreeConfig,
    UnforeseenError,
    draft_config_from,
    from_dict,
)
from ospec_jax.config.fields import Fields, parse_json
from ospec_jax.drafters.base import Family, dequantized
from ospec_jax.drafters.registry import FAMILIES, build_drafter
from ospec_jax.models import finite
from ospec_jax.models.hub import Target
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.tokenizer import tokenizer_hash
from ospec_jax.storage import low_rank, older
from ospec_jax.types import Draft
from ospec_jax.typing import short_repr

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")
_WRITING = ".writing"
_REPLACED = ".replaced"
_PATIENCE = 300.0
"""Seconds to wait for another one's save, which takes a few."""
_ORBAX_PART = ".orbax-checkpoint-tmp"


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or belongs to something else."""


class BrokenCheckpointError(CheckpointError, UnforeseenError):
    """No step can be read, for a reason that was not foreseen."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a draft belongs to and how it came about.

    Attributes:
      family: Name of the family of drafters, one of `drafters.registry.FAMILIES` or of
        the user's own.
      draft: The architecture; None for a family without parameters.
      fingerprint: Of the target's weights; empty, like `tokenizer_hash`, for a draft
        that was imported without its target.
      storage: Precision of the stored draft parameters.
      draft_version: How often learning has changed the draft that is served, in all
        the runs that led to it; see `online.trainer.TrainerState`.
      num_waiting: Changes that `waiting` is ahead of it; 0 where nothing waits.
      learner: Name and hyper-parameters of the learner, or empty.
      answered: Ids of the prompts that learning has seen, in order.
      contents: Hashes of these prompts (`data.known`); empty for those that an older
        version counted.
      num_admitted: Requests that were ever begun; see `decoding.request.Request.key`.
      controller: State of what chooses each step's action (`control`), or empty.
      card: Free facts: data, steps, scores.
      base: Name or folder of the draft that the stored parameters are a difference to;
        empty for one that stands alone. See `storage.low_rank`.
      base_hash: Its fingerprint.
      rank: Of the difference.
      members: Of a pool, the members that are stored, since they learn: by number,
        what each is, as `record_of` says it.
    """

    family: str
    draft: DraftConfig | None
    target: str
    fingerprint: str
    tokenizer_hash: str
    storage: Precision = "float32"
    draft_version: int = 0
    num_waiting: int = 0
    learner: dict = dataclasses.field(default_factory=dict)
    answered: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    num_admitted: int = 0
    controller: dict = dataclasses.field(default_factory=dict)
    card: dict = dataclasses.field(default_factory=dict)
    libraries: dict = dataclasses.field(default_factory=dict)
    base: str = ""
    base_hash: str = ""
    rank: int = 0
    members: dict = dataclasses.field(default_factory=dict)

    @property
    def is_stored(self) -> bool:
        """Whether a checkpoint holds parameters of the draft."""
        return self.draft is not None or bool(self.members)

    def of_member(self, number: str) -> "Meta":
        """The record of one of the members.

        Raises:
          InputError: It is damaged.
        """
        if not number.isdecimal():
            raise ConfigError(f"the record names the member {number!r:.20}, no number")

        fields = Fields(self.members, "the members' record").section(number)
        family = family_of(fields.text("family"))
        draft = _read_architecture(family, fields.section("draft").values)
        return dataclasses.replace(self, family=family.name, draft=draft, members={})

    @classmethod
    def create(
        cls,
        target: Target | None,
        draft: DraftConfig | None,
        family: str = "eagle3",
        **values,
    ) -> "Meta":
        """Describes a draft for `target` made with the installed libraries."""
        libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        facts: dict[str, Any] = {
            "target": "unknown",
            "fingerprint": "",
            "tokenizer_hash": "",
        }
        if target is not None:
            facts = {
                "target": target.name,
                "fingerprint": target.fingerprint,
                "tokenizer_hash": tokenizer_hash(target.tokenizer),
            }

        return cls(family=family, draft=draft, libraries=libraries, **(facts | values))

    def check(self, target: Target, warns: bool = True) -> None:
        """Refuses a draft that cannot work for `target`; warns of other weights.

        Args:
          warns: False is for who was warned before.

        Raises:
          CheckpointError: The vocabulary, tokenizer, width or taps do not fit.
        """
        config = target.config
        draft = self.draft
        found = []
        if self.tokenizer_hash:
            known = tokenizer_hash(target.tokenizer)
            found.append(("tokenizer", self.tokenizer_hash, known))

        if draft is not None:
            found += [
                ("vocabulary size", draft.vocab_size, config.vocab_size),
                ("hidden size", draft.target_hidden_size, config.hidden_size),
            ]

        # Without these being equal the draft could not run, or its tokens would mean
        # something else. Other weights of the same shape only make it worse.
        for what, ours, theirs in found:
            if ours != theirs:
                raise CheckpointError(
                    f"this draft was made for {self.target} with {what} {ours}, but "
                    f"{target.name} has {theirs}; use a draft of this target or train "
                    f"one with `ospec distill`"
                )

        if draft is not None and max(draft.taps, default=0) > config.num_layers:
            raise CheckpointError(
                f"this draft reads layers {draft.taps}, but {target.name} has "
                f"only {config.num_layers}: it was made for {self.target}"
            )
        if warns and self.fingerprint not in ("", target.fingerprint):
            warnings.warn(
                f"this draft was made for other weights of {self.target} (fingerprint "
                f"{self.fingerprint}, not {target.fingerprint}); output stays exact, "
                f"but fewer tokens may be accepted",
                stacklevel=3,
            )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint; `learner` and `feedback` may be None.

    Attributes:
      draft: Of a pool, the `Draft` of each member that is stored, by its number.
      waiting: What was learned and not served, for who reads the learner's state.
      scopes: Whose the feedback is, as JSON; empty for nobody in particular.
    """

    __repr__ = short_repr

    step: int
    meta: Meta
    draft: Draft
    learner: Any = None
    feedback: Any = None
    scopes: Sequence = ()
    waiting: Draft | None = None


def save(
    folder: str | Path,
    step: int,
    meta: Meta,
    draft: Draft,
    learner: Any = None,
    feedback: Any = None,
    num_kept: int = 2,
    scopes: Sequence = (),
    waiting: Draft | None = None,
) -> Path:
    """Writes one step, in place of one of that number; removes all but `num_kept`.

    Keys cannot be stored by Orbax, so state holds none: randomness derives from seeds
    and counters. The step appears only once it is complete, and until then the one that
    it replaces stays.

    Args:
      scopes: Whose the feedback is, as JSON; not stored without it.
      waiting: What was learned and is not served.

    Raises:
      CheckpointError: The folder holds a later step: it is of another run. Or the draft
        is not finite.
    """
    # Before anything is touched: a draft that is not finite must not replace one that
    # is.
    _check_finite(draft, f"the draft to be saved as step {step} of {folder}")
    # Meta is text, so that it can be read without knowing any shape.
    items: dict[str, Any] = {"meta": {"json": json.dumps(dataclasses.asdict(meta))}}
    if meta.is_stored:
        items["draft"] = _stored(draft, meta)
    if meta.is_stored and waiting is not None:
        items["waiting"] = _stored(waiting, meta)

    if learner is not None:
        items["learner"] = learner
    if feedback is not None:
        items["feedback"] = feedback
        if scopes:
            items["scopes"] = {"json": json.dumps(scopes)}

    return save_items(folder, step, items, num_kept)


def _stored(draft: Draft, meta: Meta) -> dict[str, Any]:
    """A draft as a checkpoint has it; of a pool, the members that are stored."""
    if meta.members:
        members = draft.params.items
        return {
            number: _stored(members[int(number)], meta.of_member(number))
            for number in meta.members
        }

    stored: dict[str, Any] = {"params": cast_params(draft.params, meta.storage)}
    if draft.token_ids is not None:
        stored["token_ids"] = draft.token_ids

    return stored


def save_items(
    folder: str | Path, step: int, items: dict[str, Any], num_kept: int
) -> Path:
    """Writes a step of any items, each a pytree; see `save`.

    Raises:
      CheckpointError: The folder holds a later step: it is of another run.
    """
    path = Path(folder).resolve()

    # The lock comes before the look at what is there: another session may just be
    # writing.
    with _alone(path), _open(path, num_kept) as checkpointer:
        found = sorted(c.step for c in checkpointer.checkpoints)
        newest = max(found, default=step)
        if newest > step:
            raise CheckpointError(
                f"{folder} holds step {newest}, of a run that has gone further than "
                f"this one's step {step}; choose another folder"
            )
        _sweep(path)
        if step in found:
            # The step that is there stays whole until the new one is.
            _replace(path, step, items)
            for number in found[:-num_kept]:
                checkpointer.delete(number)
        else:
            checkpointer.save_checkpointables(step, items)

    return path / str(step)


def _replace(path: Path, step: int, items: dict[str, Any]) -> None:
    """Writes a step beside the one of its number, then swaps the two."""
    place = path / str(step)
    writing = place.with_name(place.name + _WRITING)

    # In a folder of its own, which no reader takes for a checkpoint.
    with _open(writing) as checkpointer:
        checkpointer.save_checkpointables(step, items)

    try:
        if jax.process_index() == 0:
            _swap(writing / place.name, place)
    finally:
        # The others wait also where this process fails, and would wait for ever.
        _wait_for_all()

    _sweep(path)


def _swap(new: Path, place: Path) -> None:
    """Gives `new` the name `place`, and what had it another one."""
    replaced = place.with_name(place.name + _REPLACED)
    while True:
        place.rename(replaced)
        try:
            new.rename(place)
            return
        except OSError:
            # Someone who opened the folder just now took the step that was set aside
            # for a leftover, and gave it back its name.
            if not place.exists():
                raise


def _recover(path: Path) -> None:
    """Gives a step that was set aside its name back if no other has taken it."""
    if jax.process_index() == 0:
        for replaced in path.glob(f"*{_REPLACED}"):
            place = replaced.with_suffix("")
            try:
                if not place.exists():
                    replaced.rename(place)
            except OSError:  # the one who set it aside, or another reader, was faster
                if not place.exists():
                    raise

    _wait_for_all()


def _sweep(path: Path) -> None:
    """Removes what killed saves left; `_recover` comes before."""
    if jax.process_index() == 0:
        for replaced in path.glob(f"*{_REPLACED}"):
            # Under its name it is always whole: what is half deleted has another one.
            rest = replaced.with_suffix(_WRITING)
            rest.mkdir(exist_ok=True)
            replaced.rename(rest / replaced.name)
        for pattern in (f"*{_WRITING}", f"*{_ORBAX_PART}*"):
            for rest in path.glob(pattern):
                shutil.rmtree(rest)

    _wait_for_all()


@contextlib.contextmanager
def _alone(path: Path) -> Generator[None]:
    """Lets one session at a time write into a folder: each sweeps up what seems left.

    Processes that work together write together, behind the first one's lock.
    """
    if jax.process_index() > 0:
        yield
        return

    wait = lambda line: warnings.warn(line, stacklevel=5)
    with atomic.locked(path / ".save.lock", path, _PATIENCE, wait):
        yield


def _wait_for_all() -> None:
    """A barrier of all processes, before which only the first one renames."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("ospec checkpoint")


@contextlib.contextmanager
def _open(path: Path, num_kept: int | None = None) -> Generator[Any]:
    """Orbax's checkpointer; without `num_kept` nothing is ever removed."""
    _recover(path)
    policy: Any = None
    if num_kept is not None:
        policy = ocp.training.preservation_policies.LatestN(num_kept)

    place: Any = path

    with (
        _only_errors("absl"),
        ocp.training.Checkpointer(place, preservation_policy=policy) as checkpointer,
    ):
        yield checkpointer


@contextlib.contextmanager
def _only_errors(name: str) -> Generator[None]:
    """Keeps a logger, here the one that Orbax writes to, from telling less than errors.

    Orbax warns of what is meant so: that shardings come from the files, that items have
    no registered handler. Afterwards the logger is as its owner left it.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))

    try:
        yield
    finally:
        logger.setLevel(level)


def steps(folder: str | Path) -> list[int]:
    """Complete steps of a checkpoint folder, oldest first."""
    path = Path(folder).resolve()
    if not path.is_dir():
        return []

    with _open(path) as checkpointer:
        return sorted(c.step for c in checkpointer.checkpoints)


def check_present(folder: str | Path, found: list[int] | None = None) -> None:
    """Refuses a folder without a checkpoint.

    Args:
      found: Its `steps`, for who has looked.

    Raises:
      CheckpointError: There is none.
    """
    if not (steps(folder) if found is None else found):
        raise CheckpointError(
            f"{folder} holds no checkpoint; `ospec learn --checkpoint` and `ospec "
            f"distill --out` write them"
        )


def set_aside(folder: str | Path, last: int) -> None:
    """Renames the steps behind `last`, which could not be read, so that a run that goes
    on from there may save."""
    with _alone(Path(folder)):
        _set_aside(folder, last)


def _set_aside(folder: str | Path, last: int) -> None:
    found = steps(folder)
    # Else what a renamed step had replaced would come back in its place.
    _sweep(Path(folder))
    for step in found:
        if step > last and jax.process_index() == 0:
            old = Path(folder) / str(step)
            old.rename(_free_name(old.with_name(f"{step}.unreadable")))


def unreadable_steps(folder: str | Path) -> list[Path]:
    """Steps that were set aside; nothing removes them but their owner."""
    return sorted(Path(folder).glob("*.unreadable*"))


def _free_name(path: Path) -> Path:
    """The path, or with a number behind it where something has that name."""
    if not path.exists():
        return path

    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(place for place in numbered if not place.exists())


def load(
    folder: str | Path,
    target: Target | None = None,
    learner_like: Any = None,
    feedback_like: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    step: int | None = None,
    family: Family | None = None,
) -> Checkpoint:
    """Restores the newest readable step, or a given one, onto this machine's devices.

    Whatever mesh a checkpoint was written under, its arrays are in the files' order
    (see `sharding`) and restore under any other, or none.

    Args:
      target: Checked against the draft's record, unless None.
      learner_like: Arrays or shapes of the learner state to restore, or a function
        from `Meta` and the restored `Draft` to them; None leaves it. What an older
        version did not store comes back as it is there.
      feedback_like: Likewise.
      mesh: Devices to restore onto; the first one without a mesh.
      step: Only this one.
      family: That the draft must be of; for those that the package does not know.

    Raises:
      CheckpointError: There is no readable step, or the draft is for another target,
        or is not finite.
    """
    path = Path(folder).resolve()
    found = steps(path)
    check_present(folder, found)
    failures = []
    kind = CheckpointError

    # The newest first, unless one step was asked for.
    for number in reversed(found if step is None else [step]):
        try:
            checkpoint = _load_step(
                path, number, learner_like, feedback_like, mesh, family
            )
        except CheckpointError:
            raise  # readable, but not what was asked for
        except Exception as error:
            # An earlier step may be whole.
            kind = kind if isinstance(error, InputError) else BrokenCheckpointError
            said = (str(error).splitlines() or [type(error).__name__])[0][:300]
            failures.append(f"step {number}: {said}")
            continue
        if failures:
            warnings.warn(
                f"{folder}: {'; '.join(failures)} could not be read; "
                f"going on from step {number}",
                stacklevel=2,
            )
        if target is not None:
            checkpoint.meta.check(target)
        return checkpoint

    raise kind(f"{folder}: no step can be read ({'; '.join(failures)})")


def load_items(folder: str | Path, step: int, names: Iterable[str]) -> dict[str, Any]:
    """Items of a step as they were saved: for those whose arrays are NumPy's.

    Raises:
      ConfigError: They are damaged, or not there.
    """
    path = Path(folder).resolve()
    with _open(path) as checkpointer, _reading_files(path, step):
        return checkpointer.load_checkpointables(step, dict.fromkeys(names))


def _load_step(
    path: Path, step: int, learner_like, feedback_like, mesh, own: Family | None
) -> Checkpoint:
    with _open(path) as checkpointer:
        # Meta first: it says which shapes the rest has.
        with _reading_files(path, step):
            raw = checkpointer.load_checkpointables(step, {"meta": None})["meta"]
            kept = checkpointer.checkpointables_metadata(step).metadata
            text = str(raw["json"])
        meta = read_meta(parse_json(text, f"the record of step {step}"), own)
        draft = Draft(params={})
        waiting = None
        read = lambda name: _read_draft(checkpointer, path, step, name, meta, own, mesh)
        if meta.is_stored:
            draft = read("draft")
        # Who takes the draft alone takes what is served.
        if meta.is_stored and meta.num_waiting and learner_like is not None:
            waiting = read("waiting")
        rest = {}
        likes = {}
        for name, like in (("learner", learner_like), ("feedback", feedback_like)):
            if like is not None:
                like = like(meta, draft) if callable(like) else like
                likes[name] = like
                if name in kept:  # else Orbax says that it is not there
                    like = older.stored_like(like, kept[name])
                rest[name] = _on_devices(like, mesh)
        scopes: Sequence = ()
        with _reading_files(path, step):
            restored = _restore(checkpointer, step, rest) if rest else {}
            if "feedback" in rest and "scopes" in kept:
                raw = checkpointer.load_checkpointables(step, {"scopes": None})
                scopes = json.loads(str(raw["scopes"]["json"]))

    found = {name: older.brought_up(likes[name], restored[name]) for name in likes}
    return Checkpoint(
        step, meta, draft, found.get("learner"), found.get("feedback"), scopes, waiting
    )


def _read_draft(
    checkpointer, path: Path, step: int, name: str, meta: Meta, own, mesh
) -> Draft:
    """A draft, by the name of its item; of a pool, the members that are stored."""
    like = abstract_draft(meta, own)
    kept = checkpointer.checkpointables_metadata(step).metadata
    _check_stored(kept.get(name), like)
    with _reading_files(path, step):
        stored = _restore(checkpointer, step, {name: _on_devices(like, mesh)})[name]

    where = f"step {step} of {path}"
    if not meta.members:
        return _read_back(stored, meta, where)

    return Draft(
        params={
            int(number): _read_back(one, meta.of_member(number), where)
            for number, one in stored.items()
        }
    )


def _read_back(stored: Any, meta: Meta, where: str) -> Draft:
    """What was stored of one draft, as it was."""
    assert meta.draft is not None, "it is stored"
    token_ids = stored.get("token_ids")
    draft = Draft(params=_widen(stored["params"]), token_ids=token_ids)
    _check_finite(draft, where)
    _check_token_ids(token_ids, meta.draft)

    return draft


@contextlib.contextmanager
def _reading_files(path: Path, step: int) -> Generator[None]:
    """Whatever Orbax says of damaged files, which it has no error of its own for."""
    try:
        yield
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"the files of step {step} of {path} are damaged, or lack something "
            f"({said})"
        ) from error


def _check_stored(stored: Any, like: Any) -> None:
    """Refuses arrays that are not of the shapes that their record gives."""
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    wanted = shapes(like)
    found = shapes(stored)

    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"the array {name} is stored with the shape {found.get(name)}, but the "
                f"checkpoint's record gives {wanted.get(name)}"
            )


def _check_token_ids(token_ids: Any, config: DraftConfig) -> None:
    """Refuses a draft vocabulary that is not of the target's, or not ascending."""
    if token_ids is None:
        return

    ids = np.asarray(token_ids)
    if ids.min() < 0 or ids.max() >= config.vocab_size or np.any(np.diff(ids) <= 0):
        raise ConfigError(
            f"the stored draft vocabulary must be ascending ids below "
            f"{config.vocab_size}"
        )


def _check_finite(draft: Draft, what: str) -> None:
    """Refuses a draft that would predict nothing."""
    if name := finite.find_not_finite(draft.params):
        raise CheckpointError(
            f"{what} is not finite: the tensor {name!r} holds infinities or NaNs; use "
            f"an earlier step, or train again with a lower learning rate"
        )


def _restore(checkpointer, step, wanted):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]harding.*")
        return checkpointer.load_checkpointables(step, wanted)


def family_of(name: str, own: Family | None = None) -> Family:
    """The family that a checkpoint names.

    Args:
      own: A family of the user's, which the package does not know.

    Raises:
      CheckpointError: It is neither known nor the user's.
    """
    if own is not None and own.name == name:
        return own
    if own is not None:
        raise CheckpointError(
            f"this is a draft of the family {name!r}, not {own.name!r}; choose another "
            f"folder, or the other family"
        )
    if name not in FAMILIES:
        raise CheckpointError(
            f"this is a draft of the family {name!r}, which is not one of "
            f"{', '.join(FAMILIES)}; pass its record, as in `load_draft(folder, "
            f"target, family=MY_FAMILY)`"
        )

    return FAMILIES[name]


def read_meta(values: dict, own: Family | None = None) -> Meta:
    """Rebuilds `Meta` from its stored form, refusing unknown keys.

    Args:
      own: See `family_of`.

    Raises:
      InputError: A value is missing, unknown, or of another type or range.
    """
    if isinstance(values, dict) and "depth" in values:  # what older versions called it
        values = {("controller" if k == "depth" else k): v for k, v in values.items()}

    fields = Fields(values, "the checkpoint's record")
    draft = fields.section("draft").values if values.get("draft") is not None else None
    family = family_of(fields.text("family"), own)
    if draft is not None:
        draft = _read_architecture(family, draft)

    meta = from_dict(Meta, values | {"draft": draft})
    for number in meta.members:
        meta.of_member(number)
    if meta.base and meta.rank < 1:
        raise ConfigError(
            f"the checkpoint's record names the base {meta.base!r} of a difference of "
            f"rank {meta.rank}; its rank must be 1 or more"
        )
    counts = meta.draft_version, meta.num_waiting, meta.num_admitted, meta.rank
    if min(counts) < 0:
        raise ConfigError("the checkpoint's record has a count below 0")

    return meta


def _read_architecture(family: Family, values: dict) -> DraftConfig:
    """A draft's architecture, from its stored form."""
    if family.config is None or not issubclass(family.config, DraftConfig):
        raise CheckpointError(
            f"a draft with parameters is stored, but those of the family "
            f"{family.name!r} have none"
        )

    return draft_config_from(family.config, values)


def record_of(meta: Meta) -> dict[str, Any]:
    """What a pool's record says of a member that is stored; see `Meta.members`."""
    assert meta.draft is not None, "it has parameters"
    record = {"family": meta.family, "draft": dataclasses.asdict(meta.draft)}
    # As it is read back, where there are no tuples.
    return json.loads(json.dumps(record))


def abstract_draft(meta: Meta, own: Family | None = None) -> dict:
    """Shapes of the stored draft, or of a pool's stored members by their numbers.

    Args:
      own: See `family_of`.
    """
    if meta.members:
        return {
            number: abstract_draft(meta.of_member(number)) for number in meta.members
        }

    config = meta.draft
    family = family_of(meta.family, own)
    assert config is not None, "only drafts with parameters are stored"

    def make():
        drafter = build_drafter(family, config, TreeConfig(num_steps=1))
        params = drafter.init_params(jax.random.key(0))
        if meta.base:
            params = low_rank.empty(params, meta.rank)

        stored = {"params": cast_params(params, meta.storage)}
        if meta.base or not config.has_own_head:
            return stored

        return stored | {"token_ids": jnp.zeros(config.draft_vocab_size, int)}

    return jax.eval_shape(make)


def _on_devices(tree, mesh):
    """Gives every leaf of an abstract tree its place: the mesh, or one device."""
    # Files say on which devices their arrays lay, which need not be those of this
    # machine.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: device, tree)
    if mesh is not None:
        places = sharding.param_shardings(tree, mesh)

    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, tree, places)


def _widen(params):
    """Stored parameters back to float32, dequantising int8 kernels."""
    if "kernel" in params and params["kernel"].dtype == jnp.int8:
        rest = {k: v for k, v in params.items() if k not in ("kernel", "scale")}
        return {"kernel": dequantized(params)} | rest

    return {
        name: _widen(value) if isinstance(value, dict) else value.astype(jnp.float32)
        for name, value in params.items()
    }
