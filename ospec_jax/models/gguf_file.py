# SPDX-License-Identifier: Apache-2.0
"""The layout of GGUF files: metadata and tensors, nothing of what they mean.

Read by ourselves, since the `gguf` package believes each count that a file states: an
array of 2**40 entries in a file of 49 bytes takes it a minute and a gigabyte. Here all
counts and offsets are held against the file's size before anything is read by them.
Types, block sizes and dequantisation are the package's.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from ospec_jax.config import naming
from ospec_jax.config.fields import Fields
from ospec_jax.models.weights import WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Types of metadata by their number in the file."""
_BOOL = 7
_STRING = 8
_ARRAY = 9
_LEAST_FIELD = 8 + 4 + 1
"""Bytes of the shortest field: a name's length, a type and a value."""
_LEAST_TENSOR = 8 + 4 + 4 + 8
"""Bytes of the shortest entry of a tensor: a name's length, counts, type, offset."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
      shape: As numpy has it, rows first.
      kind: Number of its type in GGML.
      begin: First byte, in the file's header from where tensors begin, else from the
        file's beginning.
      num_bytes: Of all of it.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int
    num_bytes: int = 0

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.begin + self.num_bytes


class GGUFFile:
    """An opened GGUF file, whose tensors are dequantised one at a time.

    Raises:
      WeightsError: The file is not GGUF, or what it states does not fit into it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with naming(path):
            if not self.path.stat().st_size:
                raise WeightsError(f"{path} cannot be read as GGUF: it is empty")
            # Mapped, not read: tensors are dequantised one by one, and only one is in
            # memory.
            self._data = np.memmap(self.path, np.uint8, "r")
            found = _Cursor(self._data, self.path)
            values, self._tensors = found.read_header()

        self.fields = Fields(values, str(path))

    def get(self, key: str, default=None):
        """A metadata value, or `default`."""
        return self.fields.values.get(key, default)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Of all tensors."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, `[out, in]` for matrices.

        Raises:
          WeightsError: There is none, or it is of a type that is not supported.
        """
        import gguf

        if name not in self._tensors:
            raise WeightsError(f"{self.path} has no tensor {name!r}")

        entry = self._tensors[name]
        kind = gguf.GGMLQuantizationType(entry.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = self._data[entry.begin : entry.end]
        # Quantised rows are whole blocks, each with its scales.
        rows = raw.reshape(-1, entry.shape[-1] // block * size)
        if kind == gguf.GGMLQuantizationType.F64:
            return rows.view("<f8").astype(np.float32).reshape(entry.shape)

        try:
            array = gguf.quants.dequantize(rows, kind)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: the tensor {name!r} is of the type {kind.name}, which "
                f"cannot be read; quantise the model to another type, such as Q8_0"
            ) from error

        return np.asarray(array, np.float32).reshape(entry.shape)


class _Cursor:
    """Reads on from a place; nothing behind the file's end."""

    def __init__(self, data: np.ndarray, path: Path):
        self._data = data
        self._path = path
        self._place = 0

    def read_header(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        """Metadata by key, and tensors by name."""
        if bytes(self._take(4, "its magic number")) != _MAGIC:
            raise WeightsError(
                f"{self._path} cannot be read as GGUF: it does not begin with GGUF"
            )

        version = self._number("<u4", "its version")
        # In a big-endian file the version reads as a huge number.
        if version not in _VERSIONS:
            raise WeightsError(
                f"{self._path} is GGUF of version {version}; little-endian files of "
                f"version 2 or 3 can be read"
            )

        num_tensors = self._count(_LEAST_TENSOR, "tensors")
        num_fields = self._count(_LEAST_FIELD, "fields")
        values = {}

        for _ in range(num_fields):
            key = self._text("a key")
            if key in values:
                raise WeightsError(f"{self._path} has the key {key!r} twice")
            values[key] = self._value(self._number("<u4", f"the type of {key}"), key)

        entries = [self._entry() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        is_whole = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not is_whole or alignment < 1 or alignment & (alignment - 1):
            raise WeightsError(
                f"{self._path} has general.alignment {alignment!r}; use a power of two"
            )

        # Offsets count from the first multiple of the alignment behind the header.
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}

        for entry in entries:
            if entry.name in tensors:
                raise WeightsError(f"{self._path} has the tensor {entry.name!r} twice")
            if entry.begin % alignment:
                raise WeightsError(
                    f"{self._path}: the tensor {entry.name!r} begins at {entry.begin}, "
                    f"which is no multiple of the alignment {alignment}"
                )
            tensors[entry.name] = dataclasses.replace(
                entry, begin=start + entry.begin, num_bytes=self._size_of(entry)
            )

        self._check_places(tensors)

        return values, tensors

    def _size_of(self, entry: TensorEntry) -> int:
        """Bytes of a tensor, by its shape and type."""
        import gguf

        kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
        if entry.kind not in kinds:
            raise WeightsError(
                f"{self._path}: the tensor {entry.name!r} has the type {entry.kind}, "
                f"which is not known; quantise the model to another type, such as Q8_0"
            )

        block, size = gguf.GGML_QUANT_SIZES[kinds[entry.kind]]
        row = entry.shape[-1]
        if row % block:
            raise WeightsError(
                f"{self._path}: rows of the tensor {entry.name!r} have {row} entries, "
                f"which are no whole blocks of {block}, as {kinds[entry.kind].name} "
                f"has them"
            )

        return math.prod(entry.shape) // block * size

    def _check_places(self, tensors: dict[str, TensorEntry]) -> None:
        """Refuses tensors that end behind the file, or share bytes."""
        ordered = sorted(tensors.values(), key=lambda entry: entry.begin)

        for entry in ordered:
            if entry.end > len(self._data):
                raise WeightsError(
                    f"{self._path} has {len(self._data)} bytes, but its tensor "
                    f"{entry.name!r} ends at {entry.end}: the file is truncated, "
                    f"download it again"
                )

        # Sorted by where they begin, so only neighbours can overlap.
        for entry, following in itertools.pairwise(ordered):
            if entry.end > following.begin:
                raise WeightsError(
                    f"{self._path}: the tensors {entry.name!r} and {following.name!r} "
                    f"overlap; get another copy"
                )

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            return self._scalars(kind, 1, key)[0]

        kind = self._number("<u4", f"the type of {key}")
        if kind == _STRING:
            count = self._count(8, f"entries of {key}")
            return [self._text(key) for _ in range(count)]

        if kind not in _SCALARS:
            raise WeightsError(
                f"{self._path}: {key} is an array of the type {kind}, which is not "
                f"known"
            )

        count = self._count(_SCALARS[kind].itemsize, f"entries of {key}")
        return self._scalars(kind, count, key)

    def _scalars(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in _SCALARS:
            raise WeightsError(
                f"{self._path}: {key} has the type {kind}, which is not known"
            )

        dtype = _SCALARS[kind]
        values = self._take(count * dtype.itemsize, key).view(dtype).tolist()
        if kind != _BOOL:
            return values
        if any(x > 1 for x in values):
            raise WeightsError(f"{self._path}: {key} is neither true nor false")

        return [bool(x) for x in values]

    def _entry(self) -> TensorEntry:
        name = self._text("a tensor's name")
        num_dimensions = self._number("<u4", f"the dimensions of {name}")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise WeightsError(
                f"{self._path}: the tensor {name!r} has {num_dimensions} dimensions; "
                f"1 to {_MAX_DIMENSIONS} can be"
            )

        raw = self._take(8 * num_dimensions, f"the shape of {name}")
        # GGUF names the fastest dimension first, numpy last.
        shape = tuple(raw.view("<u8").tolist()[::-1])
        if 0 in shape:
            raise WeightsError(f"{self._path}: the tensor {name!r} is empty: {shape}")

        kind = self._number("<u4", f"the type of {name}")
        return TensorEntry(name, shape, kind, self._number("<u8", f"{name}'s offset"))

    def _count(self, least: int, what: str) -> int:
        """A count of things, each of which takes at least so many bytes."""
        count = self._number("<u8", f"the count of {what}")
        rest = len(self._data) - self._place
        # Before anything is allocated or read by the count.
        if count * least > rest:
            raise WeightsError(
                f"{self._path} states {count} {what}, but has only {rest} more bytes: "
                f"it is truncated or not a GGUF file, download it again"
            )

        return count

    def _text(self, what: str) -> str:
        raw = bytes(self._take(self._count(1, f"bytes of {what}"), what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(
                f"{self._path}: {what} is not UTF-8 text; get another copy"
            ) from error

    def _number(self, dtype: str, what: str) -> int:
        return self._take(np.dtype(dtype).itemsize, what).view(dtype).item()

    def _take(self, count: int, what: str) -> np.ndarray:
        begin = self._place
        if begin + count > len(self._data):
            raise WeightsError(
                f"{self._path} cannot be read as GGUF: it ends before {what}; it is "
                f"truncated or not a GGUF file, download it again"
            )

        self._place = begin + count
        return self._data[begin : self._place]
