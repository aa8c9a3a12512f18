# SPDX-License-Identifier: Apache-2.0
"""A trained draft of one family as the start of one of another."""

import dataclasses

from ospec_jax.drafters.base import dequantized
from ospec_jax.drafters.registry import find_family
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.llama import embedding_table


def adopted(
    draft: LoadedDraft, family: str, target: Target, num_steps: int
) -> LoadedDraft:
    """The draft as one of `family`, where that begins with such drafts; else itself.

    Args:
      num_steps: Tokens that it shall draft.
    """
    kind = find_family(family)
    if kind.adopt is None or kind.adopts != draft.family.name:
        return draft

    table = dequantized(embedding_table(target.params))
    config, params = kind.adopt(draft.meta.draft, draft.draft.params, table, num_steps)
    meta = dataclasses.replace(draft.meta, draft=config, family=kind.name)

    return dataclasses.replace(
        draft, draft=draft.draft.replace(params=params), meta=meta
    )
