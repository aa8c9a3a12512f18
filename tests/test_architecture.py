# SPDX-License-Identifier: Apache-2.0
"""Imports point one way."""

import ast
from pathlib import Path

import pytest

import ospec_jax

ROOT = Path(ospec_jax.__file__).parent
NOUNS = {"typing", "types", "config"}
ALLOWED = {
    "typing": set(),
    "atomic": set(),
    "config": {"config"},
    "kernels": set(),
    "sharding": {"config"},
    "models": NOUNS | {"models", "data", "kernels", "sharding", "atomic"},
    "types": NOUNS | {"models"},
    "sampling": NOUNS | {"models"},
    "tree": NOUNS,
    "drafters": NOUNS | {"models", "sampling", "tree", "drafters"},
    "decoding": NOUNS
    | {"models", "sampling", "sharding", "tree", "drafters", "decoding", "metrics"},
    # Sampling: what is learned of drawn tokens is processed as they were.
    "learners": NOUNS | {"sampling", "drafters", "learners"},
    "metrics": set(),
}


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """Parts of the package, and other packages, that a module imports."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ospec_jax":
            ours |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = node.module.split(".")
            ours |= {names[1]} if names[0] == "ospec_jax" else set()
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return ours, others


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    ours, others = imported(path)
    part = part_of(path)
    if part in ALLOWED:
        assert ours <= ALLOWED[part]
    if part not in ("models", "drafters"):
        assert "flax.linen" not in others


def test_learners_see_of_drafters_only_the_base():
    for path in (ROOT / "learners").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and "drafters" in (node.module or ""):
                assert node.module == "ospec_jax.drafters.base"
