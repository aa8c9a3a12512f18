# SPDX-License-Identifier: Apache-2.0
"""Hydra: sequentially dependent heads over the target's final state (2402.05109).

Head i reads the state of token t and the embeddings of tokens t + 1 to t + 1 + i, the
last i of them drafted, and predicts token t + 2 + i (section 3). In Hydra++ (section 4)
a decoder layer with a cache of its own runs over the target's states first, so that the
heads see more of the prefix than one state holds.

As published, a head is a residual block that changes the width, `R x + silu(W x)`, and
further blocks `x + silu(W x)` which share their weights. There each head has an output
projection of its own (`has_separate_heads`); unless it does, all share one: the draft's
own for a reduced vocabulary, or the target's.

While drafting, a node's hidden state is the row of what the heads have read so far:
the prefix' state and the embeddings of its path, zeros beyond.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError, HydraConfig, ModelConfig, TreeConfig
from ospec_jax.drafters.attention import (
    attend_cached,
    attend_unrolled,
    num_unseen,
    run_if_seen,
    seen_in_window,
    split_heads,
)
from ospec_jax.drafters.base import (
    Drafter,
    Family,
    Hints,
    shape_of,
    take_row,
    training_head,
)
from ospec_jax.drafters.growth import Nodes, grow, num_scratch
from ospec_jax.drafters.starts import last_layer
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import (
    Linear,
    Numerics,
    RMSNorm,
    SwiGLU,
    at_least_two_rows,
    embed,
    linear,
)
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Feedback,
    Pairs,
    Retraced,
    Roots,
    SharedTables,
    Suggested,
)
from ospec_jax.typing import Params


class Prefix(nn.Module):
    """Hydra++'s decoder layer and final norm over the target's states."""

    config: HydraConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        # Named as in the target's layers, so that its last one can be the start.
        norm = lambda: RMSNorm(c.rms_norm_eps, n)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.norm = norm()
        self.qkv_proj = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, n)
        self.o_proj = Linear(c.hidden_size, n)
        self.mlp = SwiGLU(c.intermediate_size, n)

    def _finish(self, states, attended):
        states = states + self.o_proj(attended)
        return self.norm(states + self.mlp(self.post_attention_layernorm(states)))

    def cached(self, states, positions, bias, cache, starts):
        """Runs over verified states; returns their prefix states and the cache."""
        qkv = self.qkv_proj(self.input_layernorm(states))
        out, cache = attend_cached(
            qkv, self.config, self.numerics, positions, bias, cache, starts
        )
        return self._finish(states, out), cache

    def windowed(self, states, positions, num_context):
        """Without a cache: prefix states of all but the first `num_context`."""
        sliding_window = self.config.sliding_window
        unseen = num_unseen(num_context, sliding_window)
        states = states[:, unseen:]
        positions = positions[:, unseen:]
        num_context = num_context - unseen
        qkv = self.qkv_proj(self.input_layernorm(states))
        q, k, v = split_heads(qkv, self.config, self.numerics, positions)
        is_seen = seen_in_window(positions, num_context, sliding_window)
        # Nothing deeper is drafted by this layer: it runs over verified states only.
        out = attend_unrolled(q[:, num_context:], k, v, [], [], is_seen)
        return self._finish(states[:, num_context:], out)


class Head(nn.Module):
    """One head: what it has read, joined, to what the output projection reads."""

    config: HydraConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, joined):
        c = self.config
        dense = lambda name: Linear(c.hidden_size, self.numerics, True, name=name)
        # The first block changes the width, so its residual path is a projection.
        x = dense("residual")(joined) + nn.silu(dense("first")(joined))
        if c.num_blocks > 1:
            # One block, run several times: the published heads share its weights.
            block = dense("block")
            for _ in range(c.num_blocks - 1):
                x = x + nn.silu(block(x))

        return x


class HydraHeads(nn.Module):
    """All parameters of a Hydra draft."""

    config: HydraConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        if c.has_prefix:
            self.prefix = Prefix(c, n)

        self.heads = [Head(c, n) for _ in range(c.depth)]
        if c.has_separate_heads:
            own = lambda: Linear(c.draft_vocab_size, n, True)
            self.lm_heads = [own() for _ in range(c.depth)]
        elif c.has_own_head:
            self.lm_head = Linear(c.draft_vocab_size, n)

    def read(self, states, positions, bias, cache, starts):
        """What the heads read of verified states, `[b, t, d]`, and the cache."""
        if not self.config.has_prefix:
            return states, cache

        return self.prefix.cached(states, positions, bias, cache, starts)

    def logits(self, read, depth: int, head):
        """Head `depth`'s logits of `[b, t, >= (depth + 2) * d]` read so far."""
        # The row holds what deeper heads read as well; this one reads its part.
        x = self.heads[depth](read[..., : (depth + 2) * self.config.hidden_size])
        if head is not None:
            return linear(x, head, self.numerics)

        is_separate = self.config.has_separate_heads
        return self.lm_heads[depth](x) if is_separate else self.lm_head(x)

    def unroll(self, states, embeddings, start, num_context, num_steps, heads):
        """Logits of the first `num_steps` heads at every pair, as `EagleHead.unroll`.

        Args:
          states: `[b, t, d]` final states of consecutive tokens.
          embeddings: `[b, t + num_steps - 1, d]` of the tokens that follow them.
          heads: Output projections by depth, None for the draft's own.
        """
        num_pairs = states.shape[1]
        positions = start[:, None] + jnp.arange(num_pairs)
        read = states[:, num_context:]
        if self.config.has_prefix:
            read = self.prefix.windowed(states, positions, num_context)

        logits = []

        for depth in range(num_steps):
            # Head `depth` reads the embedding of the token `depth + 1` after the pair's
            # state. While training all of them are true tokens, which is what the head
            # reads when the draft before it was accepted.
            shifted = slice(num_context + depth, num_pairs + depth)
            read = jnp.concatenate([read, embeddings[:, shifted]], axis=-1)
            logits.append(self.logits(read, depth, heads[depth]))

        return logits

    def init_all(self, states, embeddings, head):
        """Touches every parameter."""
        start = jnp.zeros(1, jnp.int32)
        depth = self.config.depth
        return self.unroll(states, embeddings, start, 0, depth, [head] * depth)


def hydra(
    config: HydraConfig,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter; Hydra++ with `config.has_prefix`.

    Args:
      numerics: For drafting; training is in float32.
      stop_fn: When a row grows no deeper; see `drafters.stopping`.

    Raises:
      ConfigError: The tree is deeper than there are heads.
    """
    if tree.num_steps > config.depth:
        raise ConfigError(
            f"this draft has {config.depth} heads, one for each drafted token, which "
            f"is too few for {tree.num_steps}; use --num-speculative-tokens "
            f"{config.depth} or less"
        )

    numerics = numerics or Numerics()
    # One set of parameters, two precisions: drafting in the target's, training in
    # float32.
    module = HydraHeads(config, numerics)
    trainer = HydraHeads(config, numerics.for_training())
    width = config.hidden_size

    def apply(draft, method, *args) -> Any:
        return module.apply({"params": draft.params}, *args, method=method)

    def init_cache(batch_size, capacity):
        heads, size = (1, 1)  # without a prefix layer only the capacity matters
        if config.has_prefix:
            heads = config.num_kv_heads
            size = config.head_dim

        return kv.init_cache(1, batch_size, heads, capacity, size, numerics.cache_dtype)

    def init_context(batch_size):
        return DraftContext(
            hidden=jnp.zeros((batch_size, (config.depth + 1) * width)),
            logits=jnp.zeros((batch_size, config.num_draft_ids)),
        )

    def logits_of(draft, shared, depth, read):
        head = None if config.has_own_head else shared.head
        return apply(draft, HydraHeads.logits, read, depth, head)

    def run_pairs(draft, shared, cache, pairs: Pairs):
        """Prefix states of pairs, which may be twice one, the context, the cache."""
        tokens = pairs.tokens
        taps = pairs.taps
        starts = pairs.starts
        if numerics.is_row_invariant:
            tokens, taps = at_least_two_rows(tokens, taps)

        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        bias = kv.causal_bias(starts, tokens.shape[1], cache.capacity)
        args = (taps, positions, bias, cache, starts)
        states, cache = apply(draft, HydraHeads.read, *args)
        # Only the newest pair's state is drafted from.
        newest = jnp.maximum(pairs.num_valid - 1, 0)
        follower = take_row(tokens, newest)
        known = embed(follower[:, None], shared.embedding)[:, 0]
        hidden = _laid_out(config, states, newest, known)
        # Twice the last row: its logits are one product of at least two rows.
        twice = jnp.stack([hidden, hidden], axis=1)
        logits = logits_of(draft, shared, 0, twice)

        return states, DraftContext(hidden=hidden, logits=logits[:, 0]), cache

    def extend(
        draft: Draft, shared: SharedTables, cache: kv.KVCache, pairs: Pairs
    ) -> tuple[kv.KVCache, DraftContext]:
        def run(cache):
            _, context, cache = run_pairs(draft, shared, cache, pairs)
            return cache, context

        blank = init_context(pairs.tokens.shape[0])
        return run_if_seen(run, cache, blank, pairs, config.sliding_window)

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[kv.KVCache, DraftContext, Retraced]:
        states, following, cache = run_pairs(draft, shared, cache, pairs)
        # The first head reads a state and the token behind it, and predicts the next:
        # the first of the pairs' tokens was predicted before.
        num_tokens = pairs.tokens.shape[1]
        known = embed(pairs.tokens[:, :-1], shared.embedding)
        read = jnp.concatenate([states[:, : num_tokens - 1], known], axis=-1)
        before = context.hidden[:, None, : 2 * width].astype(read.dtype)
        read = jnp.concatenate([before, read], axis=1)
        if numerics.is_row_invariant:
            (read,) = at_least_two_rows(read)
        logits = logits_of(draft, shared, 0, read)[:, :num_tokens]

        return cache, following, Retraced(suggested, logits, draft.token_ids)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, kv.KVCache]:
        heads = [
            functools.partial(logits_of, draft, shared, depth)
            for depth in range(tree.num_steps)
        ]

        def step(cache, nodes: Nodes):
            hidden = nodes.hidden
            tokens = nodes.tokens
            depth = nodes.depth
            num_tokens = tokens.shape[1]
            if numerics.is_row_invariant:
                hidden, tokens = at_least_two_rows(hidden, tokens)

            # A drafted token's embedding goes behind what its parent's row holds: the
            # state, the root's embedding, and `depth - 1` drafted ones.
            own = embed(tokens, shared.embedding)
            place = (0, 0, (depth + 1) * width)
            hidden = jax.lax.dynamic_update_slice(hidden, own, place)
            # The depth is known only on the device, where the loop over depths is.
            logits = jax.lax.switch(depth, heads, hidden)

            return hidden[:, :num_tokens], logits[:, :num_tokens], cache

        return grow(
            step,
            tree,
            cache,
            roots,
            draft.token_ids,
            hints,
            stop_fn,
            numerics=numerics,
        )

    def unroll(
        params: Params,
        token_ids: Int[Array, " q"] | None,
        shared: SharedTables,
        feedback: Feedback,
        start: Int[Array, " b"],
        *,
        num_context: int,
        num_steps: int,
        candidates: Int[Array, " c"] | None = None,
    ) -> list[Float[Array, "b t q"]]:
        if num_steps > config.depth:
            raise ConfigError(
                f"cannot train {num_steps} steps deep: this draft has {config.depth} "
                f"heads"
            )

        assert feedback.hidden is not None, "features are recorded"
        # The last pair needs a token for each depth to be compared with.
        num_pairs = feedback.tokens.shape[1] - num_steps
        states = feedback.hidden[:, :num_pairs].astype(jnp.float32)
        embeddings = embed(feedback.tokens[:, 1:], shared.embedding)
        name = "lm_heads_{}" if config.has_separate_heads else "lm_head"
        heads = [
            training_head(
                config, params, token_ids, shared, candidates, name.format(depth)
            )
            for depth in range(num_steps)
        ]
        logits: Any = trainer.apply(
            {"params": params},
            states,
            embeddings,
            start,
            num_context,
            num_steps,
            heads,
            method=HydraHeads.unroll,
        )

        return logits

    return Drafter(
        init_params=lambda key: _init_params(config, trainer, key),
        init_cache=init_cache,
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=unroll,
        num_scratch=num_scratch(tree),
        retrace=retrace,
    )


def _laid_out(config: HydraConfig, states, newest, known):
    """A row of what heads read, `[b, (k + 1) d]`: a state, and the token behind it.

    It is laid out for the deepest head at once, because a tree's states have one shape.

    Args:
      states: `[b, t, d]`, of which the `newest` is read.
      known: `[b, d]` embedding of that token.
    """
    unread = jnp.zeros((states.shape[0], (config.depth - 1) * config.hidden_size))
    return jnp.concatenate([take_row(states, newest), known, unread], axis=-1)


def _init_params(config: HydraConfig, trainer: HydraHeads, key) -> Params:
    """Parameters that know nothing."""
    width = config.hidden_size
    zeros = lambda count: jnp.zeros((1, count, width))
    head = None if config.has_own_head else {"kernel": jnp.zeros((2, width))}
    args = zeros(1), zeros(config.depth), head
    return trainer.init(key, *args, method=HydraHeads.init_all)["params"]


def _default_config(
    model: ModelConfig, draft_vocab_size: int, num_steps: int, layer: int
) -> HydraConfig:
    return HydraConfig(
        **shape_of(model),
        taps=(model.num_layers,),
        draft_vocab_size=draft_vocab_size,
        depth=num_steps,
    )


def _warm_start(params, target) -> dict:
    """The target's last layer is the prefix layer, and each head passes its state on.

    The blocks add nothing yet, as published; a tenth of the state is passed on, since
    it is sure of a token that the head already knows.
    """
    started = {}

    for name, head in params.items():
        if not name.startswith("heads_"):
            continue

        # An identity over the state, which comes first in what a head reads.
        kernel = head["residual"]["kernel"]
        passed = {"kernel": 0.1 * (jnp.eye(*kernel.shape) + kernel)}
        started[name] = {
            block: jax.tree.map(jnp.zeros_like, values)
            for block, values in head.items()
            if block != "residual"
        } | {"residual": head["residual"] | passed}

    if "prefix" in params:
        started["prefix"] = last_layer(target)

    return started


HYDRA = Family(
    name="hydra",
    description="a head a token over the target's final state (Hydra, Hydra++)",
    build=hydra,
    config=HydraConfig,
    default_config=_default_config,
    warm_start=_warm_start,
    max_depth=lambda config: config.depth,
)
