# SPDX-License-Identifier: Apache-2.0
"""Replaying learners on recorded answers, with the draft alone and no target.

Greedy answers do not depend on the draft. `scoring` tells how many drafted tokens each
step on a recorded answer would get accepted; learning then sees what a `Session` at
batch 1 sees, in the same order.

Chains only, and without suggestions of n-grams.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ospec_jax import recording
from ospec_jax.adaptation import Adaptation, UpdateReport
from ospec_jax.config import ConfigError, LearnerConfig, TreeConfig
from ospec_jax.decoding.engine import CAPACITIES
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.step import shared_tables
from ospec_jax.distill.families import TAPPED
from ospec_jax.distill.store import Recording
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learning import Learning
from ospec_jax.loading import LoadedDraft
from ospec_jax.metrics import DecodingStats
from ospec_jax.models.hub import Target
from ospec_jax.models.quantization import cast_params
from ospec_jax.scoring import answer_window, build_score, walk, whole_answer
from ospec_jax.types import Draft, Feedback

_ROWS = (1, 4, 8)
"""Requests scored at once; each is compiled for."""
_CONTEXT = 128
"""Prompts are padded to multiples of this, for the same reason; they cost little."""
_ANSWER = 16
"""Likewise answers, to the longest of the stream."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What one request's replay found.

    Attributes:
      num_tokens: Of the answer.
      version: Of the draft that was served.
      learning_seconds: Time that learning took after it.
      loss: Cross-entropy of the served draft to the target, mean over the answer's
        positions and, weighted, over depths; None when not asked for.
    """

    id: str
    domain: str
    num_tokens: int
    stats: DecodingStats
    version: int = 0
    learning_seconds: float = 0.0
    loss: float | None = None


@dataclasses.dataclass
class Run:
    """A learner's way along a stream.

    Attributes:
      draft: What is served at its end.
      learning: The learner at its end, None for a static draft.
      seconds: Wall-clock time of it all.
    """

    answers: list[Answered]
    reports: list[UpdateReport]
    draft: Draft
    learning: Learning | None
    seconds: float = 0.0


class Replayer:
    """Compiled functions for one draft and one recording; holds no learner."""

    def __init__(
        self, target: Target, draft: LoadedDraft, folder: Path, num_steps: int = 3,
        ids: Sequence[str] = (), has_losses: bool = False, decay: float = 0.8,
    ):  # fmt: skip
        """Opens the recording.

        Args:
          num_steps: Tokens of a chain, K.
          ids: Replay these prompts in this order instead of the recorded ones.
          has_losses: Also report losses, at about half of the scoring's cost again.
          decay: Weight of each depth's loss relative to the one before.

        Raises:
          ConfigError: The draft is not trained, or the recording is not of this target.
        """
        if draft.meta.draft is None or draft.mix or num_steps < 1:
            raise ConfigError(
                f"replay needs a trained draft alone and a chain of one token at "
                f"least, not {draft.meta.family!r} and {num_steps}"
            )
        self.draft, self.num_steps, self.decay = draft, num_steps, decay
        self.has_losses, self._numerics = has_losses, target.numerics
        # Other families read the final states, which every recording has.
        self._is_tapped = draft.meta.family in TAPPED
        taps = draft.taps if self._is_tapped else None
        self.store, self.order = recording.open_recording(folder, target, taps, ids)
        self.shared = shared_tables(target.params)
        self.drafter = build_drafter(
            draft.meta.family, draft.meta.draft, TreeConfig(num_steps=num_steps),
            target.numerics,
        )  # fmt: skip
        precision = target.numerics.precision
        self._cast = jax.jit(lambda params: cast_params(params, precision))
        self._scorers: dict[int, Callable] = {}
        entries = [self.store.entries[i] for i in self.order]
        longest = max(e.length - e.num_prompt for e in entries)
        self._num_roots = -(-max(longest, 1) // _ANSWER) * _ANSWER
        longest = max(e.length for e in entries) + 1
        self._capacity = next(c for c in CAPACITIES if c >= longest)

    def serving(self, params) -> Any:
        """Parameters in the target's precision, as they are served."""
        return self._cast(params)

    def score(self, params, entries: Sequence[int]) -> list[tuple[np.ndarray, Any]]:
        """Accepted tokens by root, and the loss, of whole answers.

        Args:
          params: In serving precision.
          entries: At most eight numbers of `store`'s entries.
        """
        found = [self.store.recording(i) for i in entries]
        num_rows = next(n for n in _ROWS if n >= len(found))
        longest = max(r.num_prompt for r in found) - 1
        context = max(-(-longest // _CONTEXT), 1) * _CONTEXT
        if context not in self._scorers:
            self._scorers[context] = jax.jit(
                build_score(
                    self.drafter, self._numerics, context, self.num_steps, self.decay
                )
            )
        rows = [self._window(r, context) for r in found]
        rows += [jax.tree.map(np.zeros_like, rows[0])] * (num_rows - len(rows))
        feedback, start, following, weight = jax.tree.map(lambda *x: np.stack(x), *rows)
        accepted, losses = jax.device_get(
            self._scorers[context](
                params, self.draft.draft.token_ids, self.shared, feedback, start,
                following, weight if self.has_losses else None,
            )
        )  # fmt: skip
        losses = [None] * len(found) if losses is None else losses.tolist()
        return list(zip(accepted, losses, strict=False))[: len(found)]

    def _window(self, found: Recording, context: int):
        return answer_window(
            found, context, self._num_roots, self.num_steps, self.has_losses,
            self._is_tapped,
        )  # fmt: skip

    def completion(self, found: Recording, stats: DecodingStats) -> Completion:
        """What the engine hands to learning after an answer."""
        prompt = tuple(found.arrays["tokens"][: found.num_prompt].tolist())
        fields, length = {}, len(found.arrays["tokens"])
        for name, source in found.arrays.items():
            fields[name] = np.zeros(
                (1, self._capacity, *source.shape[1:]), source.dtype
            )
            fields[name][0, :length] = source
        answer = whole_answer(found)
        feedback: Any = Feedback(**fields)
        return Completion(
            Request(found.id, prompt, len(answer)), answer, "length", stats, [], 0.0,
            feedback, length, self._capacity,
        )  # fmt: skip

    def learning(self, config: LearnerConfig) -> Learning:
        """A learner at its start, compiled.

        Raises:
          ConfigError: It trains nothing, or would choose its interval by the clock.
        """
        if not config.is_training:
            raise ConfigError(
                f"the learner {config.name!r} learns from more than is recorded; "
                f"replay those that learn along gradients"
            )
        if config.update_interval < 1 and not config.update_every_prompts:
            raise ConfigError(
                "a replayed learner needs an update_interval, in tokens: a budget of "
                "time would make the result depend on the machine"
            )
        config = dataclasses.replace(config, memory_slots=0)
        draft, first = self.draft.draft, self.store.recording(self.order[0])
        adaptation = Adaptation(
            config, self.drafter.unroll, self.shared, first.arrays["taps"].shape[-1],
            first.arrays["hidden"].shape[-1], has_memory=False,
        )  # fmt: skip
        learning = Learning(config, adaptation, *adaptation.init(draft))
        learning.rehearse(self.completion(first, DecodingStats()), draft)
        # Compiles; costs are those of the budget, not of this machine.
        learning.state = adaptation.calibrate(learning.state, learning.traffic, draft)
        return learning

    def run(
        self,
        config: LearnerConfig | None,
        on_answer: Callable[[Answered], None] = lambda answered: None,
        on_update: Callable[[UpdateReport, Draft, Draft], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Run:
        """Goes along the stream.

        Args:
          config: None replays the draft as it is.
          on_update: Called with the draft served before and after each update.
        """
        learning = None if config is None else self.learning(config)
        run = Run([], [], self.draft.draft, learning)
        served, begin = self.serving(run.draft.params), time.perf_counter()
        position = 0
        while position < len(self.order) and not should_stop():
            batch = self.order[
                position : position + self._num_ahead(learning, position)
            ]
            for entry, (accepted, loss) in zip(
                batch, self.score(served, batch), strict=True
            ):
                found, before = self.store.recording(entry), run.draft
                num_tokens = len(found.arrays["tokens"]) - found.num_prompt + 1
                stats = walk(accepted, num_tokens, self.num_steps)
                answered = Answered(
                    found.id, found.domain, num_tokens, stats,
                    int(learning.state.version) if learning else 0, 0.0, loss,
                )  # fmt: skip
                if learning is not None:
                    answered = self._learn(run, found, answered, on_update)
                run.answers.append(answered)
                on_answer(answered)
                position += 1
                if run.draft is not before:
                    # What else was scored ahead was so with the draft of before.
                    served = self.serving(run.draft.params)
                    break
        run.seconds = time.perf_counter() - begin
        return run

    def _num_ahead(self, learning: Learning | None, position: int) -> int:
        """Requests to score at once: as many as the next update is likely to leave."""
        limit = min(_ROWS[-1], len(self.order) - position)
        if learning is None:
            return limit
        state, count = learning.state, 0
        if every := learning.config.update_every_prompts:
            return min(limit, every - int(state.num_prompts) % every)
        waiting, interval = int(state.num_waiting), int(state.update_interval)
        while count < limit and (count == 0 or waiting < interval):
            entry = self.store.entries[self.order[position + count]]
            waiting += entry.length - entry.num_prompt + 1
            count += 1
        return count

    def _learn(self, run: Run, found: Recording, answered: Answered, on_update):
        """As `Session` learns from a completion; with the time that it took."""
        learning = run.learning
        assert learning is not None
        completion = self.completion(found, answered.stats)
        start = time.perf_counter()
        learning.observe(completion, run.draft)
        before, report = run.draft, None
        if learning.is_due:
            draft, report = learning.update(run.draft)
            run.reports.append(report)
            if report.decision == "promote":
                run.draft = draft
        jax.block_until_ready((learning.state, learning.traffic, run.draft))
        seconds = time.perf_counter() - start
        if report is not None and on_update is not None:
            on_update(report, before, run.draft)
        return dataclasses.replace(answered, learning_seconds=seconds)
