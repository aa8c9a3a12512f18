# SPDX-License-Identifier: Apache-2.0
"""Which of the texts that a model wrote are worth keeping: simple, and in one pass."""

import dataclasses
import functools
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterator

from ospec_jax.config import ConfigError, check_types

_WORD = re.compile(r"\w+")
_NGRAM = 5
"""Words that texts share by quoting each other, hardly ever by chance."""
_LOOP = 4
"""Words of which a text that goes round in circles is made."""

_PACKED = 200
"""Characters from which on packing tells of repetition."""


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Bounds that a text must keep.

    Attributes:
      min_chars: Of a text.
      max_chars: Likewise.
      script: Of its letters, by the first word of their Unicode names: LATIN, CYRILLIC,
        CJK; empty for any.
      min_script_share: Of its letters that are of the script.
      min_letter_share: Of its characters, but for spaces, that are letters.
      max_odd_share: Of its characters that are no text: control characters, unassigned
        ones, and what stands for bytes that make none.
      max_repeated_share: Of its runs of four words that occurred in it before.
      min_packed_share: Of its bytes that are left when it is packed (zlib); prose has
        0.4 to 0.6, and what loops with small changes below 0.3. Of short texts nothing
        follows from it.
      max_overlap: Of its runs of five words that occurred in texts kept before.
    """

    min_chars: int = 8
    max_chars: int = 1200
    script: str = "LATIN"
    min_script_share: float = 0.9
    min_letter_share: float = 0.5
    max_odd_share: float = 0.0
    max_repeated_share: float = 0.3
    min_packed_share: float = 0.3
    max_overlap: float = 0.6

    def __post_init__(self):
        check_types(self)
        if not 1 <= self.min_chars <= self.max_chars:
            raise ConfigError(
                f"texts of {self.min_chars} to {self.max_chars} characters are none; "
                f"min_chars is 1 or more, and at most max_chars"
            )

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("share", "overlap")) and not 0 <= value <= 1:
                raise ConfigError(f"{field.name} is {value}; it lies in [0, 1]")


def find_fault(text: str, config: FilterConfig) -> str:
    """Why a text is not kept, in two words; empty if it is.

    >>> find_fault("What is the tallest mountain of Italy?", FilterConfig())
    ''
    >>> find_fault("no no no no no no no no no", FilterConfig())
    'repeats itself'
    """
    if len(text.strip()) < config.min_chars:
        return "too short"
    if len(text) > config.max_chars:
        return "too long"

    if _share(map(_is_odd, text)) > config.max_odd_share:
        return "no text"
    if _share(c.isalpha() for c in text if not c.isspace()) < config.min_letter_share:
        return "few letters"

    letters = [c for c in text if c.isalpha()]
    own = (_script(c) == config.script for c in letters)
    if config.script and letters and _share(own) < config.min_script_share:
        return "other script"

    runs = list(_runs(text, _LOOP))
    if runs and 1 - len(set(runs)) / len(runs) > config.max_repeated_share:
        return "repeats itself"
    if len(text) >= _PACKED and _packed_share(text) < config.min_packed_share:
        return "repeats itself"

    return ""


class Seen:
    """Texts kept so far, as far as is needed to tell what is like them."""

    def __init__(self, config: FilterConfig):
        self._max_overlap = config.max_overlap
        self._texts: set[bytes] = set()
        self._runs: set[bytes] = set()

    def find_fault(self, text: str) -> str:
        """Why a text is not kept beside the others; empty if it is."""
        if _digest(_normal(text)) in self._texts:
            return "said before"

        shared = (_digest(run) in self._runs for run in _runs(text, _NGRAM))
        if _share(shared) > self._max_overlap:
            return "like others"

        return ""

    def add(self, text: str) -> None:
        """Keeps a text."""
        self._texts.add(_digest(_normal(text)))
        self._runs.update(map(_digest, _runs(text, _NGRAM)))


def _normal(text: str) -> str:
    """Its words, whatever their case and what stands between them."""
    return " ".join(_WORD.findall(text.casefold()))


def _runs(text: str, size: int) -> Iterator[str]:
    words = _normal(text).split()
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def _digest(text: str) -> bytes:
    # Python's own hash differs from one process to the next.
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _packed_share(text: str) -> float:
    content = text.encode(errors="replace")
    return len(zlib.compress(content, 9)) / len(content)


def _share(found: Iterator[bool]) -> float:
    """Of true ones; 0 of none."""
    flags = list(found)
    return sum(flags) / max(1, len(flags))


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@functools.lru_cache(maxsize=4096)
def _is_odd(character: str) -> bool:
    if character in "\n\t\r":
        return False

    kind = unicodedata.category(character)
    return character == "\ufffd" or kind in ("Cc", "Cs", "Co", "Cn")
