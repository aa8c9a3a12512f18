# SPDX-License-Identifier: Apache-2.0
"""What a target is to write, and the record of it beside what it wrote."""

import dataclasses
import json
import math
from pathlib import Path

from ospec_jax import atomic
from ospec_jax.config import ConfigError, SamplingConfig, check_types, whole_number
from ospec_jax.config.fields import read_json
from ospec_jax.data.filters import FilterConfig
from ospec_jax.distill.kinds import KINDS, Limits
from ospec_jax.models.hub import Target
from ospec_jax.reports.answers import check_unused

DEFAULT_KINDS = (
    ("self-chat", 30.0),
    ("self-turns", 14.0),
    ("self-summary", 10.0),
    ("self-translation", 12.0),
    ("self-extraction", 6.0),
    ("self-question", 10.0),
    ("self-rewrite", 5.0),
    ("self-continuation", 3.0),
    ("self-system", 6.0),
    ("self-shots", 4.0),
)
_VERSION = 1
"""Of what is asked and how: to be raised with any change to kinds and phrases."""


@dataclasses.dataclass(frozen=True)
class SelfPromptConfig:
    """What a target writes.

    Attributes:
      seed: Of all choices; another one gives other prompts.
      kinds: Kinds of prompts, of `kinds.KINDS`, with how often each is begun.
      max_turn_tokens: Of a user's turn; one that is not ended by then is dropped.
      max_answer_tokens: Of answers within a prompt; longer ones end with a sentence.
      min_document_tokens: Of the shortest limit of a document.
      max_document_tokens: Of the longest one.
      min_document_chars: Of a document that is kept.
      turn_temperature: Of users' turns.
      writing_temperature: Of answers and documents.
      filters: What a text must be like.
      patience: Prompts that may be dropped in a row before it is given up.
    """

    seed: int = 0
    kinds: tuple[tuple[str, float], ...] = DEFAULT_KINDS
    max_turn_tokens: int = 128
    max_answer_tokens: int = 256
    min_document_tokens: int = 200
    max_document_tokens: int = 1500
    min_document_chars: int = 200
    turn_temperature: float = 1.0
    writing_temperature: float = 0.8
    top_p: float = 0.95
    filters: FilterConfig = FilterConfig()
    patience: int = 1000

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            if field.name.endswith(("tokens", "chars", "patience")):
                whole_number(field.name, getattr(self, field.name), least=1)

        if self.min_document_tokens > self.max_document_tokens:
            raise ConfigError(
                f"documents of {self.min_document_tokens} to "
                f"{self.max_document_tokens} tokens: lower min_document_tokens, or "
                f"raise max_document_tokens"
            )

        for temperature in (self.turn_temperature, self.writing_temperature):
            SamplingConfig(temperature, top_p=self.top_p)

        for name, weight in self.kinds:
            if name not in KINDS:
                raise ConfigError(
                    f"unknown kind of prompts {name!r}; use {', '.join(KINDS)}"
                )
            if not 0 <= weight < math.inf:
                raise ConfigError(f"the weight of {name} is {weight}; use 0 or more")

        if not sum(weight for _, weight in self.kinds):
            raise ConfigError("no kind of prompts has a weight above 0; give one")

    @property
    def limits(self) -> Limits:
        """What talks keep to."""
        documents = self.min_document_tokens, self.max_document_tokens
        return Limits(
            self.filters,
            self.max_turn_tokens,
            self.max_answer_tokens,
            documents,
            self.min_document_chars,
        )


def config_file(file: Path) -> Path:
    """Where it stands what a file of prompts was written by."""
    return file.with_name(f"{file.name}.config.json")


def check_config(file: Path, target: Target, config: SelfPromptConfig) -> None:
    """Writes down what a file is written by, or compares what is written down.

    Raises:
      ConfigError: The two differ, or the file holds something else.
    """
    wanted = {
        "version": _VERSION,
        "target": target.name,
        "fingerprint": target.fingerprint,
        "precision": target.numerics.precision,
        **dataclasses.asdict(config),
    }
    # Tuples are lists there.
    wanted = json.loads(json.dumps(wanted))
    # Where a run is given up changes nothing of what it wrote.
    wanted.pop("patience")
    place = config_file(file)

    if not place.is_file():
        check_unused(file)
        atomic.write_text(place, json.dumps(wanted, indent=1))
        return

    found = read_json(place)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{file} was written with {name} {found.get(name)!r:.80}, not "
                f"{wanted.get(name)!r:.80}; use what it was written with, or another "
                f"file"
            )
