# SPDX-License-Identifier: Apache-2.0
"""Values of a JSON body, read with their types."""

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

from ospec_jax.serving.errors import RequestError


def parse_body(content: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
      RequestError: It is none.
    """
    try:
        body = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start}") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deep") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error

    if not isinstance(body, dict):
        raise RequestError(f"the body is {short(body)}; send an object")

    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


class Values:
    """Values of an object, read with their types; null is as good as none.

    Args:
      prefix: Of names in messages.
    """

    def __init__(self, values: dict[str, Any], prefix: str = ""):
        self._values = values
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """A value of any type."""
        value = self._values.get(name)
        return default if value is None else value

    def refusal(self, name: str, remedy: str, code: str = "invalid_value"):
        """The error that a value is."""
        full = self._prefix + name
        value = short(self._values.get(name))
        return RequestError(f"{full} is {value}; {remedy}", full, code)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.get(name, default)
        if not is_number(value) or not low <= value <= high:
            raise self.refusal(name, f"use a number from {low:g} to {high:g}")

        return float(value)

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if not is_whole(value) or not low <= value <= high:
            raise self.refusal(name, f"use a whole number from {low} to {high}")

        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "use true or false")

        return value

    def text(self, name: str) -> str | None:
        """A string that can be written as UTF-8."""
        value = self.get(name)
        if value is not None and not is_text(value):
            raise self.refusal(name, "use text (Unicode without lone surrogates)")

        return value

    def section(self, name: str, known: Sequence[str] = ()) -> "Values":
        """Values in an object of their own.

        Args:
          known: Names that it may have; empty for any.
        """
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refusal(name, "use an object")

        full = f"{self._prefix}{name}."
        for key in value:
            if known and key not in known:
                raise RequestError(
                    f"{full}{key:.60} is not known; {name} has {', '.join(known)}",
                    f"{full}{key:.60}",
                    "unknown_parameter",
                )

        return Values(value, full)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # A whole number may be too large to be made a float of.
    return isinstance(value, int) or math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written as UTF-8."""
    if not isinstance(value, str):
        return False

    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False

    return True


def is_same(value: Any, other: Any) -> bool:
    """Equality for which true is not 1."""
    return type(value) is type(other) and value == other


def short(value: Any) -> str:
    """A value for messages; neither long nor deep, whatever a client sends."""
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    shortener.maxstring = 60
    shortener.maxother = 60

    return shortener.repr(value)
