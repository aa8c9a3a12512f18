# SPDX-License-Identifier: Apache-2.0
"""Independent oracles for the tests, written from the papers in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np


def forward(
    params, config, tokens, taps=(), attention=None, residual=1.0, logits_scaling=1.0
):
    """Llama and its relatives in float64, one sequence, without a cache.

    Follows Touvron et al. (arXiv 2302.13971), with Qwen2's bias (2407.10671), Qwen3's
    normalisation of queries and keys (2505.09388), OLMo-2's norms (2501.00656, section
    3.2) and Mistral's window (2310.06825), token by token and head by head; shares no
    code with the package but the layout of `params`.

    Args:
      attention: Granite's `attention_multiplier`; `residual` and `logits_scaling` are
        its others. Where these are folded into weights there are none.

    Returns:
      Logits `[t, v]`, and the inputs of the layers `taps`, concatenated, `[t, f]`;
      the number of layers stands for the head.
    """
    c, wide = config, lambda array: np.asarray(array, np.float64)
    x = wide(params["embed_tokens_kernel"])[np.asarray(tokens)]
    x = x * c.embedding_multiplier
    tapped = {}
    for number in range(c.num_layers):
        layer = params[f"layers_{number}"]
        tapped[number] = x
        is_before = c.norms == "before"
        norms = ("input_layernorm", "post_attention_layernorm")
        if not is_before:
            norms = ("attention_out_norm", "mlp_out_norm")
        for name, block in zip(norms, (_attention, _feed_forward), strict=True):
            gain = wide(layer[name]["scale"])
            normed = _norm(x, gain, c.rms_norm_eps) if is_before else x
            out = block(c, layer, normed, attention)
            out = out if is_before else _norm(out, gain, c.rms_norm_eps)
            x = x + residual * out
    x = _norm(x, wide(params["norm"]["scale"]), c.rms_norm_eps)
    tapped[c.num_layers] = x
    head = "embed_tokens_kernel" if c.tie_embeddings else "lm_head_kernel"
    features = [tapped[number] for number in taps] or [x[:, :0]]
    logits = x @ wide(params[head]).T / logits_scaling
    return logits, np.concatenate(features, axis=1)


def _norm(x, gain, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def _feed_forward(c, layer, x, _):
    fused = np.asarray(layer["mlp"]["gate_up_proj"]["kernel"], np.float64)
    gate, up = fused[: c.intermediate_size], fused[c.intermediate_size :]
    gated = x @ gate.T
    gated = gated / (1.0 + np.exp(-gated))
    return (gated * (x @ up.T)) @ np.asarray(layer["mlp"]["down_proj"]["kernel"]).T


def _attention(c, layer, x, scale):
    layer, scale = layer["self_attn"], scale or c.head_dim**-0.5
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
    # A norm over all heads needs all of them before the first is used.
    means = {}
    for name, rows_of, first in (
        ("q_norm", query_rows, 0), ("k_norm", key_rows, c.num_heads),
    ):  # fmt: skip
        flat = np.concatenate(
            [x @ rows.T + bias[first + i] for i, rows in enumerate(rows_of)], axis=1
        )
        means[name] = np.sqrt(np.mean(flat**2, axis=1, keepdims=True) + c.rms_norm_eps)
    heads = []
    for head in range(c.num_heads):
        own = c.num_heads + head // group
        queries = x @ query_rows[head].T + bias[head]
        keys = x @ key_rows[head // group].T + bias[own]
        values = x @ value_rows[head // group].T + bias[own + c.num_kv_heads]
        if c.has_qk_norm:
            queries = _norm(queries, layer["q_norm"]["scale"], c.rms_norm_eps)
            keys = _norm(keys, layer["k_norm"]["scale"], c.rms_norm_eps)
        if c.has_wide_qk_norm:
            gains = np.asarray(layer["q_norm"]["scale"]).reshape(-1, c.head_dim)
            queries = queries / means["q_norm"] * gains[head]
            gains = np.asarray(layer["k_norm"]["scale"]).reshape(-1, c.head_dim)
            keys = keys / means["k_norm"] * gains[head // group]
        queries, keys = _rotated(c, queries), _rotated(c, keys)
        out = np.empty_like(values)
        for i in range(num_tokens):
            seen = slice(max(i + 1 - c.attention_window, 0), i + 1)
            if not c.attention_window:
                seen = slice(0, i + 1)
            scores = keys[seen] @ queries[i] * scale
            weights = np.exp(scores - scores.max())
            out[i] = weights @ values[seen] / weights.sum()
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
        names = ("input_layernorm", "post_attention_layernorm")
        if c.norms == "after":
            names = ("attention_out_norm", "mlp_out_norm")
        params[f"layers_{i}"] = {
            names[0]: norm(),
            "self_attn": {
                "qkv_proj": {"kernel": kernel(qkv, c.hidden_size, gain)},
                "o_proj": {
                    "kernel": kernel(c.hidden_size, c.num_heads * c.head_dim, gain)
                },
            },
            names[1]: norm(),
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
        if c.has_wide_qk_norm:
            attention["q_norm"] = norm(c.num_heads * c.head_dim)
            attention["k_norm"] = norm(c.num_kv_heads * c.head_dim)
    params["norm"] = norm()
    if not c.tie_embeddings:
        params["lm_head_kernel"] = kernel(c.vocab_size, c.hidden_size, 3.0)
    return jax.tree.map(jnp.asarray, params)
