# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and chat templates, through transformers."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ospec_jax.config import ConfigError
from ospec_jax.models.gguf import GGUFFile

# How llama.cpp's named pre-tokenizers split text before byte-level BPE; the patterns
# are those of the models' own `tokenizer.json`.
_SPLIT_PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_CONTROL_TOKEN = 3
"""GGUF's token type for special tokens."""


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """For the first import of transformers, which else says that PyTorch is missing.

    Nobody misses it here. What transformers logs later is left as its user has it: its
    variable for advice holds for the import alone.
    """
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    chosen = os.environ.get(name)
    os.environ[name] = chosen or "1"

    try:
        yield
    finally:
        if chosen is None:
            del os.environ[name]
        else:
            os.environ[name] = chosen


def tokenizer_from_folder(folder: Path):
    """Loads a Hugging Face tokenizer from a local folder."""
    with quiet_import():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def tokenizer_from_gguf(file: GGUFFile):
    """Builds a byte-level BPE tokenizer from a GGUF file's own tables.

    transformers reads GGUF tokenizers only where torch is installed; the tables map
    onto the `tokenizers` library directly.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    with quiet_import():
        from transformers import PreTrainedTokenizerFast

    kind = file.get("tokenizer.ggml.model")
    pre = file.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in (*_SPLIT_PATTERNS, "smollm"):
        raise ConfigError(
            f"{file.path} has tokenizer {kind}/{pre}; byte-level BPE of the kinds "
            f"smollm, {', '.join(_SPLIT_PATTERNS)} is supported: use a Hugging Face "
            f"folder instead"
        )

    tokens = file["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in file["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    if pre == "smollm":
        split: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        pattern = tokenizers.Regex(_SPLIT_PATTERNS[pre])
        split = pre_tokenizers.Split(pattern, behavior="isolated")

    use_regex = pre == "smollm"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = file["tokenizer.ggml.token_type"]
    special = [
        t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(special)
    named = {
        name: tokens[index]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"))
        if (index := file.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )
    fast.chat_template = file.get("tokenizer.chat_template")

    return fast


def tokenizer_hash(tokenizer) -> str:
    """A hash of the vocabulary, to tell whether two models share a tokenizer."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def stop_token_ids(tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: end of sequence, end of turn."""
    ends = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>")
    vocab = tokenizer.get_vocab()
    ids = {vocab[token] for token in ends if token in vocab}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)

    return tuple(sorted(ids))


def first_stop(text: str, stop: Iterable[str]) -> int | None:
    """Where the first stop string begins, if there is one."""
    found = [place for string in stop if (place := text.find(string)) >= 0]
    return min(found, default=None)


class TextStream:
    """Decodes tokens into text as they come.

    It holds back incomplete characters, and what may be the beginning of a stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()):
        self._decode = decode
        self._stop = stop
        self._ids = []
        self._shown = 0

    def add(self, token_ids: list[int]) -> str:
        """The text that these tokens add."""
        self._ids += token_ids
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""

        return self._show(text[: self._num_sure(text)])

    def finish(self, text: str) -> str:
        """What was held back, at the end of the answer.

        Args:
          text: All of the answer.
        """
        return self._show(text)

    def _num_sure(self, text: str) -> int:
        """Characters that belong to the answer, whatever comes."""
        found = first_stop(text, self._stop)
        if found is not None:
            return found

        beginnings = (s[:size] for s in self._stop for size in range(1, len(s)))
        held = max((len(s) for s in beginnings if text.endswith(s)), default=0)

        return len(text) - held

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new
