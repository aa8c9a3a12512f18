# SPDX-License-Identifier: Apache-2.0
"""A round of PEARL as pure functions, one set for each side (arXiv 2408.11850).

In a round the draft writes a *chunk* of K tokens while the target passes over a
*block*: the newest emitted token, and behind it the K - 1 tokens of the chunk before
that nobody has judged yet. So the target's K rows judge those K - 1 tokens and the
first one of the new chunk, which did not exist when the pass began.

- All are accepted: the rest of the new chunk is the next block (*post-verify*).
- One is rejected: the target's token takes its place, and all drafted behind it is
  dropped. The next block is that token alone, whose one row judges the first token of
  a new chunk (*pre-verify*): the same round, with nothing pending.

There is no bonus token: the row that would give it judges the next chunk's first token
instead. Rolling back costs nothing on either side: what lies in a cache beyond the
emitted tokens is overwritten before anything attends to it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ospec_jax.config import ChildrenKind, TreeConfig
from ospec_jax.decoding.step import (
    Scored,
    StepConfig,
    build_target,
    emit,
    moved_on,
    position_keys,
    score_nodes,
)
from ospec_jax.decoding.verify import verify_chosen, verify_drawn
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter
from ospec_jax.types import (
    DecodeState,
    Draft,
    DraftTree,
    Pairs,
    Roots,
    SamplingParams,
    SharedTables,
    Verdict,
)
from ospec_jax.typing import Params, struct

_NOTHING = SharedTables(embedding={}, head={})
"""What a language model of its own reads of the target."""


@struct
class Chunk:
    """Tokens that the draft has written one after the other.

    The first one is judged in the round that it comes from, the others in the next.

    Attributes:
      tokens: `[b, k]`.
      probs: `[b, k, q]` what each was drawn from; None for the most probable ones.
    """

    tokens: Int[Array, "b k"]
    probs: Float[Array, "b k q"] | None = None


@struct
class RoundOutput:
    """What a round added to the answers.

    Attributes:
      tokens: `[b, m + 1]`, of which the first `num_emitted` count.
      num_emitted: `[b]`.
      num_accepted: `[b]` drafted tokens among all `m + 1` that were judged.
      is_finished: `[b]` by a stop token, or because there is no more to come.
      is_kept: `[b]` whether all were accepted: the rest of the chunk is pending.
    """

    tokens: Int[Array, "b m"]
    num_emitted: Int[Array, " b"]
    num_accepted: Int[Array, " b"]
    is_finished: Bool[Array, " b"]
    is_kept: Bool[Array, " b"]


def build_reading(drafter: Drafter) -> Callable:
    """Builds what runs the draft over known tokens, to be jitted.

    The function maps `(draft, cache, inputs [b, t], tokens [b, t], starts [b],
    num_valid [b])`, as in `Pairs`, to the cache.
    """

    def read(draft: Draft, cache: Any, inputs, tokens, starts, num_valid) -> Any:
        pairs = Pairs(inputs, tokens, _no_taps(inputs), starts, num_valid)
        return drafter.extend(draft, _NOTHING, cache, pairs)[0]

    return read


def build_chunk(drafter: Drafter) -> Callable:
    """Builds what drafts a chunk, to be jitted.

    The function maps `(draft, cache, newest, positions, request_keys, sampling)` to
    `(cache, Chunk)`. `newest` are the last two tokens to go on behind, `positions`
    those of the last. It serves both regimes: whether the draft goes on behind its own
    last token or behind the target's, its cache lacks that one token.
    """

    def draft_chunk(
        draft: Draft,
        cache: Any,
        newest: Int[Array, "b 2"],
        positions: Int[Array, " b"],
        request_keys: Key[Array, " b"],
        sampling: SamplingParams,
    ) -> tuple[Any, Chunk]:
        before = newest[:, :1]
        last = newest[:, 1:]
        one = jnp.ones_like(positions)
        pairs = Pairs(before, last, _no_taps(last), positions - 1, one)
        cache, context = drafter.extend(draft, _NOTHING, cache, pairs)

        # The target's numbers are others. A chunk may begin where one began that was
        # dropped before any of its tokens was looked at, so no number serves twice.
        keys = jax.vmap(position_keys)(request_keys, positions)[:, 0]
        roots = Roots(last[:, 0], positions, keys, context, sampling)
        tree, cache = drafter.propose(draft, _NOTHING, cache, roots)
        # Node i is the i-th token, and its row is what the next one was drawn from.
        probs = None if tree.draft_probs is None else tree.draft_probs[:, :-1]

        return cache, Chunk(tree.tokens[:, 1:], probs)

    return draft_chunk


def build_scoring(config: StepConfig) -> Callable:
    """Builds the target's pass over a block, to be jitted.

    The function maps `(target_params, state, previous)` to `(state, Scored)`.
    `config.tree` is a chain as long as what is pending; `previous` is the chunk whose
    rest that is, None where nothing is.
    """
    target = build_target(config)

    def score_block(
        target_params: Params, state: DecodeState, previous: Chunk | None
    ) -> tuple[DecodeState, Scored]:
        block = _block_of(state, previous)
        tree = _chain(block, config.tree.children)
        scored = score_nodes(config, target, target_params, tree, state)
        state = state.replace(cache=scored.cache)

        # What nobody reads need not be kept until the chunk has come.
        return state, scored.replace(hidden=None, taps=None, cache=None)

    return score_block


def build_judging(config: StepConfig) -> Callable:
    """Builds the verdict on a round, to be jitted.

    The function maps `(state, scored, previous, chunk, token_ids)` to `(state,
    RoundOutput)`; `token_ids` are the target ids of the draft's vocabulary where it
    draws from a part of the target's, else None.

    Every position is judged once, with a random number of its own: rounds have roots at
    different positions, and nodes of a round numbers of their own. The released code
    uses one number for the token that pre-verify accepts and for the one after it,
    which is then accepted too often; `tests/parallel/test_laws_of_rounds.py` shows by
    how much.
    """

    def judge(
        state: DecodeState,
        scored: Scored,
        previous: Chunk | None,
        chunk: Chunk,
        token_ids: Int[Array, " q"] | None,
    ) -> tuple[DecodeState, RoundOutput]:
        judged = _judged(config, state, scored, previous, chunk, token_ids)
        # In terms of the block the new chunk's first token, once it is accepted, is the
        # token that follows: then all else is as in any step.
        num_pending = config.tree.num_steps
        is_kept = judged.num_accepted > num_pending
        verdict = Verdict(
            path=judged.path[:, : num_pending + 1],
            num_accepted=jnp.minimum(judged.num_accepted, num_pending),
            next_token=jnp.where(is_kept, chunk.tokens[:, 0], judged.next_token),
        )
        block = _chain(_block_of(state, previous), config.tree.children)
        emitted = emit(config, block, verdict, state)
        state = moved_on(state, emitted, ~state.is_finished)
        output = RoundOutput(
            tokens=emitted.tokens,
            num_emitted=emitted.num,
            num_accepted=judged.num_accepted,
            is_finished=emitted.is_finished,
            is_kept=is_kept,
        )

        return state, output

    return judge


def _judged(
    config, state, scored: Scored, previous, chunk: Chunk, token_ids
) -> Verdict:
    """The verdict on what is pending and on the first token of the new chunk."""
    tokens = jnp.concatenate([_block_of(state, previous), chunk.tokens[:, :1]], axis=1)
    tree = _chain(tokens, config.tree.children)
    # Of the chain's last token the target has said nothing yet. A chain that is
    # accepted as a whole emits nothing behind it, so anything may stand there.
    if scored.chosen is not None:
        return verify_chosen(tree, _with_last_twice(scored.chosen))

    tree = tree.replace(draft_probs=_draft_probs(previous, chunk), token_ids=token_ids)
    keys = jax.vmap(position_keys)(state.request_keys, state.lengths)[:, 1]

    return verify_drawn(
        keys, tree, _with_last_twice(scored.probs), config.tree.verification
    )


def _draft_probs(previous: Chunk | None, chunk: Chunk):
    """What the node behind each node was drawn from, `[b, n, q]`."""
    assert chunk.probs is not None, "the draft has drawn"
    probs = chunk.probs[:, :1]
    if previous is not None:
        assert previous.probs is not None
        probs = jnp.concatenate([previous.probs[:, 1:], probs], axis=1)

    return _with_last_twice(probs)


def _with_last_twice(x):
    return jnp.concatenate([x, x[:, -1:]], axis=1)


def _block_of(state: DecodeState, previous: Chunk | None) -> Int[Array, "b n"]:
    """The tokens that the target passes over."""
    root = state.last_token[:, None]
    if previous is None:
        return root

    return jnp.concatenate([root, previous.tokens[:, 1:]], axis=1)


def _chain(tokens: Int[Array, "b n"], children: ChildrenKind) -> DraftTree:
    """A tree of a root and one token after the other."""
    rows, num_nodes = tokens.shape
    spread = lambda x: jnp.broadcast_to(x, (rows, *x.shape))
    parents = topology.static_parents(TreeConfig(num_steps=num_nodes - 1))

    return DraftTree(
        tokens=tokens,
        parents=spread(parents),
        depths=spread(topology.static_depths(parents)),
        is_valid=jnp.ones(tokens.shape, bool),
        log_probs=jnp.zeros(tokens.shape),
        ancestor_mask=spread(topology.static_ancestor_mask(parents)),
        children=children,
        max_depth=num_nodes - 1,
        is_chain=True,
    )


def _no_taps(tokens):
    """A model of its own reads tokens, and nothing of what the target made of them."""
    return jnp.zeros((*tokens.shape, 0))
