# SPDX-License-Identifier: Apache-2.0
"""Drafts that were never trained, for tests in which they only have to draft."""

from ospec_jax import TreeConfig
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.loading import LoadedDraft
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config


def random_head(target, draft_vocab_size=200, **changes):
    """An EAGLE-3 head of random parameters.

    Args:
      changes: Fields of the architecture; see `tiny_draft_config`.
    """
    config = tiny_draft_config(target.config, draft_vocab_size, **changes)
    params = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
    return LoadedDraft(params, Meta.create(target, config))
