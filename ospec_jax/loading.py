# SPDX-License-Identifier: Apache-2.0
"""Drafts by the names and folders that users give."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    ModelConfig,
    TreeConfig,
    naming,
)
from ospec_jax.drafters.base import Family
from ospec_jax.drafters.combine import MIXES
from ospec_jax.drafters.pool import POOL, Member, Members, PoolConfig
from ospec_jax.drafters.registry import FAMILIES, SUGGESTIONS, build_drafter
from ospec_jax.drafters.self_draft import in_four_bits
from ospec_jax.drafters.starts import start_warm
from ospec_jax.formats.importing import is_public_folder, load_folder
from ospec_jax.models.hub import Target, check_name, load_target
from ospec_jax.models.llama import without_padding
from ospec_jax.models.repositories import from_hub, is_hub_id
from ospec_jax.models.tokenizer import tokenizer_hash
from ospec_jax.storage import checkpoint, low_rank
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.types import Draft
from ospec_jax.typing import size_of

_SHIPPED = Path(__file__).parent / "shipped"
_SHIPPED_TARGET = "smollm2-135m"
_NUM_HEADS = 5
"""Tokens that a new draft can draft one after the other, if it must know before."""


@dataclasses.dataclass(frozen=True)
class LoadedDraft:
    """Draft parameters with the record of what they belong to.

    Attributes:
      model: The language model that drafts, for the families `model` and `self`.
      mix: One of `combine.MIXES`: how suggestions are drafted beside it, if they are.
      suggestions: Where they come from: `ngram`, `suffix` or `prediction`.
      own_family: The record of a family that the package does not know.
      members: Of a pool, in the order of their numbers.
      pool: What a pool is built from.
    """

    draft: Draft
    meta: Meta
    model: Target | None = None
    mix: str = ""
    suggestions: str = ""
    own_family: Family | None = None
    members: tuple["LoadedDraft", ...] = ()
    pool: PoolConfig | None = None

    def __repr__(self) -> str:
        return (
            f"LoadedDraft({self.beside}{self.meta.family!r} for {self.meta.target!r}, "
            f"{size_of(self.draft.params)})"
        )

    @property
    def beside(self) -> str:
        """What stands in front of its name where suggestions are drafted beside it."""
        return f"{self.mix}:{self.suggestions}," if self.mix else ""

    @property
    def family(self) -> Family:
        """What drafts with it."""
        return checkpoint.family_of(self.meta.family, self.own_family)

    @property
    def architecture(self) -> DraftConfig | ModelConfig | PoolConfig | None:
        """What its family's drafters are built from."""
        if self.pool is not None:
            return self.pool

        return self.model.config if self.model is not None else self.meta.draft

    @property
    def memory_orders(self) -> tuple[int, ...]:
        """Lengths of the n-grams that stand by it."""
        # One memory serves all members, so it holds the orders of whoever wants most.
        if self.members:
            return max((member.memory_orders for member in self.members), key=len)

        source = FAMILIES[self.suggestions] if self.suggestions else self.family
        return source.memory_orders

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose inputs the draft reads."""
        if self.pool is not None:
            return self.pool.taps

        return self.meta.draft.taps if self.meta.draft else ()

    @property
    def needs_ngrams(self) -> bool:
        """Whether it would have nothing to suggest without n-grams to look up."""
        if self.mix:
            return self.suggestions != "prediction"

        return self.family.ngrams == "always"


def load_draft(
    name_or_folder: str | Path | Family,
    target: Target | str | Path,
    family: Family | None = None,
) -> LoadedDraft:
    """Loads what the command line's `--draft` names, but for `none`.

    Args:
      name_or_folder: A family without parameters (`ngram`, `suffix`, `prediction`),
        `shipped` or `shipped:NAME`, the folder of a checkpoint or of a public EAGLE-3
        or Hydra head, the hub id of one (`owner/name`, or `owner/name@revision`),
        `model:TARGET`, `self:int4`, `self:exit-N`, or
        `fallback:`, `mixed:` or `longer:` with suggestions and a draft:
        `mixed:ngram,shipped`;
        or several of these behind one, `pool:shipped+ngram+shipped:hydra`.
        Or the record of a family, one of the user's own, too: then a new draft of it.
      target: What it drafts for, or a name of it, which is loaded.
      family: Of your own, of which a checkpoint's draft is; its name stands for a new
        draft of it, in `fallback:` and the like, too.

    Raises:
      CheckpointError: Nothing readable is there, or it is for another target.
      ConfigError: A public head has an architecture that is not supported, or an
        argument means nothing.
      WeightsError: A public head lacks tensors.
    """
    if family is not None and not isinstance(family, Family):
        raise ConfigError(
            f"family is {family!r:.60}; use the record of a family "
            f"(drafters.base.Family), or leave it out"
        )
    # A family's own name stands for a new draft of it.
    if family is not None and name_or_folder == family.name:
        name_or_folder = family

    # A slip in the name shows before a target is loaded for it.
    check_draft(name_or_folder, family)
    if isinstance(target, str | Path):
        target = load_target(target)
    if not isinstance(target, Target):
        raise ConfigError(
            f"target is {target!r:.60}; use load_target(...), or a name that it takes"
        )

    if isinstance(name_or_folder, Family):
        return new_draft(name_or_folder, target)
    if name_or_folder in SUGGESTIONS:
        return new_draft(FAMILIES[str(name_or_folder)], target)

    # A prefix says what kind of draft it is; without one it is a folder.
    kind, _, name = str(name_or_folder).partition(":")
    if kind == "model":
        return model_draft(name, target)
    if kind == "self":
        return own_draft(name, target)
    if kind in MIXES:
        return mixed_draft(kind, name, target, family)
    if kind == POOL.name:
        names = name.split("+")
        members = [load_draft(one, target, family) for one in names]
        return pool_draft(members, target, names)

    folder = draft_folder(name_or_folder)
    if is_public_folder(folder):
        with naming(folder):
            draft, meta = load_folder(folder, target)

        # The folder of a download is named by a commit.
        card = meta.card | {"imported_from": Path(name_or_folder).name}
        return LoadedDraft(draft, dataclasses.replace(meta, card=card))

    # A checkpoint that was learned beside a language model does not hold that model.
    restored = restore(name_or_folder, target, family)
    if restored.meta.members:
        return _learned_pool(restored, target)

    known = checkpoint.family_of(restored.meta.family, family)
    if known.config is not None and not known.is_trained:
        name = f"{restored.meta.family}:{restored.meta.card.get('model', 'NAME')}"
        raise checkpoint.CheckpointError(
            f"{folder} was learned beside the draft {name!r}, which it does not hold; "
            f"pass --draft {name}"
        )

    draft = freely_placed(restored.draft, target.mesh)

    return LoadedDraft(draft, restored.meta, own_family=family)


def check_draft(name_or_folder: Any, family: Family | None = None) -> None:
    """Refuses what names no draft; quick, for before a target is loaded for it.

    Args:
      family: See `load_draft`.

    Raises:
      CheckpointError: Nothing readable is there.
      ConfigError: It is no name, nor the record of a family, or there is none of that
        name.
    """
    if name_or_folder == "none":
        raise ConfigError(
            "the draft 'none' is no draft to load; leave the draft of a Session out to "
            "decode plainly"
        )
    if not isinstance(name_or_folder, str | Path | Family) or not str(name_or_folder):
        raise ConfigError(
            f"the draft is {name_or_folder!r:.60}; use a name, a folder or the record "
            f"of a family: 'shipped', 'ngram', ..."
        )

    is_family = family is not None and name_or_folder == family.name
    if is_family or isinstance(name_or_folder, Family):
        return
    if name_or_folder in SUGGESTIONS:
        return

    kind, _, name = str(name_or_folder).partition(":")
    if kind in MIXES:
        check_draft(_split_mix(kind, name)[1], family)
    elif kind == POOL.name:
        for member in name.split("+"):
            check_draft(member, family)
    elif kind == "self":
        _exit_layers(name)
    elif kind == "model":
        check_name(name)
    elif not _is_on_hub(name_or_folder):
        folder = draft_folder(name_or_folder)
        if not is_public_folder(folder):
            checkpoint.check_present(folder)


def new_draft(family: Family, target: Target) -> LoadedDraft:
    """A draft that has learned nothing yet, of a target's own shape if it has one.

    Its vocabulary is the target's, whose head it uses; `ospec distill` makes drafts
    with a smaller one, and a head of their own.

    Raises:
      ConfigError: A language model drafts, which one is not said.
    """
    if family.config is ModelConfig:
        raise ConfigError(
            f"a draft of the family {family.name!r} is a language model; say which, "
            f"as in 'model:TARGET' or 'self:int4'"
        )

    if family is POOL:
        raise ConfigError("a pool has members; name them, as in 'pool:shipped+ngram'")

    config = None
    if family.default_config is not None:
        config = family.default_config(target.config, 0, _NUM_HEADS, 0)

    # The depth does not matter to its parameters.
    drafter = build_drafter(family, config, TreeConfig(num_steps=1), target.numerics)
    params = jax.jit(drafter.init_params)(jax.random.key(0))
    draft = Draft(start_warm(family, params, target, None))
    # A family that the package does not know must come with the draft.
    own = None if FAMILIES.get(family.name) is family else family

    return LoadedDraft(draft, Meta.create(target, config, family.name), own_family=own)


def shipped_drafts() -> dict[str, Path]:
    """Folders of the drafts that come with the package, by what follows `shipped:`."""
    folders = sorted(_SHIPPED.glob(f"{_SHIPPED_TARGET}-*"))
    return {
        folder.name.removeprefix(f"{_SHIPPED_TARGET}-"): folder for folder in folders
    }


def draft_folder(name_or_folder: str | Path) -> Path:
    """Where a trained draft lies; `shipped` is short for `shipped:eagle3`.

    What is on the hub is downloaded, if it is not here.

    Raises:
      ConfigError: No such draft is shipped.
      FileNotFoundError: It cannot be had from the hub.
    """
    kind, _, name = str(name_or_folder).partition(":")
    if kind != "shipped":
        # All of it: it may be a checkpoint as well as a public head.
        if _is_on_hub(name_or_folder):
            return from_hub(str(name_or_folder))

        return Path(name_or_folder)

    shipped = shipped_drafts()
    if (name or "eagle3") not in shipped:
        names = ", ".join(f"shipped:{name}" for name in shipped)
        raise ConfigError(f"no draft {name_or_folder!r} is shipped; there are {names}")

    return shipped[name or "eagle3"]


def _is_on_hub(name_or_folder: str | Path) -> bool:
    """Whether a draft is named as the hub names what it holds, and is not here."""
    name = str(name_or_folder)
    return is_hub_id(name) and not Path(name).exists()


def restore(
    name_or_folder: str | Path,
    target: Target | None = None,
    family: Family | None = None,
    above: tuple[Path, ...] = (),
) -> checkpoint.Checkpoint:
    """A draft's checkpoint, its difference to a base draft added to that.

    Args:
      family: See `load_draft`.
      above: Folders of differences that it is the base of.

    Raises:
      CheckpointError: Nothing readable is there, it is for another target, or its base
        is not what it was.
    """
    mesh = target.mesh if target is not None else None
    folder = draft_folder(name_or_folder)
    found = checkpoint.load(folder, target, mesh=mesh, family=family)
    meta = found.meta
    if not meta.base:
        return found

    above = (*above, folder.resolve())
    if draft_folder(meta.base).resolve() in above:
        raise checkpoint.CheckpointError(
            f"{name_or_folder} says that it is the difference to {meta.base!r}, which "
            f"is itself, or a difference to it; get the base back"
        )

    # The base may itself be a difference, down to one that stands alone.
    base = restore(meta.base, target, family, above).draft
    # By content, not by name: added to another base, the difference would be noise.
    known = low_rank.fingerprint(base)
    if known != meta.base_hash:
        raise checkpoint.CheckpointError(
            f"{name_or_folder} holds only its difference to the draft {meta.base!r} "
            f"with the hash {meta.base_hash}, but that one's is {known} now: get the "
            f"base back, or train it anew with `ospec distill --from {meta.base}`"
        )

    with naming(f"{name_or_folder}, a difference to {meta.base},"):
        params = low_rank.add(base.params, found.draft.params)

    # From here on it is a whole draft.
    meta = dataclasses.replace(meta, base="", base_hash="", rank=0)

    return dataclasses.replace(found, draft=base.replace(params=params), meta=meta)


def model_draft(name_or_path: str, target: Target) -> LoadedDraft:
    """Loads a smaller language model to draft for a target, in its precision.

    Raises:
      CheckpointError: The two have different tokenizers.
    """
    # Like the target, so that one kind of cache and numerics serves both.
    how = target.numerics
    model = load_target(name_or_path, how.precision, target.mesh, how.is_scanned)
    meta = Meta.create(target, None, "model", card={"model": name_or_path})
    if tokenizer_hash(model.tokenizer) != meta.tokenizer_hash:
        ours, theirs = (
            t.get_vocab().items() for t in (target.tokenizer, model.tokenizer)
        )
        differing = sorted(ours ^ theirs)
        raise checkpoint.CheckpointError(
            f"{name_or_path!r} has another tokenizer than {target.name}: "
            f"{len(differing)} entries differ, as {differing[:3]}, so its tokens would "
            f"mean something else; use a model of the same family"
        )

    # Equal tokenizers, but heads may be padded to different sizes.
    token_ids = None
    if model.config.vocab_size < target.config.vocab_size:
        token_ids = jnp.arange(model.config.vocab_size, dtype=jnp.int32)
    elif model.config.vocab_size > target.config.vocab_size:
        # What is beyond the common tokenizer is padding.
        size = target.config.vocab_size
        model = dataclasses.replace(
            model,
            config=dataclasses.replace(model.config, vocab_size=size),
            params=without_padding(model.params, size),
        )

    return LoadedDraft(Draft(model.params, token_ids), meta, model)


def own_draft(name: str, target: Target) -> LoadedDraft:
    """The target as its own draft: `int4`, or `exit-N` for its first N layers.

    Raises:
      ConfigError: It has no such part.
    """
    config = target.config
    params = {}
    layers = _exit_layers(name, config.num_layers - 1)
    if layers is None:
        params = in_four_bits(target.params)
    else:
        config = dataclasses.replace(config, num_layers=layers)

    meta = Meta.create(target, None, "self", card={"model": name})
    return LoadedDraft(Draft(params), meta, dataclasses.replace(target, config=config))


def _exit_layers(name: str, most: int | None = None) -> int | None:
    """The number of layers in `exit-N`; None for `int4`.

    Args:
      most: Layers that there are before an exit; None where that is not known yet.

    Raises:
      ConfigError: It is neither, or there are fewer layers.
    """
    if name == "int4":
        return None

    kind, _, count = name.partition("-")
    layers = int(count) if count.isdecimal() else 0
    if kind != "exit" or layers < 1 or (most is not None and layers > most):
        end = f"from 1 to {most}" if most is not None else "layers"
        raise ConfigError(
            f"no draft 'self:{name}'; use self:int4, or self:exit-N with N {end}"
        )

    return layers


def mixed_draft(
    mix: str, names: str, target: Target, family: Family | None = None
) -> LoadedDraft:
    """A draft beside which chains of suggestions are drafted.

    Args:
      names: Of the suggestions and of the draft, `ngram,shipped`.
      family: See `load_draft`.

    Raises:
      ConfigError: They are not one of each.
    """
    suggestions, name = _split_mix(mix, names)
    inner = load_draft(name, target, family)
    if inner.members:
        raise ConfigError(
            f"{name!r} is a pool; put the mixture into it, as in "
            f"'pool:fallback:ngram,shipped+shipped:hydra'"
        )

    # The inner draft stays what it is: only how it is drafted with changes.
    return dataclasses.replace(inner, mix=mix, suggestions=suggestions)


def _split_mix(mix: str, names: str) -> tuple[str, str]:
    """The names of suggestions and of the draft beside them."""
    suggestions, _, name = names.partition(",")
    if suggestions not in SUGGESTIONS or not name or name in SUGGESTIONS:
        raise ConfigError(
            f"cannot mix {names!r}; use {mix}:SUGGESTIONS,DRAFT, the first one of "
            f"{', '.join(SUGGESTIONS)}, the second a draft of another kind"
        )

    return suggestions, name


def pool_draft(
    members: Sequence[LoadedDraft], target: Target, names: Sequence[str] = ()
) -> LoadedDraft:
    """Several drafts behind one, of which a controller chooses one each step.

    They are served as they are, but for those that learn (`LearnerConfig.members`);
    n-grams are learned in one memory for all.

    Args:
      names: Of the members, for records; by default their families'.

    Raises:
      ConfigError: They cannot stand side by side.
    """
    if target.mesh is not None:
        raise ConfigError(
            "a pool of drafts cannot be split over devices; use one device, or one "
            "draft"
        )

    for member in members:
        if member.members:
            raise ConfigError("a pool cannot be a member of another one; join them")
        if member.mix not in ("", "fallback"):
            raise ConfigError(
                f"{member.mix!r} drafts another tree than the other members of a pool; "
                f"use 'fallback' there"
            )

    config = PoolConfig(
        tuple(
            Member(member.family, member.architecture, member.mix, member.needs_ngrams)
            for member in members
        )
    )
    names = names or [member.meta.family for member in members]
    meta = Meta.create(target, None, POOL.name, card={"model": "+".join(names)})
    params = Members(tuple(member.draft for member in members))

    return LoadedDraft(Draft(params), meta, members=tuple(members), pool=config)


def _learned_pool(restored: checkpoint.Checkpoint, target: Target) -> LoadedDraft:
    """A pool some members of which have learned; the others are loaded by name."""
    names = str(restored.meta.card.get("model", "")).split("+")
    members = [load_draft(name, target) for name in names]
    learned = freely_placed(restored.draft, target.mesh).params
    for number, draft in learned.items():
        members[number] = dataclasses.replace(members[number], draft=draft)

    pool = pool_draft(members, target, names)
    # So that they are stored again, whoever learns next.
    meta = dataclasses.replace(pool.meta, members=restored.meta.members)

    return dataclasses.replace(pool, meta=meta)


def with_sliding_window(draft: LoadedDraft, sliding_window: int) -> LoadedDraft:
    """The draft with another window in its own attention.

    No parameter depends on it, so a trained draft may see less, or more, than it was
    trained with.

    Args:
      sliding_window: See `DraftConfig`; 0 for all.

    Raises:
      ConfigError: The draft has no attention of its own.
    """
    if draft.meta.draft is None:
        raise ConfigError(
            f"a draft of the family {draft.meta.family!r} has no attention of its own "
            f"for a sliding window"
        )

    config = dataclasses.replace(draft.meta.draft, sliding_window=sliding_window)
    meta = dataclasses.replace(draft.meta, draft=config)

    return dataclasses.replace(draft, meta=meta)


def freely_placed(tree, mesh):
    """Copies of restored arrays that are not committed to a device; on a mesh, all are.

    A committed one commits all that is computed from it, and `jit` compiles a function
    anew for its committed and uncommitted arguments.
    """
    if mesh is not None:
        return tree

    return jax.tree.map(jnp.asarray, jax.device_get(tree))
