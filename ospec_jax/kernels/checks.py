# SPDX-License-Identifier: Apache-2.0
"""Whether what a machine's compiler made of the kernels computes what numpy does."""

from collections.abc import Callable

import numpy as np

_SHAPES = (
    (1, 5, 7),
    (2, 64, 64),
    (9, 70, 100),
    (16, 33, 63),
    (5, 40, 192),
    (37, 34, 128),
)
"""Rows, features and columns. AMX takes whole vectors of 64 columns alone."""


def is_correct(
    int8_linear: Callable,
    attention: Callable,
    decoder_layer: Callable,
    most_probable: Callable,
) -> bool:
    """Compares results of odd shapes with numpy's, with tiles and without.

    Args:
      int8_linear: As in `native`, and so the others.
    """
    parts = all(
        _is_product(int8_linear, has_tiles)
        and _is_layer(decoder_layer, has_tiles, is_draft=False)
        and _is_layer(decoder_layer, has_tiles, is_draft=True)
        and _is_attention(attention)
        for has_tiles in (False, True)
    )
    return parts and _is_most_probable(most_probable)


def _product(x, kernel, scale):
    """As `quantize_rows` computes it, bit by bit: the integer product must be equal."""
    row_scale = np.max(np.abs(x), axis=1, keepdims=True) * np.float32(1 / 127)
    quantized = np.rint(x / row_scale).astype(np.int32)
    y = (quantized @ kernel.T.astype(np.int32)).astype(np.float32)
    return y * row_scale * scale


def _random_kernel(rng, features, columns):
    kernel = rng.integers(-127, 128, size=(features, columns)).astype(np.int8)
    return kernel, rng.random(features).astype(np.float32) / 64


def _is_product(int8_linear, has_tiles) -> bool:
    rng = np.random.default_rng(0)

    for rows, features, columns in _SHAPES:
        x = rng.normal(size=(rows, columns)).astype(np.float32)
        weights = _random_kernel(rng, features, columns)
        found = np.asarray(int8_linear(x, *weights, has_tiles))
        if not np.array_equal(_product(x, *weights), found):
            return False

    return True


def _softmax(scores):
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def _is_attention(attention) -> bool:
    rng = np.random.default_rng(0)
    shapes = ((1, 3, 2, 16), (1, 1, 16, 32), (1, 1, 32, 16))
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    weights = _softmax(np.einsum("bthe,bes->bths", q, k[:, 0]) / 4)
    expected = np.einsum("bths,bse->bthe", weights, v[:, 0]).reshape(1, 3, 32)
    found = attention(q, k, v, np.zeros((1, 3, 32), np.float32))

    return np.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _is_most_probable(most_probable) -> bool:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 70)).astype(np.float32)
    log_probs = np.log(_softmax(logits))
    order = np.argsort(-logits, axis=-1)[:, :5]
    found, places = most_probable(logits, 5)

    return np.array_equal(places, order) and np.allclose(
        found, np.take_along_axis(log_probs, order, axis=-1), rtol=1e-4, atol=1e-5
    )


def _is_layer(decoder_layer, has_tiles, is_draft) -> bool:
    """Tokens at the beginning of a cache, of a layer with two query heads.

    A draft's reads two inputs and has an output projection.
    """
    rng = np.random.default_rng(0)
    t, d, e, s, f = 4, 64, 32, 16, 128
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x = normal(t, d)
    angles = normal(t, e // 2)
    cos, sin = (np.tile(half, 2) for half in (np.cos(angles), np.sin(angles)))
    beside, beside_gain = normal(t, d), normal(d)
    qkv = _random_kernel(rng, 4 * e, 2 * d if is_draft else d)
    o, head = _random_kernel(rng, d, 2 * e), _random_kernel(rng, 48, d)
    gate_up, down = _random_kernel(rng, 2 * f, d), _random_kernel(rng, d, f)
    gains, nothing = normal(3, d), np.zeros(0, np.float32)
    bias = np.where(np.arange(s) <= np.arange(t)[:, None], 0, -1e30).astype(np.float32)

    norm = lambda x, gain: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * gain
    joint = norm(x, gains[0])
    if is_draft:
        joint = np.concatenate([norm(beside, beside_gain), joint], axis=-1)
    heads = _product(joint, *qkv).reshape(t, 4, e)
    turned = np.concatenate([-heads[..., e // 2 :], heads[..., : e // 2]], axis=-1)
    queries = (heads * cos[:, None] + turned * sin[:, None])[:, :2]
    keys = (heads * cos[:, None] + turned * sin[:, None])[:, 2]
    scores = np.einsum("the,se->ths", queries, keys) / e**0.5 + bias[:, None, :t]
    mixed = np.einsum("ths,se->the", _softmax(scores), heads[:, 3]).reshape(t, -1)
    hidden = x + _product(mixed.astype(np.float32), *o)
    gate, up = np.split(_product(norm(hidden, gains[1]), *gate_up), 2, axis=-1)
    expected = hidden + _product(gate / (1 + np.exp(-gate)) * up, *down)
    scored = _product(norm(expected, gains[2]), *head)

    weights = (
        *(gains[0], *qkv, nothing, nothing, nothing, *o),
        *(gains[1], *gate_up, *down),
    )
    parts = {}
    if is_draft:
        parts = dict(beside=(beside[None], beside_gain), head=(gains[2], *head))
    found, new_keys, new_values, logits = decoder_layer(
        x[None],
        (cos[None, :, None], sin[None, :, None]),
        bias[None],
        np.zeros((1, 1, e, s), np.float32),
        np.zeros((1, 1, s, e), np.float32),
        np.zeros(1, np.int32),
        weights,
        1e-5,
        has_tiles,
        **parts,
    )
    # Sums in another order may move a number to the next of int8's levels.
    close = lambda a, b: np.allclose(a, b, atol=0.02 * np.max(np.abs(b)))

    return (
        close(found[0], expected)
        and close(np.asarray(new_keys)[0, 0, :, :t].T, keys)
        and close(np.asarray(new_values)[0, 0, :t], heads[:, 3])
        and (not is_draft or close(logits[0], scored))
    )
