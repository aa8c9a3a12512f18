# SPDX-License-Identifier: Apache-2.0
"""The letters that shapes are written in, and the decorator that checks them.

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

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import beartype
from jaxtyping import jaxtyped

Params = Any
"""A pytree of parameter arrays."""

_F = TypeVar("_F", bound=Callable)


def typed(function: _F) -> _F:
    """Checks a function's shape annotations while it is traced (free inside `jit`)."""
    return jaxtyped(typechecker=beartype)(function)
