# SPDX-License-Identifier: Apache-2.0
"""Prompts of OpenAI's API: turns, texts, token ids, and expected answers."""

from typing import Any, Literal, NamedTuple

from ospec_jax.data.prompts import Prompt
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.refused import NO_AUDIO, NO_TOOLS
from ospec_jax.serving.settings import HttpConfig
from ospec_jax.serving.values import Values, is_text, is_whole, short

Kind = Literal["chat", "completion"]

_SEED_RANGE = 2**32
_MAX_NAME = 64
_BYTES_PER_ID = 4
"""What a token id counts against the bound on a prompt's bytes."""
_ROLES = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_PARTS = {
    "file": "files",
    "input_file": "files",
    "image_url": "images",
    "input_audio": "audio",
    "input_image": "images",
    "video_url": "videos",
}


class Server(NamedTuple):
    """What reading needs to know of the server.

    Attributes:
      model: The only one there is.
      vocab_size: Ids of tokens lie below.
      teaches: Whether an answer teaches if its request does not say.
      can_teach: Whether any may.
    """

    config: HttpConfig
    model: str
    vocab_size: int
    teaches: bool = True
    can_teach: bool = True


class PromptReader:
    """The prompts of one request.

    Args:
      request_id: For messages, and the prompts' own.
    """

    def __init__(self, values: Values, request_id: str, server: Server):
        self.values = values
        self.request_id = request_id
        self.server = server
        self.config = server.config
        self._num_bytes = 0

    def read(self, kind: Kind) -> list[tuple[Prompt, tuple[int, ...]]]:
        """Prompts with token ids, if these stand in place of text."""
        prediction = self._prediction()
        seed = self._seed()
        # Bytes are counted over all of the request.
        if kind == "chat":
            messages = self._messages()
            texts = [(messages[-1]["content"], messages, ())]
        else:
            turn = lambda text: ({"role": "user", "content": text},) if text else ()
            texts = [(text, turn(text), ids) for text, ids in self._raw_prompts()]

        return [
            (Prompt(self.request_id, text, turns, "", prediction, seed=seed), ids)
            for text, turns, ids in texts
        ]

    def _seed(self) -> int | None:
        """The API knows 64 bits, and random numbers here begin with 32 of them."""
        seed = self.values.whole("seed", None, -(2**63), 2**63 - 1)
        return seed if seed is None else seed % _SEED_RANGE

    def _prediction(self) -> str:
        if "prediction" not in self.values:
            return ""

        section = self.values.section("prediction")
        if section.get("type") != "content":
            raise section.refusal("type", "use 'content'")
        if "content" not in section:
            raise section.refusal("content", "use text, or a list of text parts")

        # Parts of one answer: nothing stands between them.
        content = section.get("content")
        text = self._content(content, "prediction.content", joint="")
        if not text.strip():
            raise RequestError(
                "prediction.content is empty; leave the prediction out",
                "prediction.content",
            )

        return text

    def _messages(self) -> tuple[dict[str, str], ...]:
        messages = self.values.get("messages")
        if not isinstance(messages, list) or not messages:
            raise self.values.refusal("messages", "use a list of at least one turn")
        if len(messages) > self.config.max_messages:
            raise RequestError(
                f"messages has {len(messages)} turns; {self.config.max_messages} are "
                f"possible",
                "messages",
            )

        return tuple(self._message(turn, i) for i, turn in enumerate(messages))

    def _message(self, turn: Any, number: int) -> dict[str, str]:
        where = f"messages[{number}]"
        if not isinstance(turn, dict):
            raise RequestError(f"{where} is {short(turn)}; use an object", where)

        values = Values(turn, f"{where}.")
        role = values.get("role")
        if role in ("tool", "function"):
            raise values.refusal("role", NO_TOOLS, "unsupported_parameter")
        if not isinstance(role, str) or role not in _ROLES:
            raise values.refusal("role", f"use {', '.join(_ROLES)}")
        for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
            if name in values and values.get(name) != []:
                remedy = NO_AUDIO if name == "audio" else NO_TOOLS
                raise values.refusal(name, remedy, "unsupported_parameter")
        if "content" not in values:
            raise values.refusal("content", "use text, or a list of text parts")

        content = values.get("content")
        message = {"role": _ROLES[role]}
        message["content"] = self._content(content, f"{where}.content", joint="\n")
        name = values.text("name")
        # Templates that tell speakers apart read it.
        if name is not None:
            if len(name) > _MAX_NAME:
                raise values.refusal("name", f"use at most {_MAX_NAME} letters")
            message["name"] = name

        return message

    def _content(self, content: Any, where: str, joint: str) -> str:
        """A text, or the texts of parts."""
        if isinstance(content, str):
            return self._counted(content, where)
        if not isinstance(content, list) or not content:
            raise RequestError(
                f"{where} is {short(content)}; use text, or a list of text parts",
                where,
                "invalid_value",
            )

        texts = []
        for i, part in enumerate(content):
            place = f"{where}[{i}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in _PARTS:
                raise RequestError(
                    f"{place} has type {kind!r}; {_PARTS[kind]} are not supported, "
                    f"only parts of type 'text'",
                    place,
                    "unsupported_parameter",
                )
            if not isinstance(part, dict) or kind != "text":
                raise RequestError(
                    f"{place} is {short(part)}; use {{'type': 'text', 'text': ...}}",
                    place,
                    "invalid_value",
                )
            texts.append(self._counted(part.get("text"), f"{place}.text"))

        return joint.join(texts)

    def _counted(self, text: Any, where: str) -> str:
        """A text, whose bytes count."""
        if not is_text(text):
            raise RequestError(
                f"{where} is {short(text)}; use text (Unicode without lone surrogates)",
                where,
                "invalid_value",
            )

        self._count(len(text.encode("utf-8")), where)
        return text

    def _count(self, num_bytes: int, where: str) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self.config.max_prompt_bytes:
            raise RequestError(
                f"the prompt has more than {self.config.max_prompt_bytes} bytes; "
                f"shorten it",
                where,
                "string_above_max_length",
                status=413,
            )

    def _raw_prompts(self) -> list[tuple[str, tuple[int, ...]]]:
        """Texts and ids of a completion's prompts; one of the two is empty."""
        prompt = self.values.get("prompt")
        is_several = isinstance(prompt, list) and isinstance(
            prompt[0] if prompt else None, list | str
        )
        several: list[Any] = prompt if is_several else [prompt]
        if len(several) > self.config.max_choices:
            raise RequestError(
                f"prompt has {len(several)} of them; at most "
                f"{self.config.max_choices} are possible at once",
                "prompt",
            )

        return [self._raw_prompt(item) for item in several]

    def _raw_prompt(self, prompt: Any) -> tuple[str, tuple[int, ...]]:
        if isinstance(prompt, str) and prompt:
            return self._counted(prompt, "prompt"), ()

        size = self.server.vocab_size
        if not isinstance(prompt, list) or not prompt:
            raise RequestError(
                f"prompt is {short(prompt)}; use text, token ids, or a list of these, "
                f"none of them empty",
                "prompt",
                "invalid_value",
            )
        for token in prompt:
            if not is_whole(token) or not 0 <= token < size:
                raise RequestError(
                    f"prompt has the token {short(token)}; use whole numbers from 0 "
                    f"to {size - 1}, or texts alone",
                    "prompt",
                    "invalid_value",
                )

        self._count(_BYTES_PER_ID * len(prompt), "prompt")
        return "", tuple(prompt)
