# SPDX-License-Identifier: Apache-2.0
"""P-EAGLE: an EAGLE-3 head that drafts all its tokens in one pass (arXiv 2602.01469).

The first token is EAGLE-3's: the newest pair of a feature and the token that follows it
predicts the next. Those behind it have neither feature nor token. In their place stand
a learned embedding and a learned feature, the same at every depth, so that the pairs
differ by their positions alone and need not wait for each other. A pair attends to all
verified ones and to the masks before it.

Predicting from masks is harder than going on from a token, for which the published
drafts have more layers: plain decoder layers behind EAGLE-3's own.

Parameters of that first layer are named as in `eagle`: a trained EAGLE-3 head is a
start, see `of_eagle3`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import (
    ConfigError,
    DraftConfig,
    ModelConfig,
    PEagleConfig,
    TreeConfig,
)
from ospec_jax.drafters.attention import (
    attend_blocks,
    attend_cached,
    attend_unrolled,
    num_unseen,
    seen_in_window,
    split_heads,
)
from ospec_jax.drafters.base import (
    Drafter,
    Family,
    Hints,
    dequantized,
    embedding_table,
    shape_of,
    states_before,
    take_row,
    training_head,
)
from ospec_jax.drafters.eagle import check_window, eagle3_taps, start_eagle3
from ospec_jax.drafters.growth import num_scratch
from ospec_jax.drafters.onepass import grow_marginals
from ospec_jax.drafters.starts import decoder_layer
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
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


class Further(nn.Module):
    """A plain decoder layer, taken apart at its attention."""

    config: PEagleConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        self.input_layernorm = RMSNorm(c.rms_norm_eps, n)
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps, n)
        self.qkv_proj = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, n)
        self.o_proj = Linear(c.hidden_size, n)
        self.mlp = SwiGLU(c.intermediate_size, n)

    def project(self, x):
        """What attention reads of the residual stream, and the stream."""
        return self.qkv_proj(self.input_layernorm(x)), x

    def finish(self, residual, attended):
        """Both residual branches."""
        residual = residual + self.o_proj(attended)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class ParallelHead(nn.Module):
    """EAGLE-3's layer, those behind it, and two ways of attending."""

    config: PEagleConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        norm = lambda: RMSNorm(c.rms_norm_eps, n)
        self.fc = Linear(c.hidden_size, n, c.has_fc_bias)
        self.input_layernorm = norm()
        self.hidden_norm = norm()
        self.post_attention_layernorm = norm()
        self.norm = norm()
        self.qkv_proj = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, n)
        self.o_proj = Linear(c.hidden_size, n)
        self.mlp = SwiGLU(c.intermediate_size, n)
        self.further = [Further(c, n) for _ in range(c.num_layers - 1)]
        if c.has_own_head:
            self.lm_head = Linear(c.draft_vocab_size, n)

    def _join(self, taps, embeddings):
        """What the first layer's attention reads of pairs, and their stream."""
        features = self.fc(taps)
        normed = self.hidden_norm(features)
        joint = jnp.concatenate([self.input_layernorm(embeddings), normed], axis=-1)
        is_normed = self.config.has_norm_before_residual
        return self.qkv_proj(joint), normed if is_normed else features

    def _finish(self, residual, attended):
        residual = residual + self.o_proj(attended)
        return residual + self.mlp(self.post_attention_layernorm(residual))

    def _layers(self):
        """How each layer goes on behind its attention, and into the next one's."""
        projections = [layer.project for layer in self.further]
        finishes = [self._finish] + [layer.finish for layer in self.further]
        return zip(finishes, [*projections, None], strict=True)

    def step(self, taps, embeddings, positions, bias, cache: kv.KVCache, starts):
        """Runs pairs, or masks, against the cache; returns outputs and the cache."""
        qkv, x = self._join(taps, embeddings)
        keys = []
        values = []

        for number, (finish, project) in enumerate(self._layers()):
            one = kv.KVCache((cache.keys[number],), (cache.values[number],))
            args = (qkv, self.config, self.numerics, positions, bias, one, starts)
            out, one = attend_cached(*args)
            keys += one.keys
            values += one.values
            x = finish(x, out)
            if project is not None:
                qkv, x = project(x)

        return x, kv.KVCache(keys=tuple(keys), values=tuple(values))

    def head_inputs(self, outputs):
        """What the output projection reads."""
        return self.norm(outputs)

    def logits(self, outputs, head):
        """Draft logits over the rows of `head`, or of the draft's own for None."""
        normed = self.head_inputs(outputs)
        if head is None:
            return self.lm_head(normed)

        return linear(normed, head, self.numerics)

    def unroll(self, taps, embeddings, mask, start, num_context, num_steps, head):
        """Logits `num_steps` deep at every pair, in one pass.

        Args:
          taps: `[b, s, f]` features of consecutive tokens.
          embeddings: `[b, s, d]` of the tokens that follow them.
          mask: What stands for both in masks, `[f]` and `[d]`.
          start: `[b]` position of the first pair; pairs at negative ones are padding.
          num_context: Leading pairs that are only attended to.

        Returns:
          For each depth, `[b, s - num_context, q]` logits, and the outputs that they
          were made of.
        """
        c = self.config
        window = c.sliding_window
        check_window(c, num_steps)
        # Of several layers each looks a window further back than the one behind it.
        span = window and 1 + c.num_layers * (window - 1)
        unseen = num_unseen(num_context, span)
        taps = taps[:, unseen:]
        embeddings = embeddings[:, unseen:]
        num_context = num_context - unseen
        b, num_pairs, _ = taps.shape
        num_masks = num_steps - 1
        num_rows = (num_pairs - num_context) * num_masks
        positions = start[:, None] + unseen + jnp.arange(num_pairs)
        # A mask of depth j stands j positions behind the pair that it goes on from.
        depths = 1 + jnp.arange(num_masks)
        own_positions = positions[:, num_context:, None] + depths
        own_positions = own_positions.reshape(b, num_rows)
        is_seen = seen_in_window(positions, 0, window)
        is_seen_by_masks = [
            seen_in_window(positions, num_context, window, depth)
            for depth in range(1, num_steps)
        ]

        qkv, x = self._join(taps, embeddings)
        # All masks are alike before their positions tell them apart: one product.
        mask_taps, mask_embedding = mask
        one = self._join(mask_taps[None, None], mask_embedding[None, None])
        mask_qkv, mask_x = (
            jnp.broadcast_to(part, (b, num_rows, part.shape[-1])) for part in one
        )

        for finish, project in self._layers():
            q, k, v = split_heads(qkv, c, self.numerics, positions)
            if num_masks:
                args = (mask_qkv, c, self.numerics, own_positions)
                mask_q, *own = split_heads(*args)
                seen = jnp.stack(is_seen_by_masks, axis=2)
                out = attend_blocks(mask_q, own, (k, v), seen, is_causal=True)
                mask_x = finish(mask_x, out)

            if project is None:
                # Nothing is predicted of the context: its keys are all that counts.
                q = q[:, num_context:]
                x = x[:, num_context:]
                is_seen = is_seen[:, num_context:]

            x = finish(x, attend_unrolled(q, k, v, [], [], is_seen))
            if project is not None:
                qkv, x = project(x)
                mask_qkv, mask_x = project(mask_x) if num_masks else (qkv, x)

        outputs = [x]
        if num_masks:
            masks = mask_x.reshape(*x.shape[:2], num_masks, c.hidden_size)
            outputs += [masks[:, :, i] for i in range(num_masks)]

        return [self.logits(states, head) for states in outputs], outputs

    def init_all(self, taps, embeddings, head):
        """Touches every parameter."""
        mask = taps[0, 0], embeddings[0, 0]
        start = jnp.zeros(1, jnp.int32)
        return self.unroll(taps, embeddings, mask, start, 0, 1, head)


def peagle(
    config: PEagleConfig,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter.

    Args:
      config: The head's architecture.
      tree: How much to draft.
      numerics: For drafting; training is in float32.
      stop_fn: When a row grows no deeper; see `drafters.stopping`. It makes trees
        smaller, not the pass.

    Raises:
      ConfigError: The tree is deeper than the draft was made for.
    """
    _check_depth(config, tree.num_steps, "draft")
    check_window(config, tree.num_steps)
    numerics = numerics or Numerics()
    module = ParallelHead(config, numerics)
    trainer = ParallelHead(config, numerics.for_training())
    num_masks = max(tree.num_steps - 1, 0)

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
        return DraftContext(
            hidden=jnp.zeros((batch_size, config.hidden_size)),
            logits=jnp.zeros((batch_size, config.num_draft_ids)),
        )

    def logits_of(draft, shared, outputs):
        head = None if config.has_own_head else shared.head
        return apply(draft, ParallelHead.logits, outputs, head)

    def run_pairs(draft, shared, cache, pairs: Pairs):
        """Outputs of pairs, which may be twice one, the newest one's, and the cache."""
        tokens = pairs.tokens
        taps = pairs.taps
        if numerics.is_row_invariant:
            tokens, taps = at_least_two_rows(tokens, taps)

        num_tokens = tokens.shape[1]
        positions = pairs.starts[:, None] + jnp.arange(num_tokens)
        bias = kv.causal_bias(pairs.starts, num_tokens, cache.capacity)
        embeddings = embed(tokens, embedding_table(config, draft.params, shared))
        args = (taps, embeddings, positions, bias, cache, pairs.starts)
        outputs, cache = apply(draft, ParallelHead.step, *args)

        return outputs, take_row(outputs, jnp.maximum(pairs.num_valid - 1, 0)), cache

    def extend(
        draft: Draft, shared: SharedTables, cache: kv.KVCache, pairs: Pairs
    ) -> tuple[kv.KVCache, DraftContext]:
        _, last, cache = run_pairs(draft, shared, cache, pairs)
        return cache, DraftContext(last, predict(draft, shared, last))

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[kv.KVCache, DraftContext, Retraced]:
        outputs, last, cache = run_pairs(draft, shared, cache, pairs)
        num_tokens = pairs.tokens.shape[1]
        states = states_before(context, outputs, num_tokens)
        if numerics.is_row_invariant:
            (states,) = at_least_two_rows(states)
        logits = logits_of(draft, shared, states)[:, :num_tokens]
        found = Retraced(suggested, logits, draft.token_ids)

        return cache, DraftContext(last, predict(draft, shared, last)), found

    def predict(draft, shared, hidden):
        # Twice each row: its logits are one product of at least two rows.
        return logits_of(draft, shared, jnp.stack([hidden, hidden], axis=1))[:, 0]

    def head_inputs(params, states):
        return module.apply({"params": params}, states, method=ParallelHead.head_inputs)

    def run_masks(draft, shared, cache, roots: Roots):
        """Logits and outputs of the masks behind each root, and the cache."""
        b = roots.token.shape[0]
        positions = roots.position[:, None] + jnp.arange(num_masks)
        bias = kv.causal_bias(roots.position, num_masks, cache.capacity)
        spread = lambda x: jnp.broadcast_to(x, (b, num_masks, x.shape[-1]))
        args = (
            spread(draft.params["mask_taps"]),
            spread(draft.params["mask_embedding"]),
            positions,
            bias,
        )
        if numerics.is_row_invariant:
            args = at_least_two_rows(*args)

        found = apply(draft, ParallelHead.step, *args, cache, roots.position)
        outputs, cache = found
        logits = logits_of(draft, shared, outputs)

        return logits[:, :num_masks], outputs[:, :num_masks], cache

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, kv.KVCache]:
        logits = roots.context.logits[:, None]
        states = roots.context.hidden[:, None]
        if num_masks:
            masked, outputs, cache = run_masks(draft, shared, cache, roots)
            logits = jnp.concatenate([logits, masked], axis=1)
            states = jnp.concatenate([states, outputs], axis=1)

        return grow_marginals(
            logits,
            states,
            tree,
            cache,
            roots,
            draft.token_ids,
            hints,
            stop_fn,
            numerics=numerics,
        )

    def unroll_outputs(
        params: Params,
        token_ids: Int[Array, " q"] | None,
        shared: SharedTables,
        feedback: Feedback,
        start: Int[Array, " b"],
        *,
        num_context: int,
        num_steps: int,
        candidates: Int[Array, " c"] | None = None,
    ) -> tuple[list[Float[Array, "b t q"]], list[Float[Array, "b t d"]]]:
        _check_depth(config, num_steps, "train")
        assert feedback.taps is not None, "features are recorded"
        # The last pair's masks need tokens to be compared with.
        num_pairs = feedback.tokens.shape[1] - num_steps
        taps = feedback.taps[:, :num_pairs].astype(jnp.float32)
        table = embedding_table(config, params, shared)
        # The embedding is frozen, the draft's own as well as the target's.
        tokens = feedback.tokens[:, 1 : num_pairs + 1]
        embeddings = jax.lax.stop_gradient(embed(tokens, table))
        head = training_head(config, params, token_ids, shared, candidates)
        unrolled: Any = trainer.apply(
            {"params": params},
            taps,
            embeddings,
            (params["mask_taps"], params["mask_embedding"]),
            start,
            num_context,
            num_steps,
            head,
            method=ParallelHead.unroll,
        )

        return unrolled

    return Drafter(
        init_params=lambda key: _init_params(config, trainer, key),
        init_cache=init_cache,
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=lambda *args, **kwargs: unroll_outputs(*args, **kwargs)[0],
        unroll_outputs=unroll_outputs,
        num_scratch=num_scratch(tree),
        head_inputs=head_inputs if config.has_own_head else None,
        predict=predict,
        retrace=retrace,
    )


def _init_params(config: PEagleConfig, trainer: ParallelHead, key) -> Params:
    """Parameters that know nothing."""
    own = config.has_own_embedding
    width = config.hidden_size if own else config.target_hidden_size
    num_features = len(config.taps) * config.target_hidden_size
    zeros = lambda width: jnp.zeros((1, 1, width))
    head = None if config.has_own_head else {"kernel": jnp.zeros((2, width))}
    args = zeros(num_features), zeros(width), head
    params: Any = trainer.init(key, *args, method=ParallelHead.init_all)["params"]
    key_table, key_taps, key_token = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) * width**-0.5
    params = params | {
        "mask_taps": normal(key_taps, num_features),
        "mask_embedding": normal(key_token, width),
    }
    if own:
        table = normal(key_table, config.vocab_size, width)
        params = params | {"embed_tokens": {"kernel": table}}

    return params


def of_eagle3(
    config: DraftConfig, params: Params, table: Float[Array, "v d"], depth: int
) -> tuple[PEagleConfig, Params]:
    """A P-EAGLE draft of one layer from a trained EAGLE-3 head.

    Its first token is the head's own from the start; masks are yet to be learned.

    Args:
      table: The target's embedding; a head may have one of its own.
      depth: Tokens that it shall draft.
    """
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(DraftConfig)
    }
    made = PEagleConfig(**values, depth=depth, num_layers=1)
    if config.has_own_embedding:
        table = dequantized(params["embed_tokens"])
    num_features = len(config.taps) * config.target_hidden_size
    key = jax.random.key(0)
    return made, params | {
        "mask_taps": jax.random.normal(key, (num_features,)) * num_features**-0.5,
        "mask_embedding": jnp.mean(table, axis=0),
    }


def _check_depth(config: PEagleConfig, num_steps: int, verb: str) -> None:
    if num_steps > config.depth:
        raise ConfigError(
            f"cannot {verb} {num_steps} tokens at once: this draft was made for "
            f"{config.depth}; use --num-speculative-tokens {config.depth} or less, or "
            f"train one with more --num-steps"
        )


def _default_config(
    model: ModelConfig, draft_vocab_size: int, num_steps: int, layer: int
) -> PEagleConfig:
    return PEagleConfig(
        **shape_of(model),
        taps=eagle3_taps(model),
        draft_vocab_size=draft_vocab_size,
        depth=num_steps,
        num_layers=min(2, model.num_layers),
    )


def _warm_start(params, target) -> dict:
    """The target's last layers, the first of them as EAGLE-3's is started."""
    num_further = sum(name.startswith("further_") for name in params)
    first = target.config.num_layers - 1 - num_further
    further = {
        f"further_{i}": decoder_layer(target, first + 1 + i) for i in range(num_further)
    }
    table = dequantized(llama.embedding_table(target.params))
    mask = {"mask_embedding": jnp.mean(table, axis=0)}

    return start_eagle3(params, target, first) | further | mask


PEAGLE = Family(
    name="peagle",
    description="an EAGLE-3 head that drafts all its tokens in one pass (P-EAGLE)",
    build=peagle,
    config=PEagleConfig,
    default_config=_default_config,
    warm_start=_warm_start,
    max_depth=lambda config: config.depth,
    reads_taps=True,
    adopts="eagle3",
    adopt=of_eagle3,
)
