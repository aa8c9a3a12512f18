# SPDX-License-Identifier: Apache-2.0
"""Values of files that others wrote, each checked as it is read."""

import difflib
import json
from pathlib import Path
from typing import Any

from ospec_jax.config.base import ConfigError, InputError

_MISSING: Any = object()
_LARGEST = 2**31 - 1
_LARGEST_NUMBER = 1e300
_ALIKE = 0.88
"""Similarity from which an unknown name is taken for a slip: `rope_theta` has 0.90 to
itself with a wrong letter, and 0.77 to `rope_local_theta`."""


def read_json(file: Path, error: type[InputError] = ConfigError) -> Any:
    """What a JSON file holds.

    Raises:
      FileNotFoundError: There is no such file.
      InputError: It is not UTF-8, not JSON, or nested too deep; of the kind `error`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")

    try:
        return json.loads(file.read_text("utf-8"))
    except UnicodeDecodeError as cause:
        raise error(f"{file} is not UTF-8 text; get another copy of it") from cause
    except RecursionError as cause:
        raise error(f"{file} is nested too deep to be read") from cause
    except ValueError as cause:
        raise error(f"{file} is not JSON ({cause}); get another copy of it") from cause


def parse_json(text: str, where: str, error: type[InputError] = ConfigError) -> Any:
    """What JSON text says; `where` it stands is for the message.

    Raises:
      InputError: It is not JSON, or nested too deep; of the kind `error`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not JSON ({cause})") from cause


class Fields:
    """Named values of a file, read with their types.

    A value that may be None (`default=None`) may be null in the file, no other.

    Args:
      values: As read from the file.
      where: The file, for messages.
      prefix: Of all names, as `llama.` in GGUF.
      error: What is raised.

    Raises:
      InputError: `values` is no dictionary; by the methods, a value is missing, of
        another type, or out of its range.
    """

    def __init__(
        self,
        values: Any,
        where: str,
        prefix: str = "",
        error: type[InputError] = ConfigError,
    ):
        if not isinstance(values, dict):
            raise error(f"{where} is {values!r:.80}; use an object with named values")

        self.values = values
        self.where = where
        self.prefix = prefix
        self._error = error

    def __contains__(self, name: str) -> bool:
        return self.values.get(self.prefix + name) is not None

    def whole(
        self, name: str, default: Any = _MISSING, low: int = 1, high: int = _LARGEST
    ) -> Any:
        """A whole number from `low` to `high`."""
        value = self._get(name, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            self._refuse(name, "a whole number")
        if not low <= value <= high:
            self._refuse(name, f"{low} to {high}")

        return value

    def number(self, name: str, default: Any = _MISSING) -> Any:
        """A finite number above 0, as all that models need are."""
        value = self._get(name, default)
        if value is default:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._refuse(name, "a number")
        if not 0 < value < _LARGEST_NUMBER:  # NaN is refused, too
            self._refuse(name, "a finite number above 0")

        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        value = self._get(name, _MISSING)
        is_good = lambda x: (
            isinstance(x, int | float)
            and not isinstance(x, bool)
            and 0 < x < _LARGEST_NUMBER
        )
        if not isinstance(value, list | tuple) or not all(map(is_good, value)):
            self._refuse(name, "a list of finite numbers above 0")

        return tuple(map(float, value))

    def flag(self, name: str, default: Any = _MISSING) -> Any:
        """True or false."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, bool):
            self._refuse(name, "true or false")

        return value

    def text(self, name: str, default: Any = _MISSING) -> Any:
        """A string."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            self._refuse(name, "text")

        return value

    def items(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """A list of values of one type, as a tuple."""
        value = self._get(name, default)
        if value is default:
            return value
        is_good = lambda x: (
            isinstance(x, kind) and (kind is bool or not isinstance(x, bool))
        )
        if not isinstance(value, list | tuple) or not all(map(is_good, value)):
            self._refuse(name, f"a list of {kind.__name__}")

        return tuple(value)

    def section(self, name: str) -> "Fields":
        """Values in an object of their own, which may be missing."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, dict):
            self._refuse(name, "an object with named values")

        return Fields(value or {}, f"{name} of {self.where}", error=self._error)

    def refuse_slips(self, known: tuple[str, ...]) -> None:
        """Refuses a name that is all but one of the known ones, which is missing.

        Names that nobody here reads are none of our affair; but a value under a name
        with a slip in it would go unread, and a default be taken in its place.
        """
        missing = [name for name in known if self.prefix + name not in self.values]

        for name in self.values:
            own = str(name).removeprefix(self.prefix)
            near = difflib.get_close_matches(own, missing, n=1, cutoff=_ALIKE)
            if own not in known and near and str(name).startswith(self.prefix):
                raise self._error(
                    f"{self.where} has {name!r}, which is not known; did you mean "
                    f"{self.prefix + near[0]!r}?"
                )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(self.prefix + name, _MISSING)
        if value is _MISSING and default is not _MISSING:
            return default
        if value is None and default is None:
            return None
        if value is _MISSING or value is None:
            what = "lacks" if value is _MISSING else "has null for"
            raise self._error(
                f"{self.where} {what} {self.prefix + name!r}; get another copy of it"
            )

        return value

    def _refuse(self, name: str, wanted: str) -> Any:
        value = self.values[self.prefix + name]
        raise self._error(
            f"{self.where} has {self.prefix + name} {value!r:.80}; use {wanted}"
        )
