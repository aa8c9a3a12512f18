# SPDX-License-Identifier: Apache-2.0
"""EAGLE heads: one decoder layer over target features and tokens.

The *pair* at position i joins the target's feature of token i with the embedding of
token i + 1 and predicts token i + 2. Deeper in a proposal the features are the draft's
own output of the step before. The head is trained as it is used, by unrolling those
steps (*training-time test*).

- **EAGLE-3** (arXiv 2503.01840) fuses tapped features of three layers, norms feature
  and embedding apart, and has a norm and mostly a head of its own.
- **EAGLE-1** and EAGLE-2 (arXiv 2401.15077, 2406.16858; the same weights) read the
  target's final state, join it with the embedding in one projection, norm neither, and
  predict the next final state, of which the target's frozen head makes tokens.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError, DraftConfig, ModelConfig, TreeConfig
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
    embedding_table,
    shape_of,
    states_before,
    take_row,
    training_head,
)
from ospec_jax.drafters.deltas import add_rows
from ospec_jax.drafters.growth import Nodes, grow, num_scratch
from ospec_jax.drafters.starts import decoder_layer, last_layer, passing
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.kernels import native
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
from ospec_jax.models.rope import rotary_angles
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

Version = Literal["eagle3", "eagle1"]


class EagleHead(nn.Module):
    """The draft's parameters and its two ways of attending."""

    config: DraftConfig
    numerics: Numerics
    version: Version = "eagle3"

    def setup(self):
        c = self.config
        n = self.numerics
        norm = lambda: RMSNorm(c.rms_norm_eps, n)
        self.fc = Linear(c.hidden_size, n, c.has_fc_bias)
        if self.version == "eagle3":
            self.input_layernorm = norm()
            self.hidden_norm = norm()
            self.norm = norm()

        self.post_attention_layernorm = norm()
        self.qkv_proj = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, n)
        self.o_proj = Linear(c.hidden_size, n)
        self.mlp = SwiGLU(c.intermediate_size, n)
        if c.has_own_head:
            self.lm_head = Linear(c.draft_vocab_size, n)

    def fuse(self, taps):
        """Target features to the draft's width."""
        return self.fc(taps) if self.version == "eagle3" else taps

    def _join(self, features, embeddings):
        """What attention reads of pairs, projected, and their residual stream."""
        if self.version == "eagle1":
            joint = self.fc(jnp.concatenate([embeddings, features], axis=-1))
            return self.qkv_proj(joint), joint

        # EAGLE-3 norms both parts apart, for the fused taps are of another size than
        # the embeddings. Attention reads them side by side; the residual stream carries
        # the features alone.
        normed = self.hidden_norm(features)
        joint = jnp.concatenate([self.input_layernorm(embeddings), normed], axis=-1)
        is_normed = self.config.has_norm_before_residual
        return self.qkv_proj(joint), normed if is_normed else features

    def _finish(self, residual, attended):
        residual = residual + self.o_proj(attended)
        return residual + self.mlp(self.post_attention_layernorm(residual))

    def step(self, features, embeddings, positions, bias, cache, starts):
        """Runs pairs against the cache; returns their outputs and the cache."""
        args = features, embeddings, positions, bias, cache, starts
        if self.is_one_call(cache):
            outputs, _, cache = self._run_natively(*args)
            return outputs, cache

        qkv, residual = self._join(features, embeddings)
        out, cache = attend_cached(
            qkv, self.config, self.numerics, positions, bias, cache, starts
        )
        return self._finish(residual, out), cache

    def step_and_score(
        self, features, embeddings, positions, bias, cache, starts, head
    ):
        """As `step`, with the outputs' `logits` behind them."""
        args = features, embeddings, positions, bias, cache, starts
        if self.is_one_call(cache) and self.has_native_head(head):
            return self._run_natively(*args, self._native_head(head))

        outputs, cache = self.step(*args)

        return outputs, self.logits(outputs, head), cache

    def _run_natively(
        self, features, embeddings, positions, bias, cache, starts, head=None
    ):
        """`step`, and the logits if there is a `head`, in one call."""
        c = self.config
        params = self.variables["params"]
        x = features
        beside = None
        if self.version == "eagle1":
            x = self.fc(jnp.concatenate([embeddings, features], axis=-1))
        else:
            beside = embeddings, params["input_layernorm"]["scale"]

        num_positions = cache.capacity if self.numerics.is_row_invariant else None
        outputs, keys, values, logits = native.decoder_layer(
            x,
            rotary_angles(c, positions, num_positions, is_native=True),
            kv.within_window(bias, positions, c.sliding_window),
            cache.keys[0],
            cache.values[0],
            starts,
            native.layer_weights(params, "hidden_norm"),
            c.rms_norm_eps,
            beside=beside,
            head=head,
            has_normed_residual=bool(beside) and c.has_norm_before_residual,
        )

        return outputs, logits, kv.KVCache(keys=(keys,), values=(values,))

    def is_one_call(self, cache) -> bool:
        """Whether `step` is native, and so computes each row by itself."""
        own = self.variables.get("params", {})
        if self.is_mutable_collection("ranges") or not own:
            return False

        # The layer itself says whether it can be one; `fc` stands in front of it.
        is_layer = llama.is_one_call(self.config, self.numerics, cache.keys[0], own)
        return is_layer and own["fc"]["kernel"].dtype == jnp.int8

    def has_native_head(self, head) -> bool:
        """Whether `logits` are native, and each row's computed by itself.

        Args:
          head: As for `logits`.
        """
        if self.is_mutable_collection("ranges"):
            return False

        table = head or self.variables.get("params", {}).get("lm_head")
        is_int8 = bool(table) and table["kernel"].dtype == jnp.int8
        return is_int8 and self.numerics.is_native

    def _native_head(self, head) -> tuple:
        """Gain of the norm in front of the head, the head's kernel, and its scale."""
        params = self.variables["params"]
        table = head or params["lm_head"]
        # An empty gain stands for no norm.
        has_norm = self.version == "eagle3"
        gain = params["norm"]["scale"] if has_norm else jnp.zeros(0, jnp.float32)

        return gain, table["kernel"], table["scale"]

    def head_inputs(self, outputs):
        """What the output projection reads."""
        return self.norm(outputs) if self.version == "eagle3" else outputs

    def logits(self, outputs, head):
        """Draft logits over the rows of `head`, or of the draft's own for None."""
        if self.has_native_head(head):
            gain, kernel, scale = self._native_head(head)
            return native.int8_linear(
                outputs, kernel, scale, gain=gain, eps=self.config.rms_norm_eps
            )

        normed = self.head_inputs(outputs)
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
          For each depth j, `[b, t - num_context, q]` logits of token i + 2 + j, and
          the outputs that they were made of.
        """
        check_window(self.config, num_steps)
        sliding_window = self.config.sliding_window
        # Pairs that lie in front of every trained pair's window cost nothing.
        unseen = num_unseen(num_context, sliding_window)
        taps = taps[:, unseen:]
        embeddings = embeddings[:, unseen:]
        num_context = num_context - unseen
        num_pairs = taps.shape[1]
        positions = start[:, None] + unseen + jnp.arange(num_pairs)
        qkv, residual = self._join(self.fuse(taps), embeddings[:, :num_pairs])
        q, k, v = split_heads(qkv, self.config, self.numerics, positions)
        # Keys of the context are read, but nothing is predicted there.
        queries = slice(num_context, num_pairs)
        residual = residual[:, queries]
        q = q[:, queries]
        own_keys = []
        own_values = []
        logits = []
        outputs = []

        for depth in range(num_steps):
            if depth:
                # From here on a pair's features are the draft's own outputs, as when it
                # drafts: it learns to go on from its own mistakes. All pairs go one
                # token further, each along its own chain.
                shifted = slice(num_context + depth, num_pairs + depth)
                qkv, residual = self._join(outputs[-1], embeddings[:, shifted])
                q, own_k, own_v = split_heads(
                    qkv, self.config, self.numerics, positions[:, queries] + depth
                )
                # A chain's deeper keys are its own: pair i at depth j attends to the
                # verified pairs up to i, and to its own entries of depths 1 to j.
                own_keys.append(own_k)
                own_values.append(own_v)

            is_seen = seen_in_window(positions, num_context, sliding_window, depth)
            out = attend_unrolled(q, k, v, own_keys, own_values, is_seen)
            outputs.append(self._finish(residual, out))
            logits.append(self.logits(outputs[-1], head))

        return logits, outputs

    def init_all(self, taps, embeddings, head):
        """Touches every parameter."""
        return self.unroll(taps, embeddings, jnp.zeros(1, jnp.int32), 0, 1, head)


def eagle3(
    config: DraftConfig,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the EAGLE-3 drafter.

    Args:
      config: The head's architecture.
      tree: How much to draft.
      numerics: For drafting; training is in float32.
      stop_fn: When a row grows no deeper; see `drafters.stopping`.
    """
    return _eagle("eagle3", config, tree, numerics, stop_fn)


def eagle1(
    config: DraftConfig,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the EAGLE-1 drafter; with a dynamic tree it is EAGLE-2's."""
    return _eagle("eagle1", config, tree, numerics, stop_fn)


def _eagle(
    version: Version,
    config: DraftConfig,
    tree: TreeConfig,
    numerics: Numerics | None,
    stop_fn: StopFn | None,
) -> Drafter:
    check_window(config, tree.num_steps)
    numerics = numerics or Numerics()
    module = EagleHead(config, numerics, version)
    # Training is in float32, and of whole windows, whose rows may depend on each other.
    trainer = EagleHead(config, numerics.for_training(), version)

    def apply(draft, method, *args) -> Any:
        return module.apply({"params": draft.params}, *args, method=method)

    def init_cache(batch_size, capacity):
        return kv.init_cache(
            1,
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

    def embedded(draft, shared, tokens):
        return embed(tokens, embedding_table(config, draft.params, shared))

    def head_of(shared):
        return None if config.has_own_head else shared.head

    def logits_of(draft, shared, outputs):
        logits = apply(draft, EagleHead.logits, outputs, head_of(shared))
        return with_deltas(draft, outputs, logits)

    def with_deltas(draft, outputs, logits):
        """Logits `[b, t, q]`, or of one token a row `[b, q]`, with the rows' own."""
        if draft.deltas is None:
            return logits

        inputs: Any = head_inputs(draft.params, outputs)
        if logits.ndim == 3:
            return add_rows(draft.deltas, inputs, logits)

        return add_rows(draft.deltas, inputs[:, None], logits[:, None])[:, 0]

    def needs_two_rows(draft, shared, cache=None) -> bool:
        """Whether a lone token must be doubled to have the bits it has among others.

        A product of one row may round differently from one of several; native ones do
        not.

        Args:
          cache: None where the head alone is run.
        """
        is_native = apply(draft, EagleHead.has_native_head, head_of(shared))
        if cache is not None:
            is_native &= apply(draft, EagleHead.is_one_call, cache)

        return numerics.is_row_invariant and not is_native

    def step(draft, shared, cache, nodes: Nodes):
        """Runs over drafted pairs; the features are the draft's own."""
        num_tokens = nodes.tokens.shape[1]
        features = nodes.hidden
        tokens = nodes.tokens
        positions = nodes.positions
        bias = nodes.bias
        if needs_two_rows(draft, shared, cache):
            features, tokens, positions, bias = at_least_two_rows(
                features, tokens, positions, bias
            )

        embeddings = embedded(draft, shared, tokens)
        args = (features, embeddings, positions, bias, cache, nodes.starts)
        outputs, logits, cache = apply(
            draft, EagleHead.step_and_score, *args, head_of(shared)
        )
        logits = with_deltas(draft, outputs, logits)

        return outputs[:, :num_tokens], logits[:, :num_tokens], cache

    def run_pairs(draft, shared, cache, pairs: Pairs):
        """Outputs of pairs, which may be twice one, the newest one's, and the cache."""
        tokens = pairs.tokens
        taps = pairs.taps
        starts = pairs.starts
        if needs_two_rows(draft, shared, cache):
            tokens, taps = at_least_two_rows(tokens, taps)

        num_tokens = tokens.shape[1]
        positions = starts[:, None] + jnp.arange(num_tokens)
        bias = kv.causal_bias(starts, num_tokens, cache.capacity)
        features = apply(draft, EagleHead.fuse, taps)
        embeddings = embedded(draft, shared, tokens)
        args = (features, embeddings, positions, bias, cache, starts)
        outputs, cache = apply(draft, EagleHead.step, *args)
        # The next proposal begins behind the last real pair. Rows that are finished
        # have none; nothing that follows from theirs is emitted.
        return outputs, take_row(outputs, jnp.maximum(pairs.num_valid - 1, 0)), cache

    def extend(
        draft: Draft, shared: SharedTables, cache: kv.KVCache, pairs: Pairs
    ) -> tuple[kv.KVCache, DraftContext]:
        def run(cache):
            _, last, cache = run_pairs(draft, shared, cache, pairs)
            return cache, DraftContext(last, predict(draft, shared, last))

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
        outputs, last, cache = run_pairs(draft, shared, cache, pairs)
        num_tokens = pairs.tokens.shape[1]
        states = states_before(context, outputs, num_tokens)
        if needs_two_rows(draft, shared):
            (states,) = at_least_two_rows(states)
        logits = logits_of(draft, shared, states)[:, :num_tokens]
        found = Retraced(suggested, logits, draft.token_ids)

        return cache, DraftContext(last, predict(draft, shared, last)), found

    def predict(draft, shared, hidden):
        if not needs_two_rows(draft, shared):
            return logits_of(draft, shared, hidden)

        # Twice each row: its logits are one product of at least two rows.
        return logits_of(draft, shared, jnp.stack([hidden, hidden], axis=1))[:, 0]

    def head_inputs(params, states):
        return module.apply({"params": params}, states, method=EagleHead.head_inputs)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: kv.KVCache,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, kv.KVCache]:
        return grow(
            functools.partial(step, draft, shared),
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
        # The last pair's chain needs `num_steps` tokens behind it.
        num_pairs = feedback.tokens.shape[1] - num_steps
        features = feedback.taps if version == "eagle3" else feedback.hidden
        assert features is not None, "features are recorded"
        features = features[:, :num_pairs].astype(jnp.float32)
        table = embedding_table(config, params, shared)
        # The embedding is frozen, the draft's own as well as the target's.
        embeddings = jax.lax.stop_gradient(embed(feedback.tokens[:, 1:], table))
        head = training_head(config, params, token_ids, shared, candidates)
        unrolled: Any = trainer.apply(
            {"params": params},
            features,
            embeddings,
            start,
            num_context,
            num_steps,
            head,
            method=EagleHead.unroll,
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
        has_features=version == "eagle1",
        num_scratch=num_scratch(tree),
        head_inputs=head_inputs if config.has_own_head else None,
        adds_deltas=config.has_own_head,
        predict=predict,
        retrace=retrace,
    )


def _init_params(config: DraftConfig, trainer: EagleHead, key) -> Params:
    """Parameters that know nothing."""
    # A table of two rows stands for the target's head: no parameter depends on it.
    own = config.has_own_embedding
    width = config.hidden_size if own else config.target_hidden_size
    zeros = lambda width: jnp.zeros((1, 1, width))
    args = (
        zeros(len(config.taps) * config.target_hidden_size),
        zeros(width),
        None if config.has_own_head else {"kernel": jnp.zeros((2, width))},
    )
    params: Any = trainer.init(key, *args, method=EagleHead.init_all)["params"]
    if own:
        table = jax.random.normal(key, (config.vocab_size, width)) * width**-0.5
        params = params | {"embed_tokens": {"kernel": table}}

    return params


def check_window(config: DraftConfig, num_steps: int) -> None:
    """Refuses drafts whose last token would not see the path to it."""
    if 0 < config.sliding_window < num_steps:
        raise ConfigError(
            f"this draft sees {config.sliding_window} tokens (sliding_window), fewer "
            f"than the {num_steps} that are drafted one after the other; draft less, "
            f"or give it a longer window"
        )


def eagle3_taps(model: ModelConfig) -> tuple[int, ...]:
    """Layers that EAGLE-3 reads of a target unless its configuration says otherwise."""
    n = model.num_layers
    if n >= 7:
        return (2, n // 2, n - 3)

    # The rule would name a layer twice, or one below the first.
    return (2, 3, 4) if n == 6 else tuple(range(min(n, 3)))


def _eagle3_config(
    model: ModelConfig, draft_vocab_size: int, num_steps: int, layer: int
) -> DraftConfig:
    taps = eagle3_taps(model)
    return DraftConfig(**shape_of(model), taps=taps, draft_vocab_size=draft_vocab_size)


def start_eagle3(params, target, number: int = -1) -> dict:
    """The newest tap passes through one of the target's layers, by default the last.

    That layer reads features where it read its residual stream.
    """
    layer = decoder_layer(target, number % target.config.num_layers)
    layer["norm"] = target.params["norm"]
    fused = params["fc"]["kernel"]
    qkv = layer["qkv_proj"]["kernel"]
    small = 0.01 * jax.random.normal(jax.random.key(0), qkv.shape)
    layer["hidden_norm"] = layer.pop("input_layernorm")
    layer["qkv_proj"] = {"kernel": jnp.concatenate([small, qkv], axis=1)}
    width, num_features = fused.shape

    return layer | {"fc": {"kernel": passing(fused, num_features - width)}}


def _eagle1_config(
    model: ModelConfig, draft_vocab_size: int, num_steps: int, layer: int
) -> DraftConfig:
    return DraftConfig(
        **shape_of(model),
        taps=(model.num_layers,),
        draft_vocab_size=draft_vocab_size,
        has_fc_bias=True,
    )


def _start_eagle1(params, target) -> dict:
    """The final state passes through the target's last layer, again."""
    layer = last_layer(target)
    fused = params["fc"]["kernel"]
    del layer["input_layernorm"], layer["norm"]
    joined = {"kernel": passing(fused, fused.shape[0])}
    return layer | {"fc": params["fc"] | joined}


EAGLE3 = Family(
    name="eagle3",
    description="one decoder layer over three of the target's hidden states (EAGLE-3)",
    build=eagle3,
    config=DraftConfig,
    default_config=_eagle3_config,
    warm_start=start_eagle3,
    reads_taps=True,
)

EAGLE1 = Family(
    name="eagle1",
    description="one decoder layer that predicts the target's final states (EAGLE-1/2)",
    build=eagle1,
    config=DraftConfig,
    default_config=_eagle1_config,
    warm_start=_start_eagle1,
    # Published (arXiv 2401.15077): 1 for the predicted states, 0.1 for the tokens.
    feature_weight=10.0,
)
