# SPDX-License-Identifier: Apache-2.0
"""OpenAI's newer API, responses: one answer at a time, of which nothing is kept.

A body is put into the words of a chat and read as one, so that both APIs mean the same.
"""

import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

from ospec_jax.serving.answers import (
    Source,
    chat_log_prob,
    encode_json,
    metrics_json,
    padded,
)
from ospec_jax.serving.asks import ChoiceEnd, Ended, Piece, Token, Usage
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.prompting import Server
from ospec_jax.serving.schema import Wanted, read_wanted
from ospec_jax.serving.values import Values, is_same, short

_LOG_PROBS = "message.output_text.logprobs"
_NOTHING = "reasoning.encrypted_content"
"""Clients ask for it of every model; of one that does not reason there is none."""
_TEXT_PARTS = ("input_text", "output_text", "text")
_STATELESS = "nothing is kept here; send the whole conversation as input"
_REFUSED = {
    "background": (_STATELESS, False),
    "conversation": (_STATELESS, None),
    "messages": ("use input", None),
    "n": ("there is one answer; ask several times", 1),
    "previous_response_id": (_STATELESS, None),
    "prompt": ("there are no stored prompts; use instructions and input", None),
    "max_completion_tokens": ("use max_output_tokens", None),
    "max_tokens": ("use max_output_tokens", None),
    "max_tool_calls": ("there are no tools", None),
    "logprobs": (f"use include, with {_LOG_PROBS!r}", None),
    "truncation": ("shorten the input", "disabled"),
}
"""Parameters with what to do instead, and a value that asks for nothing."""
_OWN = ("include", "input", "instructions", "max_output_tokens", "reasoning", "text")
_MESSAGES = re.compile(r"messages(?:\[(\d+)\])?")


def read_response(
    body: dict[str, Any], response_id: str, server: Server, key: str = ""
) -> Wanted:
    """What a body asks for.

    Args:
      key: Name of the client's key.

    Raises:
      RequestError: It cannot be done, or means nothing.
    """
    values = Values(body)
    for name, (remedy, neutral) in _REFUSED.items():
        value = values.get(name)
        if value is not None and not is_same(value, neutral):
            raise values.refusal(name, remedy, "unsupported_parameter")

    own = (*_OWN, *_REFUSED)
    chat = {name: value for name, value in body.items() if name not in own}
    # What there would be to choose from is refused by the chat's own rules.
    if values.get("tool_choice") == "auto":
        del chat["tool_choice"]
    _check_text(values)
    _check_reasoning(values)
    values.section("stream_options", ("include_obfuscation",))
    if values.section("speculative").get("show"):
        raise RequestError(
            "speculative.show is for /v1/chat/completions", "speculative.show"
        )

    chat |= _log_probs(values)
    chat["max_completion_tokens"] = values.whole("max_output_tokens", None, 1, 2**31)
    instructions = values.text("instructions")
    opening = [{"role": "system", "content": instructions}] if instructions else []
    chat["messages"] = opening + _turns(values)

    try:
        return read_wanted(chat, "chat", response_id, server, key)
    except RequestError as error:
        raise _in_own_words(error, len(opening)) from error


def _check_text(values: Values) -> None:
    text = values.section("text", ("format", "verbosity"))
    kind = text.section("format").get("type")
    if kind not in (None, "text"):
        raise text.refusal("format", "use {'type': 'text'}", "unsupported_parameter")
    if text.get("verbosity") not in (None, "medium"):
        remedy = "say in the instructions how long answers should be"
        raise text.refusal("verbosity", remedy, "unsupported_parameter")


def _check_reasoning(values: Values) -> None:
    reasoning = values.section("reasoning")
    for name in ("effort", "summary", "generate_summary"):
        if reasoning.get(name) not in (None, "none", "auto"):
            remedy = "leave it out: the model does not reason apart"
            raise reasoning.refusal(name, remedy, "unsupported_parameter")


def _log_probs(values: Values) -> dict[str, Any]:
    """A chat's words for log-probabilities."""
    include = values.get("include", [])
    if not isinstance(include, list):
        raise values.refusal("include", f"use a list, like [{_LOG_PROBS!r}]")
    for item in include:
        if item not in (_LOG_PROBS, _NOTHING):
            raise RequestError(
                f"include has {short(item)}; {_LOG_PROBS!r} is possible",
                "include",
                "unsupported_parameter",
            )
    if _LOG_PROBS in include:
        return {"logprobs": True}
    # 0 is what clients send that want none.
    if values.get("top_logprobs"):
        raise values.refusal("top_logprobs", f"include {_LOG_PROBS!r}, too")

    return {"top_logprobs": None}


def _turns(values: Values) -> list[Any]:
    """The input as a chat's messages."""
    given = values.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise values.refusal("input", "use text, or a list of messages")

    return [_turn(item, f"input[{i}]") for i, item in enumerate(given)]


def _turn(item: Any, where: str) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind not in (None, "message"):
        raise RequestError(
            f"{where} has the type {short(kind)}; only messages are possible",
            f"{where}.type",
            "unsupported_parameter",
        )

    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]

    return {"role": item.get("role"), "content": content}


def _part(part: Any) -> Any:
    is_text = isinstance(part, dict) and part.get("type") in _TEXT_PARTS
    return {"type": "text", "text": part.get("text")} if is_text else part


def _in_own_words(error: RequestError, num_before: int) -> RequestError:
    """A chat's refusal, with the names of this API."""

    def rename(match: re.Match) -> str:
        if match[1] is None:
            return "input"
        number = int(match[1]) - num_before
        return f"input[{number}]" if number >= 0 else "instructions"

    change = lambda text: _MESSAGES.sub(rename, text)
    param = error.param and change(error.param)

    return RequestError(
        change(error.message), param, error.code, error.status, error.retry_after
    )


class ResponseTeller:
    """Tells one request's events in this API's words.

    Args:
      body: That was asked; the answer says what it was asked with.
    """

    last = b""

    def __init__(self, wanted: Wanted, source: Source, body: dict[str, Any]):
        self._wanted = wanted
        self._source = source
        self._body = body
        self._created = int(time.time())
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._logs = wanted.asks[0].num_log_probs is not None
        self._number = 0
        self._texts: list[str] = []
        self._log_probs: list[dict[str, Any]] = []
        self._reason = ""

    def encode(self, event: dict[str, Any]) -> bytes:
        """An event as lines of a stream."""
        if self._wanted.is_obfuscated:
            event = padded(event)

        return b"event: %s\ndata: %s\n\n" % (
            event["type"].encode(),
            encode_json(event),
        )

    def open(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        response = self._response("in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event(
                "response.output_item.added",
                output_index=0,
                item=self._item("in_progress", []),
            ),
            self._of_part("response.content_part.added", part=self._part("", [])),
        ]

    def add(self, events: Iterable[Piece | ChoiceEnd | Ended]) -> list[dict[str, Any]]:
        """What some events add to a stream."""
        told = []
        for event in events:
            if isinstance(event, Piece):
                told += self._continue(event.text, event.tokens)
            elif isinstance(event, ChoiceEnd):
                told += self._continue(event.text, ()) + self._end_text(event)
            else:
                told.append(self._end(event))

        return told

    def fail(self, error: RequestError) -> list[dict[str, Any]]:
        """What a stream ends with that has failed."""
        said = error.to_json()["error"]
        response = self._response("failed", [])
        code = said["code"] or "server_error"
        response["error"] = {"code": code, "message": said["message"]}

        return [self._event("response.failed", response=response)]

    def tell_whole(
        self, events: Iterable[Piece | ChoiceEnd], ended: Ended
    ) -> dict[str, Any]:
        """The whole answer."""
        self.add(events)
        return self._end(ended)["response"]

    def _continue(self, text: str, tokens: tuple[Token, ...]) -> list[dict[str, Any]]:
        found = []
        if self._logs:
            found = [chat_log_prob(token, self._source.texts) for token in tokens]
        self._texts.append(text)
        self._log_probs += found
        if not text and not found:
            return []

        return [self._of_part("response.output_text.delta", delta=text, logprobs=found)]

    def _end_text(self, end: ChoiceEnd) -> list[dict[str, Any]]:
        self._reason = end.finish_reason
        text = "".join(self._texts)
        return [
            self._of_part(
                "response.output_text.done", text=text, logprobs=self._log_probs
            ),
            self._of_part("response.content_part.done", part=self._whole_part()),
            self._event(
                "response.output_item.done", output_index=0, item=self._whole_item()
            ),
        ]

    def _end(self, ended: Ended) -> dict[str, Any]:
        status = "completed" if self._reason == "stop" else "incomplete"
        response = self._response(status, [self._whole_item()], ended.version)
        response["usage"] = _usage_json(ended.usage)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._source.tells_acceptance:
            response["metrics"] = metrics_json(ended, 1)

        return self._event(f"response.{status}", response=response)

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        number = self._number
        self._number += 1
        return {"type": kind, "sequence_number": number, **values}

    def _of_part(self, kind: str, **values: Any) -> dict[str, Any]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **values)

    def _whole_part(self) -> dict[str, Any]:
        return self._part("".join(self._texts), self._log_probs)

    def _part(self, text: str, log_probs: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": log_probs,
        }

    def _whole_item(self) -> dict[str, Any]:
        status = "completed" if self._reason == "stop" else "incomplete"
        return self._item(status, [self._whole_part()])

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._item_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], *version: int
    ) -> dict[str, Any]:
        body = self._body
        sampling = self._wanted.asks[0].sampling
        return {
            "id": self._source.request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": self._source.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "system_fingerprint": self._source.fingerprint(*version),
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
