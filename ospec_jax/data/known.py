# SPDX-License-Identifier: Apache-2.0
"""Telling prompts that are new from those that were answered before.

A prompt is known by its content. Names will not do: by default they are a file's name
and a line, which move when a line is put in front, and which another file of the same
name has, too.
"""

import dataclasses
import hashlib
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Sequence

from ospec_jax.data.prompts import Prompt

_HASH_DIGITS = 16
_NAME_DIGITS = 8
"""Of a hash that is put behind a name which another prompt has already."""


def content_hash(prompt: Prompt) -> str:
    """What an answer to the prompt is asked by: its turns, and draws of its own."""
    asked = [list(prompt.messages), prompt.seed, prompt.choice]
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


@dataclasses.dataclass(frozen=True)
class Known:
    """Which prompts of a list are known, and how they are named.

    Attributes:
      prompts: All of them, in order; those that are known, by the names that they have
        there. Where another content has a new prompt's name, a part of its hash is put
        behind that.
      is_new: Which of them are not known.
      moved: Names, in the list, of those that are known by another one.
      renamed: Names of new prompts that were taken already.
    """

    prompts: tuple[Prompt, ...]
    is_new: tuple[bool, ...]
    moved: tuple[str, ...]
    renamed: tuple[str, ...]

    @property
    def new(self) -> list[Prompt]:
        """Those that are not known."""
        return list(itertools.compress(self.prompts, self.is_new))

    def warn(self, place: object, stacklevel: int = 2) -> None:
        """Says how many names and contents disagree with what `place` holds."""
        told = []
        if self.moved:
            told.append(
                f"{len(self.moved)} prompts are there under other names, the first is "
                f"{self.moved[0]!r}: they are not answered again"
            )
        if self.renamed:
            told.append(
                f"{len(self.renamed)} prompts have names under which others are there, "
                f"the first is {self.renamed[0]!r}: they are answered, under names "
                f"that end in a hash"
            )
        if told:
            warnings.warn(f"{place}: {'; '.join(told)}", stacklevel=stacklevel + 1)


def find_known(
    prompts: Sequence[Prompt], ids: Sequence[str], contents: Sequence[str]
) -> Known:
    """Finds which prompts are among those of these names and contents.

    A content that is there once makes one prompt known, not its copies.

    Args:
      contents: Hashes, one a name; empty where an older version kept none, which is
        then known by its name alone.
    """
    taken = set(ids)
    left = Counter(zip(ids, contents, strict=True))
    hashes = [content_hash(prompt) for prompt in prompts]
    known_as: list[str | None] = [None] * len(prompts)

    # First those that have both the name and the content, or a name without a content.
    for i, prompt in enumerate(prompts):
        for content in (hashes[i], ""):
            if known_as[i] is None and left[prompt.id, content]:
                left[prompt.id, content] -= 1
                known_as[i] = prompt.id

    # Then those whose content is there under another name.
    names: dict[str, list[str]] = {}
    for (name, content), count in left.items():
        if content:
            names.setdefault(content, []).extend([name] * count)

    moved = []

    for i, prompt in enumerate(prompts):
        if known_as[i] is None and names.get(hashes[i]):
            known_as[i] = names[hashes[i]].pop(0)
            moved.append(prompt.id)

    # New ones last, since only now it is known whose names are taken.
    named = []
    renamed = []

    for prompt, name, content in zip(prompts, known_as, hashes, strict=True):
        if name is None and prompt.id in taken:
            renamed.append(prompt.id)
            name = f"{prompt.id}-{content[:_NAME_DIGITS]}"
        named.append(dataclasses.replace(prompt, id=name or prompt.id))

    is_new = tuple(name is None for name in known_as)
    return Known(tuple(named), is_new, tuple(moved), tuple(renamed))
