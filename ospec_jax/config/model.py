# SPDX-License-Identifier: Apache-2.0
"""Shapes of target models and of drafts."""

import dataclasses
from typing import Any, Literal

from ospec_jax.config.base import ConfigError, from_dict

Precision = Literal["float32", "bfloat16", "int8"]
AttentionKind = Literal["xla", "cudnn", "pallas"]
NormPlaces = Literal["before", "after"]


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3's frequency scaling of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        _check_above_zero(self, "factor low_freq_factor original_max_position")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor {self.high_freq_factor} of the rope scaling must be "
                f"above low_freq_factor {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies of rotary embeddings are divided by one factor."""

    factor: float

    def __post_init__(self):
        _check_above_zero(self, "factor")


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's frequency scaling (arXiv 2309.00071).

    Attributes:
      beta_fast: Pairs that turn as often or more in the original context are kept.
      beta_slow: Those that turn as seldom or less are stretched by the full factor.
      attention_factor: Of rotated queries and keys.
      is_truncated: The two limits are widened to whole pairs.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    is_truncated: bool = True

    def __post_init__(self):
        above_zero = "factor original_max_position beta_slow attention_factor"
        _check_above_zero(self, above_zero)
        if not self.beta_fast > self.beta_slow:
            raise ConfigError(
                f"beta_fast {self.beta_fast} of the rope scaling must be above "
                f"beta_slow {self.beta_slow}"
            )


@dataclasses.dataclass(frozen=True)
class FactorScaling:
    """Each frequency is divided by a factor of its own (LongRoPE, arXiv 2402.13753).

    Attributes:
      factors: One a pair, `head_dim / 2` of them.
      attention_factor: Of rotated queries and keys.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self):
        _check_above_zero(self, "attention_factor")
        for factor in self.factors:
            if not 0 < factor < float("inf"):  # NaN is refused, too
                raise ConfigError(
                    f"a factor of the rope scaling is {factor}; use finite numbers "
                    f"above 0"
                )


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling | FactorScaling
"""How rotary embeddings are stretched to a longer context than they began with."""
_SCALINGS = Llama3Scaling, LinearScaling, YarnScaling, FactorScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a target; see `models.families`.

    Attributes:
      has_qkv_bias: Queries, keys and values have a bias (Qwen2).
      has_qk_norm: Queries and keys are normalised by head (Qwen3).
      has_wide_qk_norm: They are normalised over all heads (OLMo-2).
      norms: Where attention and the feed-forward block are normalised: what they read,
        or what they add to the residual stream (OLMo-2).
      attention_window: Tokens that each one sees, itself included; 0 for all.
      embedding_multiplier: Of embeddings, where layers read them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position: int = 2048
    tie_embeddings: bool = True
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_wide_qk_norm: bool = False
    norms: NormPlaces = "before"
    attention_window: int = 0
    embedding_multiplier: float = 1.0

    def __post_init__(self):
        _check_above_zero(
            self, f"{_SIZES} num_layers max_position embedding_multiplier"
        )
        _check_heads(self)
        _check_at_least(self, {"attention_window": 0})

    @property
    def has_llama_layers(self) -> bool:
        """Whether a layer is what the native kernels compute in one call."""
        return self.norms == "before" and not self.has_wide_qk_norm


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Architecture of an EAGLE draft head; `HydraConfig` and `ExitConfig` add to it.

    Attributes:
      taps: Target layers whose *input* hidden states the draft reads, joined; the
        number of layers itself stands for the input of the target's head, its final
        normed state. EAGLE-3's default is layers 2, n // 2 and n - 3.
      draft_vocab_size: Tokens that can be drafted; 0 stands for the target's full
        vocabulary with its frozen head.
      rope_scaling: Of the draft's own rotary embedding.
      has_norm_before_residual: The residual stream begins at the normed feature, not
        at the feature itself (EAGLE-3 heads of the `speculators` project).
      has_own_embedding: The draft does not share the target's embedding.
      has_fc_bias: The joining projection has a bias (most EAGLE-1 heads).
      sliding_window: Pairs that the draft's own attention sees, the newest included,
        while drafting and in training; 0 for all. No parameter depends on it.
    """

    vocab_size: int
    target_hidden_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    taps: tuple[int, ...]
    draft_vocab_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    has_norm_before_residual: bool = False
    has_own_embedding: bool = False
    has_fc_bias: bool = False
    sliding_window: int = 0

    def __post_init__(self):
        _check_above_zero(self, f"{_SIZES} target_hidden_size")
        _check_heads(self)
        if self.draft_vocab_size < 0:
            raise ConfigError(
                f"draft_vocab_size is {self.draft_vocab_size}; use the number of "
                f"tokens that can be drafted, or 0 for the target's head"
            )
        if self.sliding_window < 0:
            raise ConfigError(
                f"sliding_window is {self.sliding_window}; use the number of tokens "
                f"that the draft shall see, or 0 for all"
            )
        if min(self.taps, default=0) < 0:
            raise ConfigError(
                f"taps are {self.taps}; layers are counted from 0, and none is below "
                f"it: name the layers that the draft reads (--taps)"
            )

    @property
    def has_own_head(self) -> bool:
        """Whether the draft predicts its own reduced vocabulary with its own head."""
        return self.draft_vocab_size > 0

    @property
    def num_draft_ids(self) -> int:
        """Width of the draft's logits."""
        return self.draft_vocab_size or self.vocab_size


@dataclasses.dataclass(frozen=True)
class HydraConfig(DraftConfig):
    """Architecture of Hydra heads (arXiv 2402.05109).

    Attributes:
      depth: Heads, one for each token of the longest draft.
      num_blocks: Residual blocks of each head; those after the first share weights, as
        in the published heads.
      has_prefix: A decoder layer runs over the target's final states before the heads
        read them (Hydra++).
      has_separate_heads: Each head has an output projection of its own, with a bias, as
        published; else they share one.
    """

    depth: int = 3
    num_blocks: int = 2
    has_prefix: bool = True
    has_separate_heads: bool = False

    def __post_init__(self):
        super().__post_init__()
        _check_at_least(self, {"depth": 1, "num_blocks": 1})
        if self.has_separate_heads and not self.has_own_head:
            raise ConfigError("separate heads have a draft vocabulary of their own")
        if self.sliding_window and not self.has_prefix:
            raise ConfigError(
                f"sliding_window is {self.sliding_window}, but Hydra heads without a "
                f"prefix layer (has_prefix) attend to nothing; use 0"
            )


@dataclasses.dataclass(frozen=True)
class ExitConfig(DraftConfig):
    """An exit behind the target's first layers, whose shape this is, with a head.

    The single tap is the exit: the layer whose input the head reads. `max_position` and
    the rest of a target's shape do not matter before it.
    """

    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_wide_qk_norm: bool = False
    norms: NormPlaces = "before"
    attention_window: int = 0
    embedding_multiplier: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if len(self.taps) != 1 or self.taps[0] < 1:
            raise ConfigError(
                f"an early exit lies behind one layer or more, not at {self.taps}"
            )
        if self.sliding_window:
            raise ConfigError(
                f"sliding_window is {self.sliding_window}, but an early exit attends "
                f"as its target does; use 0"
            )

    @property
    def num_layers(self) -> int:
        """Of the target, before the exit."""
        return self.taps[0]

    @property
    def model(self) -> ModelConfig:
        """What the target is up to the exit."""
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        shared = {name: x for name, x in vars(self).items() if name in names}
        return ModelConfig(**shared, num_layers=self.num_layers)


@dataclasses.dataclass(frozen=True)
class DFlashConfig(DraftConfig):
    """Architecture of a DFlash draft (arXiv 2602.06036).

    Attributes:
      num_layers: Of the transformer that runs over blocks.
      block_size: Entries of the longest block, the known token in front included: one
        less are drafted.
      bigram_rank: Of the bias between neighbouring tokens (DSpark, arXiv 2607.05147);
        0 for none, as published of DFlash.
      has_qk_norm: Queries and keys are normalised by head.
    """

    num_layers: int = 2
    block_size: int = 4
    bigram_rank: int = 32
    has_qk_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        least = {"num_layers": 1, "block_size": 2, "bigram_rank": 0}
        _check_at_least(self, least)
        if self.has_own_embedding:
            raise ConfigError(
                "a DFlash draft reads its target's embedding; has_own_embedding is for "
                "EAGLE heads"
            )


@dataclasses.dataclass(frozen=True)
class PEagleConfig(DraftConfig):
    """Architecture of a P-EAGLE draft (arXiv 2602.01469).

    Attributes:
      depth: Tokens that it can draft: the first, and one of each mask.
      num_layers: Decoder layers: EAGLE-3's, and plain ones behind it.
    """

    depth: int = 3
    num_layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        _check_at_least(self, {"depth": 1, "num_layers": 1})


_SIZES = (
    "vocab_size hidden_size intermediate_size num_heads num_kv_heads head_dim "
    "rope_theta rms_norm_eps"
)
"""What is above 0 in each architecture."""


def _check_above_zero(config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if not 0 < value < float("inf"):  # NaN is refused, too
            raise ConfigError(f"{name} is {value}; use a finite number above 0")


def _check_at_least(config: Any, least: dict[str, int]) -> None:
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ConfigError(f"{name} is {getattr(config, name)}; use {value} or more")


def _check_heads(config: "ModelConfig | DraftConfig") -> None:
    """Refuses heads that cannot be grouped, or whose halves cannot be rotated."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"num_heads {config.num_heads} is not a multiple of "
            f"num_kv_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"head_dim is {config.head_dim}; rotary embeddings turn pairs, so use an "
            f"even number"
        )

    scaling = config.rope_scaling
    num_pairs = config.head_dim // 2
    if isinstance(scaling, FactorScaling) and len(scaling.factors) != num_pairs:
        raise ConfigError(
            f"the rope scaling has {len(scaling.factors)} factors, but heads of "
            f"{config.head_dim} turn {num_pairs} pairs; use one a pair"
        )
    if isinstance(scaling, YarnScaling) and config.rope_theta <= 1:
        raise ConfigError(
            f"rope_theta is {config.rope_theta}; YaRN needs one above 1, by which "
            f"later pairs turn more slowly"
        )


def draft_config_from(
    architecture: type[DraftConfig], values: dict[str, Any]
) -> DraftConfig:
    """Rebuilds a draft's architecture from its stored form.

    Args:
      architecture: The class that the draft's family has for it.
    """
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict):
        # Each kind has names of its own, which are all written.
        named = lambda kind: {field.name for field in dataclasses.fields(kind)}
        fitting = (kind for kind in _SCALINGS if named(kind) == set(scaling))
        kind = next(fitting, Llama3Scaling)
        values = values | {"rope_scaling": from_dict(kind, scaling)}

    config = from_dict(architecture, values)
    check_draft_vocab(config)

    return config


def check_draft_vocab(config: DraftConfig) -> None:
    """Refuses a stored draft with more tokens than its target."""
    if config.draft_vocab_size > config.vocab_size:
        raise ConfigError(
            f"draft_vocab_size is {config.draft_vocab_size}, more than the vocab_size "
            f"{config.vocab_size} of the target"
        )
