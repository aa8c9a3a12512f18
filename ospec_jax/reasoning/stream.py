# SPDX-License-Identifier: Apache-2.0
"""Problems one after another, and a drafting model that learns from them in chunks.

As OnlineSPEC's Online-LR (arXiv 2603.12617): a chunk is answered with the model as it
is, then the model learns from what was rejected meanwhile, then comes the next chunk.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ospec_jax.config import ConfigError, from_dict, naming, whole_number
from ospec_jax.config.fields import parse_json
from ospec_jax.data.prompts import Prompt
from ospec_jax.data.templates import encode
from ospec_jax.reasoning.lookahead import LossyAnswer, Reasoner
from ospec_jax.reasoning.preferences import (
    PreferenceInfo,
    PreferenceLearner,
    PreferencePair,
    PreferenceState,
    collect_pairs,
)
from ospec_jax.storage import checkpoint
from ospec_jax.storage.leaves import as_item, from_item

CHUNK = 25
"""Problems between two updates, as published."""
_NUM_KEPT = 2
"""Steps of a checkpoint's folder."""


@dataclasses.dataclass(frozen=True)
class ReasoningMeta:
    """Where a stream of problems stands; see `OnlineReasoner`.

    Attributes:
      fingerprint: Of the drafting model's weights.
      learner: Settings of what learns.
      pairs: Of the chunk that is not full yet, tokens of prefix, chosen and rejected
        step.
      num_waiting: Answers of that chunk.
    """

    fingerprint: str
    chunk_size: int
    learner: dict[str, Any]
    version: int
    answered: tuple[str, ...]
    pairs: tuple[list[list[int]], ...]
    num_waiting: int


@dataclasses.dataclass(frozen=True)
class Solved:
    """A problem's answer.

    Attributes:
      text: The answer's, without special tokens.
      version: Chunks that the drafting model had learned from before it.
      learning_seconds: Wall-clock time of learning, behind the last answer of a chunk.
      info: What it came to.
    """

    prompt: Prompt
    text: str
    answer: LossyAnswer
    version: int
    learning_seconds: float = 0.0
    info: PreferenceInfo | None = None


class OnlineReasoner:
    """Answers problems, and has the drafting model learn from them.

    Args:
      learner: Of the drafting model; None serves it as it is.
      chunk_size: Problems between two updates.

    Attributes:
      version: Chunks that the drafting model has learned from.
      answered: Ids of the problems, in order.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        learner: PreferenceLearner | None = None,
        chunk_size: int = CHUNK,
    ):
        self.reasoner = reasoner
        self.chunk_size = whole_number("chunk_size", chunk_size, least=1)
        self.version = 0
        self.answered: list[str] = []
        self._learner = learner
        self._state: PreferenceState | None = None
        if learner is not None:
            self._state = learner.init()
        # Of the chunk that is not full yet.
        self._pairs: list[PreferencePair] = []
        self._num_waiting = 0

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Solved]:
        """Answers in order, one by one.

        Args:
          should_stop: Asked before each.

        Raises:
          PromptTooLongError: A prompt and its answer do not fit.
        """
        session = self.reasoner.target.session
        for prompt in prompts:
            if should_stop():
                return
            ids = encode(prompt, session.target.tokenizer)
            answer = self.reasoner.answer(ids, max_new_tokens)
            text = session.decode(list(answer.token_ids))
            solved = Solved(prompt, text, answer, self.version)
            self.answered.append(prompt.id)
            self._pairs += collect_pairs(answer)
            self._num_waiting += 1
            if self._num_waiting == self.chunk_size:
                solved = self._learned(solved)
            yield solved

    def save(self, folder: str | Path) -> None:
        """Writes what was learned, as an Orbax step by the number of answers.

        The pairs of a chunk that is not full yet are in it, which hold prompts and
        answers.

        Raises:
          ConfigError: Nothing learns.
          CheckpointError: The folder holds a later step: it is of another run.
        """
        if self._learner is None:
            raise ConfigError("without a learner there is nothing to save")

        meta = ReasoningMeta(
            self._fingerprint,
            self.chunk_size,
            self._learner.settings,
            self.version,
            tuple(self.answered),
            tuple([list(step) for step in pair] for pair in self._pairs),
            self._num_waiting,
        )
        items = {
            "meta": {"json": json.dumps(dataclasses.asdict(meta))},
            "learner": as_item(self._state),
        }
        checkpoint.save_items(folder, len(self.answered), items, _NUM_KEPT)

    def resume(self, folder: str | Path) -> None:
        """Goes on from the newest step of a folder, as if nothing had happened.

        Raises:
          ConfigError: Nothing learns, or the folder holds none, or one of another
            model or other settings.
        """
        if self._learner is None or self._state is None:
            raise ConfigError("without a learner there is nothing to go on with")

        found = checkpoint.steps(folder)
        checkpoint.check_present(folder, found)
        items = checkpoint.load_items(folder, found[-1], ("meta", "learner"))
        text = str(items["meta"]["json"])
        with naming(folder):
            record = parse_json(text, f"the record of {folder}")
            meta = from_dict(ReasoningMeta, record)

        for name, own, other in (
            ("draft model", self._fingerprint, meta.fingerprint),
            ("chunk_size", self.chunk_size, meta.chunk_size),
            ("learner", self._learner.settings, meta.learner),
        ):
            if own != other:
                raise ConfigError(
                    f"{folder} was made with the {name} {other!r:.200}, not "
                    f"{own!r:.200}; use what it was made with, or another folder"
                )

        state: PreferenceState = from_item(items["learner"], self._state, folder)
        self._state = state
        self.version = meta.version
        self.answered = list(meta.answered)
        self._pairs = [PreferencePair(*map(tuple, pair)) for pair in meta.pairs]
        self._num_waiting = meta.num_waiting
        self.reasoner.draft.use(self._learner.serve(state))

    @property
    def _fingerprint(self) -> str:
        """Of the drafting model, as it was loaded."""
        return self.reasoner.draft.session.target.fingerprint

    def _learned(self, solved: Solved) -> Solved:
        """Learns from the chunk that has just ended."""
        pairs = self._pairs
        self._pairs = []
        self._num_waiting = 0
        if self._learner is None or self._state is None:
            return solved

        begin = time.perf_counter()
        self._state, info = self._learner.update(self._state, pairs)
        if info.num_pairs and info.is_finite:
            self.reasoner.draft.use(self._learner.serve(self._state))
            self.version += 1

        seconds = time.perf_counter() - begin
        return dataclasses.replace(solved, learning_seconds=seconds, info=info)
