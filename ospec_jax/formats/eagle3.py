# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 heads as public checkpoints hold them.

Two layouts carry the same tensors. The reference one (SafeAILab/EAGLE, SpecForge) calls
the decoder layer `midlayer.` and has a flat config.json; that of the `speculators`
project calls it `layers.0.` and nests the layer's configuration. `d2t` is a table of
*offsets*: draft id i stands for target id i + d2t[i]; `t2d` marks the target ids that
can be drafted.

Tap layers are written in two ways as well. A top-level
`eagle_aux_hidden_state_layer_ids` names the layers whose *input* is read (vLLM, and
ours); the same key inside `eagle_config` names those whose *output* is (SpecForge,
SGLang), one less. Without either the layers are 2, n // 2 and n - 3.

A `sliding_window` holds where `layer_types` says that the layer has one, as vLLM reads
them: transformers fills it in for models that attend to everything, too.
"""

import dataclasses
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, DraftConfig, check_draft_vocab
from ospec_jax.config.fields import Fields
from ospec_jax.formats import speculators
from ospec_jax.formats.tensors import DTYPES, read_config, read_tensors
from ospec_jax.models.rope_fields import read_rope
from ospec_jax.models.weights import WeightsError
from ospec_jax.types import Draft

LAYOUTS = ("eagle3", "speculators")
_FIXED = {
    "speculators_model_type": "eagle3",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "qkv_bias": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}
"""Settings of which one value is supported; a missing key has it."""
_READ = (
    "draft_vocab_size",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "norm_before_residual",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "target_hidden_size",
    "vocab_size",
)
"""Names of which a default is taken where they are missing, or whose lack is told."""
LAYER_NAME = "layers.0."
_IGNORED = ("rotary_emb.inv_freq", "verifier_lm_head.weight", "verifier_norm.weight")
"""Tensors that some checkpoints hold though they are not the draft's."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """A head that was read.

    Attributes:
      layout: One of `LAYOUTS`.
      dtype: In which its weights were stored.
      verifier: Name of the target it was trained for, if the file says so.
      embedding: `[v, d]` table that came with it, or None.
    """

    draft: Draft
    config: DraftConfig
    layout: str
    dtype: str
    verifier: str | None
    embedding: np.ndarray | None


def read(
    folder: Path,
    num_target_layers: int | None = None,
    taps: tuple[int, ...] | None = None,
) -> Imported:
    """Reads a public EAGLE-3 head; its embedding, if any, is the draft's own.

    Args:
      num_target_layers: Of the target, for the default tap layers.
      taps: Layers whose input the head reads, instead of what its files say.

    Raises:
      ConfigError: Its architecture is not supported, or it does not say its taps.
      WeightsError: Tensors are missing, surplus or of the wrong shape.
    """
    raw = read_config(folder)
    layout = "speculators" if speculators.is_config(raw) else "eagle3"
    flat = speculators.flatten(raw) if layout == "speculators" else raw

    for key, supported in _FIXED.items():
        if (flat.get(key) or supported) != supported:
            raise ConfigError(
                f"{folder} has {key} {flat[key]!r}; only {supported!r} is supported"
            )

    tensors = {_plain_name(n): x for n, x in read_tensors(folder).items()}
    tensors = {n: x for n, x in tensors.items() if not n.endswith(_IGNORED)}
    config = _read_config(folder, flat, taps, num_target_layers, tensors)
    _check_tensors(folder, config, tensors)
    token_ids = _token_ids(folder, config, tensors)
    embedding = tensors.get("embed_tokens.weight")
    params = _to_params(config, tensors)
    found = tensors["fc.weight"].dtype

    return Imported(
        draft=Draft(params, token_ids),
        config=config,
        layout=layout,
        dtype=next((n for n, d in DTYPES.items() if d == found), "float32"),
        verifier=speculators.verifier_of(raw),
        embedding=embedding,
    )


def _plain_name(name: str) -> str:
    """One name for the layouts' variants."""
    name = name.removeprefix("model.").replace("midlayer.", LAYER_NAME)
    return "d2t" if name == "draft_id_to_target_id" else name


def _read_config(folder, raw, taps, num_target_layers, tensors) -> DraftConfig:
    fields = Fields(raw, str(folder / "config.json"))
    fields.refuse_slips(_READ)
    hidden = fields.whole("hidden_size")
    heads = fields.whole("num_attention_heads")
    theta, scaling = read_rope(fields)
    vocab_size = fields.whole("vocab_size")
    chosen = taps or _taps(folder, fields, num_target_layers)
    _check_taps(folder, chosen)

    config = DraftConfig(
        vocab_size=vocab_size,
        target_hidden_size=fields.whole("target_hidden_size", None) or hidden,
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", None) or heads,
        head_dim=fields.whole("head_dim", None) or hidden // heads,
        taps=chosen,
        draft_vocab_size=fields.whole("draft_vocab_size", None) or vocab_size,
        rope_theta=theta,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_scaling=scaling,
        has_norm_before_residual=bool(fields.flag("norm_before_residual", None)),
        has_own_embedding="embed_tokens.weight" in tensors,
        sliding_window=_sliding_window(folder, fields),
    )
    check_draft_vocab(config)

    return config


def _sliding_window(folder, fields: Fields) -> int:
    """Of the head's layer; 0 where it attends to everything."""
    kinds = fields.items("layer_types", str, None) or ()
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{folder} has a layer of the type {min(unknown)!r}; those that can be "
            f"read attend to all (full_attention) or to a window (sliding_attention)"
        )

    return fields.whole("sliding_window") if "sliding_attention" in kinds else 0


def _taps(folder, fields: Fields, num_target_layers) -> tuple[int, ...]:
    nested = fields.section("eagle_config")
    if nested.flag("use_aux_hidden_state", None) is False:
        raise ConfigError(
            f"{folder} reads no inner states of its target (use_aux_hidden_state is "
            f"false), which is not supported"
        )

    key = "eagle_aux_hidden_state_layer_ids"
    if found := fields.items(key, int, None):
        return found
    if found := nested.items(key, int, None):
        return tuple(layer + 1 for layer in found)
    if num_target_layers is None:
        raise ConfigError(
            f"{folder} does not say which layers of its target it reads; pass "
            f"--target, for the usual three, or --taps"
        )

    n = num_target_layers

    return (2, n // 2, n - 3)


def _check_taps(folder, taps: tuple[int, ...]) -> None:
    """Refuses layers that no target has, and warns of a layer that is read twice."""
    if min(taps) < 0:
        raise ConfigError(
            f"{folder} reads the layers {taps} of its target, of which there is none "
            f"below 0: say with --taps which ones it was trained on"
        )
    if len(set(taps)) < len(taps):
        warnings.warn(
            f"{folder} reads a layer of its target twice: {taps}; if it was trained on "
            f"others, say so with --taps",
            stacklevel=2,
        )


def _shapes(c: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a head must have."""
    d = c.hidden_size
    q = c.num_heads * c.head_dim
    kv = c.num_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, 2 * d),
        "self_attn.k_proj": (kv, 2 * d),
        "self_attn.v_proj": (kv, 2 * d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (c.intermediate_size, d),
        "mlp.up_proj": (c.intermediate_size, d),
        "mlp.down_proj": (d, c.intermediate_size),
        "input_layernorm": (d,),
        "hidden_norm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {f"{LAYER_NAME}{name}.weight": shape for name, shape in layer.items()}
    num_features = len(c.taps) * c.target_hidden_size

    return shapes | {
        "fc.weight": (d, num_features),
        "norm.weight": (d,),
        "lm_head.weight": (c.draft_vocab_size, d),
    }


def _check_tensors(folder, config: DraftConfig, tensors) -> None:
    expected = _shapes(config)
    optional = {
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
    }
    if missing := sorted(set(expected) - set(tensors)):
        raise WeightsError(f"{folder} lacks the tensors {', '.join(missing)}")
    if surplus := sorted(set(tensors) - set(expected) - set(optional)):
        raise WeightsError(
            f"{folder} has tensors that an EAGLE-3 head of one layer has not: "
            f"{', '.join(surplus)}"
        )

    for name, value in tensors.items():
        shape = (expected | optional)[name]
        if name not in ("d2t", "t2d") and value.dtype not in DTYPES.values():
            raise WeightsError(
                f"{name} of {folder} is stored as {value.dtype}; heads in "
                f"{', '.join(DTYPES)} can be read"
            )
        if value.shape != shape:
            raise WeightsError(
                f"{name} of {folder} has shape {value.shape}, but its config.json and "
                f"the tap layers {config.taps} give {shape}"
            )


def _token_ids(folder, config: DraftConfig, tensors):
    size = config.draft_vocab_size
    vocab_size = config.vocab_size
    if "d2t" not in tensors and size != vocab_size:
        raise WeightsError(
            f"{folder} lacks the tensor d2t, which says what its {size} draft tokens "
            f"are among {vocab_size}"
        )

    offsets = tensors.get("d2t", np.zeros(size, np.int64))
    if not np.issubdtype(offsets.dtype, np.integer):
        raise WeightsError(f"d2t of {folder} is stored as {offsets.dtype}, not as ids")

    ids = np.arange(size) + offsets.astype(np.int64)
    marked = tensors.get("t2d")
    is_ids = marked is not None and np.array_equal(np.flatnonzero(marked), offsets)
    is_sound = ids.min() >= 0 and ids.max() < vocab_size and np.all(np.diff(ids) > 0)
    if not is_sound or (is_ids and np.any(offsets)):
        raise WeightsError(
            f"d2t of {folder} does not give ascending ids below {vocab_size}: it must "
            f"hold offsets (target id less draft id), not ids"
        )

    can_be_drafted = np.zeros(vocab_size, bool)
    can_be_drafted[ids] = True
    if marked is not None and np.any(marked.astype(bool) != can_be_drafted):
        raise WeightsError(f"t2d and d2t of {folder} contradict each other")

    return jnp.asarray(ids, jnp.int32)


def _to_params(config: DraftConfig, tensors) -> dict:
    wide = lambda name: np.asarray(tensors[f"{name}.weight"], np.float32)
    layer = lambda name: wide(LAYER_NAME + name)
    join = lambda *names: {"kernel": jnp.asarray(np.concatenate([*map(layer, names)]))}
    norm = lambda values: {"scale": jnp.asarray(values)}
    heads = [f"self_attn.{n}_proj" for n in "qkv"]
    params = {
        "fc": {"kernel": jnp.asarray(wide("fc"))},
        "qkv_proj": join(*heads),
        "o_proj": join("self_attn.o_proj"),
        "mlp": {
            "gate_up_proj": join("mlp.gate_proj", "mlp.up_proj"),
            "down_proj": join("mlp.down_proj"),
        },
        "norm": norm(wide("norm")),
        "lm_head": {"kernel": jnp.asarray(wide("lm_head"))},
    }

    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        params[name] = norm(layer(name))

    if config.has_own_embedding:
        params["embed_tokens"] = {"kernel": jnp.asarray(wide("embed_tokens"))}

    return params
