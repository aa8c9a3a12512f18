# SPDX-License-Identifier: Apache-2.0
"""What every configuration needs: its error, and reading it from a dictionary."""

import dataclasses
import difflib
from typing import Any


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
