# SPDX-License-Identifier: Apache-2.0
"""What `--help` shows of a command."""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Annotated, Any

import tyro


def summary_of(command: Callable) -> str:
    """The docstring of a command, but for its arguments."""
    text = inspect.cleandoc(command.__doc__ or "")
    return text.partition("\n\nArgs:")[0]


def documented(docstring: str, heading: str) -> dict[str, str]:
    """The entries of a section of a docstring in Google's style, each in one line."""
    _, _, section = inspect.cleandoc(docstring).partition(f"{heading}:\n")
    entries: dict[str, str] = {}
    name = ""

    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if begin := re.match(r"  (\w+): (.*)", line):
            name = begin[1]
            entries[name] = begin[2]
        elif name and line.strip():
            entries[name] += " " + line.strip()

    return entries


def with_plain_help(command: Callable[..., None]) -> Callable[..., None]:
    """The same command; help wraps by the terminal, not as the code does.

    Flags that are empty unless given show no default: what then happens stands in
    their help.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    texts = documented(command.__doc__ or "", "Args")

    @functools.wraps(command)
    def same(*args: Any, **kwargs: Any) -> None:
        command(*args, **kwargs)

    same.__annotations__ = {
        name: Annotated[hint, _help(texts.get(name), _is_empty(command, name))]
        for name, hint in hints.items()
    }
    parameters = [
        parameter.replace(annotation=same.__annotations__[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
    ]
    same.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # Else inspection would follow it back to the command, and to its own annotations.
    del same.__wrapped__

    return same


def _help(text: str | None, is_empty: bool) -> object:
    return tyro.conf.arg(help=text, help_behavior_hint="" if is_empty else None)


def _is_empty(command: Callable, name: str) -> bool:
    parameter = inspect.signature(command).parameters.get(name)
    return parameter is not None and parameter.default in (None, "", ())
