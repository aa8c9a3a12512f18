# SPDX-License-Identifier: Apache-2.0
"""What single tokens look like: of a character they may be a part."""

import re
import threading
from collections.abc import Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_BEGIN = "\u2581"
"""SentencePiece's space."""


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, for any thread."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._found: dict[int, bytes] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
        self._bytes_of_letters = _bytes_of_letters() if is_byte_level else {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of several tokens."""
        with self._lock:
            return self._tokenizer.decode(list(token_ids))

    def text_of(self, token_id: int) -> str:
        """One token's text; parts of characters are replacement characters."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def plain_of(self, token_id: int) -> str:
        """One token's text, or its bytes in words where they are no text."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes_of(self, token_id: int) -> bytes:
        """One token's bytes."""
        found = self._found.get(token_id)
        if found is None:
            with self._lock:
                found = self._look_up(token_id)
            self._found[token_id] = found

        return found

    def _look_up(self, token_id: int) -> bytes:
        letters = self._tokenizer.convert_ids_to_tokens(token_id)
        if letters is None:
            return b""

        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        if token_id in added:
            return letters.encode("utf-8")

        table = self._bytes_of_letters
        if table and all(letter in table for letter in letters):
            return bytes(table[letter] for letter in letters)

        match = _BYTE_TOKEN.fullmatch(letters)
        if match is not None:
            return bytes([int(match[1], 16)])

        return letters.replace(_WORD_BEGIN, " ").encode("utf-8")


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes, which are those of Latin-1 where these can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in seen}
    others = [byte for byte in range(256) if byte not in seen]
    table |= {chr(256 + i): byte for i, byte in enumerate(others)}

    return table
