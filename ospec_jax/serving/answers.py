# SPDX-License-Identifier: Apache-2.0
"""Events of a service, told as OpenAI's objects and chunks."""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.serving.asks import ChoiceEnd, Ended, Piece, Token, Usage
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.schema import Wanted
from ospec_jax.serving.token_texts import TokenTexts

DONE = b"data: [DONE]\n\n"
"""The last line of a stream, after an error, too."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: proxies keep a stream open in which something moves."""

_LEAST_LOG_PROB = -9999.0
"""What OpenAI says for less than it tells; JSON has no infinity."""
_BUCKET = 256
"""Chunks are padded to multiples of so many bytes: most of them to one and the same
size, whether they bring one token or five."""


def as_event(chunk: dict[str, Any], is_obfuscated: bool = False) -> bytes:
    """A chunk as a line of a stream."""
    if is_obfuscated:
        chunk = padded(chunk)

    return b"data: " + encode_json(chunk) + b"\n\n"


def padded(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chunk of one of few sizes."""
    size = len(encode_json(chunk | {"obfuscation": ""}))
    num_missing = -size % _BUCKET

    return chunk | {"obfuscation": secrets.token_hex(num_missing)[:num_missing]}


def encode_json(value: Any) -> bytes:
    """JSON without spaces."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8")


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object.

    Rejected tokens of a prediction are not among the completion's: they are no part of
    the answer. A predicted token that the target wrote by itself, since nothing was
    drafted in its place, is neither accepted nor rejected.
    """
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_prediction,
            "rejected_prediction_tokens": usage.rejected_prediction,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
    }


def metrics_json(ended: Ended, num_choices: int) -> dict[str, Any]:
    """vLLM's metrics object; times are those of one answer, so only one has them."""
    metrics: dict[str, Any] = {"speculative_decoding": ended.stats.to_json()}
    if num_choices != 1:
        return metrics

    generation = max(ended.seconds - ended.first_token_seconds, 0.0)
    num_later = ended.usage.completion - 1
    metrics |= {
        "time_to_first_token_ms": 1000 * ended.first_token_seconds,
        "queue_time_ms": 1000 * ended.queue_seconds,
        "generation_time_ms": 1000 * generation,
    }
    if num_later > 0 and generation > 0:
        metrics["mean_itl_ms"] = 1000 * generation / num_later
        metrics["tokens_per_second"] = num_later / generation

    return metrics


def merge_ends(ends: Sequence[Ended]) -> Ended:
    """The end of a request of several prompts."""
    totals = [sum(counts) for counts in zip(*(e.usage for e in ends), strict=True)]
    return Ended(
        Usage(*totals),
        sum((end.stats for end in ends), start=DecodingStats()),
        ends[-1].version,
        max(end.queue_seconds for end in ends),
        min(end.first_token_seconds for end in ends),
        max(end.seconds for end in ends),
    )


class Source(NamedTuple):
    """What answers are told of.

    Attributes:
      request_id: `chatcmpl-...` or `cmpl-...`.
      fingerprint: Of the draft that is served at the moment, or of a version.
      tells_acceptance: Say how much of the draft was accepted.
    """

    request_id: str
    model: str
    texts: TokenTexts
    fingerprint: Callable[..., str]
    tells_acceptance: bool = True


class Teller:
    """Tells one request's events, as chunks or as a whole answer.

    Args:
      num_prompt_tokens: Of all prompts.
    """

    def __init__(self, wanted: Wanted, source: Source, num_prompt_tokens: int):
        self._wanted = wanted
        self._source = source
        self._num_prompt_tokens = num_prompt_tokens
        self._created = int(time.time())
        self._is_chat = wanted.kind == "chat"
        self._logs = wanted.asks[0].num_log_probs is not None
        self._num_missing = wanted.num_choices
        self._num_told = 0
        self._held: dict[str, Any] | None = None
        self._told = [_Told() for _ in range(wanted.num_choices)]
        self._echoes = self._read_echoes()

    def _read_echoes(self) -> list[str]:
        """What answers begin with."""
        echoes = []
        for ask in self._wanted.asks:
            text = ""
            if self._wanted.is_echoed:
                text = ask.prompt.text or self._source.texts.decode(ask.prompt_ids)
            echoes += [text] * ask.num_choices

        return echoes

    # Chunks.

    last = DONE

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """A chunk as a line of a stream."""
        return as_event(chunk, self._wanted.is_obfuscated)

    def fail(self, error: RequestError) -> list[dict[str, Any]]:
        """What a stream ends with that has failed."""
        return [error.to_json()]

    def open(self) -> list[dict[str, Any]]:
        """What a stream begins with.

        Choices are opened in order: clients number them as they come. A role is said
        once, since clients put what is said of it together.
        """
        if self._is_chat:
            deltas = [{"role": "assistant", "content": "", "refusal": None}]
            choices = [
                self._choice(i, {"delta": deltas[0]})
                for i in range(self._wanted.num_choices)
            ]
        else:
            choices = [
                self._choice(i, {"text": text})
                for i, text in enumerate(self._echoes)
                if text
            ]

        return [self._chunk(choice) for choice in choices]

    def add(self, events: Iterable[Piece | ChoiceEnd | Ended]) -> list[dict[str, Any]]:
        """What some events add to a stream; those of a choice go together."""
        chunks = []
        waiting: dict[int, list[Piece]] = {}

        for event in events:
            if isinstance(event, Piece):
                waiting.setdefault(event.choice, []).append(event)
            elif isinstance(event, ChoiceEnd):
                pieces = waiting.pop(event.choice, [])
                chunks += self._end_choice(pieces, event)
            else:
                chunks += self._end(event)

        for pieces in waiting.values():
            chunk = self._continue(pieces)
            if chunk is not None:
                chunks.append(chunk)

        return chunks

    def _continue(self, pieces: list[Piece]) -> dict[str, Any] | None:
        choice, text = self._take(pieces)
        is_silent = not text and not self._logs and not self._wanted.shows_drafted
        if is_silent:
            return None

        return self._chunk(choice | self._said(text))

    def _end_choice(self, pieces: list[Piece], end: ChoiceEnd) -> list[dict[str, Any]]:
        nothing = Piece(end.choice, "", ())
        choice, text = self._take(pieces or [nothing])
        choice |= self._said(text + end.text)
        choice["finish_reason"] = end.finish_reason
        chunk = self._chunk(choice)
        self._num_missing -= 1
        # What is said of all answers goes with the last of them, if with none apart.
        if self._num_missing == 0 and not self._wanted.has_usage:
            self._held = chunk
            return []

        return [chunk]

    def _end(self, ended: Ended) -> list[dict[str, Any]]:
        if self._wanted.has_usage:
            last = self._chunk(None) | {"usage": usage_json(ended.usage)}
        elif self._held is not None:
            last = self._held
        else:
            return []

        last["system_fingerprint"] = self._source.fingerprint(ended.version)
        return [last | self._metrics(ended)]

    def _take(self, pieces: list[Piece]) -> tuple[dict[str, Any], str]:
        """Notes pieces of one choice: what is said of their tokens, and their text."""
        number = pieces[0].choice
        told = self._told[number]
        tokens = [token for piece in pieces for token in piece.tokens]
        self._num_told += len(tokens)
        choice = self._choice(number, {})
        if self._logs:
            choice["logprobs"] = self._log_probs(tokens, told)
        if self._wanted.shows_drafted:
            choice["speculative"] = {"tokens": self._shown(pieces, told)}

        return choice, "".join(piece.text for piece in pieces)

    def _said(self, text: str) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": text}

        return {"delta": {"content": text} if text else {}}

    def _choice(self, number: int, said: dict[str, Any]) -> dict[str, Any]:
        return {"index": number, **said, "logprobs": None, "finish_reason": None}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        chunk = self._head("chat.completion.chunk")
        chunk["choices"] = [] if choice is None else [choice]
        if self._wanted.has_running_usage:
            usage = Usage(self._num_prompt_tokens, self._num_told)
            chunk["usage"] = usage_json(usage)
        elif self._wanted.has_usage:
            chunk["usage"] = None

        return chunk

    # Whole answers.

    def tell_whole(
        self, events: Iterable[Piece | ChoiceEnd], ended: Ended
    ) -> dict[str, Any]:
        """The whole answer."""
        pieces: list[list[Piece]] = [[] for _ in self._told]
        ends: dict[int, ChoiceEnd] = {}
        for event in events:
            if isinstance(event, Piece):
                pieces[event.choice].append(event)
            else:
                ends[event.choice] = event

        answer = self._head("chat.completion", ended.version)
        answer["choices"] = [
            self._whole_choice(found, ends[i], self._echoes[i])
            for i, found in enumerate(pieces)
        ]
        answer["usage"] = usage_json(ended.usage)

        return answer | self._metrics(ended)

    def _whole_choice(
        self, pieces: list[Piece], end: ChoiceEnd, echo: str
    ) -> dict[str, Any]:
        choice, text = self._take(pieces or [Piece(end.choice, "", ())])
        text = echo + text + end.text
        if self._is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            choice["message"] = message
        else:
            choice["text"] = text
        choice["finish_reason"] = end.finish_reason

        return choice

    # Both.

    def _head(self, name: str, *version: int) -> dict[str, Any]:
        return {
            "id": self._source.request_id,
            "object": name if self._is_chat else "text_completion",
            "created": self._created,
            "model": self._source.model,
            "system_fingerprint": self._source.fingerprint(*version),
        }

    def _metrics(self, ended: Ended) -> dict[str, Any]:
        if not self._source.tells_acceptance:
            return {}

        return {"metrics": metrics_json(ended, self._wanted.num_choices)}

    def _shown(self, pieces: list[Piece], told: "_Told") -> list[dict[str, Any]]:
        """Who proposed each token, and in which step."""
        texts = self._source.texts
        shown = []
        for piece in pieces:
            for token in piece.tokens:
                entry = {
                    "text": texts.text_of(token.id),
                    "bytes": list(texts.bytes_of(token.id)),
                    "drafted": token.is_drafted,
                    "source": token.source,
                    "step": told.num_steps,
                }
                if token.is_drafted and piece.drafter is not None:
                    entry["drafter"] = piece.drafter
                shown.append(entry)
            told.num_steps += bool(piece.tokens)

        return shown

    def _log_probs(self, tokens: list[Token], told: "_Told") -> dict[str, Any]:
        if self._is_chat:
            content = [chat_log_prob(token, self._source.texts) for token in tokens]
            return {"content": content, "refusal": None}

        texts = [self._source.texts.plain_of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(told.num_characters)
            told.num_characters += len(text)

        has_top = bool(self._wanted.asks[0].num_log_probs)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.log_prob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if has_top else None,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        plain = self._source.texts.plain_of
        return {plain(i): _finite(value) for i, value in token.alternatives}


class _Told:
    """What was told of one choice."""

    def __init__(self):
        self.num_steps = 0
        self.num_characters = 0


def chat_log_prob(token: Token, texts: TokenTexts) -> dict[str, Any]:
    """A token with its log-probability, and the alternatives to it."""

    def entry(token_id: int, value: float | None) -> dict[str, Any]:
        return {
            "token": texts.text_of(token_id),
            "logprob": _finite(value),
            "bytes": list(texts.bytes_of(token_id)),
        }

    others = [entry(i, value) for i, value in token.alternatives]
    return entry(token.id, token.log_prob) | {"top_logprobs": others}


def _finite(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        return _LEAST_LOG_PROB

    return max(float(value), _LEAST_LOG_PROB)
