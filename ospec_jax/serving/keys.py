# SPDX-License-Identifier: Apache-2.0
"""Keys of clients and of the administration."""

import hashlib
import secrets
from pathlib import Path
from typing import Literal, NamedTuple

from ospec_jax.config import ConfigError
from ospec_jax.serving.settings import HttpConfig

_LEAST_CHARACTERS = 8
_ANONYMOUS = "key"
"""Beginning of the names of keys that have none."""

Bearer = Literal["nobody", "client", "admin"]


class Caller(NamedTuple):
    """Who calls.

    Attributes:
      name: Of the key; the scope of what is learned.
    """

    bearer: Bearer
    name: str = ""


class Keys:
    """The keys that are known.

    Only their digests are kept, and all of them are compared, each in constant time:
    how long a refusal takes says nothing of how near a guess came.
    """

    def __init__(self, clients: dict[str, str], admin: str | None = None):
        self._clients = {name: _digest(key) for name, key in clients.items()}
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
            found = list(_read_keys(config.admin_key_file).values())
            if len(found) != 1:
                raise ConfigError(
                    f"{config.admin_key_file} has {len(found)} keys; the "
                    f"administration has one"
                )
            admin = found[0]
            if admin in clients.values():
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
        caller = Caller("nobody")

        for name, known in self._clients.items():
            if secrets.compare_digest(digest, known):
                caller = Caller("client", name)
        if self._admin is not None and secrets.compare_digest(digest, self._admin):
            caller = Caller("admin")

        return caller


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read_keys(file: Path) -> dict[str, str]:
    """Keys by their names."""
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
        if len(parts) > 2:
            raise ConfigError(f"{where} has {len(parts)} words; use `name key`")

        key = parts[-1]
        name = parts[0] if len(parts) == 2 else f"{_ANONYMOUS}-{len(keys) + 1}"
        # What a line holds is secret: messages say its number alone.
        if len(key) < _LEAST_CHARACTERS:
            raise ConfigError(
                f"{where} has a key of {len(key)} letters; use {_LEAST_CHARACTERS} or "
                f"more, as `openssl rand -hex 24` makes"
            )
        if "/" in name:
            raise ConfigError(f"{where} has a name with /; use one without")
        if name in keys or key in keys.values():
            raise ConfigError(f"{where} repeats a name or a key; give each once")
        keys[name] = key

    if not keys:
        raise ConfigError(f"{file} has no keys; write one a line: `name key`")

    return keys
