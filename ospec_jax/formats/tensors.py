# SPDX-License-Identifier: Apache-2.0
"""Folders of named tensors, as Hugging Face models come: config.json and weights."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from ospec_jax import atomic
from ospec_jax.models import finite
from ospec_jax.models.weights import WeightsError

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Types that weights are stored in, by the name that config.json uses."""


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
      WeightsError: There is none, or it is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(f"{folder} has no config.json: not a draft's folder")

    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON ({error})") from error


def read_tensors(folder: Path, pickles: str = "*.bin") -> dict[str, np.ndarray]:
    """All tensors of a folder in their own types, from safetensors or else pickles.

    Args:
      pickles: Names of the PyTorch files that hold weights.

    Raises:
      WeightsError: There are none, a file is corrupt, a pickle is met without torch, or
        numbers are not finite.
    """
    files = sorted(folder.glob("*.safetensors"))
    read = _read_safetensors
    if not files:
        files = sorted(folder.glob(pickles))
        read = _read_pickle

    if not files:
        raise WeightsError(f"{folder} has neither *.safetensors nor {pickles} weights")

    tensors: dict[str, np.ndarray] = {}

    for file in files:
        try:
            tensors.update(read(file))
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(
                f"{file} cannot be read ({error}): it is truncated or corrupt"
            ) from error

    if name := finite.find_not_finite(tensors):
        raise WeightsError(
            f"{folder}: the tensor {name!r} holds infinities or NaNs; get another copy "
            f"of this draft"
        )

    return tensors


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


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
