# SPDX-License-Identifier: Apache-2.0
"""Every module has a floor, imports only go down, and none go round in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ospec_jax

ROOT = Path(ospec_jax.__file__).parent

FLOORS = (
    {"_platform", "atomic", "config", "typing"},
    {"kernels"},
    {"control", "data", "sharding"},
    {"models"},
    {"types"},
    {"sampling"},
    {"drafters"},
    {"testing"},
    {"decoding", "learners", "storage"},
    {"formats", "online"},
    {"loading"},
    {"reports", "session"},
    {"bench", "parallel", "reasoning", "replay", "serving"},
    {"distill"},
    {"cli"},
    {"__main__"},
)
"""From the ground up. What stands on one floor knows nothing of its neighbours."""

FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}

MODULES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
NAMES = {path: str(path.relative_to(ROOT)) for path in MODULES}


def room_of(path: Path) -> str:
    """The part of the package that a module belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that one imports, and the names it takes from each.

    Wherever the import stands: inside a function or behind TYPE_CHECKING, too.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()


def module_files(path: Path) -> Iterator[Path]:
    """Files of the package that a module imports."""
    for module, names in imports(path):
        if module.split(".")[0] != "ospec_jax":
            continue
        place = ROOT.joinpath(*module.split(".")[1:])
        inside = [place / f"{name}.py" for name in names]
        found = [file for file in inside if file.exists()]
        if place.with_suffix(".py").exists():
            found.append(place.with_suffix(".py"))
        elif len(found) < len(names) or not names:
            found.append(place / "__init__.py")
        yield from found


def test_every_module_has_a_floor():
    rooms = {room_of(path) for path in MODULES} - {"__init__"}
    assert rooms == set(FLOOR_OF)


def test_few_modules_lie_at_the_root():
    loose = [p.stem for p in ROOT.glob("*.py") if not p.stem.startswith("__")]
    assert len(loose) <= 8, loose


@pytest.mark.parametrize("path", MODULES, ids=NAMES.get)
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return

    for file in module_files(path):
        other = room_of(file)
        if other not in (room, "__init__"):
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}"

    # Parameters are trees to everybody else: a change of framework touches two rooms.
    if room not in ("models", "drafters"):
        assert all(not module.startswith("flax.linen") for module, _ in imports(path))


def test_no_imports_go_round_in_circles():
    below = {path: set(module_files(path)) - {path} for path in MODULES}
    # A package's face gathers names from its own modules, which do not look at it.
    while free := {path for path, needed in below.items() if not needed}:
        below = {
            path: needed - free for path, needed in below.items() if path not in free
        }
    assert not {NAMES[path]: sorted(map(NAMES.get, below[path])) for path in below}


def test_the_tests_stand_where_the_modules_do():
    here = Path(__file__).parent
    rooms = {path.name for path in here.iterdir() if any(path.glob("test_*.py"))}
    assert rooms <= set(FLOOR_OF)


def test_no_two_files_of_tests_have_one_name():
    """They are imported by their names alone, and a second one is not collected."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
