# SPDX-License-Identifier: Apache-2.0
"""Plain, drafted and learning decoding of the same prompts, interleaved in one run.

Every prompt is answered by every mode in turn, in rotating order, so that drifts of the
machine hit all alike. Learning happens inside the learned mode's turn and is drained
before the next one; a prompt is always decoded before anything is learned from it.
"""

import dataclasses
import datetime
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from ospec_jax.config import ConfigError, LearnerConfig, SamplingConfig, TreeConfig
from ospec_jax.data.prompts import Prompt, encode
from ospec_jax.decoding.engine import fetch
from ospec_jax.decoding.reference import is_tie
from ospec_jax.metrics import DecodingStats, repeated_token_share
from ospec_jax.models.hub import Target
from ospec_jax.session import LoadedDraft, Result, Session

MODES = ("autoregressive", "static", "ngrams", "learned")
"""Without a draft; with the draft as it is; that with n-grams of the request; that with
learning from earlier requests."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
      modes: Some of `MODES`.
      max_new_tokens: Of each answer.
      ngrams: Let n-grams suggest tokens in the learned mode, too.
    """

    modes: tuple[str, ...] = MODES
    max_new_tokens: int = 128
    tree: TreeConfig = TreeConfig(num_steps=3)
    learner: LearnerConfig = LearnerConfig()
    sampling: SamplingConfig = SamplingConfig()
    is_raw: bool = False
    ngrams: bool = True

    def __post_init__(self):
        unknown = set(self.modes) - set(MODES)
        if unknown or not self.modes:
            raise ConfigError(f"unknown modes {sorted(unknown)}; use some of {MODES}")


@dataclasses.dataclass
class ModeRun:
    """What one mode did."""

    session: Session
    results: list[Result] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(r.token_ids) for r in self.results)

    @property
    def stats(self) -> DecodingStats:
        """Counters of all answers."""
        empty = DecodingStats(num_spec_tokens=self.session.tree.num_steps)
        return sum((r.stats for r in self.results), empty)

    @property
    def seconds(self) -> float:
        """Decoding time."""
        return sum(r.seconds for r in self.results)

    @property
    def learning_seconds(self) -> float:
        """Ring writes, updates, promotion scoring and swaps."""
        return sum(r.learning_seconds for r in self.results)

    @property
    def tokens_per_second(self) -> float:
        """Without learning."""
        return self.num_tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_second_with_learning(self) -> float:
        """All wall-clock time of the mode's turns."""
        return self.num_tokens / max(self.seconds + self.learning_seconds, 1e-9)


@dataclasses.dataclass
class BenchRun:
    """A finished benchmark."""

    config: BenchConfig
    prompts: list[Prompt]
    modes: dict[str, ModeRun]
    reference: list[list[int]]
    pass_seconds: dict[str, float]


def run_bench(
    target: Target,
    draft: LoadedDraft | None,
    prompts: Sequence[Prompt],
    config: BenchConfig = BenchConfig(),
    on_result: Callable[[int, str, "ModeRun"], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> BenchRun:
    """Measures all modes on all prompts.

    Args:
      on_result: Called after each answer with the prompt's number and the mode.
      should_stop: Asked before each prompt.
    """
    if draft is None and set(config.modes) != {"autoregressive"}:
        raise ConfigError("all modes but autoregressive need a draft")
    modes = {name: _open_mode(name, target, draft, config) for name in config.modes}
    pass_seconds = measure_passes(modes)
    # Mismatches are against plain decoding, which runs unscored if nobody asked for it.
    plain = modes.get("autoregressive") or _open_mode(
        "autoregressive", target, draft, config
    )
    reference, done = [], []
    for number, prompt in enumerate(prompts):
        if should_stop():
            break
        order = list(modes)[number % len(modes) :] + list(modes)[: number % len(modes)]
        for name in order:
            modes[name].results.append(_answer(modes[name].session, prompt, config))
            if on_result is not None:
                on_result(number, name, modes[name])
        if "autoregressive" in modes:
            reference.append(modes["autoregressive"].results[-1].token_ids)
        else:
            reference.append(_answer(plain.session, prompt, config).token_ids)
        done.append(prompt)
    return BenchRun(config, done, modes, reference, pass_seconds)


def _open_mode(name, target, draft, config: BenchConfig) -> ModeRun:
    if name == "autoregressive":
        session = Session(target)
    else:
        learner = config.learner if name == "learned" else None
        ngrams = name == "ngrams" or (name == "learned" and config.ngrams)
        session = Session(
            target, draft, learner=learner, tree=config.tree, ngrams=ngrams
        )  # fmt: skip
    return ModeRun(session, compile_seconds=session.warm_up())


def _answer(session: Session, prompt: Prompt, config: BenchConfig) -> Result:
    results = session.generate(
        [prompt], config.max_new_tokens, config.sampling, is_raw=config.is_raw
    )
    return list(results)[0]


def measure_passes(modes: dict[str, ModeRun], num_rounds: int = 12) -> dict[str, float]:
    """Seconds of one step of each mode alone, for the predicted speed-up.

    Steps are timed round robin on a prompt of the cache's usual filling; the median
    counts.
    """
    runs = {}
    for name, mode in modes.items():
        session = mode.session
        request = session.probe_request()
        draft = session.served_draft
        capacity = session.engine.capacity_for([request])
        state, _ = session.engine.prefill(draft, request, capacity)
        runs[name] = (session, draft, state)
    times: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(num_rounds):
        for name, (session, draft, state) in runs.items():
            step = session.engine.compiled("step", True)
            # Rewinding keeps the cache's filling the same in every round.
            lengths, remaining = state.lengths + 0, state.num_remaining + 0
            start = time.perf_counter()
            state, output = step(session.target.params, draft, state)
            fetch(output)
            times[name].append(time.perf_counter() - start)
            state = state.replace(lengths=lengths, num_remaining=remaining)
            runs[name] = (session, draft, state)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def to_rows(run: BenchRun) -> list[dict]:
    """The benchmark's JSON: one row a mode."""
    return [_row(run, name) for name in run.modes]


def _row(run: BenchRun, name: str) -> dict:
    mode, stats = run.modes[name], run.modes[name].stats
    session, learning = mode.session, mode.session.learning
    predicted = None
    if "autoregressive" in run.pass_seconds:
        ratio = run.pass_seconds["autoregressive"] / run.pass_seconds[name]
        predicted = stats.mean_acceptance_length * ratio
    mismatched, ties = count_mismatches(run, mode)
    shares = [repeated_token_share(r.token_ids) for r in mode.results]
    weights = [len(r.token_ids) for r in mode.results]
    return {
        "mode": name,
        "num_prompts": len(mode.results),
        "num_tokens": mode.num_tokens,
        "tokens_per_second": mode.tokens_per_second,
        "tokens_per_second_with_learning": mode.tokens_per_second_with_learning,
        "predicted_speedup": predicted,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_per_position": stats.acceptance_per_position,
        "num_mismatched_outputs": mismatched,
        "num_tie_flips": ties,
        "repeated_token_share": float(np.dot(shares, weights) / max(sum(weights), 1)),
        "num_updates": int(learning.state.learner.num_updates) if learning else 0,
        "num_promotions": session.version,
        "learning_seconds": mode.learning_seconds,
        "compile_seconds": mode.compile_seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "target": session.target.name,
        "precision": session.target.numerics.precision,
        "num_speculative_tokens": session.tree.num_steps,
        "device": str(jax.devices()[0].device_kind),
        "jax_version": jax.__version__,
        "git_commit": _git_commit(),
        "date": datetime.date.today().isoformat(),
    }


def count_mismatches(run: BenchRun, mode: ModeRun) -> tuple[int, int]:
    """Outputs that differ from plain decoding, and how many of them are mere ties.

    Sampled outputs follow the same law, not the same draws: they are not compared.
    """
    if run.config.sampling.temperature > 0:
        return 0, 0
    mismatched = ties = 0
    session = mode.session
    for result, expected in zip(mode.results, run.reference, strict=True):
        if result.token_ids == expected:
            continue
        mismatched += 1
        pairs = enumerate(zip(result.token_ids, expected, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is None:
            continue  # one output is longer: no tie
        ids = encode(result.prompt, session.target.tokenizer, run.config.is_raw)
        prefix = [*ids, *expected[:first]]
        ties += is_tie(session.engine.config, session.target.params, prefix)
    return mismatched, ties


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
