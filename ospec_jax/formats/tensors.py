# SPDX-License-Identifier: Apache-2.0
"""Folders of named tensors, as Hugging Face models come: config.json and weights."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from ospec_jax import atomic
from ospec_jax.config import ConfigError
from ospec_jax.config.fields import Fields, read_json
from ospec_jax.models import finite
from ospec_jax.models.weights import WeightsError, weight_files

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Types that weights are stored in, by the name that config.json uses."""
_READABLE = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Their names in safetensors, and those of types that tables of tokens have."""
_ORBAX_PART = ".orbax-checkpoint-tmp"


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
      WeightsError: There is none, or it is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(f"{folder} has no config.json: not a draft's folder")

    return Fields(read_json(file, WeightsError), str(file), error=WeightsError).values


def read_tensors(folder: Path, pickles: str = "*.bin") -> dict[str, np.ndarray]:
    """All tensors of a folder in their own types, from safetensors or else pickles.

    Args:
      pickles: Names of the PyTorch files that hold weights.

    Raises:
      WeightsError: There are none, a file is corrupt, a pickle is met without torch, or
        numbers are not finite.
    """
    files = []
    read = _read_safetensors
    if any(folder.glob("*.safetensors")):
        files = weight_files(folder)
    else:
        files = sorted(folder.glob(pickles))
        read = _read_pickle

    if not files:
        raise WeightsError(f"{folder} has neither *.safetensors nor {pickles} weights")

    tensors: dict[str, np.ndarray] = {}

    for file in files:
        try:
            found = read(file)
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(
                f"{file} cannot be read ({error}): it is truncated or corrupt"
            ) from error
        if twice := sorted(tensors.keys() & found.keys()):
            raise WeightsError(
                f"{folder} has the tensor {twice[0]!r} in {file.name} and in another "
                f"file; remove the one that does not count"
            )
        tensors |= found

    if name := finite.find_not_finite(tensors):
        raise WeightsError(
            f"{folder}: the tensor {name!r} holds infinities or NaNs; get another copy "
            f"of this draft"
        )

    return tensors


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    tensors = {}
    with safe_open(file, framework="numpy") as handle:
        for name in handle.keys():  # noqa: SIM118
            kind = handle.get_slice(name).get_dtype()
            if kind not in _READABLE:
                raise WeightsError(
                    f"{name} of {file} is stored as {kind}; heads in "
                    f"{', '.join(DTYPES)} can be read"
                )
            tensors[name] = handle.get_tensor(name)

    return tensors


def _read_pickle(file: Path) -> dict[str, np.ndarray]:
    """A pickled checkpoint; only tensors are unpickled, never code."""
    try:
        import torch  # type: ignore[import-not-found]
    except ImportError as error:
        raise WeightsError(
            f"{file} is a pickled PyTorch checkpoint, which needs torch to be read: "
            f"pip install 'ospec-jax[torch]', or convert it to safetensors elsewhere"
        ) from error

    loaded = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {}

    for name, value in loaded.items():
        # numpy knows no bfloat16 of torch's; float32 holds all of its values.
        is_narrow = value.dtype == torch.bfloat16
        array = (value.float() if is_narrow else value).numpy()
        tensors[name] = array.astype(ml_dtypes.bfloat16) if is_narrow else array

    return tensors


def check_is_free(folder: Path) -> None:
    """Refuses a folder with something in it, which would be lost or mistaken.

    A model's config.json would be overwritten, and another draft's; and a checkpoint
    with a config.json beside it is taken for a public head.

    Raises:
      ConfigError: It is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder")

    # What a killed save left is swept by the next one.
    is_rest = lambda path: path.name.startswith(".") or _ORBAX_PART in path.name
    found = sorted(path.name for path in _entries(folder) if not is_rest(path))
    if found:
        raise ConfigError(
            f"{folder} is not empty (it has {', '.join(found[:3])}), and a draft in it "
            f"would replace or confuse what is there; choose another folder"
        )


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def write_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors.

    Raises:
      WeightsError: A tensor is not finite.
    """
    from safetensors.numpy import save

    if name := finite.find_not_finite(tensors):
        raise WeightsError(
            f"the tensor {name!r}, as {tensors[name].dtype}, holds infinities or NaNs, "
            f"and is not written; if the draft itself is finite, export it as float32"
        )

    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    # Not `save_file`, whose files nobody but their owner may read.
    content = save(whole, metadata={"format": "pt"})
    atomic.write_bytes(folder / "model.safetensors", content)
    text = json.dumps(config, indent=2, sort_keys=True)
    atomic.write_text(folder / "config.json", text + "\n")
