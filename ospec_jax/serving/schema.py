# SPDX-License-Identifier: Apache-2.0
"""Bodies of OpenAI's API, read into what the service is asked.

A parameter is honoured exactly, or refused with its name and what is possible. Only
what changes nothing in an answer is passed over, and keys that nobody knows are, as
OpenAI's own clients expect.
"""

import dataclasses
from typing import Any

from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.serving.asks import Ask
from ospec_jax.serving.errors import RequestError
from ospec_jax.serving.prompting import Kind, PromptReader, Server
from ospec_jax.serving.refused import REFUSED, refuse_unsupported
from ospec_jax.serving.values import Values, is_number, is_text, short

_COMPLETION_TOKENS = 16
"""New tokens of a completion that names no number: OpenAI's own default."""
_MAX_TOKENS = 2**31 - 1
_MAX_TENANT = 128


_READ = frozenset(
    {
        "echo",
        "frequency_penalty",
        "learn",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "min_p",
        "model",
        "n",
        "prediction",
        "presence_penalty",
        "prompt",
        "repetition_penalty",
        "seed",
        "speculative",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "tenant",
        "top_k",
        "top_logprobs",
        "top_p",
    }
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request as its body has it.

    Attributes:
      asks: One a prompt; their answers are numbered through.
      is_stream: Answer in chunks.
      has_usage: A chunk at the end says what was used.
      has_running_usage: Every chunk says what was used until then.
      is_obfuscated: Chunks are padded to few sizes.
      shows_drafted: Say of each token who proposed it.
      is_echoed: Answers begin with their prompts.
      ignored: Keys that were passed over.
    """

    kind: Kind
    asks: tuple[Ask, ...]
    is_stream: bool = False
    has_usage: bool = False
    has_running_usage: bool = False
    is_obfuscated: bool = False
    shows_drafted: bool = False
    is_echoed: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def num_choices(self) -> int:
        """Answers to all prompts."""
        return sum(ask.num_choices for ask in self.asks)


def read_wanted(
    body: dict[str, Any], kind: Kind, request_id: str, server: Server, key: str = ""
) -> Wanted:
    """What a body asks for.

    Args:
      request_id: For messages, and the prompts' own.
      key: Name of the client's key.

    Raises:
      RequestError: It cannot be done, or means nothing.
    """
    values = Values(body)
    _check_model(values, server.model)
    refuse_unsupported(values, kind == "chat")

    reader = _Reader(values, kind, server)
    num_choices = values.whole("n", 1, 1, server.config.max_choices)
    max_new_tokens = reader.max_new_tokens()
    sampling = reader.sampling()
    stop = reader.stop()
    num_log_probs = reader.num_log_probs()
    speculative = reader.speculative()
    prompts = PromptReader(values, request_id, server).read(kind)
    if len(prompts) * num_choices > server.config.max_choices:
        raise RequestError(
            f"{len(prompts)} prompts with n = {num_choices} make "
            f"{len(prompts) * num_choices} answers; at most "
            f"{server.config.max_choices} are possible at once",
            "n",
        )

    is_echoed = values.flag("echo", False)
    if is_echoed and kind == "chat":
        raise values.refusal("echo", "leave it out: only completions have it")
    if is_echoed and num_log_probs is not None:
        raise values.refusal(
            "echo", "leave out echo or logprobs: a prompt's tokens have none"
        )

    teaches = values.flag("learn", server.teaches)
    asks = [
        Ask(
            prompt=prompt,
            prompt_ids=ids,
            is_raw=kind == "completion",
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            num_choices=num_choices,
            stop=stop,
            num_log_probs=num_log_probs,
            can_speculate=speculative.flag("enabled", True),
            can_teach=teaches and server.can_teach,
            informs=values.flag("learn", True),
            scope=reader.scope(key),
        )
        for prompt, ids in prompts
    ]
    shows_drafted = speculative.flag("show", False)
    if shows_drafted and not server.config.tell_acceptance:
        raise RequestError(
            "speculative.show is True; this server does not tell who proposed a token",
            "speculative.show",
        )

    return Wanted(
        kind=kind,
        asks=tuple(asks),
        shows_drafted=shows_drafted,
        is_echoed=is_echoed,
        ignored=tuple(sorted(body.keys() - _READ - REFUSED.keys() - {"best_of"})),
        **reader.streaming(),
    )


def _check_model(values: Values, model: str) -> None:
    name = values.text("model")
    if name is None:
        raise RequestError(f"model is missing; use {model!r}", "model")
    if name != model:
        raise RequestError(
            f"there is no model {short(name)}; use {model!r}",
            "model",
            "model_not_found",
            status=404,
        )


class _Reader:
    """Parameters of one request, group by group."""

    def __init__(self, values: Values, kind: Kind, server: Server):
        self.values = values
        self.kind = kind
        self.server = server
        self.config = server.config

    def max_new_tokens(self) -> int | None:
        """The newer name wins, as it does at OpenAI's."""
        older = self.values.whole("max_tokens", None, 1, _MAX_TOKENS)
        newer = self.values.whole("max_completion_tokens", None, 1, _MAX_TOKENS)
        default = None if self.kind == "chat" else _COMPLETION_TOKENS

        return next((x for x in (newer, older) if x is not None), default)

    def sampling(self) -> SamplingConfig:
        """How tokens are chosen."""
        values = self.values
        temperature = values.number(
            "temperature", self.config.default_temperature, 0, 2
        )
        top_p = values.number("top_p", 1.0, 0, 1)
        # Of no probability mass at all the API leaves the most probable token.
        if top_p == 0:
            temperature = 0.0
            top_p = 1.0

        wanted = {
            "temperature": temperature,
            "top_p": top_p,
            # vLLM's word for all tokens is -1, others' is 0.
            "top_k": max(values.whole("top_k", 0, -1, _MAX_TOKENS), 0),
            "min_p": values.number("min_p", 0.0, 0, 1),
            "presence_penalty": values.number("presence_penalty", 0.0, -2, 2),
            "frequency_penalty": values.number("frequency_penalty", 0.0, -2, 2),
            "repetition_penalty": values.number("repetition_penalty", 1.0, 1e-3, 1e3),
            "logit_bias": self._logit_bias(),
        }

        return _make_sampling(wanted)

    def _logit_bias(self) -> tuple[tuple[int, float], ...]:
        bias = self.values.get("logit_bias", {})
        if not isinstance(bias, dict):
            raise self.values.refusal("logit_bias", "use an object of ids and numbers")
        if len(bias) > self.config.max_logit_bias:
            raise RequestError(
                f"logit_bias has {len(bias)} tokens; "
                f"{self.config.max_logit_bias} are possible",
                "logit_bias",
            )

        pairs = {}
        for name, value in bias.items():
            token = _as_id(name, self.server.vocab_size)
            if token is None or token in pairs:
                raise RequestError(
                    f"logit_bias has the token {short(name)}; use ids from 0 to "
                    f"{self.server.vocab_size - 1}, each once",
                    "logit_bias",
                )
            if not is_number(value) or not -100 <= value <= 100:
                raise RequestError(
                    f"logit_bias of {token} is {short(value)}; use -100 to 100",
                    "logit_bias",
                )
            pairs[token] = float(value)

        return tuple(sorted(pairs.items()))

    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        stop = self.values.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        most = self.config.max_stop
        longest = self.config.max_stop_characters
        if not isinstance(stop, list) or len(stop) > most:
            raise self.values.refusal("stop", f"use a string, or up to {most}")
        if not all(is_text(text) and 0 < len(text) <= longest for text in stop):
            raise self.values.refusal("stop", f"use strings of 1 to {longest} letters")

        return tuple(stop)

    def num_log_probs(self) -> int | None:
        """Alternatives with each token; None for no log-probabilities."""
        values = self.values
        most = self.config.max_top_logprobs
        if self.kind == "completion":
            return values.whole("logprobs", None, 0, most)

        is_on = values.flag("logprobs", False)
        num_top = values.whole("top_logprobs", None, 0, most)
        if num_top is not None and not is_on:
            raise values.refusal("top_logprobs", "set logprobs to true, too")

        return (num_top or 0) if is_on else None

    def speculative(self) -> Values:
        """Our own object of what is drafted and shown."""
        section = self.values.section("speculative")
        if "num_speculative_tokens" in section:
            raise section.refusal(
                "num_speculative_tokens",
                "the server chooses; use enabled to draft or not",
                "unsupported_parameter",
            )

        return self.values.section("speculative", ("enabled", "show"))

    def scope(self, key: str) -> str:
        """Whose the request is: a tenant is one of its key's, never of another's."""
        tenant = self.values.text("tenant")
        if tenant is None:
            return key
        if not 0 < len(tenant) <= _MAX_TENANT or not tenant.isprintable():
            raise self.values.refusal(
                "tenant", f"use 1 to {_MAX_TENANT} printable letters"
            )
        if "/" in tenant:
            raise self.values.refusal("tenant", "use a name without /")

        return f"{key}/{tenant}"

    def streaming(self) -> dict[str, bool]:
        """`Wanted`'s fields about chunks."""
        is_stream = self.values.flag("stream", False)
        if "stream_options" in self.values and not is_stream:
            raise self.values.refusal("stream_options", "set stream to true, too")

        options = self.values.section("stream_options")
        has_usage = options.flag("include_usage", False)

        return {
            "is_stream": is_stream,
            "has_usage": has_usage,
            "has_running_usage": options.flag("continuous_usage_stats", False),
            "is_obfuscated": options.flag("include_obfuscation", self.config.obfuscate),
        }


def _make_sampling(wanted: dict[str, Any]) -> SamplingConfig:
    """How tokens are chosen, with the names of the API.

    Raises:
      RequestError: A value means nothing, or cannot be honoured.
    """
    try:
        return SamplingConfig(**wanted)
    except ConfigError as error:
        # Its messages begin with the name of the value.
        name = str(error).split(" ", 1)[0]
        raise RequestError(str(error), name if name in wanted else None) from error


def _as_id(name: str, vocab_size: int) -> int | None:
    """The token id that a key of JSON is."""
    if not name.isascii() or not name.isdecimal() or len(name) > 10:
        return None

    token = int(name)
    return token if token < vocab_size else None
