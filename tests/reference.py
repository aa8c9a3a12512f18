# SPDX-License-Identifier: Apache-2.0
"""Independent oracles for the tests, written from the papers in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np


def forward(params, config, tokens, taps=()):
    """Llama, Qwen2 and Qwen3 in float64, one sequence, without a cache.

    Follows Touvron et al. (arXiv 2302.13971), with Qwen2's bias (2407.10671) and
    Qwen3's normalisation of queries and keys (2505.09388), token by token and head by
    head; shares no code with the package but the layout of `params`.

    Returns:
      Logits `[t, v]`, and the inputs of the layers `taps`, concatenated, `[t, f]`;
      the number of layers stands for the head.
    """
    c, wide = config, lambda array: np.asarray(array, np.float64)
    x = wide(params["embed_tokens_kernel"])[np.asarray(tokens)]
    tapped = {}
    for number in range(c.num_layers):
        layer = params[f"layers_{number}"]
        tapped[number] = x
        normed = _norm(x, wide(layer["input_layernorm"]["scale"]), c.rms_norm_eps)
        x = x + _attention(c, layer["self_attn"], normed)
        gain = wide(layer["post_attention_layernorm"]["scale"])
        normed = _norm(x, gain, c.rms_norm_eps)
        fused = wide(layer["mlp"]["gate_up_proj"]["kernel"])
        gate, up = fused[: c.intermediate_size], fused[c.intermediate_size :]
        gated = normed @ gate.T
        gated = gated / (1.0 + np.exp(-gated))
        x = x + (gated * (normed @ up.T)) @ wide(layer["mlp"]["down_proj"]["kernel"]).T
    x = _norm(x, wide(params["norm"]["scale"]), c.rms_norm_eps)
    tapped[c.num_layers] = x
    head = "embed_tokens_kernel" if c.tie_embeddings else "lm_head_kernel"
    features = [tapped[number] for number in taps] or [x[:, :0]]
    return x @ wide(params[head]).T, np.concatenate(features, axis=1)


def _norm(x, gain, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def _attention(c, layer, x):
    fused = np.asarray(layer["qkv_proj"]["kernel"], np.float64)
    num_tokens, group = len(x), c.num_heads // c.num_kv_heads
    rows = fused.reshape(c.num_heads + 2 * c.num_kv_heads, c.head_dim, c.hidden_size)
    query_rows = rows[: c.num_heads]
    key_rows = rows[c.num_heads : c.num_heads + c.num_kv_heads]
    value_rows = rows[c.num_heads + c.num_kv_heads :]
    bias = np.zeros(len(fused))
    if c.has_qkv_bias:
        bias = np.asarray(layer["qkv_proj"]["bias"], np.float64)
    bias = bias.reshape(-1, c.head_dim)
    heads = []
    for head in range(c.num_heads):
        own = c.num_heads + head // group
        queries = x @ query_rows[head].T + bias[head]
        keys = x @ key_rows[head // group].T + bias[own]
        values = x @ value_rows[head // group].T + bias[own + c.num_kv_heads]
        if c.has_qk_norm:
            queries = _norm(queries, layer["q_norm"]["scale"], c.rms_norm_eps)
            keys = _norm(keys, layer["k_norm"]["scale"], c.rms_norm_eps)
        queries, keys = _rotated(c, queries), _rotated(c, keys)
        out = np.empty_like(values)
        for i in range(num_tokens):
            scores = keys[: i + 1] @ queries[i] / np.sqrt(c.head_dim)
            weights = np.exp(scores - scores.max())
            out[i] = weights @ values[: i + 1] / weights.sum()
        heads.append(out)
    return np.concatenate(heads, axis=1) @ np.asarray(layer["o_proj"]["kernel"]).T


def _rotated(c, x):
    """Rotates dimension i against dimension i + e / 2 by position times frequency."""
    half = c.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = np.arange(len(x)) * frequency(c, i)
        cos, sin = magnitude(c) * np.cos(angle), magnitude(c) * np.sin(angle)
        out[:, i] = x[:, i] * cos - x[:, i + half] * sin
        out[:, i + half] = x[:, i + half] * cos + x[:, i] * sin
    return out


def frequency(c, i):
    """Angular frequency of rotary pair i, as the scaling's own source has it."""
    plain = c.rope_theta ** (-2.0 * i / c.head_dim)
    scaling = c.rope_scaling
    if scaling is None:
        return plain
    rule = {
        "Llama3Scaling": _llama3_frequency,
        "LinearScaling": lambda c, s, i, plain: plain / s.factor,
        "YarnScaling": _yarn_frequency,
        "FactorScaling": lambda c, s, i, plain: plain / s.factors[i],
    }
    return rule[type(scaling).__name__](c, scaling, i, plain)


def magnitude(c):
    """What rotated queries and keys are multiplied by: sqrt(1 / t) of YaRN's paper."""
    return getattr(c.rope_scaling, "attention_factor", 1.0)


def _llama3_frequency(c, scaling, i, plain):
    """Meta's reference of Llama 3."""
    wavelength = 2 * np.pi / plain
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    if wavelength < shortest:
        return plain
    if wavelength > longest:
        return plain / scaling.factor
    smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _yarn_frequency(c, scaling, i, plain):
    """YaRN (arXiv 2309.00071, section 3.2), with the ramp of its authors' code."""

    def pair(turns):  # solves L = turns * wavelength for the number of the pair
        wavelength = scaling.original_max_position / turns
        return c.head_dim / 2 * np.log(wavelength / (2 * np.pi)) / np.log(c.rope_theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.is_truncated:
        first, last = int(np.floor(first)), int(np.ceil(last))
    first, last = max(first, 0), min(last, c.head_dim - 1)
    if i <= first:
        return plain
    if i >= last:
        return plain / scaling.factor
    share = (i - first) / (last - first)
    return plain * (1 - share) + plain / scaling.factor * share


def random_params(config, seed=0, gain=1.0):
    """Random float32 parameters of a `Llama`, its matrices scaled by `gain`."""
    c, rng = config, np.random.default_rng(seed)

    def kernel(out, fan_in, scale=1.0):
        values = rng.normal(size=(out, fan_in)) * scale / np.sqrt(fan_in)
        return np.float32(values)

    def norm(width=c.hidden_size):
        return {"scale": np.float32(1 + 0.2 * rng.normal(size=width))}

    params = {"embed_tokens_kernel": kernel(c.vocab_size, c.hidden_size, 3.0)}
    for i in range(c.num_layers):
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        params[f"layers_{i}"] = {
            "input_layernorm": norm(),
            "self_attn": {
                "qkv_proj": {"kernel": kernel(qkv, c.hidden_size, gain)},
                "o_proj": {
                    "kernel": kernel(c.hidden_size, c.num_heads * c.head_dim, gain)
                },
            },
            "post_attention_layernorm": norm(),
            "mlp": {
                "gate_up_proj": {
                    "kernel": kernel(2 * c.intermediate_size, c.hidden_size, gain)
                },
                "down_proj": {
                    "kernel": kernel(c.hidden_size, c.intermediate_size, gain)
                },
            },
        }
        attention = params[f"layers_{i}"]["self_attn"]
        if c.has_qkv_bias:
            attention["qkv_proj"]["bias"] = np.float32(0.5 * rng.normal(size=qkv))
        if c.has_qk_norm:
            attention |= {"q_norm": norm(c.head_dim), "k_norm": norm(c.head_dim)}
    params["norm"] = norm()
    if not c.tie_embeddings:
        params["lm_head_kernel"] = kernel(c.vocab_size, c.hidden_size, 3.0)
    return jax.tree.map(jnp.asarray, params)
