# SPDX-License-Identifier: Apache-2.0
"""The letters that shapes are written in, how they are checked, and how data is shown.

| letter | axis |
|---|---|
| b | rows of a batch, one request each |
| t | tokens of one forward pass |
| s | slots of a key-value cache (its capacity) |
| n | nodes of a draft tree, the root included |
| m | tokens one step can emit: the tree's depth plus one |
| k | draft tokens of a chain (`num_speculative_tokens`) |
| v, q | target vocabulary, draft vocabulary |
| d, f | hidden size of the target, width of its tapped features |
| h, g, e | key-value heads, query heads per key-value head, head width |
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import flax.struct
import jax
from beartype import beartype
from jaxtyping import jaxtyped

Params = Any
"""A pytree of parameter arrays."""

_F = TypeVar("_F", bound=Callable)
_MAX_LENGTH = 120
"""Characters of a value that is shown."""
_MAX_ITEMS = 8
"""Of a list that is shown."""


def typed(function: _F) -> _F:
    """Checks a function's shape annotations while it is traced (free inside `jit`)."""
    return jaxtyped(typechecker=beartype)(function)


@dataclass_transform(frozen_default=True, field_specifiers=(flax.struct.field,))
def struct(cls: type) -> Any:
    """A `flax.struct.dataclass` that shows shapes of its arrays, not their numbers."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = short_repr  # pyrefly: ignore[bad-assignment]

    return flax.struct.dataclass(cls)


def short_repr(self: Any) -> str:
    """A dataclass on a line or a few: arrays as their shapes, trees as their size."""
    fields = [
        f"{field.name}={_shown(getattr(self, field.name))}"
        for field in dataclasses.fields(self)
    ]
    return f"{type(self).__name__}({', '.join(fields)})"


def size_of(tree: Any) -> str:
    """How many numbers the arrays of a tree hold, in words."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size")]
    count = sum(leaf.size for leaf in leaves)
    if count >= 1_000_000:
        return f"{count / 1e6:.1f} million numbers"

    return f"{count:,} numbers"


def _shown(value: Any) -> str:
    if _is_array(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, dict) and any(map(_is_array, jax.tree.leaves(value))):
        return f"{{{len(value)} entries, {size_of(value)}}}"
    if dataclasses.is_dataclass(value):
        return repr(value)

    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items = [*map(_shown, value[:_MAX_ITEMS])]
        more = [f"... {len(value)} in all"] if len(value) > _MAX_ITEMS else []
        text = ", ".join(items + more)
        if isinstance(value, list):
            return f"[{text}]"
        return f"({text},)" if len(value) == 1 else f"({text})"
    if isinstance(value, tuple):
        pairs = zip(value._fields, value, strict=True)
        text = ", ".join(f"{name}={_shown(x)}" for name, x in pairs)
        return f"{type(value).__name__}({text})"

    text = repr(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
