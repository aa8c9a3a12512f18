# SPDX-License-Identifier: Apache-2.0
"""How the server is set: what it takes in and keeps, addresses, keys, limits."""

import dataclasses
import ipaddress
from pathlib import Path
from typing import Literal

from ospec_jax.config import ConfigError, check_types, whole_number

LearnMode = Literal["auto", "opt-in", "opt-out", "off"]

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
    """How requests are taken.

    Attributes:
      model: The model's name, as clients say it.
      max_model_len: Tokens of prompt and answer together; None for all that fit.
      max_waiting: Answers that may wait for a row.
      checkpoint: Folder for what is learned; None keeps nothing.
      checkpoint_seconds: Between two checkpoints.
      drafts: Folder of drafts that an administrator may have loaded.
      keeps_traffic: Checkpoints hold recent traffic, from which prompts can be read.
      kept_mib: Memory for caches of answered requests, so that a conversation's next
        turn need not run what was said before; 0 keeps none.
    """

    model: str
    max_model_len: int | None = None
    max_waiting: int = 64
    checkpoint: Path | None = None
    checkpoint_seconds: float = 300.0
    drafts: Path | None = None
    keeps_traffic: bool = False
    kept_mib: int = 512

    def __post_init__(self):
        whole_number("max_waiting", self.max_waiting, least=1)
        whole_number("kept_mib", self.kept_mib, least=0)
        if self.max_model_len is not None:
            whole_number("max_model_len", self.max_model_len, least=2)
        if not self.checkpoint_seconds > 0:
            raise ConfigError(
                f"checkpoint_seconds is {self.checkpoint_seconds}; use more than 0"
            )


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """How the server speaks to the outside.

    Attributes:
      host: Address to listen on.
      port: 0 takes any that is free.
      allow_no_key: Listen on other addresses than loopback without an API key.
      allowed_hosts: Names, beside loopback's, that a request without a key may say in
        its Host header. Pages of others cannot pass for this server's own by a name
        that they point at it.
      api_key_file: Keys of clients, one a line: `name key`, or a key alone; None asks
        for none. Of several keys, only those with `share` behind them have what all are
        served with learn from their answers.
      admin_key_file: Key of the administration, on a line of its own; without one
        there is no administration.
      open_metrics: /metrics asks for no key even if there are keys.
      default_temperature: For requests that name none; the API's own is 1.
      learn: Whether an answer teaches if its request does not say: `opt-in` no,
        `opt-out` yes, `off` never; `auto` is `opt-in` with several keys, else
        `opt-out`.
      tell_acceptance: Answers carry their acceptance, and may show who proposed each
        token. Whoever sees these learns something of what others have taught. Without,
        clients with keys do not see the status and the metrics either.
      obfuscate: Pad chunks to few sizes unless the request says otherwise.
      stream_interval: Seconds between two chunks of a stream at least.
      keep_alive: Seconds of silence after which a stream sends a comment.
      max_body_bytes: Of a request.
      max_prompt_bytes: Of all texts of a prompt, its prediction among them.
      max_header_bytes: Of all headers.
      max_messages: Turns of a conversation.
      max_choices: Answers of one request.
      max_stop: Stop strings.
      max_stop_characters: Of each of them.
      max_logit_bias: Tokens with a bias.
      max_top_logprobs: Alternatives told with each token.
      max_preparing: Requests whose template and tokens are under way.
      max_connections: Above which a connection is answered 503.
      body_seconds: For a body to arrive.
      prepare_seconds: For template and tokenizer.
      send_seconds: For a client to take what it is sent.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allow_no_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    open_metrics: bool = False
    default_temperature: float = 1.0
    learn: LearnMode = "auto"
    tell_acceptance: bool = True
    obfuscate: bool = False
    stream_interval: float = 0.0
    keep_alive: float = 15.0
    max_body_bytes: int = 4 * 2**20
    max_prompt_bytes: int = 2**20
    max_header_bytes: int = 16 * 2**10
    max_messages: int = 1024
    max_choices: int = 16
    max_stop: int = 4
    max_stop_characters: int = 256
    max_logit_bias: int = 300
    max_top_logprobs: int = 20
    max_preparing: int = 64
    max_connections: int = 512
    body_seconds: float = 30.0
    prepare_seconds: float = 30.0
    send_seconds: float = 60.0

    def __post_init__(self):
        check_types(self)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}; use 0 (any) to {2**16 - 1}")
        if not 0 <= self.default_temperature <= 2:
            raise ConfigError(
                f"default_temperature is {self.default_temperature}; use 0 to 2"
            )
        if not 0 <= self.stream_interval <= 10:
            raise ConfigError(
                f"stream_interval is {self.stream_interval} s; use 0 to 10"
            )

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value < 1:
                raise ConfigError(f"{field.name} is {value}; use 1 or more")

        for name in ("keep_alive", "body_seconds", "prepare_seconds", "send_seconds"):
            value = getattr(self, name)
            if not 0 < value < 1e6:
                raise ConfigError(f"{name} is {value}; use a number of seconds above 0")

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach the address."""
        if self.host == "localhost":
            return True

        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str]:
        """What a Host header may say where there are no keys."""
        return frozenset({*_LOOPBACK_NAMES, self.host, *self.allowed_hosts})
