# SPDX-License-Identifier: Apache-2.0
"""What every configuration needs: its error, its types, and how to read it."""

import dataclasses
import difflib
import functools
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np


class ConfigError(ValueError):
    """A configuration that cannot work, with the value found and the remedy."""


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Builds the frozen dataclass `cls`, refusing keys that it does not have."""
    known = [field.name for field in dataclasses.fields(cls)]

    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"
            raise ConfigError(f"{cls.__name__} has no key {key!r}{hint}")

    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**values)


def check_types(config: Any) -> None:
    """Refuses settings of a dataclass that are of another type than it says.

    NumPy's scalars become Python's, and lists become tuples where these are wanted: a
    frozen configuration is hashed, and stored as JSON.

    Raises:
      ConfigError: A setting is of another type.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, list) and get_origin(hint) is tuple:
            value = tuple(value)
        if not _is_of(value, hint):
            raise ConfigError(f"{name} is {value!r:.80}; use {_in_words(hint)}")
        object.__setattr__(config, name, value)


def whole_number(name: str, value: Any, least: int) -> int:
    """An argument that counts something.

    Raises:
      ConfigError: It is no whole number, or below the least one.
    """
    if isinstance(value, np.integer):
        value = value.item()
    if not _is_of(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r:.80}; use a whole number from {least}")

    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if name in names}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as settings have them."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is tuple:
        kind, *_ = get_args(hint)
        return isinstance(value, tuple) and all(_is_of(x, kind) for x in value)

    # True is a number to Python, but nobody means one by it.
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    if isinstance(hint, type):
        return isinstance(value, hint)

    return True


def _in_words(hint: Any) -> str:
    """What a type admits, for messages."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if origin is Literal:
        *others, last = get_args(hint)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        return f"a tuple, each of it {_in_words(get_args(hint)[0])}"

    words = {int: "a whole number", float: "a number", str: "text (a name)"}
    words |= {bool: "True or False", type(None): "None"}

    return words.get(hint, getattr(hint, "__name__", str(hint)))
