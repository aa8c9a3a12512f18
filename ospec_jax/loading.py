# SPDX-License-Identifier: Apache-2.0
"""Drafts by the names and folders that users give."""

import dataclasses
from pathlib import Path

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
from ospec_jax.drafters.registry import FAMILIES, SUGGESTIONS, build_drafter
from ospec_jax.drafters.self_draft import in_four_bits
from ospec_jax.drafters.starts import start_warm
from ospec_jax.formats.importing import is_public_folder, load_folder
from ospec_jax.models.hub import Target, load_target
from ospec_jax.models.tokenizer import tokenizer_hash
from ospec_jax.storage import checkpoint, low_rank
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.types import Draft

_SHIPPED = Path(__file__).parent / "shipped"
_SHIPPED_TARGET = "smollm2-135m"
_NUM_HEADS = 5
"""Tokens that a new draft can draft one after the other, if it must know before."""


@dataclasses.dataclass(frozen=True)
class LoadedDraft:
    """Draft parameters with the record of what they belong to.

    Attributes:
      model: The language model that drafts, for the families `model` and `self`.
      mix: `fallback` or `mixed`: how suggestions are drafted beside it, if they are.
      suggestions: Where they come from: `ngram`, `suffix` or `prediction`.
      own_family: The record of a family that the package does not know.
    """

    draft: Draft
    meta: Meta
    model: Target | None = None
    mix: str = ""
    suggestions: str = ""
    own_family: Family | None = None

    @property
    def family(self) -> Family:
        """What drafts with it."""
        return checkpoint.family_of(self.meta.family, self.own_family)

    @property
    def architecture(self) -> DraftConfig | ModelConfig | None:
        """What its family's drafters are built from."""
        return self.model.config if self.model is not None else self.meta.draft

    @property
    def memory_orders(self) -> tuple[int, ...]:
        """Lengths of the n-grams that stand by it."""
        source = FAMILIES[self.suggestions] if self.suggestions else self.family
        return source.memory_orders

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose inputs the draft reads."""
        return self.meta.draft.taps if self.meta.draft else ()


def load_draft(
    name_or_folder: str | Path | Family,
    target: Target,
    family: Family | None = None,
) -> LoadedDraft:
    """Loads what the command line's `--draft` names, but for `none`.

    Args:
      name_or_folder: A family without parameters (`ngram`, `suffix`, `prediction`),
        `shipped` or `shipped:NAME`, the folder of a checkpoint or of a public EAGLE-3
        or Hydra head, `model:TARGET`, `self:int4`, `self:exit-N`, or
        `fallback:` or `mixed:` with suggestions and a draft: `mixed:ngram,shipped`.
        Or the record of a family, one of the user's own, too: then a new draft of it.
      family: Of a checkpoint's draft, where the package does not know it.

    Raises:
      CheckpointError: Nothing readable is there, or it is for another target.
      ConfigError: A public head has an architecture that is not supported.
      WeightsError: A public head lacks tensors.
    """
    if isinstance(name_or_folder, Family):
        return new_draft(name_or_folder, target)
    if name_or_folder in SUGGESTIONS:
        return new_draft(FAMILIES[str(name_or_folder)], target)

    kind, _, name = str(name_or_folder).partition(":")
    if kind == "model":
        return model_draft(name, target)
    if kind == "self":
        return own_draft(name, target)
    if kind in MIXES:
        return mixed_draft(kind, name, target)

    folder = draft_folder(name_or_folder)
    if is_public_folder(folder):
        with naming(folder):
            return LoadedDraft(*load_folder(folder, target))

    restored = restore(name_or_folder, target, family)
    known = checkpoint.family_of(restored.meta.family, family)
    if known.config is ModelConfig:
        name = f"{restored.meta.family}:{restored.meta.card.get('model', 'NAME')}"
        raise checkpoint.CheckpointError(
            f"{folder} was learned beside the drafting model {name!r}, which it does "
            f"not hold; pass --draft {name}"
        )

    draft = freely_placed(restored.draft, target.mesh)

    return LoadedDraft(draft, restored.meta, own_family=family)


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

    config = None
    if family.default_config is not None:
        config = family.default_config(target.config, 0, _NUM_HEADS, 0)

    drafter = build_drafter(family, config, TreeConfig(num_steps=1), target.numerics)
    params = drafter.init_params(jax.random.key(0))
    draft = Draft(start_warm(family, params, target, None))
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

    Raises:
      ConfigError: No such draft is shipped.
    """
    kind, _, name = str(name_or_folder).partition(":")
    if kind != "shipped":
        return Path(name_or_folder)

    shipped = shipped_drafts()
    if (name or "eagle3") not in shipped:
        names = ", ".join(f"shipped:{name}" for name in shipped)
        raise ConfigError(f"no draft {name_or_folder!r} is shipped; there are {names}")

    return shipped[name or "eagle3"]


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

    base = restore(meta.base, target, family, above).draft
    known = low_rank.fingerprint(base)
    if known != meta.base_hash:
        raise checkpoint.CheckpointError(
            f"{name_or_folder} holds only its difference to the draft {meta.base!r} "
            f"with the hash {meta.base_hash}, but that one's is {known} now: get the "
            f"base back, or train it anew with `ospec distill --from {meta.base}`"
        )

    with naming(f"{name_or_folder}, a difference to {meta.base},"):
        params = low_rank.add(base.params, found.draft.params)

    meta = dataclasses.replace(meta, base="", base_hash="", rank=0)

    return dataclasses.replace(found, draft=base.replace(params=params), meta=meta)


def model_draft(name_or_path: str, target: Target) -> LoadedDraft:
    """Loads a smaller language model to draft for a target, in its precision.

    Raises:
      CheckpointError: The two have different tokenizers.
    """
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

    token_ids = None
    if model.config.vocab_size < target.config.vocab_size:
        token_ids = jnp.arange(model.config.vocab_size, dtype=jnp.int32)
    elif model.config.vocab_size > target.config.vocab_size:
        # What is beyond the common tokenizer is padding of the head.
        own = dataclasses.replace(model.config, vocab_size=target.config.vocab_size)
        model = dataclasses.replace(model, config=own)

    return LoadedDraft(Draft(model.params, token_ids), meta, model)


def own_draft(name: str, target: Target) -> LoadedDraft:
    """The target as its own draft: `int4`, or `exit-N` for its first N layers.

    Raises:
      ConfigError: It has no such part.
    """
    config = target.config
    params = {}
    if name == "int4":
        params = in_four_bits(target.params)
    else:
        kind, _, count = name.partition("-")
        layers = int(count) if count.isdecimal() else 0
        if kind != "exit" or not 0 < layers < config.num_layers:
            raise ConfigError(
                f"no draft 'self:{name}'; use self:int4, or self:exit-N with N from 1 "
                f"to {config.num_layers - 1}"
            )
        config = dataclasses.replace(config, num_layers=layers)

    meta = Meta.create(target, None, "self", card={"model": name})
    return LoadedDraft(Draft(params), meta, dataclasses.replace(target, config=config))


def mixed_draft(mix: str, names: str, target: Target) -> LoadedDraft:
    """A draft beside which chains of suggestions are drafted.

    Args:
      names: Of the suggestions and of the draft, `ngram,shipped`.

    Raises:
      ConfigError: They are not one of each.
    """
    suggestions, _, name = names.partition(",")
    if suggestions not in SUGGESTIONS or not name or name in SUGGESTIONS:
        raise ConfigError(
            f"cannot mix {names!r}; use {mix}:SUGGESTIONS,DRAFT, the first one of "
            f"{', '.join(SUGGESTIONS)}, the second a draft of another kind"
        )

    inner = load_draft(name, target)
    return dataclasses.replace(inner, mix=mix, suggestions=suggestions)


def freely_placed(tree, mesh):
    """Copies of restored arrays that are not committed to a device; on a mesh, all are.

    A committed one commits all that is computed from it, and `jit` compiles a function
    anew for its committed and uncommitted arguments.
    """
    if mesh is not None:
        return tree

    return jax.tree.map(jnp.asarray, jax.device_get(tree))
