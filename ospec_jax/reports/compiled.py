# SPDX-License-Identifier: Apache-2.0
"""What compiled programs take, as a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group

from ospec_jax.reports.tables import records_table

_GB = 1e9
_LABELS = (
    "a device",
    "memory",
    "of it arguments",
    "temporaries",
    "written in place",
    "fits",
    "arithmetic",
    "bytes, compiler's sum",
    "bytes through memory",
    "over arguments",
    "over what is needed",
    "read again",
    "written to arguments",
    "temporaries moved",
    "loops",
    "compiler's estimate",
    "collectives",
    "least time",
    "set by",
)


def table_of(facts: Mapping[str, Any]) -> Group:
    """A column for each program, of the figures that `ospec lower --compile` saves."""
    chip = facts["chip"]
    records = [
        _record(name, program, chip["memory"])
        for name, program in facts["programs"].items()
    ]
    labels: list[str] = list(_LABELS)

    # Speed-ups are of speculative steps alone.
    lengths = {text: None for found in facts["speed_ups"].values() for text in found}
    for length in lengths:
        labels.append(f"speed-up at {length} tokens")
        for record in records:
            found = facts["speed_ups"].get(record[0], {}).get(length)
            record.append("-" if found is None else f"{found:.2f}")

    versions = facts["versions"]
    title = (
        f"{facts['target']}, {facts['precision']}, {facts['batch_size']} rows of "
        f"{facts['capacity']}, {facts['topology']} {facts['mesh'] or 'one device'}; "
        f"jax {versions['jax']}, libtpu {versions['libtpu']}"
    )

    return records_table(labels, records, title)


def _record(name: str, program: Mapping[str, Any], memory: int) -> list[str]:
    size = lambda key: f"{program[key] / _GB:.3f} GB"
    missing = (program["memory"] - memory) / _GB
    kinds = [
        f"{count:.0f} {kind} {moved / 1e6:.2f} MB"
        for kind, (count, moved) in sorted(program["collectives"].items())
    ]
    unknown = program["unknown_loops"]

    return [
        name,
        size("memory"),
        size("arguments"),
        size("temporaries"),
        size("aliased"),
        "yes" if program["fits"] else f"no, {missing:.2f} GB short",
        f"{program['flops'] / 1e9:.1f} Gflop",
        size("compiler_bytes"),
        size("moved"),
        f"{program['moved_over_arguments']:.2f}",
        f"{program['moved_over_needed']:.2f}",
        size("reread"),
        size("written_back"),
        size("temporary_traffic"),
        f"{program['loops']:.0f}" + (f", {unknown:.0f} unknown" if unknown else ""),
        f"{program['cycles'] / 1e6:.1f}M cycles",
        ", ".join(kinds) or "none",
        f"{program['bound_seconds'] * 1e3:.3f} ms",
        program["bound_by"],
    ]
