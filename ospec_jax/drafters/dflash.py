# SPDX-License-Identifier: Apache-2.0
"""DFlash: a block of tokens in one pass of a small transformer (arXiv 2602.06036).

The block is the newest token, the *anchor*, and a mask for each token to draft, all at
their own positions. Within a block every entry attends to every other one. Of the text
before it each layer reads what the target made: tapped states, fused once and normed,
are projected to keys and values by every layer. So verified tokens cost the draft these
projections alone, and the layers run over blocks only.

Masks know nothing of each other's tokens, so that what is drafted of a position is a
marginal. A low-rank bias between neighbours repairs some of that (DSpark, arXiv
2607.05147): the logits of a token get a product of a row for the token before it with a
row for itself. The pass is the same; the bias is added while tokens are drawn, so each
token's distribution given those before it is known, and a chain of draws is verified
exactly.

As many masks are run as tokens are drafted, in training as in use.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError, DFlashConfig, ModelConfig, TreeConfig
from ospec_jax.drafters.attention import (
    attend_blocks,
    num_unseen,
    seen_in_window,
)
from ospec_jax.drafters.base import (
    Drafter,
    Family,
    Hints,
    dequantized,
    shape_of,
    training_head,
)
from ospec_jax.drafters.eagle import eagle3_taps
from ospec_jax.drafters.onepass import grow_marginals
from ospec_jax.drafters.starts import decoder_layer, passing
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models import cache as kv
from ospec_jax.models.attention import attend
from ospec_jax.models.layers import (
    Linear,
    Numerics,
    RMSNorm,
    SwiGLU,
    at_least_two_rows,
    embed,
    linear,
)
from ospec_jax.models.llama import embedding_table, layer_params
from ospec_jax.models.rope import rotary_angles, rotate
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

_PUBLIC_LAYERS = 5
"""Of published drafts, and of the target's layers that they read."""


class Layer(nn.Module):
    """A decoder layer whose context are states of the target."""

    config: DFlashConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        norm = lambda: RMSNorm(c.rms_norm_eps, n)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        # Queries are of the block alone, keys and values of the context, too.
        self.q_proj = Linear(c.num_heads * c.head_dim, n)
        self.kv_proj = Linear(2 * c.num_kv_heads * c.head_dim, n)
        self.o_proj = Linear(c.hidden_size, n)
        self.mlp = SwiGLU(c.intermediate_size, n)
        if c.has_qk_norm:
            self.q_norm = norm()
            self.k_norm = norm()

    def queries(self, normed, angles):
        """`[b, t, heads, e]` of a block's entries, behind `input_layernorm`."""
        c = self.config
        q = self.q_proj(normed).reshape(*normed.shape[:2], c.num_heads, c.head_dim)
        if c.has_qk_norm:
            q = self.q_norm(q)

        return rotate(q, angles, self.numerics.is_row_invariant)

    def keys_values(self, normed, angles):
        """`[b, t, h, e]` twice: of a block's entries, or of fused states."""
        c = self.config
        shape = (*normed.shape[:2], 2 * c.num_kv_heads, c.head_dim)
        k, v = jnp.split(self.kv_proj(normed).reshape(shape), 2, axis=2)
        if c.has_qk_norm:
            k = self.k_norm(k)

        return rotate(k, angles, self.numerics.is_row_invariant), v

    def finish(self, x, attended):
        """Both residual branches."""
        x = x + self.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockDrafter(nn.Module):
    """The layers, and what stands before and behind them."""

    config: DFlashConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        self.fc = Linear(c.hidden_size, n)
        self.hidden_norm = RMSNorm(c.rms_norm_eps, n)
        self.layers = [Layer(c, n) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.rms_norm_eps, n)
        if c.has_own_head:
            self.lm_head = Linear(c.draft_vocab_size, n)

    def _angles(self, positions, num_positions=None):
        bound = num_positions if self.numerics.is_row_invariant else None
        return rotary_angles(self.config, positions, bound)

    def remember(self, taps, positions, cache: kv.KVCache, starts):
        """Writes keys and values of verified tokens' states; returns the cache."""
        fused = self.hidden_norm(self.fc(taps))
        angles = self._angles(positions, cache.capacity)
        is_batched = self.numerics.has_batched_writes
        keys = []
        values = []

        for number, layer in enumerate(self.layers):
            own = layer.keys_values(fused, angles)
            cached = cache.keys[number], cache.values[number]
            cached = kv.append(*cached, *own, starts, is_batched)
            keys.append(cached[0])
            values.append(cached[1])

        return kv.KVCache(keys=tuple(keys), values=tuple(values))

    def run(self, x, positions, bias, cache: kv.KVCache, starts, num_positions):
        """Runs blocks against the cache, behind whose `starts` their entries go.

        Args:
          x: `[b, t, d]` embeddings of the entries of one block or several.
          bias: `[b, t, s]` what each of them sees, the cache's new entries included.
          num_positions: Bound of the positions.

        Returns:
          `[b, t, d]` outputs, and the cache.
        """
        angles = self._angles(positions, num_positions)
        is_batched = self.numerics.has_batched_writes
        keys = []
        values = []

        for number, layer in enumerate(self.layers):
            normed = layer.input_layernorm(x)
            own = layer.keys_values(normed, angles)
            cached = cache.keys[number], cache.values[number]
            cached = kv.append(*cached, *own, starts, is_batched)
            queries = layer.queries(normed, angles)
            x = layer.finish(x, attend(queries, *cached, bias, self.numerics))
            keys.append(cached[0])
            values.append(cached[1])

        return x, kv.KVCache(keys=tuple(keys), values=tuple(values))

    def logits(self, outputs, head):
        """Draft logits over the rows of `head`, or of the draft's own for None."""
        normed = self.norm(outputs)
        if head is None:
            return self.lm_head(normed)

        return linear(normed, head, self.numerics)

    def unroll(self, taps, x, start, num_context, head):
        """Logits of a block behind every pair, without a cache.

        Args:
          taps: `[b, s, f]` features of consecutive tokens.
          x: `[b, t, n, d]` embeddings of the block behind each of the last `t`.
          start: `[b]` position of the first pair; those at negative ones are padding.

        Returns:
          `[b, t, n - 1, q]` of all but the anchors.
        """
        window = self.config.sliding_window
        _check_window(self.config, x.shape[2] - 1)
        unseen = num_unseen(num_context, window)
        taps = taps[:, unseen:]
        num_context = num_context - unseen
        b, t, n, d = x.shape
        positions = start[:, None] + unseen + jnp.arange(taps.shape[1])
        fused = self.hidden_norm(self.fc(taps))
        context_angles = self._angles(positions)
        # The anchor is the token behind its pair, and the masks come behind it.
        own_positions = positions[:, num_context:, None] + 1 + jnp.arange(n)
        angles = self._angles(own_positions.reshape(b, t * n))
        is_seen = jnp.stack(
            [
                seen_in_window(positions, num_context, window, 1 + place)
                for place in range(n)
            ],
            axis=2,
        )
        x = x.reshape(b, t * n, d)

        for layer in self.layers:
            context = layer.keys_values(fused, context_angles)
            normed = layer.input_layernorm(x)
            own = layer.keys_values(normed, angles)
            queries = layer.queries(normed, angles)
            attended = attend_blocks(queries, own, context, is_seen)
            x = layer.finish(x, attended)

        outputs = x.reshape(b, t, n, d)[:, :, 1:]

        return self.logits(outputs, head)

    def init_all(self, taps, x, head):
        """Touches every parameter."""
        return self.unroll(taps, x, jnp.zeros(1, jnp.int32), 0, head)


def dflash(
    config: DFlashConfig,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter.

    Args:
      config: The draft's architecture.
      tree: How much to draft: a block has as many masks as the tree is deep.
      numerics: For drafting; training is in float32.
      stop_fn: When a row grows no deeper; see `drafters.stopping`. It makes trees
        smaller, not the pass.

    Raises:
      ConfigError: The tree is deeper than the block.
    """
    _check_depth(config, tree.num_steps, "draft")
    _check_window(config, tree.num_steps)
    numerics = numerics or Numerics()
    module = BlockDrafter(config, numerics)
    trainer = BlockDrafter(config, numerics.for_training())
    # The anchor and a mask for each drafted token.
    size = tree.num_steps + 1

    def apply(draft, method, *args) -> Any:
        return module.apply({"params": draft.params}, *args, method=method)

    def init_cache(batch_size, capacity):
        return kv.init_cache(
            config.num_layers,
            batch_size,
            config.num_kv_heads,
            capacity,
            config.head_dim,
            numerics.cache_dtype,
        )

    def init_context(batch_size):
        # Logits are made of the block, when something is drafted.
        return DraftContext(
            hidden=jnp.zeros((batch_size, 1)), logits=jnp.zeros((batch_size, 1))
        )

    def extend(
        draft: Draft, shared: SharedTables, cache: kv.KVCache, pairs: Pairs
    ) -> tuple[kv.KVCache, DraftContext]:
        taps = pairs.taps
        if numerics.is_row_invariant:
            (taps,) = at_least_two_rows(taps)

        positions = pairs.starts[:, None] + jnp.arange(taps.shape[1])
        args = (taps, positions, cache, pairs.starts)
        cache = apply(draft, BlockDrafter.remember, *args)

        return cache, init_context(taps.shape[0])

    def logits_of(draft, shared, outputs):
        head = None if config.has_own_head else shared.head
        return apply(draft, BlockDrafter.logits, outputs, head)

    def biased(draft, logits, before):
        """Logits `[b, t, q]` of tokens that follow the tokens `before`, `[b, t]`."""
        if not config.bigram_rank:
            return logits

        num_tokens = before.shape[1]
        if numerics.is_row_invariant:
            (before,) = at_least_two_rows(before)

        bias = _bias(draft.params, before, numerics)
        return logits + bias[:, :num_tokens]

    def block_of(draft, shared, anchors):
        """Embeddings `[b, t * size, d]` of blocks behind anchors `[b, t]`."""
        x = _blocks(draft.params, embed(anchors, shared.embedding), size)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, kv.KVCache]:
        b = roots.token.shape[0]
        x = block_of(draft, shared, roots.token[:, None])
        positions = roots.position[:, None] + jnp.arange(size)
        # A block sees all that is committed, and all of itself.
        is_own = jnp.ones((b, size, size), bool)
        bias = kv.tree_bias(roots.position, is_own, cache.capacity)
        bias = kv.within_window(bias, positions, config.sliding_window)
        args = (x, positions, bias, cache, roots.position, cache.capacity)
        outputs, cache = apply(draft, BlockDrafter.run, *args)
        outputs = outputs[:, 1:]
        read = at_least_two_rows(outputs)[0] if numerics.is_row_invariant else outputs
        logits = logits_of(draft, shared, read)[:, : tree.num_steps]

        return grow_marginals(
            logits,
            outputs,
            tree,
            cache,
            roots,
            draft.token_ids,
            hints,
            stop_fn,
            add_bias=functools.partial(biased, draft),
            numerics=numerics,
        )

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[kv.KVCache, DraftContext, Retraced]:
        cache, context = extend(draft, shared, cache, pairs)
        # Each of the inputs is the anchor of a block of its own. All of them are run at
        # once, in slots behind a copy of the cache.
        anchors = pairs.inputs
        b, num_blocks = anchors.shape
        capacity = cache.capacity
        own = pairs.starts[:, None] + jnp.arange(num_blocks)
        positions, bias = _places_of_blocks(own, size, capacity, config.sliding_window)
        args = (
            block_of(draft, shared, anchors),
            positions,
            bias,
            _widened(cache, num_blocks * size),
            jnp.full((b,), capacity, jnp.int32),
            capacity,
        )
        outputs, _ = apply(draft, BlockDrafter.run, *args)
        # The first mask stands in the place of the token behind its anchor.
        firsts = outputs.reshape(b, num_blocks, size, -1)[:, :, 1]
        if numerics.is_row_invariant:
            (firsts,) = at_least_two_rows(firsts)
        logits = logits_of(draft, shared, firsts)[:, :num_blocks]
        logits = biased(draft, logits, anchors)

        return cache, context, Retraced(suggested, logits, draft.token_ids)

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
        _check_depth(config, num_steps, "train")
        assert feedback.taps is not None, "features are recorded"
        tokens = feedback.tokens
        # The last pair's block needs a token for each mask to be compared with.
        num_pairs = tokens.shape[1] - num_steps
        taps = feedback.taps[:, :num_pairs].astype(jnp.float32)
        after = lambda count: tokens[:, num_context + count : num_pairs + count]
        x = _blocks(params, embed(after(1), shared.embedding), num_steps + 1)
        head = training_head(config, params, token_ids, shared, candidates)
        logits: Any = trainer.apply(
            {"params": params},
            taps,
            x,
            start,
            num_context,
            head,
            method=BlockDrafter.unroll,
        )
        by_depth = [logits[:, :, depth] for depth in range(num_steps)]
        if not config.bigram_rank:
            return by_depth

        # The tokens before are the true ones: what the bias reads when the drafts so
        # far were accepted.
        return [
            found + _bias(params, after(1 + depth), trainer.numerics, candidates)
            for depth, found in enumerate(by_depth)
        ]

    return Drafter(
        init_params=lambda key: _init_params(config, trainer, key),
        init_cache=init_cache,
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=unroll,
        num_scratch=size,
        retrace=retrace,
    )


def _init_params(config: DFlashConfig, trainer: BlockDrafter, key) -> Params:
    """Parameters that know nothing."""
    key, key_mask, key_bigram = jax.random.split(key, 3)
    width = config.hidden_size
    head = None if config.has_own_head else {"kernel": jnp.zeros((2, width))}
    args = (
        jnp.zeros((1, 1, len(config.taps) * config.target_hidden_size)),
        jnp.zeros((1, 1, 2, width)),
        head,
    )
    params: Any = trainer.init(key, *args, method=BlockDrafter.init_all)["params"]
    mask = jax.random.normal(key_mask, (width,)) * width**-0.5
    params = params | {"mask_embedding": mask}
    if config.bigram_rank:
        # No bias at first: one of its two factors is zero.
        rank = config.bigram_rank
        shape = (config.vocab_size, rank)
        rows = jax.random.normal(key_bigram, shape) * rank**-0.5
        columns = jnp.zeros((config.num_draft_ids, rank))
        params["bigram_in"] = {"kernel": rows}
        params["bigram_out"] = {"kernel": columns}

    return params


def _blocks(params, anchors, size: int):
    """Embeddings `[b, t, n, d]` of blocks: anchors `[b, t, d]`, then masks."""
    b, t, d = anchors.shape
    mask = params["mask_embedding"].astype(anchors.dtype)
    masks = jnp.broadcast_to(mask, (b, t, size - 1, d))
    return jnp.concatenate([anchors[:, :, None], masks], axis=2)


def _places_of_blocks(own, size: int, capacity: int, sliding_window: int):
    """Positions of several blocks, `[b, t * n]`, and what each place attends to.

    Args:
      own: `[b, t]` positions of their anchors.
      capacity: Slots of the cache, behind which the blocks are written.
    """
    b, num_blocks = own.shape
    positions = (own[:, :, None] + jnp.arange(size)).reshape(b, -1)
    # What stands before a block's anchor is seen, as when it is drafted.
    is_before = jnp.arange(capacity) < own[:, :, None]
    bias = jnp.where(jnp.repeat(is_before, size, axis=1), 0.0, kv.MASKED)
    bias = kv.within_window(bias, positions, sliding_window)
    block = jnp.arange(num_blocks * size) // size
    within = jnp.where(block == block[:, None], 0.0, kv.MASKED)
    within = jnp.broadcast_to(within, (b, *within.shape))

    return positions, jnp.concatenate([bias, within], axis=-1)


def _bias(params, before, numerics: Numerics, candidates=None):
    """What the tokens before, `[b, t]`, add to logits, `[b, t, q]`."""
    table = params["bigram_out"]
    if candidates is not None:
        table = {name: rows[candidates] for name, rows in table.items()}

    return linear(embed(before, params["bigram_in"]), table, numerics)


def _widened(cache: kv.KVCache, num_slots: int) -> kv.KVCache:
    """A copy with room behind it."""
    behind = lambda x, axis: jnp.pad(
        x, [(0, num_slots if i == axis else 0) for i in range(x.ndim)]
    )
    return kv.KVCache(
        keys=tuple(behind(keys, 3) for keys in cache.keys),
        values=tuple(behind(values, 2) for values in cache.values),
    )


def _check_depth(config: DFlashConfig, num_steps: int, verb: str) -> None:
    if num_steps >= config.block_size:
        raise ConfigError(
            f"cannot {verb} {num_steps} tokens at once: this draft has blocks of "
            f"{config.block_size}, of which the first is known; use "
            f"--num-speculative-tokens {config.block_size - 1} or less, or train one "
            f"with more --num-steps"
        )


def _check_window(config: DFlashConfig, num_steps: int) -> None:
    """Refuses drafts whose last mask would not see the anchor."""
    if 0 < config.sliding_window <= num_steps:
        raise ConfigError(
            f"this draft sees {config.sliding_window} tokens (sliding_window), fewer "
            f"than the block of {num_steps + 1} that it drafts in; draft less, or give "
            f"it a longer window"
        )


def _default_config(
    model: ModelConfig, draft_vocab_size: int, num_steps: int, layer: int
) -> DFlashConfig:
    """One recording serves this family and EAGLE-3: they read the same layers."""
    return DFlashConfig(
        **shape_of(model),
        taps=eagle3_taps(model),
        draft_vocab_size=draft_vocab_size,
        num_layers=min(2, model.num_layers),
        block_size=num_steps + 1,
        has_qk_norm=model.has_qk_norm,
    )


def _public_config(model: ModelConfig, num_steps: int) -> DFlashConfig:
    """Five layers of Qwen3's kind that read five of the target's, and use its head.

    So is the draft that the paper (arXiv 2602.06036) has of Qwen3-8B.
    """
    # Outputs of evenly spaced layers, from the second to the last but two.
    last = max(1, model.num_layers - 3)
    places = range(_PUBLIC_LAYERS)
    outputs = [round(1 + i * (last - 1) / (_PUBLIC_LAYERS - 1)) for i in places]

    return DFlashConfig(
        **shape_of(model),
        taps=tuple(layer + 1 for layer in outputs),
        draft_vocab_size=0,
        num_layers=_PUBLIC_LAYERS,
        block_size=num_steps + 1,
        bigram_rank=0,
        has_qk_norm=True,
    )


def _warm_start(params, target) -> dict:
    """The layers are the target's last ones, which read the newest tap as context."""
    config = target.config
    num_layers = sum(name.startswith("layers_") for name in params)
    first = config.num_layers - num_layers
    num_queries = config.num_heads * config.head_dim
    started = {}

    for number in range(num_layers):
        layer = decoder_layer(target, first + number)
        attention = layer_params(target.params, first + number)["self_attn"]
        qkv = layer.pop("qkv_proj")["kernel"]
        layer["q_proj"] = {"kernel": qkv[:num_queries]}
        layer["kv_proj"] = {"kernel": qkv[num_queries:]}
        norms = attention.keys() & {"q_norm", "k_norm"}
        layer |= {name: attention[name] for name in norms}
        started[f"layers_{number}"] = layer

    fused = params["fc"]["kernel"]
    width, num_features = fused.shape
    table = dequantized(embedding_table(target.params))

    return started | {
        "fc": {"kernel": passing(fused, num_features - width)},
        "hidden_norm": started["layers_0"]["input_layernorm"],
        "norm": target.params["norm"],
        # A mask begins as no token in particular.
        "mask_embedding": jnp.mean(table, axis=0),
    }


DFLASH = Family(
    name="dflash",
    description="a block of tokens in one pass over masks (DFlash, DSpark's bias)",
    build=dflash,
    config=DFlashConfig,
    default_config=_default_config,
    public_config=_public_config,
    warm_start=_warm_start,
    max_depth=lambda config: config.block_size - 1,
    reads_taps=True,
)
