# SPDX-License-Identifier: Apache-2.0
"""Drafts that were never trained, for tests in which they only have to draft."""

import dataclasses

from ospec_jax import TreeConfig
from ospec_jax.control.base import Controller
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.drafters.registry import build_drafter
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


def head(target, family, seed=0, **changes):
    """A random draft of three quarters of the target's tokens.

    Args:
      changes: Fields of the architecture; see `tiny_draft_config`.
    """
    num_tokens = target.config.vocab_size * 3 // 4
    config = tiny_draft_config(target.config, num_tokens, family, **changes)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    meta = Meta.create(target, config, family)
    return LoadedDraft(tiny_draft(drafter, config, seed), meta)


@dataclasses.dataclass(frozen=True)
class Turn:
    number: int = 0


def in_turns(actions):
    """Another action at every step."""
    return Controller(
        actions=actions,
        init=lambda num_rows: Turn(),
        choose=lambda state, rows: actions[state.number % len(actions)],
        observe=lambda state, action, outcome: Turn(state.number + 1),
    )
