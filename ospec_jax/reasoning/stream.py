# SPDX-License-Identifier: Apache-2.0
"""Problems one after another, and a drafting model that learns from them in chunks.

As OnlineSPEC's Online-LR (arXiv 2603.12617): a chunk is answered with the model as it
is, then the model learns from what was rejected meanwhile, then comes the next chunk.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from ospec_jax.config import whole_number
from ospec_jax.data.prompts import Prompt
from ospec_jax.data.templates import encode
from ospec_jax.reasoning.lookahead import LossyAnswer, Reasoner
from ospec_jax.reasoning.preferences import (
    PreferenceInfo,
    PreferenceLearner,
    PreferenceState,
    collect_pairs,
)

CHUNK = 25
"""Problems between two updates, as published."""


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
        self._learner = learner
        self._state: PreferenceState | None = learner and learner.init()
        self._chunk: list[LossyAnswer] = []

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
            self._chunk.append(answer)
            if len(self._chunk) == self.chunk_size:
                solved = self._learned(solved)
            yield solved

    def _learned(self, solved: Solved) -> Solved:
        """Learns from the chunk that has just ended."""
        chunk = self._chunk
        self._chunk = []
        if self._learner is None or self._state is None:
            return solved

        begin = time.perf_counter()
        self._state, info = self._learner.update(self._state, collect_pairs(chunk))
        if info.num_pairs and info.is_finite:
            self.reasoner.draft.use(self._learner.serve(self._state))
            self.version += 1

        seconds = time.perf_counter() - begin
        return dataclasses.replace(solved, learning_seconds=seconds, info=info)
