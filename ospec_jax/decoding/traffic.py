# SPDX-License-Identifier: Apache-2.0
"""What a compiled program moves through a device's main memory, from its HLO text.

The compiler's own sum, `bytes accessed`, takes a weight as often as there are slices of
it that are fetched ahead, counts what lies on the chip, and a loop's body once. Here

- an array counts where it lies in main memory: a layout says `S(1)` of what is on chip;
- of an array of which only slices are read or written, only these count;
- what a layout pads to whole tiles is counted, too: `T(8,128)` of bfloat16 makes a lone
  column of 128 entries 32 kB. A part of a tile is read before it is written;
- a loop counts as often as it turns, a conditional as its dearest branch.

An operand that one operation reads more than once, as a product may that goes over its
rows in blocks, counts once: the figures are lower bounds.
"""

import collections
import dataclasses
import re

from ospec_jax.decoding.hlo import (
    Array,
    Computation,
    Instruction,
    behind_views,
    moved_by,
    names_in,
    parameters,
    parse,
    users_of,
)

_NOTHING = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
)
"""Operations that move nothing by themselves."""
_FREE_CALLS = (
    *("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"),
    "GatherScatterIndicesBitpacked",
)
"""Custom calls that are notes to the compiler, or views."""
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)


@dataclasses.dataclass
class Moved:
    """Bytes that one instruction moves, over all turns of the loops that it is in.

    Attributes:
      argument: Of the program, that is read or written; empty for a temporary.
    """

    read: int
    written: int
    argument: str
    operation: str
    label: str

    @property
    def total(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclasses.dataclass
class Traffic:
    """What one run of a program moves.

    Attributes:
      arguments: Bytes of each argument as it lies in main memory, by name.
      moved: One entry for each array that an instruction reads or writes.
      collectives: Number and bytes of each kind.
      cycles: The compiler's estimates for operations that carry one, by label. They
        stand for operations one after the other, without waiting for memory.
      num_unknown_loops: Loops of which the text does not say how often they turn; they
        are counted once.
    """

    arguments: dict[str, int]
    moved: list[Moved]
    collectives: dict[str, tuple[int, int]]
    cycles: dict[str, int] = dataclasses.field(default_factory=dict)
    num_loops: int = 0
    num_unknown_loops: int = 0

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return sum(entry.total for entry in self.moved)

    def by_argument(self) -> dict[str, tuple[int, int]]:
        """Bytes read and written of each argument; the temporaries under no name."""
        sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        for entry in self.moved:
            sums[entry.argument][0] += entry.read
            sums[entry.argument][1] += entry.written

        return {name: (read, written) for name, (read, written) in sums.items()}


def account(text: str) -> Traffic:
    """Adds up what a compiled module moves.

    Args:
      text: Of the scheduled HLO, as `Compiled.as_text()` gives it.

    Raises:
      ValueError: It has no entry computation.
    """
    computations, entry = parse(text)
    if not entry:
        raise ValueError("the text has no ENTRY computation; is it compiled HLO?")

    return _Walk(computations).run(entry)


class _Walk:
    """Goes through computations in the order in which they run."""

    def __init__(self, computations: dict[str, Computation]):
        self._all = computations
        self._moved: list[Moved] = []
        self._collectives: dict[str, list[int]] = {}
        self._channels: set[str] = set()
        self._cycles: dict[str, int] = collections.Counter()
        self._num_loops = 0
        self._num_unknown = 0

    def run(self, entry: str) -> Traffic:
        params = {
            line.name: line.label or line.name
            for line in self._all[entry].values()
            if line.operation == "parameter"
        }
        arguments = {
            params[name]: sum(array.moved for array in self._all[entry][name].arrays)
            for name in params
        }
        self._visit(entry, params, 1)

        return Traffic(
            arguments,
            self._moved,
            {kind: (n, size) for kind, (n, size) in self._collectives.items()},
            dict(self._cycles),
            self._num_loops,
            self._num_unknown,
        )

    def _visit(self, name: str, origins: dict, turns: int):
        """Counts a computation.

        Args:
          origins: Which argument each of its parameters is; a list for a tuple.

        Returns:
          The same, of its result.
        """
        lines = self._all[name]
        origins = dict(origins)
        result = None

        for line in lines.values():
            if line.operation != "parameter":
                origins[line.name] = self._visit_line(lines, line, origins, turns)
            if line.is_root:
                result = origins.get(line.name)

        return result

    def _visit_line(self, lines: Computation, line: Instruction, origins, turns: int):
        own = [origins.get(name) for name in line.operands]
        first = own[0] if own else None
        operation = line.operation

        if operation == "tuple":
            return own
        if operation == "get-tuple-element":
            index = int(line.attribute("index"))
            return first[index] if isinstance(first, list) else first
        if operation == "while":
            return self._visit_loop(lines, line, first, turns)
        if operation == "conditional":
            return self._visit_branches(line, own[1:], turns)
        if operation == "call":
            called = line.attribute("to_apply")
            return self._visit(called, self._given(called, own), turns)

        self._count_collectives(line, turns)
        self._cycles[line.label] += turns * line.cycles
        reads, writes, origin = self._moves(lines, line)
        for operand, size in reads.items():
            self._add(line, origins.get(operand), size * turns, 0)
        # What is written in place of an argument is that argument.
        kept = [origins.get(name) if name else None for name in origin]
        for size, place in zip(writes, kept, strict=True):
            self._add(line, place, 0, size * turns)

        # What is fetched ahead is a tuple of the copy and of what it is a copy of.
        is_view = operation == "bitcast" or _is_free_call(line)
        if is_view or operation.endswith(("-start", "-done")):
            return first if isinstance(first, str | None) else None

        return kept if len(line.arrays) > 1 else (kept[0] if kept else None)

    def _given(self, called: str, own: list) -> dict:
        return dict(zip(parameters(self._all[called]), own, strict=False))

    def _add(self, line: Instruction, origin, read: int, written: int) -> None:
        if read or written:
            name = origin if isinstance(origin, str) else ""
            self._moved.append(Moved(read, written, name, line.operation, line.label))

    def _visit_loop(self, lines: Computation, line: Instruction, carried, turns):
        body = line.attribute("body")
        condition = line.attribute("condition")
        count = _num_turns(line, lines, self._all.get(condition, {}))
        self._num_loops += 1
        if count is None:
            self._num_unknown += 1

        turns *= 1 if count is None else count
        return self._visit(body, self._given(body, [carried]), turns)

    def _visit_branches(self, line: Instruction, own: list, turns: int):
        found = re.search(r"branch_computations=\{([^}]*)\}", line.text)
        names = names_in(found[1]) if found else []
        names = names or [
            line.attribute(f"{answer}_computation") for answer in ("true", "false")
        ]
        dearest: list[Moved] = []
        result = None
        before = self._moved

        for i, name in enumerate(names):
            self._moved = []
            given = self._given(name, own[i : i + 1])
            result = self._visit(name, given, turns)
            size = lambda moved: sum(entry.total for entry in moved)
            dearest = max(dearest, self._moved, key=size)

        self._moved = before + dearest
        return result

    def _count_collectives(self, line: Instruction, turns: int) -> None:
        # One that runs beside products is spread over several fusions, which all name
        # its channel.
        inner = self._all.get(line.attribute("calls"), {})
        for part in (line, *inner.values()):
            kind = part.operation.removesuffix("-start")
            channel = part.attribute("channel_id")
            if kind not in COLLECTIVES or channel in self._channels:
                continue
            if channel and part is not line:
                self._channels.add(channel)

            # A started one gives its operands, too: the results come behind them.
            arrays = part.arrays
            if kind != part.operation and len(arrays) > len(part.operands):
                arrays = arrays[len(part.operands) :]
            entry = self._collectives.setdefault(kind, [0, 0])
            entry[0] += turns
            entry[1] += turns * sum(array.num_bytes for array in arrays)

    def _moves(self, lines: Computation, line: Instruction):
        """Bytes read by operand, bytes written by result, and what is in place.

        Returns:
          Of each result its bytes, and the operand in whose place it is, or nothing.
        """
        operation = line.operation.removesuffix("-start")
        size = {name: moved_by(lines[name]) for name in line.operands if name in lines}
        nowhere = [""] * len(line.arrays)
        none = {}, [0] * len(line.arrays), nowhere

        if line.operation in _NOTHING or line.operation.endswith("-done"):
            return none
        if _is_free_call(line):
            return none
        if operation in ("fusion", "async"):
            return self._fused_moves(line, size)
        if line.operation in ("copy-start", "slice-start", "dynamic-slice-start"):
            return self._fetched_moves(lines, line)
        if operation in ("slice", "dynamic-slice", "gather"):
            first, *rest = line.operands
            taken = line.arrays[0].num_bytes
            read = {first: min(taken, size.get(first, 0))}
            read |= {name: size.get(name, 0) for name in rest if name != first}
            return read, [array.moved for array in line.arrays], nowhere
        if operation == "dynamic-update-slice":
            place, update, *rest = line.operands
            read, written = _updated(lines[place].arrays[0], lines[update].arrays[0])
            reads = {place: read, update: size[update]}
            return reads | {name: size[name] for name in rest}, [written], [place]

        return size, [array.moved for array in line.arrays], nowhere

    def _fetched_moves(self, lines: Computation, line: Instruction):
        # At its end a program fetches for its next run what this one found fetched.
        is_again = any(
            user.operation == line.operation and user is not line
            for user in users_of(lines, line.operands[0])
        )
        if is_again and line.attribute("cross_program_prefetch_index"):
            nothing = [""] * len(line.arrays)
            return {}, [0] * len(line.arrays), nothing

        # Their results are `(copy, source, flag)`, or `((sources), copy, flag)`: what
        # is moved has the size of the copy.
        source = line.operands[0]
        index = 0 if line.operation == "copy-start" else len(lines[source].arrays)
        copy = line.arrays[index]
        is_read = lines[source].arrays[0].is_in_memory
        writes = [0] * len(line.arrays)
        writes[index] = copy.moved
        places = [""] * len(line.arrays)
        places[index] = source

        return {source: copy.num_bytes if is_read else 0}, writes, places

    def _fused_moves(self, line: Instruction, size: dict[str, int]):
        inner = self._all[line.attribute("calls")]
        params = parameters(inner)
        read: dict[str, int] = collections.defaultdict(int)

        for name, operand in zip(params, line.operands, strict=False):
            whole = size.get(operand, 0)
            if whole:
                read[operand] += min(whole, self._read_of(inner, name, whole))

        root = next(x for x in inner.values() if x.is_root)
        ends = root.operands if root.operation == "tuple" else (root.name,)
        outer = dict(zip(params, line.operands, strict=False))
        writes = []
        places = []

        for array, end in zip(line.arrays, ends, strict=False):
            update = behind_views(inner, end)
            place = ""
            written = array.moved
            if update.operation == "dynamic-update-slice":
                source = behind_views(inner, update.operands[0]).name
                place = outer.get(source, "")
                if place and array.is_in_memory:
                    part = inner[update.operands[1]].arrays[0]
                    extra, written = _updated(array, part)
                    read[place] += extra
            writes.append(written)
            places.append(place)

        missing = len(line.arrays) - len(writes)
        return dict(read), writes + [0] * missing, places + [""] * missing

    def _read_of(self, inner: Computation, name: str, whole: int) -> int:
        """Bytes that a fused computation reads of a parameter of `whole` bytes."""
        total = 0

        for view in _views(self._all, inner, name):
            # A result that is a view of the parameter is a copy of all of it.
            if inner[view].is_root:
                return whole

            for user in users_of(inner, view):
                total += self._read_by(user, view, whole)

        return min(total, whole)

    def _read_by(self, user: Instruction, name: str, whole: int) -> int:
        is_first = user.operands[0] == name
        # A view, whose own users are looked at; or a result, see `_fused_moves`.
        if user.operation in ("bitcast", "tuple"):
            return 0
        if user.operation in ("slice", "dynamic-slice", "gather") and is_first:
            return user.arrays[0].num_bytes
        # What is not replaced stays where it is.
        if user.operation == "dynamic-update-slice" and is_first:
            return 0
        if user.operation != "fusion":
            return whole

        nested = self._all[user.attribute("calls")]
        params = parameters(nested)
        read = 0
        for position, operand in enumerate(user.operands):
            if operand == name and not _is_passed_on(self._all, nested, position):
                read += self._read_of(nested, params[position], whole)

        return read


def _views(computations: dict, lines: Computation, name: str) -> list[str]:
    """An array's own name, and those of the views of it in the same computation."""
    found = [name]
    for seen in found:
        for user in users_of(lines, seen):
            is_view = user.operation == "bitcast"
            if user.operation == "fusion":
                nested = computations[user.attribute("calls")]
                position = user.operands.index(seen)
                is_view = _is_passed_on(computations, nested, position)
            if is_view:
                found.append(user.name)

    return found


def _is_passed_on(computations: dict, lines: Computation, position: int) -> bool:
    """Whether a computation's only result is a view of one of its parameters."""
    name = parameters(lines)[position]
    return any(lines[view].is_root for view in _views(computations, lines, name))


def _is_free_call(line: Instruction) -> bool:
    found = re.search(r'custom_call_target="([^"]*)"', line.text)
    return found is not None and found[1] in _FREE_CALLS


def _updated(place: Array, update: Array) -> tuple[int, int]:
    """Bytes read and written where an update replaces a part of an array."""
    if not place.is_in_memory:
        return 0, 0

    size = min(update.num_bytes, place.num_bytes)
    return (size if update.is_padded else 0), size


def _num_turns(
    line: Instruction, lines: Computation, condition: Computation
) -> int | None:
    """How often a loop turns, if the text says it.

    Args:
      lines: The loop stands among.
    """
    found = re.search(r'known_trip_count["\s:={]*n["\s:]*(\d+)', line.text)
    if found:
        return int(found[1])

    # Counters go up by one, from a constant to a constant.
    root = next((x for x in condition.values() if x.is_root), None)
    if root is None or root.operation != "compare" or "direction=LT" not in root.text:
        return None

    counter, limit = (behind_views(condition, name) for name in root.operands)
    start = behind_views(lines, line.operands[0])
    if start.operation == "tuple" and counter.operation == "get-tuple-element":
        start = behind_views(lines, start.operands[int(counter.attribute("index"))])

    begin = _constant(start)
    end = _constant(limit)
    return None if begin is None or end is None else max(end - begin, 0)


def _constant(line: Instruction) -> int | None:
    found = re.search(r"constant\((-?\d+)\)", line.text)
    return int(found[1]) if found and line.operation == "constant" else None
