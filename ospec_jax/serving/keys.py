# SPDX-License-Identifier: Apache-2.0
"""Keys of clients and of the administration."""

import hashlib
import secrets
from pathlib import Path
from typing import Literal, NamedTuple

from ospec_jax.config import ConfigError
from ospec_jax.serving.settings import HttpConfig

_LEAST_CHARACTERS = 8
_SHARE = "share"
"""Last word of a line whose key shares what is learned."""
_ANONYMOUS = "key"
"""Beginning of the names of keys that have none."""

Bearer = Literal["nobody", "client", "admin"]


class Caller(NamedTuple):
    """Who calls.

    Attributes:
      name: Of the key; the scope of what is remembered.
      is_sharing: What all are served with may learn from its answers.
    """

    bearer: Bearer
    name: str = ""
    is_sharing: bool = False


class _Client(NamedTuple):
    """A line of a key file.

    Attributes:
      is_sharing: The line says so.
    """

    key: str
    is_sharing: bool = False


class Keys:
    """The keys that are known.

    Only their digests are kept, and all of them are compared, each in constant time:
    how long a refusal takes says nothing of how near a guess came.
    """

    def __init__(self, clients: dict[str, _Client], admin: str | None = None):
        self._clients = {name: _digest(one.key) for name, one in clients.items()}
        # One alone shares with nobody else; of several, those that agreed to.
        self._sharing = {name for name, one in clients.items() if one.is_sharing}
        self._is_lone = len(clients) <= 1
        self._admin = None if admin is None else _digest(admin)

    @classmethod
    def read(cls, config: HttpConfig) -> "Keys":
        """Keys of the configured files.

        Raises:
          FileNotFoundError: There is no such file.
          ConfigError: A line is malformed, or the same key stands for two.
        """
        clients = {}
        if config.api_key_file is not None:
            clients = _read_keys(config.api_key_file)

        admin = None
        if config.admin_key_file is not None:
            found = [one.key for one in _read_keys(config.admin_key_file).values()]
            if len(found) != 1:
                raise ConfigError(
                    f"{config.admin_key_file} has {len(found)} keys; the "
                    f"administration has one"
                )
            admin = found[0]
            if admin in {one.key for one in clients.values()}:
                raise ConfigError(
                    "the administration's key is also a client's; use another one"
                )

        return cls(clients, admin)

    @property
    def num_clients(self) -> int:
        """Keys of clients."""
        return len(self._clients)

    @property
    def has_admin(self) -> bool:
        """Whether there is an administration."""
        return self._admin is not None

    def identify(self, authorization: str) -> Caller:
        """Who sends this header."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip() if scheme.lower() == "bearer" else "")
        caller = Caller("nobody", is_sharing=self._is_lone)

        for name, known in self._clients.items():
            if secrets.compare_digest(digest, known):
                is_sharing = self._is_lone or name in self._sharing
                caller = Caller("client", name, is_sharing)
        if self._admin is not None and secrets.compare_digest(digest, self._admin):
            caller = Caller("admin", is_sharing=self._is_lone)

        return caller


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read_keys(file: Path) -> dict[str, _Client]:
    """Lines by their keys' names."""
    if not file.is_file():
        raise FileNotFoundError(f"no key file {file}")
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text; write it anew") from error

    keys = {}
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        where = f"{file}, line {number}"
        is_sharing = len(parts) == 3 and parts[2] == _SHARE
        if is_sharing:
            parts = parts[:2]
        # What a line holds is secret: messages say how many words it has, not which.
        if len(parts) > 2:
            raise ConfigError(
                f"{where} has {len(parts)} words; use `name key`, or "
                f"`name key {_SHARE}`"
            )

        key = parts[-1]
        name = parts[0] if len(parts) == 2 else f"{_ANONYMOUS}-{len(keys) + 1}"
        if len(key) < _LEAST_CHARACTERS:
            raise ConfigError(
                f"{where} has a key of {len(key)} letters; use {_LEAST_CHARACTERS} or "
                f"more, as `openssl rand -hex 24` makes"
            )
        if "/" in name:
            raise ConfigError(f"{where} has a name with /; use one without")
        if name in keys or key in {one.key for one in keys.values()}:
            raise ConfigError(f"{where} repeats a name or a key; give each once")
        keys[name] = _Client(key, is_sharing)

    if not keys:
        raise ConfigError(f"{file} has no keys; write one a line: `name key`")

    return keys
