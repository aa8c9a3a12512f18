# SPDX-License-Identifier: Apache-2.0
"""Prompts: JSON lines with a `prompt` string or chat `messages`."""

import dataclasses
import difflib
import importlib.resources
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ospec_jax import atomic
from ospec_jax.config import ConfigError

_LOG = logging.getLogger(__name__)
_KEYS = {
    "id",
    "prompt",
    "messages",
    "domain",
    "prediction",
    "prediction_confidence",
    "seed",
    "choice",
}
DEMO_DOMAINS = ("math", "html", "yaml")
"""The demo's stream: one domain that the shipped draft knows, then two it does not."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, not yet tokenised.

    Attributes:
      messages: Chat turns, `{role, content}` each.
      text: The last user turn, or the raw prompt.
      prediction: What the answer is expected to be, as an edited file is; or empty.
      prediction_confidence: Chance that its first token is right.
      seed: Of this prompt's sampling alone: its answer then repeats as long as the same
        draft is served, and nothing is learned from it. None shares the call's seed,
        under which every answer has numbers of its own.
      choice: Which of several answers under that seed this is, from 0.
    """

    id: str
    text: str
    messages: tuple[dict, ...]
    domain: str = ""
    prediction: str = ""
    prediction_confidence: float = 0.5
    seed: int | None = None
    choice: int = 0


def parse_prompt(row: dict, default_id: str) -> Prompt:
    """Reads one row.

    Raises:
      ConfigError: It has neither a prompt string nor well-formed messages, or a
        prediction that is none.
    """
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        messages = ({"role": "user", "content": row["prompt"]},)
        text = row["prompt"]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = tuple(row["messages"])
        is_turn = lambda m: (
            isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str)
        )
        if not messages or not all(map(is_turn, messages)):
            raise ConfigError(
                "`messages` needs turns with `role` and text as `content`"
            )
        text = messages[-1]["content"]
    elif isinstance(row, dict) and "turns" in row:
        raise ConfigError(
            "a row with `turns` is one of Spec-Bench's questions, whose later turns "
            "need answers to the earlier ones; `ospec bench --spec-bench` asks them, "
            "other rows have `prompt` (text) or `messages` (chat turns)"
        )
    else:
        raise ConfigError("a row needs `prompt` (text) or `messages` (chat turns)")

    if not text.strip():
        raise ConfigError("the prompt is empty")

    return Prompt(
        id=str(row.get("id", default_id)),
        text=text,
        messages=messages,
        domain=str(row.get("domain", "")),
        **_prediction_of(row),
        **_seed_of(row),
    )


def _prediction_of(row: dict) -> dict:
    """`Prompt`'s fields about the expected answer."""
    if row.get("prediction") is None:
        return {}

    confidence = row.get("prediction_confidence", 0.5)
    if not isinstance(confidence, int | float) or not 0 < confidence <= 1:
        raise ConfigError(f"prediction_confidence is {confidence!r}; it lies in (0, 1]")

    text = _checked_prediction(row["prediction"])
    return {"prediction": text, "prediction_confidence": float(confidence)}


def _seed_of(row: dict) -> dict:
    """`Prompt`'s fields about random numbers of its own."""
    found = {key: row[key] for key in ("seed", "choice") if row.get(key) is not None}

    for key, value in found.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not 0 <= value < 2**32:
            raise ConfigError(f"{key} is {value!r}; use a whole number below 2**32")

    if "choice" in found and "seed" not in found:
        raise ConfigError("`choice` counts answers under a `seed`; give that, too")

    return found


def _checked_prediction(prediction) -> str:
    if isinstance(prediction, bytes):
        return decode_prediction(prediction, "the prediction")
    if not isinstance(prediction, str):
        raise ConfigError(
            f"the prediction is a {type(prediction).__name__}; it must be the text "
            f"that the answer is expected to be"
        )
    if not prediction.strip():
        raise ConfigError("the prediction is empty; leave it out instead")

    return prediction


def decode_prediction(content: bytes, name: str) -> str:
    """Text of a predicted answer.

    Raises:
      ConfigError: It is not UTF-8, or empty.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text: byte 0x{content[error.start]:02x} at "
            f"{error.start}; convert it, or predict text instead"
        ) from error

    return _checked_prediction(text)


def read_prediction(path: str | Path) -> str:
    """Reads a predicted answer from a file.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: It is empty, or not UTF-8.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no prediction file {path}")

    return decode_prediction(path.read_bytes(), str(path))


def add_predictions(
    prompts: Sequence[Prompt], predictions: Sequence[str | None]
) -> list[Prompt]:
    """Prompts with what their answers are expected to be.

    Raises:
      ConfigError: There are more or fewer of them, or one is no text.
    """
    if isinstance(predictions, str) or len(predictions) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts need as many predictions, None where there is "
            f"none; got {predictions!r:.80}"
        )

    pairs = zip(prompts, predictions, strict=True)
    return [
        p if t is None else dataclasses.replace(p, prediction=_checked_prediction(t))
        for p, t in pairs
    ]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a JSONL file; `-` is standard input.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: The file is empty, or a line is malformed or repeats an id; names
        the line.
    """
    path = Path(path).expanduser()
    lines = read_lines(path)
    prompts = []
    seen = {}
    unread = Counter()
    name = "stdin" if str(path) == "-" else path.stem

    for number, line in lines:
        try:
            row = parse_line(line)
            prompt = parse_prompt(row, f"{name}-{number}")
            unread.update(row.keys() - _KEYS)
            if prompt.id in seen:
                raise ConfigError(f"id {prompt.id!r} stands in line {seen[prompt.id]}")
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        seen[prompt.id] = number
        prompts.append(prompt)

    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    if unread:
        _tell_of_unread(path, unread)

    return prompts


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a file that are not empty, with their numbers; `-` is standard input.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: It is not UTF-8.
    """
    is_input = str(path) == "-"
    if not is_input and not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")

    try:
        content = sys.stdin.buffer.read() if is_input else path.read_bytes()
        # Some editors put a mark of its encoding in front of a file.
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; convert it") from error

    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _tell_of_unread(path: Path, unread: Counter) -> None:
    """Names keys that mean nothing here, aloud if one may be a slip of the pen."""
    counts = ", ".join(f"{key!r} ({count})" for key, count in unread.most_common(9))
    told = (
        f"{path}: keys of rows that are not read, and in how many: {counts}; those "
        f"that are read are {', '.join(sorted(_KEYS))}"
    )
    if any(difflib.get_close_matches(key, _KEYS, 1, 0.75) for key in unread):
        warnings.warn(told, stacklevel=3)
    else:
        _LOG.info(told)


def parse_line(line: str) -> Any:
    """One row, as JSON.

    Raises:
      ConfigError: It is none, or holds half of a character.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{error}; each line is a row of JSON, like "
            f'{{"prompt": "..."}}; `ospec generate --prompt` asks a text alone'
        ) from error

    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"it has {error.object[error.start]!a}, half of a surrogate pair, which is "
            f"no character; write both halves, or the character itself"
        ) from error

    return row


def write_prompts(path: str | Path, prompts: Sequence[Prompt]) -> None:
    """Writes a JSONL file that `read_prompts` reads back as the same prompts."""
    lines = [json.dumps(row_of(prompt), ensure_ascii=False) for prompt in prompts]
    atomic.write_text(Path(path).expanduser(), "\n".join(lines) + "\n")


def row_of(prompt: Prompt) -> dict:
    """What `parse_prompt` reads back as the same prompt, as JSON has it."""
    row: dict = {"id": prompt.id, "domain": prompt.domain}
    if prompt.messages == ({"role": "user", "content": prompt.text},):
        row["prompt"] = prompt.text
    else:
        row["messages"] = list(prompt.messages)

    if prompt.prediction:
        row["prediction"] = prompt.prediction
        row["prediction_confidence"] = prompt.prediction_confidence

    if prompt.seed is not None:
        row["seed"] = prompt.seed
        row["choice"] = prompt.choice

    return row


def demo_prompts(domain: str) -> list[Prompt]:
    """The project's own prompts of one demo domain."""
    files = importlib.resources.files("ospec_jax.data") / "prompts"
    with importlib.resources.as_file(files / f"{domain}.jsonl") as path:
        return read_prompts(path)


def encode_prediction(prompt: Prompt, tokenizer) -> tuple[int, ...]:
    """Token ids of the expected answer and its end; empty when there is none."""
    if not prompt.prediction:
        return ()

    ids = tokenizer.encode(prompt.prediction, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return (*ids, end) if end is not None else tuple(ids)
