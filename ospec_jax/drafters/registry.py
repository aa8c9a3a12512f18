# SPDX-License-Identifier: Apache-2.0
"""Families of drafters by name."""

from ospec_jax.config import ConfigError, DraftConfig, TreeConfig
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.drafters.ngram import ngram_chain, with_ngrams
from ospec_jax.models.layers import Numerics

FAMILIES = {
    "eagle3": "one decoder layer over three of the target's hidden states (EAGLE-3)",
    "ngram": "no parameters: what followed the same tokens before (prompt lookup)",
}


def build_drafter(
    family: str, config: DraftConfig | None, tree: TreeConfig,
    numerics: Numerics | None = None, has_ngrams: bool = False,
) -> Drafter:  # fmt: skip
    """Builds the drafter of a family.

    Args:
      config: The draft's architecture, for families that have one.
      has_ngrams: Let n-grams suggest tokens to a neural drafter; the `ngram` family
        always does.

    Raises:
      ConfigError: There is no such family, or it cannot draft such a tree.
    """
    if family == "ngram":
        return with_ngrams(ngram_chain(tree), tree)
    if family != "eagle3" or config is None:
        raise ConfigError(
            f"unknown family of drafters {family!r}; known: {', '.join(FAMILIES)}"
        )
    drafter = eagle3(config, tree, numerics)
    return with_ngrams(drafter, tree) if has_ngrams else drafter
