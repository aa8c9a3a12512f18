# SPDX-License-Identifier: Apache-2.0
"""Compiled programs between runs: each is kept whole, or not at all.

jax writes its files in place and without a lock. A reader may meet half of one that
another process writes, and a process that is killed meanwhile leaves half of one for
good; what is read from such a file may end the reader. Here files are written beside
their place and renamed into it, and what is read is checked against a digest.
"""

import contextlib
import hashlib
import os
import pathlib
import warnings
from typing import Any

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from ospec_jax import atomic

_ENDING = ".program"
_NO_LIMIT = -1


class CheckedCache(CacheInterface):
    """jax's interface of a cache, over a folder of files with digests.

    What cannot be read, or is damaged, is compiled again; what cannot be written is
    done without.
    """

    def __init__(self, folder: str | os.PathLike):
        self._path = pathlib.Path(folder)
        self._has_warned = False

    def get(self, key: str) -> Any:
        """A program; None where there is none, or only a damaged one, which goes."""
        file = self._file(key)
        try:
            content = file.read_bytes()
        except OSError:
            return None

        size = hashlib.sha256().digest_size
        digest, value = content[:size], content[size:]
        if hashlib.sha256(value).digest() == digest:
            return value

        # Left there, it would be met at every start.
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, unless there is one, or no room for it."""
        file = self._file(key)
        if file.exists():
            return

        try:
            atomic.write_bytes(file, hashlib.sha256(value).digest() + value)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"compiled programs are not kept for later runs: {error}; make room, "
                f"or set OSPEC_CACHE_DIR to another folder",
                stacklevel=3,
            )

    def _file(self, key: str) -> pathlib.Path:
        return self._path / f"{key}{_ENDING}"


def keep_programs(folder: pathlib.Path) -> None:
    """Lets jax keep its compiled programs in a folder, checked.

    A folder of the user's own choice, and one with a limit of its size
    (`jax_compilation_cache_max_size`), stay jax's.
    """
    _CHECKED.add(os.path.realpath(folder))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_CHECKED: set[str] = set()
"""Folders whose files are ours."""

_open_of_jax = compilation_cache.get_file_cache


def _open_cache(path: str):
    """What jax calls once, before the first program is looked for."""
    has_limit = jax.config.jax_compilation_cache_max_size != _NO_LIMIT
    if has_limit or os.path.realpath(path) not in _CHECKED:
        return _open_of_jax(path)

    return CheckedCache(path), path


# jax offers no other way to give it a cache; its versions are pinned, and a test
# notices where this is no longer asked.
compilation_cache.get_file_cache = _open_cache
