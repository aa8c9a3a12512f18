# SPDX-License-Identifier: Apache-2.0
"""Writes the list of commands and flags in `docs/cli.md` from the code.

    python tools/make_cli_page.py

What stands above the marker in the page is written by hand, and stays.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from ospec_jax.cli import COMMANDS, EXAMPLES
from ospec_jax.cli.arguments import GROUPS
from ospec_jax.cli.helping import documented, summary_of

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
MARKER = (
    "<!-- From here on made by tools/make_cli_page.py: change the code instead. -->"
)


@dataclasses.dataclass(frozen=True)
class Flag:
    """One argument of a command.

    Attributes:
      name: As it is typed, like `--batch-size`; a positional one in capitals.
      kind: What may follow it.
      default: As it is typed; empty where there is none.
    """

    name: str
    kind: str
    default: str
    text: str


def describe_type(annotation) -> str:
    """What is typed for a value of this type."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(inner[0])
    if origin is typing.Literal:
        return ", ".join(str(choice) for choice in inner)
    if origin in (types.UnionType, typing.Union):
        parts = [describe_type(part) for part in inner if part is not type(None)]
        return ", ".join(parts)
    if origin is tuple:
        return f"{describe_type(inner[0])} ..."
    known = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}
    return known.get(annotation, "")


def describe_default(value) -> str:
    """A default as it would be typed."""
    if value is None or value is inspect.Parameter.empty or isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return str(value)


def to_flag(name: str, annotation, default, text: str) -> Flag:
    """The flag that a parameter or a field becomes on the command line."""
    extra = getattr(annotation, "__metadata__", ())
    settings = [part for part in extra if hasattr(part, "aliases")]
    if any("Positional" in repr(part) for part in extra):
        return Flag(name.upper(), describe_type(annotation), "", text)

    words = next((part.name for part in settings if part.name), name)
    aliases = next((part.aliases for part in settings if part.aliases), ())
    text = text or next((part.help for part in settings if part.help), "")
    typed = "--" + words.replace("_", "-")
    if isinstance(default, bool):
        off = "--no-" + typed.removeprefix("--")
        return Flag(f"{typed}, {off}", "", typed if default else off, text)
    names = ", ".join([typed, *aliases])
    is_needed = default is inspect.Parameter.empty
    kind = describe_type(annotation)
    if is_needed:
        kind = f"{kind} (required)"
    return Flag(names, kind, describe_default(default), text)


def shared_flags(group: type) -> list[Flag]:
    """Flags of one group of those that all commands share which decode."""
    texts = documented(group.__doc__ or "", "Attributes")
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        to_flag(field.name, hints[field.name], field.default, texts.get(field.name, ""))
        for field in dataclasses.fields(group)
    ]


def own_flags(function) -> Iterator[Flag]:
    """Flags of one command, but for the shared ones."""
    texts = documented(function.__doc__ or "", "Args")
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "decoding":
            text = texts.get(name, "")
            yield to_flag(name, hints[name], parameter.default, text)


def has_shared_flags(function) -> bool:
    """Whether a command decodes with the flags that several commands share."""
    return "decoding" in inspect.signature(function).parameters


def table(flags: list[Flag]) -> str:
    """Flags as Markdown."""
    rows = ["| flag | value | default | what it does |", "|---|---|---|---|"]
    for flag in flags:
        default = f"`{flag.default}`" if flag.default else ""
        text = flag.text.replace("|", "\\|")
        rows.append(f"| `{flag.name}` | {flag.kind} | {default} | {text} |")
    return "\n".join(rows)


def made_part() -> str:
    """All commands and their flags as Markdown."""
    parts = [
        "## Shared flags",
        "`generate`, `learn` and `bench` take these beside their own.",
    ]
    for group in GROUPS:
        parts += [summary_of(group).partition("\n\nAttributes:")[0]]
        parts += [table(shared_flags(group))]
    for name, function in COMMANDS.items():
        parts += [f"## `ospec {name}`", summary_of(function)]
        parts.append(f"```\n{EXAMPLES[name]}\n```")
        if flags := list(own_flags(function)):
            parts.append(table(flags))
        if has_shared_flags(function):
            parts.append("And the [shared flags](#shared-flags).")
    return "\n\n".join(parts) + "\n"


def whole_page(text: str) -> str:
    """The page with its made part brought up to date."""
    by_hand, marker, _ = text.partition(MARKER)
    assert marker, f"{PAGE} has no marker"
    return f"{by_hand}{MARKER}\n\n{made_part()}"


if __name__ == "__main__":
    PAGE.write_text(whole_page(PAGE.read_text()))
