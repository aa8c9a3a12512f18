# SPDX-License-Identifier: Apache-2.0
"""Prompts: JSON lines with a `prompt` string or chat `messages`."""

import dataclasses
import importlib.resources
import json
from pathlib import Path

from ospec_jax.config import ConfigError

DEMO_DOMAINS = ("math", "html", "yaml")
"""The demo's stream: one domain that the shipped draft knows, then two it does not."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, not yet tokenised.

    Attributes:
      messages: Chat turns, `{role, content}` each.
      text: The last user turn, or the raw prompt.
    """

    id: str
    text: str
    messages: tuple[dict, ...]
    domain: str = ""


def parse_prompt(row: dict, default_id: str) -> Prompt:
    """Reads one row.

    Raises:
      ConfigError: It has neither a prompt string nor well-formed messages.
    """
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        messages = ({"role": "user", "content": row["prompt"]},)
        text = row["prompt"]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = tuple(row["messages"])
        is_turn = lambda m: isinstance(m, dict) and {"role", "content"} <= m.keys()
        if not messages or not all(map(is_turn, messages)):
            raise ConfigError("`messages` needs turns with `role` and `content`")
        text = messages[-1]["content"]
    else:
        raise ConfigError("a row needs `prompt` (text) or `messages` (chat turns)")
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return Prompt(
        id=str(row.get("id", default_id)), text=text, messages=messages,
        domain=str(row.get("domain", "")),
    )  # fmt: skip


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a JSONL file.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: The file is empty, or a line is malformed or repeats an id; names
        the line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    prompts, seen = [], {}
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = parse_prompt(json.loads(line), f"{path.stem}-{number}")
            if prompt.id in seen:
                raise ConfigError(f"id {prompt.id!r} stands in line {seen[prompt.id]}")
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def demo_prompts(domain: str) -> list[Prompt]:
    """The project's own prompts of one demo domain."""
    files = importlib.resources.files("ospec_jax.data") / "prompts"
    with importlib.resources.as_file(files / f"{domain}.jsonl") as path:
        return read_prompts(path)


def encode(prompt: Prompt, tokenizer, is_raw: bool = False) -> tuple[int, ...]:
    """Token ids, through the chat template unless raw or there is none."""
    if is_raw or not tokenizer.chat_template:
        return tuple(tokenizer.encode(prompt.text))
    text = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer.encode(text, add_special_tokens=False))
