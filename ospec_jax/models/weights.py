# SPDX-License-Identifier: Apache-2.0
"""Assembling target parameters from named tensors, and reading safetensors folders."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import (
    ConfigError,
    InputError,
    ModelConfig,
    Precision,
)
from ospec_jax.config.fields import Fields, read_json
from ospec_jax.models.families import (
    FAMILIES,
    Multipliers,
    read_embedding_multiplier,
    read_multipliers,
    read_window,
)
from ospec_jax.models.quantization import cast_leaf
from ospec_jax.models.rope_fields import num_positions, read_rope
from ospec_jax.models.smoothing import LayerRanges, smooth

LayerWeights = dict[str, np.ndarray]
"""One layer's tensors by Hugging Face's short names, `[out, in]` for matrices."""
_BLOCK = 1 << 24
"""Numbers of a table that are cast at once."""


class Rows(Protocol):
    """A tensor of which some rows can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


Place = Callable[[dict], dict]
"""Puts some of the parameters where they belong, and gives them back."""


_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
"""Settings of a Hugging Face configuration that only have one supported value."""

_READ = (
    "attention_bias",
    "attention_multiplier",
    "embedding_multiplier",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "logits_scaling",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "quantization_config",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
)
"""Names that a default is taken for where they are missing, or whose lack is told."""
_UNUSED = re.compile(
    r".*rotary_emb\.inv_freq|lm_head\.weight|rope_freqs\.weight|"
    r"rope_factors_(short|long)\.weight"
)
"""Tensors that some files hold without a need; a tied head is checked to be tied."""

_BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_NORMS = {
    "before": {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
    },
    "after": {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}
"""Names of a layer's norms in a folder by ours, by `ModelConfig.norms`: the same name
stands for a norm of either side."""

QKV_BIASES = ("q_bias", "k_bias", "v_bias")
QK_NORMS = ("q_norm", "k_norm")


_FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of safetensors that hold the weights themselves."""


class WeightsError(InputError):
    """Weights that are missing, truncated or of the wrong shape."""


def assemble(
    config: ModelConfig,
    precision: Precision,
    top: Callable[[str], Rows],
    layer: Callable[[int], LayerWeights],
    ranges: list[LayerRanges] | None = None,
    place: Place = lambda params: params,
) -> dict:
    """Builds `Llama`'s parameters, fusing q, k, v and gate, up.

    Args:
      top: Gives `embed_tokens`, `norm` or (when untied) `lm_head`.
      layer: Gives one layer's tensors; only one layer is held in float32 at a time.
      ranges: Of each layer's activations, to smooth before quantising.
      place: Puts parameters where they belong. It gets a layer at a time, so that no
        more than that need be anywhere else.

    Raises:
      WeightsError: A tensor's shape contradicts the configuration.
    """
    c = config
    shape = c.vocab_size, c.hidden_size
    params = place(_table("embed_tokens_kernel", top("embed_tokens"), shape, precision))

    # Layer by layer, since in float32 they would take several times the memory of the
    # loaded model.
    for i in range(c.num_layers):
        tensors = layer(i)
        _check_layer(c, tensors, i)
        # After the check and before the cast: smoothing is exact only in floating
        # point.
        if ranges is not None:
            tensors = smooth(tensors, ranges[i])
        params |= place({f"layers_{i}": _assemble_layer(c, precision, tensors)})

    norm = np.asarray(top("norm")[:], np.float32)
    _check_tensor("scale", norm, (c.hidden_size,), "the model")
    last = {"norm": cast_leaf("scale", norm, precision)}
    if not c.tie_embeddings:
        last |= _table("lm_head_kernel", top("lm_head"), shape, precision)

    # What nobody has placed is on the default device.
    return jax.tree.map(jnp.asarray, params | place(last))


def _check_layer(c: ModelConfig, tensors: LayerWeights, i: int) -> None:
    d = c.hidden_size
    f = c.intermediate_size
    e = c.head_dim
    q_rows = c.num_heads * e
    kv_rows = c.num_kv_heads * e
    expected = dict.fromkeys(_NORMS[c.norms], (d,)) | {
        "q_proj": (q_rows, d),
        "k_proj": (kv_rows, d),
        "v_proj": (kv_rows, d),
        "o_proj": (d, q_rows),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }
    if c.has_qkv_bias:
        expected |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
    if c.has_qk_norm:
        expected |= dict.fromkeys(QK_NORMS, (e,))
    if c.has_wide_qk_norm:
        expected |= {"q_norm": (q_rows,), "k_norm": (kv_rows,)}

    for name, shape in expected.items():
        _check_tensor(name, tensors[name], shape, f"layer {i}")


def _assemble_layer(
    config: ModelConfig, precision: Precision, tensors: LayerWeights
) -> dict:
    # Fused along the output rows, in the order that `Llama` takes them apart in.
    join = lambda *names: np.concatenate([tensors[name] for name in names])
    kernel = lambda value: cast_leaf("kernel", value, precision)
    norm = lambda name: cast_leaf("scale", tensors[name], precision)
    attention = {
        "qkv_proj": kernel(join("q_proj", "k_proj", "v_proj")),
        "o_proj": kernel(tensors["o_proj"]),
    }
    if config.has_qkv_bias:
        attention["qkv_proj"] |= cast_leaf("bias", join(*QKV_BIASES), precision)
    if config.has_qk_norm or config.has_wide_qk_norm:
        attention |= {name: norm(name) for name in QK_NORMS}

    return {name: norm(name) for name in _NORMS[config.norms]} | {
        "self_attn": attention,
        "mlp": {
            "gate_up_proj": kernel(join("gate_proj", "up_proj")),
            "down_proj": kernel(tensors["down_proj"]),
        },
    }


def _table(name: str, rows: Rows, shape: tuple[int, int], precision: Precision) -> dict:
    """A table of the vocabulary, cast some rows at a time: in float32 it may be larger
    than all else that is in memory."""
    _check_shape(name, rows, shape, "the model")
    table: dict[str, np.ndarray] = {}
    step = max(1, _BLOCK // shape[1])

    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = np.asarray(rows[start:stop], np.float32)
        _check_finite(name, block, "the model")
        for part, values in cast_leaf(name, block, precision).items():
            if part not in table:
                table[part] = np.empty((shape[0], *values.shape[1:]), values.dtype)
            table[part][start:stop] = values

    return table


def _check_tensor(name, value, shape, where):
    _check_shape(name, value, shape, where)
    _check_finite(name, value, where)


def _check_shape(name, value, shape, where):
    if tuple(value.shape) != shape:
        raise WeightsError(
            f"{name} of {where} has shape {tuple(value.shape)}, but the configuration "
            f"says {shape}: the weights belong to another model"
        )


def _check_finite(name, value, where):
    if not np.isfinite(value).all():
        raise WeightsError(
            f"{name} of {where} holds infinities or NaNs, so that every answer would "
            f"be nonsense; get another copy of the weights"
        )


def check_all_read(where: str, names: Iterable[str], read: set[str]) -> None:
    """Refuses weights that hold more than the model that their configuration describes.

    Args:
      names: Of all tensors.
      read: Of those that were read.

    Raises:
      WeightsError: A tensor was left over.
    """
    surplus = [n for n in sorted(set(names) - read) if not _UNUSED.fullmatch(n)]
    if surplus:
        raise WeightsError(
            f"{where} has {len(surplus)} tensors that its configuration has no place "
            f"for, as {', '.join(surplus[:3])}: the configuration is of another model, "
            f"or of fewer layers"
        )


def read_hf_config(folder: Path) -> ModelConfig:
    """The architecture in a Hugging Face `config.json` (v4 or v5 names).

    Raises:
      FileNotFoundError: There is none.
      ConfigError: It is not supported, or a value is missing or wrong.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no config.json: not a model folder")

    fields = _open_config(file)
    _refuse_variants(fields)
    theta, scaling = read_rope(fields)
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    most = num_positions(fields)

    return ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        # Missing or null: as many as there are query heads.
        num_kv_heads=fields.whole("num_key_value_heads", None) or heads,
        head_dim=fields.whole("head_dim", None) or hidden // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=most,
        attention_window=read_window(fields, most),
        embedding_multiplier=read_embedding_multiplier(fields),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        **FAMILIES[fields.text("model_type")].traits,
    )


def _open_config(file: Path) -> Fields:
    """A `config.json` of a supported family, with the family's own defaults."""
    fields = Fields(read_json(file), str(file))
    family = fields.text("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{file} describes a {family!r} model; supported families: "
            f"{', '.join(FAMILIES)}"
        )

    fields.refuse_slips(_READ)
    return Fields(FAMILIES[family].defaults | fields.values, str(file))


def _refuse_variants(fields: Fields) -> None:
    """Refuses what would have to be computed with, and is not."""
    for key, supported in _FIXED.items():
        value = fields.values.get(key)
        if value is not None and value != supported:
            raise ConfigError(
                f"{fields.where} has {key} {value!r:.80}; only {supported!r} is "
                f"supported"
            )

    kinds = fields.items("layer_types", str, None) or ()
    if other := set(kinds) - {"full_attention"}:
        raise ConfigError(
            f"{fields.where} has layers of the type {min(other)!r}; only "
            f"'full_attention' is supported"
        )

    quantized = fields.section("quantization_config")
    if quantized.values:
        method = quantized.values.get("quant_method", "of no name")
        raise ConfigError(
            f"{fields.where} says that its weights are quantised ({method}), which "
            f"cannot be read; use the folder that they were quantised from (precision "
            f"int8 quantises it on loading), or a GGUF file"
        )


def load_hf_params(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    ranges: list[LayerRanges] | None = None,
    place: Place = lambda params: params,
) -> dict:
    """Reads `*.safetensors` shards (bfloat16, float16 or float32) tensor by tensor.

    Args:
      ranges: See `assemble`, as for `place`.

    Raises:
      FileNotFoundError: There are no weights.
      WeightsError: A file is corrupt; a tensor is missing, surplus, quantised, not
        finite, or of the wrong shape.
    """
    tensors = SafetensorsFolder(folder)
    fields = _open_config(folder / "config.json")
    multipliers = read_multipliers(fields, config.head_dim)

    def top(name: str) -> Rows:
        prefix = "" if name == "lm_head" else "model."
        rows = tensors.rows(f"{prefix}{name}.weight")
        if name == "norm" and multipliers.hidden != 1:
            return np.asarray(rows[:], np.float32) * np.float32(multipliers.hidden)

        return rows

    def layer(i: int) -> LayerWeights:
        read = lambda name: tensors.read(f"model.layers.{i}.{name}")
        weights = _read_products(tensors, config, i)
        for name, theirs in _NORMS[config.norms].items():
            weights[name] = read(f"{theirs}.weight")
        if config.has_qkv_bias:
            weights |= {n: read(f"self_attn.{n[0]}_proj.bias") for n in QKV_BIASES}
        if config.has_qk_norm or config.has_wide_qk_norm:
            weights |= {n: read(f"self_attn.{n}.weight") for n in QK_NORMS}

        return _multiply(weights, multipliers)

    params = assemble(config, precision, top, layer, ranges, place)

    # Tensors that nobody asked for tell of another model.
    check_all_read(str(folder), tensors.names, tensors.read_names)
    if config.tie_embeddings and "lm_head.weight" in tensors.names:
        head = tensors.read("lm_head.weight")
        if not np.array_equal(head, tensors.read("model.embed_tokens.weight")):
            raise WeightsError(
                f"{folder} has a head of its own, lm_head.weight, but its config.json "
                f"says that it is the embedding; set tie_word_embeddings to false if "
                f"it is not"
            )

    return params


def _read_products(
    tensors: "SafetensorsFolder", config: ModelConfig, i: int
) -> LayerWeights:
    """A layer's matrices, which may be stored as the products that they are here."""
    c = config
    heads = c.num_heads * c.head_dim
    kv_heads = c.num_kv_heads * c.head_dim
    fused = {
        "self_attn.qkv_proj": (heads, kv_heads, kv_heads),
        "mlp.gate_up_proj": (c.intermediate_size, c.intermediate_size),
    }
    weights = {}

    for block, names in _BLOCKS.items():
        left = list(names)
        for path, sizes in fused.items():
            name = f"model.layers.{i}.{path}.weight"
            if path.startswith(block) and name in tensors.names:
                both = tensors.read(name)
                shape = (sum(sizes), c.hidden_size)
                _check_shape(path, both, shape, f"layer {i}")
                parts = np.split(both, np.cumsum(sizes)[:-1])
                weights |= dict(zip(names, parts, strict=False))
                left = left[len(sizes) :]
        for name in left:
            weights[name] = tensors.read(f"model.layers.{i}.{block}.{name}.weight")

    return weights


def _multiply(weights: LayerWeights, multipliers: Multipliers) -> LayerWeights:
    """Weights whose products are multiplied already."""
    factors = {
        "q_proj": multipliers.queries,
        "o_proj": multipliers.residual,
        "down_proj": multipliers.residual,
    }
    for name, factor in factors.items():
        if factor != 1:
            weights[name] = weights[name] * np.float32(factor)

    return weights


class _Stored:
    """A tensor of a safetensors file."""

    def __init__(self, tensor: Any):
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.get_shape())

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._tensor[rows]


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, each read when it is asked for.

    Where there is an index, it says which file holds which tensor, and other files are
    not looked at; else all of them are taken.

    Raises:
      FileNotFoundError: There are no weights.
      InputError: A file or the index is corrupt, or the two contradict each other.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.read_names: set[str] = set()
        self._handles = {}

        index = _read_index(folder)
        files = index.values() if index else (f.name for f in weight_files(folder))
        for name in sorted(set(files)):
            handle = _open_safetensors(folder / name)
            for tensor in handle.keys():  # noqa: SIM118
                if index and index.get(tensor) != name:
                    continue
                if tensor in self._handles:
                    raise WeightsError(
                        f"{folder} has the tensor {tensor!r} in {name} and in another "
                        f"file, and no model.safetensors.index.json says which counts"
                    )
                self._handles[tensor] = handle

        if lost := sorted(set(index) - set(self._handles)):
            raise WeightsError(
                f"{index[lost[0]]} of {folder} lacks the tensor {lost[0]!r}, which the "
                f"index says that it holds; get another copy"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors."""
        return tuple(self._handles)

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32.

        Raises:
          WeightsError: There is none, or it is quantised.
        """
        return np.asarray(self.rows(name)[:], np.float32)

    def rows(self, name: str) -> Rows:
        """A tensor whose rows are read when they are asked for, as they are stored.

        Raises:
          WeightsError: There is none, or it is quantised.
        """
        if name not in self._handles:
            raise WeightsError(f"{self.folder} has no tensor {name!r}")

        tensor = self._handles[name].get_slice(name)
        kind = tensor.get_dtype()
        if kind not in _FLOATS:
            raise WeightsError(
                f"{name} of {self.folder} is stored as {kind}, which has scales that "
                f"cannot be read; use the folder that the weights were quantised from "
                f"(types {', '.join(_FLOATS)})"
            )

        self.read_names.add(name)
        return _Stored(tensor)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights: those of its index, or all.

    Raises:
      FileNotFoundError: There are none.
      InputError: The index is corrupt.
    """
    index = _read_index(folder)
    if index:
        return sorted({folder / name for name in index.values()})

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors weights")

    # As written by transformers: what lies beside it is of others.
    whole = folder / "model.safetensors"
    return [whole] if whole in files else files


def _read_index(folder: Path) -> dict[str, str]:
    """Names of files by tensor; empty where a folder has no index."""
    file = folder / "model.safetensors.index.json"
    if not file.exists() or (folder / "model.safetensors").exists():
        return {}

    where = Fields(read_json(file, WeightsError), str(file), error=WeightsError)
    index = where.section("weight_map").values
    if not index:
        raise WeightsError(f"{file} names no tensors; get another copy")

    for tensor, name in index.items():
        is_name = isinstance(name, str) and name.endswith(".safetensors")
        if not is_name or Path(name).name != name:
            raise WeightsError(
                f"{file} says that {tensor!r} is in {name!r:.80}, which is no "
                f"*.safetensors file of the folder"
            )

    return index


def _open_safetensors(file: Path):
    from safetensors import safe_open

    if not file.is_file():
        raise WeightsError(f"{file} is missing, which the folder's index names")

    try:
        return safe_open(file, framework="numpy")
    except Exception as error:
        raise WeightsError(
            f"{file} cannot be read ({error}): it is truncated or corrupt"
        ) from error
