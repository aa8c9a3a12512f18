# SPDX-License-Identifier: Apache-2.0
"""Families of drafters by name."""

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    HydraConfig,
    ModelConfig,
    TreeConfig,
)
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.eagle import eagle1, eagle3
from ospec_jax.drafters.hydra import hydra
from ospec_jax.drafters.ngram import ngram_chain, with_ngrams
from ospec_jax.drafters.small_lm import small_lm
from ospec_jax.models.layers import Numerics

FAMILIES = {
    "eagle3": "one decoder layer over three of the target's hidden states (EAGLE-3)",
    "eagle1": "one decoder layer that predicts the target's final states (EAGLE-1/2)",
    "hydra": "a head a token over the target's final state (Hydra, Hydra++)",
    "model": "a smaller language model with the same tokenizer",
    "ngram": "no parameters: what followed the same tokens before (prompt lookup)",
}


def build_drafter(
    family: str, config: DraftConfig | ModelConfig | None, tree: TreeConfig,
    numerics: Numerics | None = None, has_ngrams: bool = False, vocab_size: int = 0,
) -> Drafter:  # fmt: skip
    """Builds the drafter of a family.

    Args:
      config: The draft's architecture, for families that have one.
      vocab_size: The target's.
      has_ngrams: Let n-grams suggest tokens to a neural drafter; the `ngram` family
        always does.

    Raises:
      ConfigError: There is no such family, or it cannot draft such a tree.
    """
    numerics = numerics or Numerics()
    lend = lambda drafter: with_ngrams(drafter, tree, numerics.has_batched_writes)
    if family == "ngram":
        return lend(ngram_chain(tree))
    trained = {"eagle3": eagle3, "eagle1": eagle1}
    if family in trained and isinstance(config, DraftConfig):
        drafter = trained[family](config, tree, numerics)
    elif family == "hydra" and isinstance(config, HydraConfig):
        drafter = hydra(config, tree, numerics)
    elif family == "model" and isinstance(config, ModelConfig):
        drafter = small_lm(config, tree, numerics, vocab_size)
    else:
        raise ConfigError(
            f"unknown family of drafters {family!r}; known: {', '.join(FAMILIES)}"
        )
    return lend(drafter) if has_ngrams else drafter
