# SPDX-License-Identifier: Apache-2.0
"""An independent, smaller language model of the same vocabulary as the draft.

It sees tokens only: the classic form of speculative decoding (Leviathan et al.,
arXiv 2211.17192), for any pair of targets that share a tokenizer.
"""

import jax.numpy as jnp

from ospec_jax.config import ConfigError, ModelConfig, TreeConfig
from ospec_jax.drafters.base import Drafter, Family, Hints, take_row
from ospec_jax.drafters.growth import Nodes, grow, num_scratch
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.layers import Numerics
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Pairs,
    Retraced,
    Roots,
    SharedTables,
    Suggested,
)

_SPARE_SLOTS = 64
"""A pass over a prompt's chunk writes one entry more than the chunk has."""


def small_lm(
    config: ModelConfig,
    tree: TreeConfig,
    numerics: Numerics,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter; a `Draft`'s parameters are the model's, ready to run.

    Args:
      config: The drafting model's architecture. Its `vocab_size` is at most the
        target's: rows of the model's head beyond it are padding, and cut off.
      stop_fn: When a row grows no deeper; see `drafters.stopping`.
    """
    model = llama.build(config, numerics)
    num_ids = config.vocab_size

    def run(draft, cache, tokens, positions, bias, starts):
        hidden, _, cache = model(draft.params, tokens, positions, bias, cache, starts)
        return hidden, cache

    def logits_of(draft, hidden):
        # Rows beyond the vocabulary are padding, which must not be drafted.
        return llama.target_logits(draft.params, hidden, numerics)[..., :num_ids]

    def init_cache(batch_size, capacity):
        return llama.init_cache(config, numerics, batch_size, capacity + _SPARE_SLOTS)

    def init_context(batch_size):
        return DraftContext(
            hidden=jnp.zeros((batch_size, 1)), logits=jnp.zeros((batch_size, num_ids))
        )

    def run_pairs(draft, cache, pairs: Pairs):
        """States of the pairs' tokens and of the one before them, and the cache."""
        # The entry before the first new one is written again: a prompt's first token
        # is nobody's successor.
        tokens = jnp.concatenate([pairs.inputs[:, :1], pairs.tokens], axis=1)
        starts = pairs.starts
        num_tokens = tokens.shape[1]
        positions = starts[:, None] + jnp.arange(num_tokens)
        bias = kv.causal_bias(starts, num_tokens, cache.capacity)
        return run(draft, cache, tokens, positions, bias, starts)

    def extend(
        draft: Draft, shared: SharedTables, cache: kv.KVCache, pairs: Pairs
    ) -> tuple[kv.KVCache, DraftContext]:
        hidden, cache = run_pairs(draft, cache, pairs)
        return cache, context_of(draft, hidden, pairs)

    def context_of(draft, hidden, pairs: Pairs) -> DraftContext:
        # The newest real token lies behind `num_valid` others, the repeated one
        # included.
        last = logits_of(draft, take_row(hidden, pairs.num_valid)[:, None])[:, 0]
        return DraftContext(hidden=jnp.zeros((last.shape[0], 1)), logits=last)

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[kv.KVCache, DraftContext, Retraced]:
        hidden, cache = run_pairs(draft, cache, pairs)
        # Each token was predicted at the one before it, the first at the root, which
        # was run over once more.
        logits = logits_of(draft, hidden[:, : pairs.tokens.shape[1]])
        found = Retraced(suggested, logits, draft.token_ids)

        return cache, context_of(draft, hidden, pairs), found

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, kv.KVCache]:
        def step(cache, nodes: Nodes):
            out, cache = run(
                draft, cache, nodes.tokens, nodes.positions, nodes.bias, nodes.starts
            )
            return nodes.hidden, logits_of(draft, out), cache

        return grow(
            step,
            tree,
            cache,
            roots,
            draft.token_ids,
            hints,
            stop_fn,
            numerics=numerics,
            offset=1,  # a token lies in the slot of its position, the root's included
        )

    return Drafter(
        init_params=lambda key: llama.init_params(config, key),
        init_cache=init_cache,
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=_refuse_training,
        num_scratch=num_scratch(tree) + 1,  # the root has a slot, too
        retrace=retrace,
    )


def _refuse_training(*_, **__):
    raise ConfigError("drafting models are not trained")


MODEL = Family(
    name="model",
    description="a smaller language model with the same tokenizer",
    build=small_lm,
    config=ModelConfig,
)
