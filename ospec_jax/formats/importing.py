# SPDX-License-Identifier: Apache-2.0
"""Taking a public head into use: with its target, or as it is."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from ospec_jax.config import ConfigError
from ospec_jax.drafters.base import dequantized
from ospec_jax.formats import dflash, eagle3, hydra
from ospec_jax.formats.tensors import read_config
from ospec_jax.models.hub import Target
from ospec_jax.models.llama import embedding_table
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.types import Draft

_SAME_TABLE = 0.02
"""Relative distance of two embeddings that are one: int8 rounds by up to 1%."""


def is_public_folder(folder: Path) -> bool:
    """Whether a folder is laid out as on a model hub, not as a checkpoint of ours."""
    return (folder / "config.json").is_file()


def load_folder(
    folder: Path, target: Target | None, taps: tuple[int, ...] | None = None
) -> tuple[Draft, Meta]:
    """Reads a public EAGLE-3 head, Hydra heads or a DFlash draft, for a target.

    Args:
      target: Checked against; None leaves that to whoever loads the draft later.
      taps: Layers whose input the head reads, instead of what its files say.

    Raises:
      CheckpointError: It was made for another vocabulary, width or depth.
      ConfigError: Its architecture is not supported.
      WeightsError: Tensors are missing, surplus or of the wrong shape.
    """
    raw = read_config(folder)
    if hydra.is_config(raw):
        return _load_hydra(folder, target, taps)
    if dflash.is_config(raw):
        return _load_dflash(folder, target, taps)

    found = eagle3.read(folder, target.config.num_layers if target else None, taps)
    facts = {"imported_from": folder.name, "format": found.layout, "dtype": found.dtype}
    if found.verifier:
        facts["verifier"] = found.verifier

    meta = Meta.create(target, found.config, card=facts)
    if target is not None:
        meta.check(target)
    elif found.verifier:
        meta = dataclasses.replace(meta, target=found.verifier)

    if found.embedding is None and _is_narrow(found):
        raise CheckpointError(
            f"{folder} is {found.config.hidden_size} wide and its target "
            f"{found.config.target_hidden_size}, so that it needs an embedding of its "
            f"own; embed_tokens.weight is missing"
        )

    if target is not None and _shares_embedding(found, target):
        config = dataclasses.replace(found.config, has_own_embedding=False)
        params = {k: v for k, v in found.draft.params.items() if k != "embed_tokens"}
        return found.draft.replace(params=params), dataclasses.replace(
            meta, draft=config
        )

    return found.draft, meta


def _load_hydra(folder: Path, target: Target | None, taps) -> tuple[Draft, Meta]:
    if taps:
        raise ConfigError(
            f"{folder} holds Hydra heads, which read the target's final state: they "
            f"have no tap layers to choose"
        )
    if target is None:
        raise ConfigError(
            f"{folder} holds Hydra heads, whose config.json does not describe the "
            f"target that they extend; pass --target"
        )

    found = hydra.read(folder, target.config)
    if found.embedding is not None and not _is_same(found.embedding, target):
        raise CheckpointError(
            f"{folder} was trained to read another embedding (input_embed_fn) than "
            f"that of {target.name}: it is for {found.verifier or 'another model'}"
        )

    facts = {"imported_from": folder.name, "format": "hydra", "dtype": found.dtype}
    if found.verifier:
        facts["verifier"] = found.verifier

    return found.draft, Meta.create(target, found.config, "hydra", card=facts)


def _load_dflash(folder: Path, target: Target | None, taps) -> tuple[Draft, Meta]:
    if target is None:
        raise ConfigError(
            f"{folder} holds a DFlash draft, whose mask is a token of its target; pass "
            f"--target"
        )

    found = dflash.read(folder, target, taps)
    facts = {"imported_from": folder.name, "format": "dflash", "dtype": found.dtype}
    meta = Meta.create(target, found.config, "dflash", card=facts)
    meta.check(target)

    return found.draft, meta


def _is_narrow(found: eagle3.Imported) -> bool:
    return found.config.hidden_size != found.config.target_hidden_size


def _shares_embedding(found: eagle3.Imported, target: Target) -> bool:
    """Whether the table that came with the head is the target's."""
    if found.embedding is None or _is_narrow(found):
        return False

    return _is_same(found.embedding, target)


def _is_same(embedding, target: Target) -> bool:
    theirs = jnp.asarray(embedding, jnp.float32)
    ours = dequantized(embedding_table(target.params))
    distance = jnp.linalg.norm(theirs - ours)
    return bool(distance <= _SAME_TABLE * jnp.linalg.norm(ours))
