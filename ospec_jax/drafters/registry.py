# SPDX-License-Identifier: Apache-2.0
"""Families of drafters by name, and building a drafter of one."""

import dataclasses
import functools
from typing import Any

from ospec_jax.config import ConfigError, DraftConfig, ModelConfig, TreeConfig
from ospec_jax.drafters.base import READING, Drafter, Family
from ospec_jax.drafters.combine import combine, inner_tree, mixed_tree
from ospec_jax.drafters.dflash import DFLASH
from ospec_jax.drafters.eagle import EAGLE1, EAGLE3
from ospec_jax.drafters.early_exit import EXIT
from ospec_jax.drafters.hints import PREDICTION, hinted_chain
from ospec_jax.drafters.hydra import HYDRA
from ospec_jax.drafters.ngram import NGRAM, SUFFIX, with_ngrams
from ospec_jax.drafters.peagle import PEAGLE
from ospec_jax.drafters.pool import POOL, PoolConfig
from ospec_jax.drafters.self_draft import SELF
from ospec_jax.drafters.small_lm import MODEL
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.drafters.wellformed import build_checked
from ospec_jax.models.layers import Numerics

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        EAGLE3,
        EAGLE1,
        HYDRA,
        DFLASH,
        PEAGLE,
        EXIT,
        MODEL,
        SELF,
        NGRAM,
        SUFFIX,
        PREDICTION,
        POOL,
    )
}
"""All that the package knows; what else there is to say of one, its record says."""

TRAINED = tuple(name for name, family in FAMILIES.items() if family.default_config)
"""Families that `ospec distill` trains."""

SUGGESTIONS = tuple(name for name, family in FAMILIES.items() if family.config is None)
"""Families without parameters, which may stand beside others."""

PUBLIC_DRAFT_VOCAB_SIZE = 32000
"""Tokens that published EAGLE-3 heads can draft."""


def find_family(name_or_family: str | Family) -> Family:
    """The family of a name, or the one that is given.

    Raises:
      ConfigError: There is no family of that name.
    """
    if isinstance(name_or_family, Family):
        return name_or_family
    if name_or_family not in FAMILIES:
        raise ConfigError(
            f"unknown family of drafters {name_or_family!r}; known: "
            f"{', '.join(FAMILIES)}; one of your own is passed as its `Family` record"
        )

    return FAMILIES[name_or_family]


def default_draft_config(
    model: ModelConfig,
    draft_vocab_size: int = 8192,
    family: str | Family = "eagle3",
    num_steps: int = 3,
    layer: int = 0,
) -> DraftConfig:
    """A draft of the target's own shape: one layer of it, or heads beside it.

    Args:
      model: The target's architecture.
      draft_vocab_size: Tokens that can be drafted; 0 for all.
      num_steps: Tokens that it shall draft one after the other.
      layer: Of the target, that the draft belongs to, for families that have one; 0
        stands for the family's own choice.

    Raises:
      ConfigError: The family is not trained, or has no such layer.
    """
    family = find_family(family)
    if family.default_config is None:
        raise ConfigError(
            f"drafts of the family {family.name!r} are not trained; use "
            f"{', '.join(TRAINED)}"
        )
    if layer and not family.has_layer:
        raise ConfigError(
            f"exit_layer is {layer}, but drafts of the family {family.name!r} do not "
            f"belong to one layer; it is for the family 'exit'"
        )

    return family.default_config(model, draft_vocab_size, num_steps, layer)


def public_draft_config(
    model: ModelConfig,
    family: str | Family,
    num_steps: int,
    draft_vocab_size: int = PUBLIC_DRAFT_VOCAB_SIZE,
) -> DraftConfig:
    """A draft as large as published ones of the family, whose weights are not here.

    Args:
      num_steps: Tokens that it shall draft, at most.
      draft_vocab_size: For families whose published drafts have heads of their own.

    Raises:
      ConfigError: The family is not trained.
    """
    family = find_family(family)
    if family.public_config is not None:
        return family.public_config(model, num_steps)

    return default_draft_config(model, draft_vocab_size, family, num_steps)


_READING = TreeConfig(num_steps=1)
"""What drafters draft whose functions over tokens those of all trees take."""


# The same arguments give the same object, so that engines find their programs again.
@functools.lru_cache(maxsize=64)
def build_drafter(
    family: str | Family,
    config: DraftConfig | ModelConfig | PoolConfig | None,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    has_ngrams: bool = False,
    predicted: TreeConfig | None = None,
    mix: str = "",
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter of a family.

    Args:
      config: The draft's architecture, for families that have one.
      has_ngrams: Let n-grams suggest tokens, unless the family never or always does.
      predicted: Draft such a chain from suggestions alone, with the state of the
        family's drafter: for stretches where a prediction holds.
      mix: How chains of suggestions stand beside those of the family: one of
        `combine.MIXES`, or not at all.
      stop_fn: When a row of the family's own drafts grows no deeper, beside the tree's
        rules; see `drafters.stopping`.

    Raises:
      ConfigError: There is no such family, or it cannot draft such a tree.
    """
    family = find_family(family)
    numerics = numerics or Numerics()
    if tree.kind == "parallel" and mix != "mixed":
        raise ConfigError("a parallel tree needs two drafters: use mixed:ngram,DRAFT")

    _check_architecture(family, config)

    is_lent = family.ngrams == "always" or (has_ngrams and family.ngrams == "wanted")
    if isinstance(config, PoolConfig):
        config = dataclasses.replace(config, has_ngrams=is_lent)

    drafter = build_alone(
        family, config, tree, numerics, is_lent, predicted, mix, stop_fn
    )
    any_tree = mixed_tree(mix, _READING)
    is_known = FAMILIES.get(family.name) is family
    if not is_known or (tree, predicted, stop_fn) == (any_tree, None, None):
        return drafter

    # What runs over tokens does not depend on what is drafted behind them: it is one
    # object for all trees, so that programs which only run over tokens are shared.
    reading = build_drafter(
        family, config, any_tree, numerics, has_ngrams, None, mix, None
    )
    return drafter._replace(**{name: getattr(reading, name) for name in READING})


def build_alone(
    family: Family,
    config: Any,
    tree: TreeConfig,
    numerics: Numerics,
    is_lent: bool,
    predicted: TreeConfig | None,
    mix: str,
    stop_fn: StopFn | None,
) -> Drafter:
    """Builds a drafter, all of whose functions are its own."""
    # From the inside out: the family's own drafter, suggestions beside it, then the
    # source that they come from. `propose` of a longer chain replaces all of the
    # family's drafting but none of its state, so that steps can change between both.
    inner = inner_tree(mix, tree) if mix else tree
    drafter = build_checked(family, config, inner, numerics, stop_fn)
    if mix:
        drafter = combine(mix, drafter, tree)
    if predicted is not None:
        drafter = drafter._replace(propose=hinted_chain(predicted).propose)
    if is_lent:
        drafter = with_ngrams(drafter, tree, numerics.has_batched_writes)

    return drafter


def _check_architecture(family: Family, config: Any) -> None:
    if isinstance(config, family.config or type(None)):
        return

    wanted = family.config.__name__ if family.config else None
    raise ConfigError(
        f"a drafter of the family {family.name!r} is built from {wanted}, not from "
        f"{type(config).__name__ if config is not None else None}"
    )
