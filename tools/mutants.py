# SPDX-License-Identifier: Apache-2.0
"""Small faults put into the package one at a time: which ones do its tests not see?

    python tools/mutants.py decoding drafters learners --num 60 --out mutants.json

A mutant is one changed comparison, operator, constant or condition. It is tried in a
copy of the working tree, by the tests of its own folder, for a minute of the processor.
"""

import ast
import copy
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
# As `make test` says it for its quick part, which is compiled accordingly.
_MARKS = "not (slow or optimized or gpu or thorough)"
_SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
      file: Relative to the package.
      before: The expression's source; `after` what takes its place.
    """

    file: str
    line: int
    before: str
    after: str


def mutants_of(file: Path) -> Iterator[tuple[Mutant, str]]:
    """All faults of a module, each with the module's source that has it."""
    source = file.read_text()
    tree = ast.parse(source)

    for node in ast.walk(tree):
        for changed in _changes(node):
            before = ast.get_source_segment(source, node)
            # Annotations and texts are no behaviour.
            if before is None or "\n" in before or _is_of_types(node):
                continue

            after = ast.unparse(changed)
            lines = source.splitlines(keepends=True)
            row = node.lineno - 1
            line = lines[row].encode()
            inside = f"({after})".encode()
            begin, end = node.col_offset, node.end_col_offset
            lines[row] = (line[:begin] + inside + line[end:]).decode()
            name = str(file.relative_to(ROOT / "ospec_jax"))
            yield Mutant(name, node.lineno, before, after), "".join(lines)


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.Compare) and type(changed.ops[0]) in _SWAPS:
        changed.ops[0] = _SWAPS[type(changed.ops[0])]()
        yield changed
    elif isinstance(changed, ast.BinOp | ast.BoolOp) and type(changed.op) in _SWAPS:
        changed.op = _SWAPS[type(changed.op)]()
        yield changed
    elif isinstance(changed, ast.UnaryOp) and isinstance(changed.op, ast.Not):
        yield changed.operand
    elif isinstance(changed, ast.Constant) and type(changed.value) in (int, float):
        changed.value = changed.value + 1
        yield changed
    elif isinstance(changed, ast.Constant) and type(changed.value) is bool:
        changed.value = not changed.value
        yield changed


def _is_of_types(node: ast.AST) -> bool:
    """Whether it is a union of types, as in `Draft | None`."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.BitOr)
        and any(
            isinstance(side, ast.Constant) or ast.unparse(side)[:1].isupper()
            for side in (node.left, node.right)
        )
    )


def judge(mutant: Mutant, source: str, seconds: int) -> str:
    """Runs the tests of the mutant's folder: `killed`, `survived` or `slow`."""
    room = Path(mutant.file).parts[0]
    with tempfile.TemporaryDirectory() as place:
        copied = Path(place) / "tree"
        ignore = shutil.ignore_patterns(".*", "*.ipynb", "__pycache__")
        shutil.copytree(ROOT, copied, ignore=ignore)
        (copied / "ospec_jax" / mutant.file).write_text(source)
        tests = [str(path) for path in sorted((copied / "tests" / room).glob("*.py"))]
        # Those that have to do with the module come first: by name, then by import.
        stem = Path(mutant.file).stem
        module = f"ospec_jax.{'.'.join(Path(mutant.file).with_suffix('').parts)}"
        text_of = lambda path: Path(path).read_text()
        tests.sort(key=lambda path: (stem not in path, module not in text_of(path)))
        naming = [path for path in tests if stem in text_of(path)]

        # Cases that name the module, as those of a family do, before all others.
        fates = [
            _run(copied, [*naming, "-k", stem], seconds // 2) if naming else "survived",
            "survived",
        ]
        if fates[0] != "killed":
            fates[1] = _run(copied, tests, seconds)

    return next((f for f in ("killed", "slow") if f in fates), "survived")


def _run(tree: Path, tests: list[str], seconds: int) -> str:
    """What becomes of a mutant by some of the tests of its tree."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header"]
    command += ["-p", "no:cacheprovider", "-m", _MARKS, *tests]
    paths = os.pathsep.join([str(tree), str(tree / "tests")])
    # Of the processor: beside other work the clock says little.
    limit = (seconds, seconds + 1)
    done = subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, limit),
    )

    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "slow"

    is_fine = done.returncode in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    )
    return "survived" if is_fine else "killed"


def main(
    rooms: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    num: int = 60,
    seconds: int = 60,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Tries faults, and writes what became of each.

    Args:
      rooms: Folders of the package.
      out: A JSON file.
      num: Faults to try, drawn from all.
      seconds: Of the processor, for the tests of each. `slow` ones were not found by
        then.
      workers: Tried at the same time.
      seed: Of the draw.
    """
    files = [f for room in rooms for f in (ROOT / "ospec_jax" / room).rglob("*.py")]
    found = [pair for file in sorted(files) for pair in mutants_of(file)]
    chosen = random.Random(seed).sample(found, min(num, len(found)))
    rows = []

    with ThreadPoolExecutor(workers) as pool:
        fates = pool.map(lambda pair: judge(*pair, seconds), chosen)
        for (mutant, _), fate in zip(chosen, fates, strict=True):
            rows.append({**dataclasses.asdict(mutant), "fate": fate})
            print(
                f"{len(rows)}/{len(chosen)} {fate}: {mutant.file}:{mutant.line} "
                f"{mutant.before!r} -> {mutant.after!r}",
                flush=True,
            )
            out.write_text(json.dumps(rows, indent=1))

    counts = {f: sum(r["fate"] == f for r in rows) for f in ("killed", "slow")}
    print(f"{counts['killed']} of {len(rows)} were found, {counts['slow']} not in time")


if __name__ == "__main__":
    tyro.cli(main)
