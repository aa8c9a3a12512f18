# SPDX-License-Identifier: Apache-2.0
"""Figures of how a package's parts import each other.

usage: python tools/rooms.py [FOLDER OF THE PACKAGE]
"""

import ast
import sys
from pathlib import Path


def imported_modules(path: Path, root: Path) -> set[Path]:
    """Files of the package that a module imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        first, *rest = node.module.split(".")
        if first != root.name:
            continue
        place = root.joinpath(*rest)
        inside = {place / f"{alias.name}.py" for alias in node.names}
        modules = {file for file in inside if file.exists()}
        if place.with_suffix(".py").exists():
            modules.add(place.with_suffix(".py"))
        elif len(modules) < len(node.names):
            modules.add(place / "__init__.py")
        found |= modules
    return found - {path}


def strongly_tied(below: dict[Path, set[Path]]) -> list[set[Path]]:
    """Sets of modules each of which reaches all others."""
    reach = {}
    for start in below:
        seen, waiting = set(), [start]
        while waiting:
            for other in below.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        reach[start] = seen
    ties = {frozenset({a} | {b for b in reach[a] if a in reach[b]}) for a in below}
    return [set(tie) for tie in ties if len(tie) > 1]


def main(root: Path) -> None:
    modules = [path for path in root.rglob("*.py") if "__pycache__" not in path.parts]
    below = {path: imported_modules(path, root) for path in modules}
    room = lambda path: path.relative_to(root).with_suffix("").parts[0]
    arrows = {
        (room(path), room(other))
        for path, others in below.items()
        for other in others
        if room(path) != room(other) and "__init__" not in (room(path), room(other))
    }
    rooms = {room(path) for path in modules} - {"__init__"}
    loose = [path.stem for path in root.glob("*.py") if not path.stem.startswith("__")]
    print(f"{len(modules)} modules in {len(rooms)} rooms, {len(loose)} at the root")
    print(f"{len(arrows)} arrows between rooms")
    both = sorted({tuple(sorted(arrow)) for arrow in arrows if arrow[::-1] in arrows})
    print(f"{len(both)} pairs of rooms that import each other: {both}")
    for tie in strongly_tied(below):
        names = sorted(str(path.relative_to(root)) for path in tie)
        print(f"circle: {', '.join(names)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "ospec_jax").resolve())
