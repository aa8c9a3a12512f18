# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and chat templates, through transformers."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from ospec_jax.config import ConfigError, naming
from ospec_jax.config.fields import Fields, read_json
from ospec_jax.models.gguf_file import GGUFFile

# How llama.cpp's named pre-tokenizers split text before byte-level BPE; the patterns
# are those of the models' own `tokenizer.json`.
_SPLIT_PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_ADDS_BOS = ("llama-bpe",)
"""Of them, those that put the token of the beginning first unless a file says no."""
_KEEPS_WHOLE = ("llama-bpe",)
"""Of them, those that take a word of the vocabulary as it is, without merging."""
_CONTROL_TOKEN = 3
"""GGUF's token type for special tokens."""
_USER_DEFINED_TOKEN = 4
"""Its type for tokens that are never split, and are text like any other."""
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>")
"""Tokens that end an answer wherever they are in a vocabulary."""


@contextlib.contextmanager
def quiet_import() -> Generator[None]:
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
    """Loads a Hugging Face tokenizer from a local folder; runs none of its code.

    Raises:
      FileNotFoundError: The folder has no tokenizer.
      ConfigError: The tokenizer is damaged, or needs code of the folder's own.
    """
    with quiet_import():
        from transformers import AutoTokenizer

    _check_tokenizer_files(folder)
    # Read by the library at its own risk: an error of any kind becomes one that names
    # the folder.
    with naming(f"the tokenizer of {folder}"):
        # Else the user would be asked, and a `y` on standard input would run it.
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        _check_template(tokenizer.chat_template, str(folder))
        # What it cannot do shows here, not in the middle of a run.
        tokenizer.decode(tokenizer.encode("a"))

    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Refuses what transformers would meet with an error that names no file."""
    import tokenizers

    settings = folder / "tokenizer_config.json"
    whole = folder / "tokenizer.json"
    # Checked beforehand, file by file, since the library's own errors do not say which
    # file is wrong.
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): copy that of "
            f"the model into it"
        )

    if settings.exists():
        _check_settings(settings)

    if whole.exists():
        read_json(whole)
        try:
            tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:
            raise ConfigError(
                f"{whole} is no tokenizer ({str(error)[:200]}); get another copy of it"
            ) from error


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _check_settings(file: Path) -> None:
    with quiet_import():
        import transformers

    fields = Fields(read_json(file), str(file))
    kind = fields.text("tokenizer_class", None)
    is_known = kind is None or any(
        isinstance(getattr(transformers, name, None), type)
        for name in (kind, f"{kind}Fast")
    )
    if "auto_map" in fields and not (kind and is_known):
        raise ConfigError(
            f"{file} names code of the folder's own (auto_map), which is never run; "
            f"use a folder with a tokenizer of transformers"
        )
    if not is_known:
        raise ConfigError(
            f"{file} has tokenizer_class {kind!r}, which transformers does not know; "
            f"use PreTrainedTokenizerFast if the folder has a tokenizer.json"
        )

    for name in _NAMED_TOKENS:
        value = fields.values.get(name)
        if value is not None and not _is_token(value):
            raise ConfigError(
                f"{file} has {name} {value!r:.80}; use the token, or an object with "
                f"its content"
            )

    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = fields.values.get(name)
        listed = list(value.values()) if isinstance(value, dict) else value or []
        if not isinstance(listed, list) or not all(map(_is_token, listed)):
            raise ConfigError(f"{file} has {name} {value!r:.80}; use a list of tokens")

    for index, token in fields.section("added_tokens_decoder").values.items():
        if not index.isdecimal() or not _is_token(token):
            raise ConfigError(
                f"{file} has the added token {index!r:.40}: {token!r:.80}; use an id "
                f"and an object with its content"
            )

    for name in ("padding_side", "truncation_side"):
        if fields.text(name, None) not in (None, "left", "right"):
            raise ConfigError(f"{file} has a {name} other than left and right")

    for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
        fields.flag(name, None)

    # A limit of the tokenizer's; `VERY_LARGE_INTEGER` of transformers is 1e30.
    fields.number("model_max_length", None)
    fields.items("model_input_names", str, None)


def _is_token(value: Any) -> bool:
    """Whether a value is a token: its text, or an object with it and with flags."""
    if not isinstance(value, dict):
        return isinstance(value, str)

    flags = (value.get(name, False) for name in _TOKEN_FLAGS)
    is_content = isinstance(value.get("content"), str)
    return is_content and all(isinstance(flag, bool) for flag in flags)


_TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def _check_template(template: Any, where: str) -> None:
    """Refuses a chat template that is none."""
    if template is not None and not isinstance(template, str | dict):
        raise ConfigError(
            f"the chat template of {where} is {template!r:.80}; it must be text"
        )


def tokenizer_from_gguf(file: GGUFFile):
    """Builds a byte-level BPE tokenizer from a GGUF file's own tables.

    transformers reads GGUF tokenizers only where torch is installed; the tables map
    onto the `tokenizers` library directly.

    Raises:
      ConfigError: It is of another kind, or its tables are missing or contradict each
        other.
    """
    fields = Fields(file.fields.values, str(file.path), "tokenizer.ggml.")
    kind = fields.text("model", None)
    pre = fields.text("pre", None)
    if kind != "gpt2" or pre not in (*_SPLIT_PATTERNS, "smollm"):
        raise ConfigError(
            f"{file.path} has tokenizer {kind}/{pre}; byte-level BPE of the kinds "
            f"smollm, {', '.join(_SPLIT_PATTERNS)} is supported: use a Hugging Face "
            f"folder instead"
        )

    tokens = fields.items("tokens", str)
    kinds = fields.items("token_type", int)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ConfigError(
            f"{file.path} has {len(tokens)} tokens, {len(set(tokens))} of them "
            f"different, and {len(kinds)} types of tokens; get another copy"
        )

    tokenizer = _byte_level_bpe(file, fields, pre, tokens)
    _add_tokens(tokenizer, tokens, kinds)
    named = {
        name: tokens[index]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"))
        if (index := _token_id(fields, key, len(tokens))) is not None
    }
    _add_ends(tokenizer, fields, pre, len(tokens))

    with quiet_import():
        from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )
    template = file.get("tokenizer.chat_template")
    _check_template(template, str(file.path))
    fast.chat_template = template

    return fast


def _byte_level_bpe(file: GGUFFile, fields: Fields, pre: str, tokens: tuple[str, ...]):
    """The tables of tokens and merges as a `tokenizers.Tokenizer`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    merges = [tuple(m.split(" ", 1)) for m in fields.items("merges", str)]
    vocab = {token: i for i, token in enumerate(tokens)}

    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise ConfigError(
                f"{file.path} merges {' and '.join(map(repr, merge))}, which gives no "
                f"token of its table; get another copy"
            )

    model = models.BPE(vocab, merges, ignore_merges=pre in _KEEPS_WHOLE)
    tokenizer = tokenizers.Tokenizer(model)
    if pre == "smollm":
        split: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        pattern = tokenizers.Regex(_SPLIT_PATTERNS[pre])
        split = pre_tokenizers.Split(pattern, behavior="isolated")

    use_regex = pre == "smollm"
    # The named patterns have split the text already; GPT-2's own would split it again.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()

    return tokenizer


def _add_tokens(tokenizer, tokens: tuple[str, ...], kinds: tuple[int, ...]) -> None:
    """Tells the tokenizer which tokens stand for themselves wherever they occur."""
    from tokenizers import AddedToken

    pairs = [*zip(tokens, kinds, strict=True)]
    special = [t for t, kind in pairs if kind == _CONTROL_TOKEN and t]
    own = [t for t, kind in pairs if kind == _USER_DEFINED_TOKEN and t]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in own])


def _add_ends(tokenizer, fields: Fields, pre: str, num_tokens: int) -> None:
    """Has text begin, or end, with the file's own tokens if the file says so."""
    from tokenizers import processors

    def asked(key: str, default: bool) -> list[int]:
        wanted = fields.flag(f"add_{key}_token", default)
        index = _token_id(fields, key, num_tokens)
        if wanted and index is None:
            raise ConfigError(
                f"{fields.where} adds a token {key} to each text, but has no "
                f"{fields.prefix}{key}_token_id"
            )
        return [index] if wanted and index is not None else []

    # As llama.cpp does where the file says nothing.
    has_bos = pre in _ADDS_BOS and "bos_token_id" in fields
    first = asked("bos", has_bos)
    last = asked("eos", False)
    if not first and not last:
        return

    name = tokenizer.id_to_token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*map(name, first), "$A", *map(name, last)],
        special_tokens=[(name(i), i) for i in {*first, *last}],
    )


def _token_id(fields: Fields, key: str, num_tokens: int) -> int | None:
    """The id of a token that the file names, or None."""
    return fields.whole(f"{key}_token_id", None, low=0, high=num_tokens - 1)


def end_ids_from_gguf(file: GGUFFile) -> tuple[int, ...]:
    """Ids that the file says end an answer: of the text, the turn and the message."""
    fields = Fields(file.fields.values, str(file.path), "tokenizer.ggml.")
    num_tokens = len(fields.items("tokens", str))
    ids = (_token_id(fields, key, num_tokens) for key in ("eos", "eot", "eom"))
    return tuple(sorted({i for i in ids if i is not None}))


def end_ids_from_folder(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer by `generation_config.json`, or else `config.json`.

    Raises:
      ConfigError: They are no ids of the model's.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.exists():
            continue
        fields = Fields(read_json(file), str(file))
        fields.refuse_slips(("bos_token_id", "eos_token_id", "pad_token_id"))
        found = fields.values.get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        is_id = lambda i: isinstance(i, int) and not isinstance(i, bool)
        if not all(is_id(i) and 0 <= i < vocab_size for i in ids):
            raise ConfigError(
                f"{file} has eos_token_id {found!r:.80}; use ids below the vocab_size "
                f"{vocab_size}"
            )
        return tuple(sorted(set(ids)))

    return ()


def tokenizer_hash(tokenizer) -> str:
    """A hash of the vocabulary, to tell whether two models share a tokenizer."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def stop_token_ids(tokenizer) -> tuple[int, ...]:
    """Ids that end an answer as the tokenizer knows them: of sequence, of turn.

    What the model's own files say comes to it: see `hub.Target.stop_ids`.
    """
    vocab = tokenizer.get_vocab()
    ids = {vocab[token] for token in _ENDS if token in vocab}
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
        # All tokens again: what a token looks like may depend on those before it.
        text = self._decode(self._ids)
        # The replacement character: some of the bytes of a character are still to come.
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

        # Proper beginnings of stop strings that the text ends with may yet become
        # whole.
        beginnings = (s[:size] for s in self._stop for size in range(1, len(s)))
        held = max((len(s) for s in beginnings if text.endswith(s)), default=0)

        return len(text) - held

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new
