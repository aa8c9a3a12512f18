# SPDX-License-Identifier: Apache-2.0
"""Chat templates: programs that come with a model, and may say no, or never end.

They run in Jinja's sandbox, as transformers has it. It keeps them from everything but
their own text; here they are kept from taking for ever, too.
"""

import contextlib
import sys
from collections.abc import Generator, Sequence
from typing import Any

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import Prompt

_MAX_LINES = 200_000
"""Lines of a compiled template that one prompt may run: a second's worth, a
thousand times what templates in use take."""
_MAX_CHARACTERS = 16_000_000
"""Of one variable."""
_FILE = "<template>"
"""What Jinja compiles a template as that was no file."""
_MARKER = "Xq7UsersTurn7qX"
"""Stands for what a user says: no template has it, and none would trim it."""


class _TooMuchError(Exception):
    """A template went beyond a limit."""


def encode(prompt: Prompt, tokenizer: Any, is_raw: bool = False) -> tuple[int, ...]:
    """Token ids, through the chat template unless raw or there is none.

    Raises:
      ConfigError: The template refuses the prompt, or there are turns and no template.
    """
    if not is_raw and tokenizer.chat_template:
        text = _render(prompt, tokenizer)
        # The template has written special tokens itself.
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    # Without a template one turn can be text as it is; several would need to be joined
    # somehow.
    if prompt.messages[:-1]:
        why = "it is asked for raw" if is_raw else "the model has no chat template"
        raise ConfigError(
            f"the prompt {prompt.id!r} has {len(prompt.messages)} turns, but {why}: "
            f"nothing says how they are put together; give one text as `prompt`"
        )

    return tuple(tokenizer.encode(prompt.text))


def encode_opening(turns: Sequence[dict], tokenizer: Any) -> tuple[int, ...]:
    """Token ids up to where a user's turn begins, for a target to write that turn.

    What the template puts in front of it by itself, like a default system turn, is
    there. The place is found by a marker in the turn, so any template will do.

    Args:
      turns: What was said before, `{role, content}` each.

    Raises:
      ConfigError: There is no template, it refuses the turns, or it does not show what
        the user says exactly once.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "the model has no chat template, so nothing says where a user's turn "
            "begins; use a model that was tuned to chat, or give prompts of your own"
        )

    turn = {"role": "user", "content": _MARKER}
    prompt = Prompt("a user's turn", _MARKER, (*turns, turn))
    text = _render(prompt, tokenizer, has_reply=False)
    opening, *behind = text.split(_MARKER)
    if len(behind) != 1:
        raise ConfigError(
            f"the model's chat template shows a user's turn {len(behind)} times, not "
            f"once, so where it begins is not known; give prompts of your own"
        )

    # A word takes the space in front of it into its first token.
    return tuple(tokenizer.encode(opening.rstrip(" "), add_special_tokens=False))


def _render(prompt: Prompt, tokenizer: Any, has_reply: bool = True) -> str:
    """The text of a conversation, up to the beginning of the reply if it has one."""
    try:
        with _bounded():
            return tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=has_reply, tokenize=False
            )
    except Exception as error:
        # What a template does is up to its author: anything may come of it.
        said = str(error) or type(error).__name__
        raise ConfigError(
            f"the prompt {prompt.id!r}: the model's chat template refuses it: {said}; "
            f"change its turns (some models know no system turn, or want turns in "
            f"alternation), or pass the text raw"
        ) from error


@contextlib.contextmanager
def _bounded() -> Generator[None]:
    """Raises within a template that runs too many lines, or makes too long a text.

    Python's own tracing tells of each line; only those of templates are looked at. One
    line's work is not bounded.
    """
    num_lines = 0
    # A debugger or a coverage tool may be tracing already; it gets its place back.
    before = sys.gettrace()

    def on_line(frame: Any, event: str, _: Any) -> Any:
        nonlocal num_lines
        num_lines += 1
        if num_lines > _MAX_LINES:
            raise _TooMuchError(f"it has run {num_lines} lines, and goes on")

        sizes = (len(x) for x in frame.f_locals.values() if isinstance(x, str | list))
        if max(sizes, default=0) > _MAX_CHARACTERS:
            raise _TooMuchError(f"it makes a text of over {_MAX_CHARACTERS} characters")

        return on_line

    def on_call(frame, event: str, argument):
        # None spares everything but templates the call for each line.
        return on_line if frame.f_code.co_filename == _FILE else None

    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
