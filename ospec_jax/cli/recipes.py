# SPDX-License-Identifier: Apache-2.0
"""Recipes: files that give a command's flags other defaults."""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from ospec_jax.cli.arguments import run_config
from ospec_jax.config import ConfigError
from ospec_jax.config.base import is_of_type

_FLAG = "--recipe"


def with_recipe(
    command: Callable[..., None], args: Sequence[str]
) -> Callable[..., None]:
    """The command with the defaults of the recipe that its arguments name, if any.

    Flags that are given win, and help shows the recipe's defaults.

    Raises:
      ConfigError: The recipe fails, or names a flag that there is not, or gives one a
        value of another type.
    """
    file = _named_file(args)
    if not file:
        return command
    if not Path(file).expanduser().is_file():
        raise ConfigError(f"no recipe {file}; name a Python file with get_config()")

    values = run_config(str(Path(file).expanduser()), dict)
    parameters = inspect.signature(command).parameters
    hints = typing.get_type_hints(command)

    for name, value in values.items():
        if name not in parameters or name == "recipe":
            near = difflib.get_close_matches(str(name), parameters, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{file}: {name!r} is none of the flags{hint}")
        if not is_of_type(value, hints[name]):
            raise ConfigError(
                f"{file}: {name} is {value!r:.80}; use what its flag takes"
            )

    @functools.wraps(command)
    def same(*args, **kwargs) -> None:
        command(*args, **kwargs)

    same.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(default=values.get(name, parameter.default))
            for name, parameter in parameters.items()
        ]
    )
    return same


def _named_file(args: Sequence[str]) -> str:
    """What the last `--recipe` among the arguments names."""
    found = ""
    for i, arg in enumerate(args):
        if arg == _FLAG and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{_FLAG}="):
            found = arg.removeprefix(f"{_FLAG}=")

    return found
