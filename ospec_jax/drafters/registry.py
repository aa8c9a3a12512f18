# SPDX-License-Identifier: Apache-2.0
"""Families of drafters by name."""

import functools

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    ExitConfig,
    HydraConfig,
    ModelConfig,
    TreeConfig,
)
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.combine import fallback, inner_tree, parallel
from ospec_jax.drafters.eagle import eagle1, eagle3
from ospec_jax.drafters.early_exit import early_exit
from ospec_jax.drafters.hints import hinted_chain
from ospec_jax.drafters.hydra import hydra
from ospec_jax.drafters.ngram import ORDERS, SUFFIX_ORDERS, with_ngrams
from ospec_jax.drafters.self_draft import self_draft
from ospec_jax.drafters.small_lm import small_lm
from ospec_jax.models.layers import Numerics

FAMILIES = {
    "eagle3": "one decoder layer over three of the target's hidden states (EAGLE-3)",
    "eagle1": "one decoder layer that predicts the target's final states (EAGLE-1/2)",
    "hydra": "a head a token over the target's final state (Hydra, Hydra++)",
    "exit": "the target's first layers and a trained head behind them (early exit)",
    "model": "a smaller language model with the same tokenizer",
    "self": "the target itself: int4 (its weights in four bits), exit-N (N layers)",
    "ngram": "no parameters: what followed the same tokens before (prompt lookup)",
    "suffix": "likewise, with longer n-grams of past answers and deeper drafts",
    "prediction": "no parameters: only what a request's user expects the answer to be",
}

TRAINED = ("eagle3", "eagle1", "hydra", "exit")
"""Families that `ospec distill` trains."""

TAPPED = ("eagle3", "exit")
"""Those of them that read states from within the target, not its final ones."""


def memory_orders(family: str) -> tuple[int, ...]:
    """Lengths of the n-grams that a family's memory holds."""
    return SUFFIX_ORDERS if family == "suffix" else ORDERS


# The same arguments give the same object, so that engines find their programs again.
@functools.lru_cache(maxsize=64)
def build_drafter(
    family: str, config: DraftConfig | ModelConfig | None, tree: TreeConfig,
    numerics: Numerics | None = None, has_ngrams: bool = False, vocab_size: int = 0,
    predicted: TreeConfig | None = None, mix: str = "",
) -> Drafter:  # fmt: skip
    """Builds the drafter of a family.

    Args:
      config: The draft's architecture, for families that have one.
      vocab_size: The target's.
      has_ngrams: Let n-grams suggest tokens to a neural drafter; the families `ngram`
        and `suffix` always do.
      predicted: Draft such a chain from suggestions alone, with the state of the
        family's drafter: for stretches where a prediction holds.
      mix: How chains of suggestions stand beside those of the family: one of
        `mixed.MIXES`, or not at all.

    Raises:
      ConfigError: There is no such family, or it cannot draft such a tree.
    """
    numerics = numerics or Numerics()
    lend = lambda drafter, tree: with_ngrams(drafter, tree, numerics.has_batched_writes)
    if family in ("ngram", "suffix"):
        return lend(hinted_chain(predicted or tree), tree)
    if family == "prediction":
        return hinted_chain(predicted or tree)
    if tree.kind == "parallel" and mix != "mixed":
        raise ConfigError("a parallel tree needs two drafters: use mixed:ngram,DRAFT")
    outer, tree = tree, inner_tree(tree) if mix else tree
    trained = {"eagle3": eagle3, "eagle1": eagle1}
    if family in trained and isinstance(config, DraftConfig):
        drafter = trained[family](config, tree, numerics)
    elif family == "hydra" and isinstance(config, HydraConfig):
        drafter = hydra(config, tree, numerics)
    elif family == "exit" and isinstance(config, ExitConfig):
        drafter = early_exit(config, tree, numerics)
    elif family == "model" and isinstance(config, ModelConfig):
        drafter = small_lm(config, tree, numerics, vocab_size)
    elif family == "self" and isinstance(config, ModelConfig):
        drafter = self_draft(config, tree, numerics)
    else:
        raise ConfigError(
            f"unknown family of drafters {family!r}; known: {', '.join(FAMILIES)}"
        )
    if mix:
        drafter = {"fallback": fallback, "mixed": parallel}[mix](drafter, outer)
    if predicted is not None:
        drafter = drafter._replace(propose=hinted_chain(predicted).propose)
    return lend(drafter, outer) if has_ngrams else drafter
