# SPDX-License-Identifier: Apache-2.0
"""The Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Qwen2 adds a bias to queries, keys and values; Qwen3 normalises queries and keys. OLMo-2
normalises these over all heads, and what blocks add instead of what they read.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ospec_jax.config import DraftConfig, ModelConfig
from ospec_jax.kernels import native
from ospec_jax.models import cache as kv
from ospec_jax.models.attention import attend
from ospec_jax.models.layers import (
    Linear,
    Numerics,
    RMSNorm,
    SwiGLU,
    at_least_two_rows,
    embed,
    keep_apart,
    linear,
    parameter,
    split_groups,
)
from ospec_jax.models.rope import rotary_angles, rotate
from ospec_jax.typing import Params


class SelfAttention(nn.Module):
    """Projects, rotates, appends to the cache and attends; q, k, v are one product."""

    config: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x, angles, bias, keys, values, starts, layer=None):
        (b, t, _) = x.shape
        c = self.config
        n = self.numerics
        norm = lambda name: RMSNorm(c.rms_norm_eps, n, name=name)
        heads = c.num_heads
        kv_heads = c.num_kv_heads
        e = c.head_dim
        qkv = Linear((heads + 2 * kv_heads) * e, n, c.has_qkv_bias, name="qkv_proj")(
            x
        ).reshape(b, t, heads + 2 * kv_heads, e)
        split = lambda x, *counts: split_groups(x, counts, n.num_groups, axis=2)
        rotated, new_values = split(qkv, heads + kv_heads, kv_heads)
        if c.has_qk_norm:
            queries, new_keys = split(rotated, heads, kv_heads)
            queries = rotate(norm("q_norm")(queries), angles, n.is_row_invariant)
            new_keys = rotate(norm("k_norm")(new_keys), angles, n.is_row_invariant)
        elif c.has_wide_qk_norm:
            queries, new_keys = split(rotated, heads, kv_heads)
            wide = lambda name, x: norm(name)(x.reshape(b, t, -1)).reshape(x.shape)
            queries = rotate(wide("q_norm", queries), angles, n.is_row_invariant)
            new_keys = rotate(wide("k_norm", new_keys), angles, n.is_row_invariant)
        else:
            # One rotation of both.
            rotated = rotate(rotated, angles, n.is_row_invariant)
            queries, new_keys = split(rotated, heads, kv_heads)

        # Written before it is read: a token attends to itself through the cache.
        keys, values = kv.append(
            keys, values, new_keys, new_values, starts, n.has_batched_writes, layer
        )
        # Stacked caches hold all layers; attention reads this one's.
        own = (keys, values) if layer is None else (keys[layer], values[layer])
        out = attend(queries, *own, bias, n)
        out = Linear(c.hidden_size, n, name="o_proj")(out)

        return out, keys, values


def is_one_call(
    config: ModelConfig | DraftConfig, numerics: Numerics, keys, layer_params
) -> bool:
    """Whether a layer with these keys and parameters, or all, are one native call.

    All passes of a model must agree: the two differ in last bits. So this must not
    depend on the number of rows; caches of an engine have whole vectors of slots.

    Args:
      keys: `[b, h, e, s]`; `[layers, b, h, e, s]` of stacked layers.
      layer_params: A layer's, or those of all of them stacked.
    """
    is_plain = numerics.is_native and numerics.num_groups == 1
    is_other = isinstance(config, ModelConfig) and not config.has_llama_layers
    if not is_plain or is_other or not layer_params:
        return False

    queries = jax.ShapeDtypeStruct((config.head_dim,), jnp.float32)
    can_attend = native.can_attend(queries, keys)
    return can_attend and native.layer_weights(layer_params) is not None


class DecoderLayer(nn.Module):
    """One transformer block.

    With `layer`, the block's number, `keys` and `values` are those of all layers.
    """

    config: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, x, angles, bias, keys, values, starts, layer=None, num_valid=None
    ):
        c = self.config
        own = self.variables.get("params", {})
        # Ranges are measured inside of the modules, see `smoothing`.
        is_alone = layer is None and not self.is_mutable_collection("ranges")
        if is_alone and is_one_call(c, self.numerics, keys, own):
            weights = native.layer_weights(own)
            return native.decoder_layer(
                x,
                angles,
                bias,
                keys,
                values,
                starts,
                weights,
                c.rms_norm_eps,
                num_valid=num_valid,
            )[:3]

        norm = lambda name: RMSNorm(c.rms_norm_eps, self.numerics, name=name)
        attention = SelfAttention(c, self.numerics, name="self_attn")
        mlp = SwiGLU(c.intermediate_size, self.numerics, name="mlp")
        if c.norms == "after":
            apart = lambda x: keep_apart(x, self.numerics.is_row_invariant)
            out, keys, values = attention(x, angles, bias, keys, values, starts, layer)
            x = x + apart(norm("attention_out_norm")(out))
            return x + apart(norm("mlp_out_norm")(mlp(x))), keys, values

        out, keys, values = attention(
            norm("input_layernorm")(x), angles, bias, keys, values, starts, layer
        )
        x = x + out

        return x + mlp(norm("post_attention_layernorm")(x)), keys, values


class Llama(nn.Module):
    """A decoder-only target with hidden-state taps.

    Attributes:
      taps: Layers whose input hidden state is returned, concatenated, for the draft;
        the number of layers stands for the input of the head, the final normed state.
      is_truncated: These are the first layers of more: no final norm.
    """

    config: ModelConfig
    numerics: Numerics
    taps: tuple[int, ...] = ()
    is_truncated: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        bias: Float[Array, "b t s"],
        cache: kv.KVCache,
        starts: Int[Array, " b"],
        num_valid: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t f"], kv.KVCache]:
        """Returns final (normed) hidden states, tapped features and the new cache.

        Args:
          positions: For the rotary embedding; in a tree, by depth.
          bias: What each token attends to, its own slot included.
          starts: First slot that each row's tokens are written to.
          num_valid: Tokens of each row that are no padding; None for all. What stands
            for padding is left open, but that it is finite.
        """
        c = self.config
        num_tokens = tokens.shape[1]
        # Where a lone token is repeated its copy is written to the cache, too: behind
        # the real entry, where the next pass overwrites it.
        # A native layer computes each row by itself, so a single one is no exception.
        is_native = self._has_native_layers(cache)
        if self.numerics.is_row_invariant and not is_native:
            tokens, positions, bias = at_least_two_rows(
                tokens, positions, bias, is_grouped=c.num_heads > c.num_kv_heads
            )

        bias = kv.within_window(bias, positions, c.attention_window)
        x = embed(tokens, self._table("embed_tokens"))
        if c.embedding_multiplier != 1:
            x = x * c.embedding_multiplier
            x = keep_apart(x, self.numerics.is_row_invariant)

        # Positions lie below the cache's capacity, so a table of that size serves.
        num_positions = cache.capacity if self.numerics.is_row_invariant else None
        angles = rotary_angles(c, positions, num_positions, is_native)
        run = self._run_layers
        if self.numerics.is_scanned:
            run = self._run_natively if is_native else self._scan_layers
        x, taps, cache = run(x, angles, bias, cache, starts, num_valid)
        if not self.is_truncated:
            x = RMSNorm(c.rms_norm_eps, self.numerics, name="norm")(x)

        taps = [
            x if i == c.num_layers else tap
            for i, tap in zip(self.taps, taps, strict=True)
        ]
        # The head is not used here, but its parameter must be a part of the tree.
        if not c.tie_embeddings:
            self._table("lm_head")

        # Without taps the features have width 0.
        features = jnp.concatenate([*taps, x[..., :0]], axis=-1)

        return x[:, :num_tokens], features[:, :num_tokens], cache

    def _has_native_layers(self, cache: kv.KVCache) -> bool:
        """Whether every layer is one call, or all of them are, for this cache."""
        if self.is_mutable_collection("ranges"):
            return False

        c = self.config
        params = self.variables.get("params", {})
        if self.numerics.is_scanned:
            return is_one_call(c, self.numerics, cache.keys, params.get("layers", {}))

        layers = [params.get(f"layers_{i}", {}) for i in range(c.num_layers)]
        pairs = zip(cache.keys, layers, strict=True)
        return all(is_one_call(c, self.numerics, keys, own) for keys, own in pairs)

    def _run_layers(self, x, angles, bias, cache: kv.KVCache, starts, num_valid):
        """Each layer with its own weights and cache."""
        keys = []
        values = []
        taps = {}

        for i in range(self.config.num_layers):
            if i in self.taps:
                # A tap is the state that enters a layer.
                taps[i] = x
            layer = DecoderLayer(self.config, self.numerics, name=f"layers_{i}")
            x, k, v = layer(
                x,
                angles,
                bias,
                cache.keys[i],
                cache.values[i],
                starts,
                num_valid=num_valid,
            )
            keys.append(k)
            values.append(v)

        cache = kv.KVCache(keys=tuple(keys), values=tuple(values))

        return x, [taps.get(i, x) for i in self.taps], cache

    def _run_natively(self, x, angles, bias, cache: kv.KVCache, starts, num_valid):
        """All layers in one call; of more that are stacked the first ones."""
        weights = native.layer_weights(self.variables["params"]["layers"])
        # In rising order, each once: so its inputs are told from those of others.
        inner = sorted({i for i in self.taps if i < self.config.num_layers})
        x, keys, values, inputs, _ = native.decoder_layers(
            x,
            angles,
            bias,
            cache.keys,
            cache.values,
            starts,
            weights,
            self.config.rms_norm_eps,
            taps=tuple(inner),
            num_valid=num_valid,
        )
        taps = [inputs[inner.index(i)] if i in inner else x for i in self.taps]

        return x, taps, kv.KVCache(keys=keys, values=values)

    def _scan_layers(self, x, angles, bias, cache: kv.KVCache, starts, num_valid):
        """One layer over stacked weights.

        Caches and taps are carried, where they are written in place; as a scan's
        inputs and outputs, whole layers of them would be copied.
        """
        tapped = np.asarray(self.taps, np.int32)

        def one(layer, carry, i):
            x, keys, values, taps = carry
            # `[taps, b, t, d]`: layer i fills the places that ask for it.
            taps = jnp.where((tapped == i)[:, None, None, None], x, taps)
            x, keys, values = layer(x, angles, bias, keys, values, starts, i)
            return (x, keys, values, taps), None

        scan = nn.scan(
            one,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
        )
        layer = DecoderLayer(self.config, self.numerics, name="layers")
        carry = x, cache.keys, cache.values, jnp.zeros((len(tapped), *x.shape))
        carry, _ = scan(layer, carry, jnp.arange(self.config.num_layers))
        x, keys, values, taps = carry

        return x, list(taps), kv.KVCache(keys=keys, values=values)

    def _table(self, name: str) -> dict:
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(self.config.hidden_size**-0.5)
        params = {"kernel": parameter(self, f"{name}_kernel", init, shape)}
        if params["kernel"].dtype == jnp.int8:
            # An int8 kernel comes with its scale, for which there is no initialiser.
            params["scale"] = self.get_variable("params", f"{name}_scale")

        return params


class LastLayers(nn.Module):
    """The layers from `first` on and the final norm, to be trained.

    They read whole sequences, and keep nothing of them.
    """

    config: ModelConfig
    numerics: Numerics
    first: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Final (normed) hidden states.

        Args:
          x: States that enter the first of these layers, from the first token on.
        """
        c = self.config
        b, t, _ = x.shape
        starts = jnp.zeros((b,), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        angles = rotary_angles(c, positions)
        # Causal, so that padding behind a row's tokens is seen by nobody.
        bias = kv.causal_bias(starts, t, t)
        bias = kv.within_window(bias, positions, c.attention_window)
        num_layers = c.num_layers - self.first
        cache = kv.init_cache(num_layers, b, c.num_kv_heads, t, c.head_dim, jnp.float32)
        for i in range(num_layers):
            layer = DecoderLayer(c, self.numerics, name=f"layers_{self.first + i}")
            x, _, _ = layer(x, angles, bias, cache.keys[i], cache.values[i], starts)

        return RMSNorm(c.rms_norm_eps, self.numerics, name="norm")(x)


def build_last_layers(config: ModelConfig, numerics: Numerics, first: int) -> Callable:
    """`LastLayers` as `(params, x) -> hidden`."""
    module = LastLayers(config, numerics, first)
    return lambda params, x: module.apply({"params": params}, x)


def build(
    config: ModelConfig,
    numerics: Numerics,
    taps: tuple[int, ...] = (),
    is_truncated: bool = False,
) -> Callable:
    """`Llama` as `(params, tokens, positions, bias, cache, starts) -> ...`."""
    module = Llama(config, numerics, taps, is_truncated)
    return lambda params, *args: module.apply({"params": params}, *args)


def init_params(config: ModelConfig, key) -> Params:
    """Freshly initialised float32 parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    cache = kv.init_cache(
        config.num_layers, 1, config.num_kv_heads, 8, config.head_dim, jnp.float32
    )
    bias = kv.causal_bias(jnp.zeros(1, jnp.int32), 2, 8)
    model = Llama(config, Numerics())
    return model.init(key, tokens, tokens, bias, cache, tokens[:, 0])["params"]


def init_cache(
    config: ModelConfig, numerics: Numerics, batch_size: int, capacity: int
) -> kv.KVCache:
    """An empty cache of a model's layers."""
    return kv.init_cache(
        config.num_layers,
        batch_size,
        config.num_kv_heads,
        capacity,
        config.head_dim,
        numerics.cache_dtype,
        numerics.is_scanned,
    )


def stack_layers(params: Params) -> Params:
    """Parameters for `Numerics.is_scanned`: all layers' in one tree, `layers`.

    Each of its arrays is `[layers, ...]`. The layers are taken out of `params`, so that
    no more than one kind of arrays is held twice where nobody else holds them.
    """
    names = [name for name in params if name.startswith("layers_")]
    layers = [params.pop(f"layers_{i}") for i in range(len(names))]
    structure = jax.tree.structure(layers[0])
    kinds = [list(kind) for kind in zip(*map(jax.tree.leaves, layers), strict=True)]
    layers.clear()
    stacked = []
    for kind in kinds:
        stacked.append(jnp.stack(kind))
        kind.clear()

    return params | {"layers": jax.tree.unflatten(structure, stacked)}


def can_stack(config: ModelConfig, numerics: Numerics, params: Params) -> bool:
    """Whether all layers of a model, as they were read, are one native call."""
    # Of some cache with whole vectors of slots, as an engine's are.
    shape = 1, config.num_kv_heads, config.head_dim, 256
    keys = jax.ShapeDtypeStruct(shape, numerics.cache_dtype)
    return all(
        is_one_call(config, numerics, keys, params[f"layers_{i}"])
        for i in range(config.num_layers)
    )


def layer_params(params: Params, number: int) -> Params:
    """A layer's parameters, whether the layers are stacked or not."""
    if "layers" not in params:
        return params[f"layers_{number}"]

    return jax.tree.map(lambda stacked: stacked[number], params["layers"])


def embedding_table(params) -> dict:
    """The target's token embedding, as `embed` reads it."""
    return _table_of(params, "embed_tokens")


def head_table(params) -> dict:
    """The target's output projection, as `linear` reads it."""
    has_own = "lm_head_kernel" in params
    return _table_of(params, "lm_head" if has_own else "embed_tokens")


def _table_of(params, name):
    table = {"kernel": params[f"{name}_kernel"]}
    if f"{name}_scale" in params:
        table["scale"] = params[f"{name}_scale"]

    return table


def without_padding(params: Params, vocab_size: int) -> Params:
    """Embedding and head without the rows beyond a vocabulary, which are padding."""
    names = [
        f"{table}_{part}"
        for table in ("embed_tokens", "lm_head")
        for part in ("kernel", "scale")
    ]
    cut = {name: params[name][:vocab_size] for name in names if name in params}

    return {**params, **cut}


def target_logits(
    params, hidden: Float[Array, "b t d"], numerics: Numerics
) -> Float[Array, "b t v"]:
    """Logits of final hidden states; at least two rows on the CPU, as `Llama` does."""
    b, t, d = hidden.shape
    head = head_table(params)
    is_native = numerics.is_native and head["kernel"].dtype == jnp.int8
    rows = hidden.reshape(b * t, d)
    if numerics.is_row_invariant and b * t == 1 and not is_native:
        rows = jnp.concatenate([rows, rows])

    logits = linear(rows, head, numerics)
    return logits[: b * t].reshape(b, t, -1)
