# SPDX-License-Identifier: Apache-2.0
"""What a `config.json` says of rotary embeddings (v4 or v5 names of transformers)."""

import math

from ospec_jax.config import (
    ConfigError,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from ospec_jax.config.fields import Fields


def read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary embeddings in a `config.json` (v4 or v5 names).

    `dynamic` is none within the model's own context, and `longrope` has one list of
    factors there: sequences never grow beyond it, see `num_positions`. Beyond it both
    would turn keys anew that are cached already.
    """
    rope = _rope_section(fields)
    kind = _rope_kind(rope)
    if kind not in _ROPE_KINDS:
        raise ConfigError(
            f"{fields.where} uses rope type {kind!r}; {', '.join(_ROPE_KINDS)} work"
        )

    partial = {s.values.get("partial_rotary_factor") for s in (fields, rope)}
    if partial - {None, 1}:
        raise ConfigError(
            f"{fields.where} rotates only a part of each head "
            f"(partial_rotary_factor), which is not supported"
        )

    # Null is no base; a missing one is in either place.
    is_nested = "rope_theta" not in fields.values
    theta = (rope if is_nested else fields).number("rope_theta", 10000.0)

    return theta, _ROPE_KINDS[kind](fields, rope)


def num_positions(fields: Fields) -> int:
    """Positions that sequences may have, by what their scaling is good for."""
    rope = _rope_section(fields)
    own = fields.whole("max_position_embeddings", 2048)
    length = _original_length(fields, rope)
    kind = _rope_kind(rope)
    if kind == "longrope":
        return min(own, length)
    if kind == "yarn":
        # Models that are published without it name the length before.
        return max(own, int(length * _context_factor(fields, rope, length)))

    return own


def _rope_section(fields: Fields) -> Fields:
    rope = fields.section("rope_parameters")
    # The name of v5 first, then that of v4.
    return rope if rope.values else fields.section("rope_scaling")


def _rope_kind(rope: Fields) -> str:
    kind = rope.text("rope_type", rope.text("type", "default"))
    return "longrope" if kind == "su" else kind  # its first name


def _read_linear(fields: Fields, rope: Fields) -> LinearScaling:
    return LinearScaling(rope.number("factor"))


def _read_llama3(fields: Fields, rope: Fields) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.whole("original_max_position_embeddings"),
    )


def _read_yarn(fields: Fields, rope: Fields) -> YarnScaling:
    length = _original_length(fields, rope)
    factor = _context_factor(fields, rope, length)
    scale = lambda weight: 1 + 0.1 * weight * math.log(max(factor, 1.0))
    own = rope.number("mscale", None)
    of_all = rope.number("mscale_all_dim", None)
    # The paper's, unless the model has its own: DeepSeek's is a quotient of two.
    usual = scale(own) / scale(of_all) if own and of_all else scale(1.0)
    is_truncated = rope.flag("truncate", None)

    return YarnScaling(
        factor=factor,
        original_max_position=length,
        beta_fast=rope.number("beta_fast", None) or 32.0,
        beta_slow=rope.number("beta_slow", None) or 1.0,
        attention_factor=rope.number("attention_factor", None) or usual,
        is_truncated=is_truncated is None or is_truncated,
    )


def _read_longrope(fields: Fields, rope: Fields) -> FactorScaling:
    length = _original_length(fields, rope)
    factor = _context_factor(fields, rope, length)
    usual = 1.0
    if factor > 1:
        usual = math.sqrt(1 + math.log(factor) / math.log(max(length, 2)))

    return FactorScaling(
        factors=rope.numbers("short_factor"),
        attention_factor=rope.number("attention_factor", None) or usual,
    )


def _original_length(fields: Fields, rope: Fields) -> int:
    """Positions of the context that was trained before the scaling."""
    name = "original_max_position_embeddings"
    own = fields.whole(name, None) or rope.whole(name, None)
    return own or fields.whole("max_position_embeddings", 2048)


def _context_factor(fields: Fields, rope: Fields, length: int) -> float:
    """By how much the context is longer than `length`."""
    factor = rope.number("factor", None)
    return factor or fields.whole("max_position_embeddings", 2048) / length


_ROPE_KINDS = {
    "default": lambda fields, rope: None,
    "linear": _read_linear,
    "dynamic": lambda fields, rope: None,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "llama3": _read_llama3,
}
