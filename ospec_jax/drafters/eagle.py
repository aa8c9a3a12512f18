# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3: one decoder layer over fused target features (arXiv 2503.01840).

The *pair* at position i joins the target's tapped features of token i with the
embedding of token i + 1 and predicts token i + 2. Deeper in a proposal the features
are the draft's own output of the step before. The head is trained as it is used, by
unrolling those steps (*training-time test*).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ospec_jax.config import DraftConfig, TreeConfig
from ospec_jax.drafters.base import Drafter, dequantized, frozen_head, take_row
from ospec_jax.drafters.expand import num_scratch, propose_static, propose_uniform
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
    rope_angles,
    rope_frequencies,
    rotate,
    split_groups,
)
from ospec_jax.types import DraftContext

_TRAINING = Numerics("float32", is_row_invariant=False)


class EagleHead(nn.Module):
    """The draft's parameters and its two ways of attending."""

    config: DraftConfig
    numerics: Numerics

    def setup(self):
        c, n = self.config, self.numerics
        norm = lambda: RMSNorm(c.rms_norm_eps, n)
        self.fc = Linear(c.hidden_size, n)
        self.input_layernorm, self.hidden_norm = norm(), norm()
        self.post_attention_layernorm, self.norm = norm(), norm()
        self.qkv_proj = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, n)
        self.o_proj = Linear(c.hidden_size, n)
        self.mlp = SwiGLU(c.intermediate_size, n)
        if c.has_own_head:
            self.lm_head = Linear(c.draft_vocab_size, n)

    def fuse(self, taps):
        """Target features to the draft's width."""
        return self.fc(taps)

    def _project(self, features, embeddings, positions, num_positions=None):
        c, n = self.config, self.numerics
        joint = jnp.concatenate(
            [self.input_layernorm(embeddings), self.hidden_norm(features)], axis=-1
        )
        qkv = self.qkv_proj(joint)
        heads, kv_heads = c.num_heads, c.num_kv_heads
        qkv = qkv.reshape(*qkv.shape[:2], heads + 2 * kv_heads, c.head_dim)
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, None)
        angles = rope_angles(positions, frequencies, num_positions)
        split = lambda x, *sizes: split_groups(x, sizes, n.num_groups, axis=2)
        rotated, values = split(qkv, heads + kv_heads, kv_heads)
        rotated = rotate(rotated, angles, n.is_row_invariant)
        return *split(rotated, heads, kv_heads), values

    def _finish(self, features, attended):
        features = features + self.o_proj(attended)
        return features + self.mlp(self.post_attention_layernorm(features))

    def step(self, features, embeddings, positions, bias, cache, starts):
        """Runs pairs against the cache; returns their outputs and the cache."""
        n = self.numerics
        num_positions = cache.capacity if n.is_row_invariant else None
        q, k, v = self._project(features, embeddings, positions, num_positions)
        keys, values = kv.append(
            cache.keys[0], cache.values[0], k, v, starts, n.has_batched_writes
        )
        out = attend(q, keys, values, bias, n)
        return self._finish(features, out), kv.KVCache(keys=(keys,), values=(values,))

    def logits(self, outputs, head):
        """Draft logits over the rows of `head`, or of the draft's own for None."""
        normed = self.norm(outputs)
        if head is None:
            return self.lm_head(normed)
        return linear(normed, head, self.numerics)

    def unroll(self, taps, embeddings, start, num_context, num_steps, head):
        """Training-time test: draft logits `num_steps` deep at every pair.

        Args:
          taps: `[b, t, f]` features of consecutive tokens.
          embeddings: `[b, t + num_steps - 1, d]` of the tokens that follow them.
          start: `[b]` position of the first pair; pairs at negative ones are padding.
          num_context: Leading pairs that only serve as keys, for the later ones.

        Returns:
          For each depth j, `[b, t - num_context, q]` logits of token i + 2 + j.
        """
        num_pairs = taps.shape[1]
        positions = start[:, None] + jnp.arange(num_pairs)
        features = self.fuse(taps)
        q, k, v = self._project(features, embeddings[:, :num_pairs], positions)
        queries = slice(num_context, num_pairs)
        order = jnp.arange(num_pairs)
        is_seen = order <= order[queries, None]
        is_seen = is_seen & (positions >= 0)[:, None, :]
        features, q = features[:, queries], q[:, queries]
        own_keys, own_values, logits = [], [], []
        for depth in range(num_steps):
            if depth:
                shifted = slice(num_context + depth, num_pairs + depth)
                q, own_k, own_v = self._project(
                    features, embeddings[:, shifted], positions[:, queries] + depth
                )
                own_keys.append(own_k)
                own_values.append(own_v)
            out = _attend_unrolled(q, k, v, own_keys, own_values, is_seen)
            features = self._finish(features, out)
            logits.append(self.logits(features, head))
        return logits

    def init_all(self, taps, embeddings, head):
        """Touches every parameter."""
        return self.unroll(taps, embeddings, jnp.zeros(1, jnp.int32), 0, 1, head)


def _attend_unrolled(q, k, v, own_keys, own_values, is_seen):
    """Attention of pair i to verified pairs up to i and to its own deeper drafts."""
    b, t, heads, e = q.shape
    h = k.shape[2]
    q = q.reshape(b, t, h, heads // h, e) * e**-0.5
    scores = jnp.einsum("bthge,bshe->bhgts", q, k)
    scores = [jnp.where(is_seen[:, None, None], scores, -1e30)]
    scores += [jnp.einsum("bthge,bthe->bhgt", q, own)[..., None] for own in own_keys]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    num_keys = k.shape[1]
    out = jnp.einsum("bhgts,bshe->bthge", weights[..., :num_keys], v)
    for i, own in enumerate(own_values):
        share = weights[..., num_keys + i].transpose(0, 3, 1, 2)[..., None]
        out = out + share * own[:, :, :, None, :]
    return out.reshape(b, t, heads * e)


def eagle3(
    config: DraftConfig, tree: TreeConfig, numerics: Numerics | None = None
) -> Drafter:
    """Builds the EAGLE-3 drafter.

    Args:
      config: The head's architecture.
      tree: How much to draft.
      numerics: For drafting; training is in float32.
    """
    numerics = numerics or Numerics()
    module = EagleHead(config, numerics)
    training = dataclasses.replace(_TRAINING, num_groups=numerics.num_groups)
    trainer = EagleHead(config, training)

    def apply(draft, method, *args) -> Any:
        return module.apply({"params": draft.params}, *args, method=method)

    def init_params(key):
        zeros = lambda width: jnp.zeros((1, 1, width))
        args = (
            zeros(len(config.taps) * config.target_hidden_size),
            zeros(config.target_hidden_size),
            None
            if config.has_own_head
            else {"kernel": jnp.zeros((2, config.hidden_size))},
        )
        return trainer.init(key, *args, method=EagleHead.init_all)["params"]

    def init_cache(batch_size, capacity):
        return kv.init_cache(
            1, batch_size, config.num_kv_heads, capacity, config.head_dim,
            numerics.cache_dtype,
        )  # fmt: skip

    def init_context(batch_size):
        return DraftContext(
            hidden=jnp.zeros((batch_size, config.hidden_size)),
            logits=jnp.zeros((batch_size, config.num_draft_ids)),
        )

    def logits_of(draft, shared, outputs):
        head = None if config.has_own_head else shared.head
        return apply(draft, EagleHead.logits, outputs, head)

    def run(draft, shared, cache, features, tokens, positions, bias, starts):
        num_tokens = tokens.shape[1]
        if numerics.is_row_invariant:
            features, tokens, positions, bias = at_least_two_rows(
                features, tokens, positions, bias
            )
        embeddings = embed(tokens, shared.embedding)
        args = (features, embeddings, positions, bias, cache, starts)
        outputs, cache = apply(draft, EagleHead.step, *args)
        logits = logits_of(draft, shared, outputs)
        return outputs[:, :num_tokens], logits[:, :num_tokens], cache

    def extend(draft, shared, cache, inputs, tokens, taps, starts, num_valid):
        if numerics.is_row_invariant:
            tokens, taps = at_least_two_rows(tokens, taps)
        num_tokens = tokens.shape[1]
        positions = starts[:, None] + jnp.arange(num_tokens)
        bias = kv.causal_bias(starts, num_tokens, cache.capacity)
        features = apply(draft, EagleHead.fuse, taps)
        embeddings = embed(tokens, shared.embedding)
        args = (features, embeddings, positions, bias, cache, starts)
        outputs, cache = apply(draft, EagleHead.step, *args)
        # Twice the last row: its logits are one product of at least two rows.
        last = take_row(outputs, jnp.maximum(num_valid - 1, 0))
        logits = logits_of(draft, shared, jnp.stack([last, last], axis=1))
        return cache, DraftContext(hidden=last, logits=logits[:, 0])

    propose_tree = propose_static if tree.kind == "static" else propose_uniform

    def propose(
        draft, shared, cache, context, root, starts, keys, sampling, hints=None
    ):
        step = lambda *args: run(draft, shared, *args)
        return propose_tree(
            step, tree, cache, context, root, starts, keys, sampling, draft.token_ids,
            numerics.is_row_invariant, hints,
        )  # fmt: skip

    def unroll(
        params, token_ids, shared, feedback, start, num_context, num_steps,
        candidates=None,
    ):  # fmt: skip
        num_pairs = feedback.tokens.shape[1] - num_steps
        taps = feedback.taps[:, :num_pairs].astype(jnp.float32)
        embeddings = embed(feedback.tokens[:, 1:], shared.embedding)
        head = None
        if not config.has_own_head:
            head = dequantized(frozen_head(shared, token_ids))
        elif candidates is not None:
            head = params["lm_head"]["kernel"]
        if head is not None:
            head = {"kernel": head if candidates is None else head[candidates]}
        return trainer.apply(
            {"params": params}, taps, embeddings, start, num_context, num_steps, head,
            method=EagleHead.unroll,
        )  # fmt: skip

    return Drafter(
        init_params=init_params,
        init_cache=init_cache,
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=unroll,
        num_scratch=num_scratch(tree),
    )
