# SPDX-License-Identifier: Apache-2.0
"""What every configuration needs: its error, its types, and how to read it."""

import contextlib
import dataclasses
import difflib
import functools
import numbers
import types
import typing
from collections.abc import Generator
from typing import Any

import numpy as np


class InputError(ValueError):
    """What a user gave cannot be used: its message names the value and the remedy."""


class ConfigError(InputError):
    """A configuration that cannot work, with the value found and the remedy."""


class UnforeseenError(ConfigError):
    """A file broke its reader in a way that no check of the reader foresaw.

    It names the file, which a traceback does not. What makes one is a fault of the
    reader: its checks should have refused the file in words of their own.
    """


@contextlib.contextmanager
def naming(what: Any) -> Generator[None]:
    """Names the file that is being read in whatever error its reader did not foresee.

    Raises:
      InputError: As it was raised inside, or in place of another error.
    """
    try:
        yield
    except (InputError, FileNotFoundError, FloatingPointError):
        raise
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be read ({error.strerror or error}); check that it is a "
            f"file, and yours to read"
        ) from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # Panics of libraries in Rust are no `Exception`.
        said = (str(error).splitlines() or [""])[0][:200]
        raise UnforeseenError(
            f"{what} cannot be read ({type(error).__name__}: {said}): it is damaged, "
            f"or of a kind that is not supported; get another copy"
        ) from error


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Builds the frozen dataclass `cls` from a dictionary as JSON has it.

    Raises:
      ConfigError: A key is unknown, is missing, or has a value of another type.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{cls.__name__} is {values!r:.80}; use a dictionary of its settings"
        )

    fields = {field.name: field for field in dataclasses.fields(cls)}
    known = list(fields)

    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"
            raise ConfigError(f"{cls.__name__} has no key {key!r}{hint}")

    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not has_default:
            raise ConfigError(f"{cls.__name__} lacks {name!r}")

    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    check_values(cls, values)

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
        if isinstance(value, list) and typing.get_origin(hint) is tuple:
            value = tuple(value)
        if not is_of_type(value, hint, needs_finite=False):
            raise ConfigError(
                f"{name} is {value!r:.80}; use {_in_words(hint, _IN_PYTHON)}"
            )
        object.__setattr__(config, name, value)


def whole_number(name: str, value: Any, least: int) -> int:
    """An argument that counts something.

    Raises:
      ConfigError: It is no whole number, or below the least one.
    """
    if isinstance(value, np.integer):
        value = value.item()
    if not is_of_type(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r:.80}; use a whole number from {least}")

    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if name in names}


def check_values(cls: type, values: dict[str, Any]) -> None:
    """Refuses values of a dataclass's fields that are of another type.

    Raises:
      ConfigError: One is.
    """
    hints = typing.get_type_hints(cls)

    for name, value in values.items():
        if not is_of_type(value, hints[name]):
            raise ConfigError(f"{name} is {value!r:.80}; use {_in_words(hints[name])}")


def is_of_type(value: Any, hint: Any, needs_finite: bool = True) -> bool:
    """Whether a value has the type that a dataclass's field is annotated with.

    Args:
      hint: A class, `Any`, a `Literal`, a union, or a tuple, list or dict of these;
        what else there may be is not looked into.
      needs_finite: Numbers that are infinite, or none, are not of type float.
    """
    is_of = functools.partial(is_of_type, needs_finite=needs_finite)
    origin = typing.get_origin(hint)
    parts = typing.get_args(hint)

    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, part) for part in parts)
    if origin is tuple and parts[-1:] == (Ellipsis,):
        return isinstance(value, tuple) and all(is_of(x, parts[0]) for x in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(map(is_of, value, parts))
        )
    if origin is list:
        return isinstance(value, list) and all(is_of(x, parts[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            is_of(k, parts[0]) and is_of(x, parts[1]) for k, x in value.items()
        )
    if hint is float:
        # JSON writes whole numbers without a point.
        # A whole number may be too large to be made a float of.
        if not _is_a(value, numbers.Real):
            return False
        number = value if isinstance(value, int) else float(value)
        return not needs_finite or -_LARGEST < number < _LARGEST
    if hint is int:
        return _is_a(value, numbers.Integral)
    if isinstance(hint, type):
        return isinstance(value, hint)

    return True


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value, which may be numpy's, is such a number; true is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


_LARGEST = 1e300
_IN_FILES = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    dict: "a dictionary",
    tuple: "a list of which each is",
    list: "a list of which each is",
    type(None): "null",
}
_IN_PYTHON = _IN_FILES | {
    float: "a number",
    str: "text (a name)",
    bool: "True or False",
    tuple: "a tuple, each of it",
    type(None): "None",
}


def _in_words(hint: Any, words: dict[Any, str] = _IN_FILES) -> str:
    """What a type admits, for messages."""
    parts = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        *others, last = map(str, parts)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part, words) for part in parts)
    if origin in (tuple, list):
        return f"{words[origin]} {_in_words(parts[0], words)}"

    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))
