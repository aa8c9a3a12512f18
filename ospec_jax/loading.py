# SPDX-License-Identifier: Apache-2.0
"""Drafts by the names and folders that users give."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from ospec_jax.config import ConfigError
from ospec_jax.drafters.combine import MIXES
from ospec_jax.drafters.self_draft import in_four_bits
from ospec_jax.formats.importing import is_public_folder, load_folder
from ospec_jax.models.hub import Target, load_target
from ospec_jax.models.tokenizer import tokenizer_hash
from ospec_jax.storage import checkpoint, low_rank
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.types import Draft

_SHIPPED = Path(__file__).parent / "shipped"
_SHIPPED_TARGET = "smollm2-135m"
_SUGGESTIONS = ("ngram", "suffix", "prediction")
"""Families that need no parameters, and stand beside others."""


@dataclasses.dataclass(frozen=True)
class LoadedDraft:
    """Draft parameters with the record of what they belong to.

    Attributes:
      model: The language model that drafts, for the families `model` and `self`.
      mix: `fallback` or `mixed`: how suggestions are drafted beside it, if they are.
      suggestions: Where they come from: `ngram`, `suffix` or `prediction`.
    """

    draft: Draft
    meta: Meta
    model: Target | None = None
    mix: str = ""
    suggestions: str = ""

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose inputs the draft reads."""
        return self.meta.draft.taps if self.meta.draft else ()


def load_draft(name_or_folder: str | Path, target: Target) -> LoadedDraft:
    """Loads what the command line's `--draft` names, but for `none`.

    Args:
      name_or_folder: A family without parameters (`ngram`, `suffix`, `prediction`),
        `shipped` or `shipped:NAME`, the folder of a checkpoint or of a public EAGLE-3
        or Hydra head, `model:TARGET`, `self:int4`, `self:exit-N`, or
        `fallback:` or `mixed:` with suggestions and a draft: `mixed:ngram,shipped`.

    Raises:
      CheckpointError: Nothing readable is there, or it is for another target.
      ConfigError: A public head has an architecture that is not supported.
      WeightsError: A public head lacks tensors.
    """
    if name_or_folder in _SUGGESTIONS:
        meta = Meta.create(target, None, str(name_or_folder))
        return LoadedDraft(Draft(params={}), meta)
    kind, _, name = str(name_or_folder).partition(":")
    if kind == "model":
        return model_draft(name, target)
    if kind == "self":
        return own_draft(name, target)
    if kind in MIXES:
        return mixed_draft(kind, name, target)
    folder = draft_folder(name_or_folder)
    if is_public_folder(folder):
        return LoadedDraft(*load_folder(folder, target))
    restored = restore(name_or_folder, target)
    if restored.meta.family in ("model", "self"):
        name = f"{restored.meta.family}:{restored.meta.card['model']}"
        raise checkpoint.CheckpointError(
            f"{folder} was learned beside the drafting model {name!r}, which it does "
            f"not hold; pass --draft {name}"
        )
    return LoadedDraft(freely_placed(restored.draft, target.mesh), restored.meta)


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
    name_or_folder: str | Path, target: Target | None = None
) -> checkpoint.Checkpoint:
    """A draft's checkpoint, its difference to a base draft added to that.

    Raises:
      CheckpointError: Nothing readable is there, it is for another target, or its base
        is not what it was.
    """
    mesh = target.mesh if target is not None else None
    found = checkpoint.load(draft_folder(name_or_folder), target, mesh=mesh)
    meta = found.meta
    if not meta.base:
        return found
    base = restore(meta.base, target).draft
    known = low_rank.fingerprint(base)
    if known != meta.base_hash:
        raise checkpoint.CheckpointError(
            f"{name_or_folder} holds only its difference to the draft {meta.base!r} "
            f"with the hash {meta.base_hash}, but that one's is {known} now: get the "
            f"base back, or train it anew with `ospec distill --from {meta.base}`"
        )
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
    return LoadedDraft(Draft(model.params, token_ids), meta, model)


def own_draft(name: str, target: Target) -> LoadedDraft:
    """The target as its own draft: `int4`, or `exit-N` for its first N layers.

    Raises:
      ConfigError: It has no such part.
    """
    config, params = target.config, {}
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
    if suggestions not in _SUGGESTIONS or not name or name in _SUGGESTIONS:
        raise ConfigError(
            f"cannot mix {names!r}; use {mix}:SUGGESTIONS,DRAFT, the first one of "
            f"{', '.join(_SUGGESTIONS)}, the second a draft of another kind"
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
