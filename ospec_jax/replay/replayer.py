# SPDX-License-Identifier: Apache-2.0
"""Replaying learners on recorded answers, with the draft alone and no target.

Greedy answers do not depend on the draft. `score` tells how many drafted tokens each
step on a recorded answer would get accepted; learning then sees what a `Session` at
batch 1 sees, in the same order.

Chains only, and without suggestions of n-grams. The states that the learner of the
last layer reads are those of the proposals that the engine would have made.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ospec_jax.config import RECORDS_STATES, ConfigError, TreeConfig
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.engine import CAPACITIES
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.layers import Numerics
from ospec_jax.models.sharing import caster, share
from ospec_jax.online.redrafting import build_score, drafting_states
from ospec_jax.online.trainer import (
    Learned,
    Traffic,
    Trainer,
    TrainerState,
    UpdateReport,
    go_on_from,
    learn_from,
)
from ospec_jax.replay import record
from ospec_jax.replay.score import answer_window, walk, whole_answer
from ospec_jax.replay.store import Recording
from ospec_jax.session.build import learner_for, trainer_for
from ospec_jax.types import Draft, Feedback

_ROWS = (1, 4, 8)
"""Requests scored at once; each is compiled for."""
_CONTEXT = 128
"""Prompts are padded to multiples of this, for the same reason; they cost little."""
_ANSWER = 16
"""Likewise answers, to the longest of the stream."""
DEFAULT_INTERVAL = 512
"""Tokens between updates where there is no clock to tell."""


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


class Score(NamedTuple):
    """A whole answer's.

    Attributes:
      accepted: `[a]` draft tokens of a proposal at each of its tokens.
      loss: None when not asked for.
      states: `[a, num_steps, d]`, or None when not asked for.
      choices: `[a, num_steps]` what was drafted from these, or None likewise.
    """

    accepted: np.ndarray
    loss: float | None
    states: np.ndarray | None
    choices: np.ndarray | None


@dataclasses.dataclass
class Run:
    """A learner's way along a stream.

    Attributes:
      draft: What is served at its end, in float32.
      learner: Its settings, `auto` made up its mind; None for a static draft.
      state: The trainer's at its end, likewise.
      seconds: Wall-clock time of it all.
    """

    answers: list[Answered]
    reports: list[UpdateReport]
    draft: Draft
    learner: LearnerConfig | None = None
    state: TrainerState | None = None
    seconds: float = 0.0


@share
def _compiled(
    drafter: Drafter,
    numerics: Numerics,
    context: int,
    num_steps: int,
    decay: float,
    has_states: bool,
) -> Callable:
    """The jitted function of `build_score`."""
    return jax.jit(
        build_score(drafter, numerics, context, num_steps, decay, has_states)
    )


class Replayer:
    """Compiled functions for one draft and one recording; holds no learner."""

    def __init__(
        self,
        target: Target,
        draft: LoadedDraft,
        folder: Path,
        num_steps: int = 3,
        ids: Sequence[str | Prompt] = (),
        has_losses: bool = False,
        decay: float = 0.8,
    ):
        """Opens the recording.

        Args:
          num_steps: Tokens of a chain, K.
          ids: Replay these prompts in this order instead of the recorded ones; see
            `record.open_recording`.
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

        self.draft = draft
        self.num_steps = num_steps
        self.decay = decay
        self.has_losses = has_losses
        self._numerics = target.numerics
        # Other families read the final states, which every recording has.
        self._is_tapped = draft.family.reads_taps
        taps = draft.taps if self._is_tapped else None
        self.store, self.order = record.open_recording(folder, target, taps, ids)
        self.shared = shared_tables(target.params)
        self.drafter = build_drafter(
            draft.family,
            draft.meta.draft,
            TreeConfig(num_steps=num_steps),
            target.numerics,
        )
        self._cast = caster(target.numerics.precision)
        self._target = target

        # Shapes of the whole stream, so that few programs are compiled.
        entries = [self.store.entries[i] for i in self.order]
        longest = max(e.length - e.num_prompt for e in entries)
        self._num_roots = -(-max(longest, 1) // _ANSWER) * _ANSWER
        longest = max(e.length for e in entries) + 1
        self._capacity = next(c for c in CAPACITIES if c >= longest)

    def serving(self, params) -> Any:
        """Parameters in the target's precision, as they are served."""
        return self._cast(params)

    def score(
        self, params, entries: Sequence[int], has_states: bool = False
    ) -> list[Score]:
        """Scores whole answers.

        Args:
          params: In serving precision.
          entries: At most eight numbers of `store`'s entries.
        """
        # Padded to few numbers of rows and of context tokens, each compiled once.
        found = [self.store.recording(i) for i in entries]
        num_rows = next(n for n in _ROWS if n >= len(found))
        longest = max(r.num_prompt for r in found) - 1
        context = max(-(-longest // _CONTEXT), 1) * _CONTEXT
        score_rows = _compiled(
            self.drafter,
            self._numerics,
            context,
            self.num_steps,
            self.decay,
            has_states,
        )

        rows = [self._window(r, context) for r in found]
        # Rows of zeros, whose scores are dropped.
        rows += [jax.tree.map(np.zeros_like, rows[0])] * (num_rows - len(rows))
        feedback, start, following, weight = jax.tree.map(lambda *x: np.stack(x), *rows)
        found_of_all = jax.device_get(
            score_rows(
                params,
                self.draft.draft.token_ids,
                self.shared,
                feedback,
                start,
                following,
                weight if self.has_losses else None,
            )
        )
        accepted, losses, states, choices = found_of_all
        losses = None if losses is None else losses.tolist()
        of_row = lambda values, row: None if values is None else values[row]

        return [
            Score(
                accepted[row],
                of_row(losses, row),
                of_row(states, row),
                of_row(choices, row),
            )
            for row in range(len(found))
        ]

    def _window(self, found: Recording, context: int):
        return answer_window(
            found,
            context,
            self._num_roots,
            self.num_steps,
            self.has_losses,
            self._is_tapped,
        )

    def completion(
        self,
        found: Recording,
        stats: DecodingStats,
        score: Score | None = None,
        has_choices: bool = False,
    ) -> Completion:
        """What the engine hands to learning after an answer.

        Args:
          score: With its states, where these are learned from.
          has_choices: What was drafted from them is learned from, too.
        """
        # As the engine would hand it over: features by position in a cache of one size.
        prompt = tuple(found.arrays["tokens"][: found.num_prompt].tolist())
        answer = whole_answer(found)
        length = len(found.arrays["tokens"])
        sources = {name: (0, source) for name, source in found.arrays.items()}
        if score is not None and score.states is not None:
            assert score.choices is not None, "they come with the states"
            states, has_state, choices = drafting_states(
                score.accepted, score.states, score.choices, len(answer)
            )
            first = found.num_prompt
            # What decoding records for the last layer is states alone.
            sources = {"tokens": sources["tokens"], "states": (first, states)}
            sources["has_state"] = first, has_state
            if has_choices:
                sources["choices"] = first, choices

        fields: dict[str, Any] = {}

        for name, (first, source) in sources.items():
            shape = 1, self._capacity, *source.shape[1:]
            fields[name] = np.zeros(shape, source.dtype)
            fields[name][0, first:length] = source

        feedback: Any = Feedback(**fields)

        # Not decoded here, so it took no time.
        return Completion(
            Request(found.id, prompt, len(answer)),
            answer,
            "length",
            stats,
            [],
            0.0,
            feedback,
            length,
            self._capacity,
        )

    def trainer(self, config: LearnerConfig) -> tuple[LearnerConfig, Trainer]:
        """What learns with these settings, and the settings, all of them decided.

        Raises:
          ConfigError: It trains nothing, or would choose its interval by the clock.
        """
        is_auto = config.name == "auto"
        config = learner_for(config, self.draft, self.drafter, self._target)
        trainer = self._trainer(config)
        if trainer.recording == "nothing":
            raise ConfigError(
                f"the learner {config.name!r} trains nothing, and a replay knows no "
                f"n-grams; replay those that train the draft"
            )
        if trainer.is_ready(trainer.init(self.draft.draft)[0]):
            return config, trainer
        if not is_auto:
            raise ConfigError(
                "a replayed learner needs an update_interval, in tokens: a budget of "
                "time would make the result depend on the machine"
            )

        config = config.replace(update_interval=DEFAULT_INTERVAL)

        return config, self._trainer(config)

    def _trainer(self, config: LearnerConfig) -> Trainer:
        first = self.store.recording(self.order[0])
        return trainer_for(
            config,
            self._target,
            self.draft,
            self.drafter,
            self._serve,
            # A recording may hold the taps of more layers than this draft reads.
            tap_width=first.arrays["taps"].shape[-1],
        )

    def _begin(self, trainer: Trainer) -> Learned:
        """Before the first answer, all compiled; costs are those of the budget."""
        first = self.store.recording(self.order[0])
        draft = self.draft.draft
        served = trainer.serve(draft)
        score = None
        if trainer.recording in RECORDS_STATES:
            (score,) = self.score(served.params, self.order[:1], has_states=True)

        has_choices = trainer.recording == "choices"
        completion = self.completion(first, DecodingStats(), score, has_choices)
        state, traffic = trainer.init(draft)
        # Without a speed nothing is measured: costs are what the settings say.
        state = trainer.warm_up(state, traffic, draft, served, completion, None)

        return go_on_from(trainer, state, traffic, draft)

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
        draft = self.draft.draft
        if config is None:
            run = Run([], [], draft)
            trainer = None
            now = Learned(None, Traffic(), draft, self._serve(draft))
        else:
            config, trainer = self.trainer(config)
            now = self._begin(trainer)
            run = Run([], [], draft, config, now.state)

        begin = time.perf_counter()
        position = 0

        # Answers are scored together as far as they are certain to be served by the
        # same draft.
        while position < len(self.order) and not should_stop():
            batch = self.order[position:][: self._num_ahead(trainer, now, position)]
            has_states = trainer is not None and trainer.recording in RECORDS_STATES
            scores = self.score(now.served.params, batch, has_states)
            # One by one from here on: learning sees them in the stream's order.
            for entry, score in zip(batch, scores, strict=True):
                before = now.served
                now, answered = self._answer(run, trainer, now, entry, score, on_update)
                run.answers.append(answered)
                on_answer(answered)
                position += 1
                if now.served is not before:
                    break  # what else was scored ahead was so with the draft of before

        run.draft = now.draft
        run.state = now.state
        run.seconds = time.perf_counter() - begin

        return run

    def _answer(
        self,
        run: Run,
        trainer: Trainer | None,
        now: Learned,
        entry: int,
        score: Score,
        on_update,
    ) -> tuple[Learned, Answered]:
        """Gives a recorded answer, and learns from it as `Session` does."""
        found = self.store.recording(entry)
        num_tokens = len(found.arrays["tokens"]) - found.num_prompt + 1
        stats = walk(score.accepted, num_tokens, self.num_steps)
        answered = Answered(found.id, found.domain, num_tokens, stats, loss=score.loss)
        if trainer is None:
            return now, answered

        start = time.perf_counter()
        before = now
        has_choices = trainer.recording == "choices"
        completion = self.completion(found, stats, score, has_choices)
        now = learn_from(trainer, now, completion)
        seconds = time.perf_counter() - start
        if now.report is not None:
            run.reports.append(now.report)
            if on_update is not None:
                on_update(now.report, before.draft, now.draft)

        return now, dataclasses.replace(
            answered, version=int(before.state.version), learning_seconds=seconds
        )

    def _serve(self, draft: Draft) -> Draft:
        return draft.replace(params=self.serving(draft.params))

    def _num_ahead(self, trainer: Trainer | None, now: Learned, position: int) -> int:
        """Requests to score at once: until the next update, at most eight."""
        entries = [self.store.entries[i] for i in self.order[position:][: _ROWS[-1]]]
        if trainer is None:
            return len(entries)

        num_tokens = [entry.length - entry.num_prompt + 1 for entry in entries]
        return trainer.answers_until_due(now.state, num_tokens)
