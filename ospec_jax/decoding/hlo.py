# SPDX-License-Identifier: Apache-2.0
"""Compiled programs as XLA prints them: computations of lines with shapes and layouts.

Of a line only what `traffic` asks for is taken apart.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      num_bytes: With what its layout pads.
      is_padded: Whether that is anything.
      is_in_memory: It lies in main memory, and not on the chip.
    """

    num_bytes: int
    is_padded: bool
    is_in_memory: bool

    @property
    def moved(self) -> int:
        """Bytes through main memory when it is read, or written, once."""
        return self.num_bytes if self.is_in_memory else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; attributes as in the text."""

    name: str
    operation: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """A computation, or a number, that the line names; empty without one."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of what the operation takes; 0 without one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def label(self) -> str:
        """What the line is a part of, in the program that was traced."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return found[1].replace("\\'", "'") if found else ""


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""

    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue

        found = _INSTRUCTION.match(line)
        if found:
            instruction = _read_instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction

    return computations, entry


def _read_instruction(name: str, rest: str, is_root: bool) -> Instruction:
    # The result's type comes first; it may be a tuple, and layouts hold brackets, but
    # only an operation is lower-case letters straight before a bracket, behind a blank.
    found = _OPERATION.search(f" {rest}")
    assert found, rest
    start = found.end() - 1
    shape = rest[: max(found.start(), 0)]
    depth = 1
    end = start
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1

    return Instruction(
        name,
        found[1],
        tuple(map(_read_array, _ARRAY.finditer(shape))),
        tuple(names_in(rest[start : end - 1])),
        rest,
        is_root,
    )


def _read_array(found: re.Match) -> Array:
    kind, dims, layout = found[1], found[2], found[3] or ""
    sizes = [int(size.lstrip("<=")) for size in dims.split(",") if size]
    order, _, tiling = layout.partition(":")
    tile = re.match(r"T\(([\d,*]+)\)", tiling)
    padded = list(sizes)

    if tile and order and sizes:
        # The last number of a tile is along the dimension that is most minor.
        minor = [int(i) for i in order.split(",")]
        tile_sizes = [int(n) for n in reversed(tile[1].replace("*", "1").split(","))]
        for axis, size in zip(minor, tile_sizes, strict=False):
            padded[axis] = math.ceil(sizes[axis] / size) * size

    bits = _ITEM_BITS.get(kind)
    if bits is None:
        digits = re.match(r"[a-z]+(\d+)", kind)
        bits = int(digits[1]) if digits else 8

    space = re.search(r"S\((\d+)\)", tiling)
    return Array(
        num_bytes=math.prod(padded) * bits // 8,
        is_padded=padded != sizes,
        is_in_memory=space is None or space[1] == "0",
    )


def parameters(lines: Computation) -> list[str]:
    """Names of a computation's parameters, by their numbers."""
    numbered = []
    for line in lines.values():
        if line.operation == "parameter":
            found = re.search(r"parameter\((\d+)\)", line.text)
            assert found
            numbered.append((int(found[1]), line.name))

    return [name for _, name in sorted(numbered)]


def moved_by(line: Instruction) -> int:
    """Bytes through main memory when all of a line's results are read once."""
    return sum(array.moved for array in line.arrays)


def users_of(lines: Computation, name: str) -> Iterator[Instruction]:
    """The lines that take a result."""
    return (line for line in lines.values() if name in line.operands)


def behind_views(lines: Computation, name: str) -> Instruction:
    """What a result is a view, or a copy, of."""
    line = lines[name]
    while line.operation in ("bitcast", "copy") and line.operands:
        line = lines[line.operands[0]]

    return line


def names_in(text: str) -> list[str]:
    """Lines and computations that a text names."""
    return _NAME.findall(text)
