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
from ospec_jax.decoding.engine import PREFILL_CHUNK, fetch
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
      batch_size: Prompts decoded together.
    """

    modes: tuple[str, ...] = MODES
    max_new_tokens: int = 128
    tree: TreeConfig = TreeConfig(num_steps=3)
    learner: LearnerConfig = LearnerConfig()
    sampling: SamplingConfig = SamplingConfig()
    is_raw: bool = False
    ngrams: bool = True
    batch_size: int = 1

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
    total_seconds: float = 0.0

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
        """All wall-clock time of the mode's turns but learning."""
        return self.total_seconds - self.learning_seconds

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
        return self.num_tokens / max(self.total_seconds, 1e-9)


@dataclasses.dataclass
class BenchRun:
    """A finished benchmark."""

    config: BenchConfig
    prompts: list[Prompt]
    modes: dict[str, ModeRun]
    reference: list[list[int]]
    pass_seconds: dict[str, "PassSeconds"]


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
      on_result: Called after each turn with the number of prompts begun, the mode's
        name and its run.
      should_stop: Asked before each round of turns.
    """
    if draft is None and set(config.modes) != {"autoregressive"}:
        raise ConfigError("all modes but autoregressive need a draft")
    size = config.batch_size
    groups = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    open_mode = lambda name: _open_mode(name, target, draft, config, groups)
    modes = {name: open_mode(name) for name in config.modes}
    pass_seconds = measure_passes(modes)
    # Mismatches are against plain decoding, which runs unscored if nobody asked for it.
    plain = modes.get("autoregressive") or open_mode("autoregressive")
    done: list[Prompt] = []
    for number, group in enumerate(groups):
        if should_stop():
            break
        done += group
        order = list(modes)[number % len(modes) :] + list(modes)[: number % len(modes)]
        for name in order:
            _answer(modes[name], group, config)
            if on_result is not None:
                on_result(len(done), name, modes[name])
        if "autoregressive" not in modes:
            _answer(plain, group, config)
    reference = [result.token_ids for result in plain.results]
    return BenchRun(config, done, modes, reference, pass_seconds)


def _open_mode(name, target, draft, config: BenchConfig, groups) -> ModeRun:
    if name == "autoregressive":
        session = Session(target, batch_size=config.batch_size)
    else:
        learner = config.learner if name == "learned" else None
        ngrams = name == "ngrams" or (name == "learned" and config.ngrams)
        session = Session(
            target, draft, learner=learner, tree=config.tree, ngrams=ngrams,
            batch_size=config.batch_size,
        )  # fmt: skip
    capacities = set()
    for group in groups:
        pairs = session.requests(
            group, config.max_new_tokens, config.sampling, config.is_raw
        )
        capacities.add(session.engine.capacity_for(request for _, request in pairs))
    seconds = session.warm_up(sorted(capacities), config.sampling)
    return ModeRun(session, compile_seconds=seconds)


def _answer(mode: ModeRun, group: list[Prompt], config: BenchConfig) -> None:
    """Answers a group of prompts in a mode's turn, and books its time."""
    start = time.perf_counter()
    results = list(
        mode.session.generate(
            group, config.max_new_tokens, config.sampling, is_raw=config.is_raw
        )
    )
    mode.total_seconds += time.perf_counter() - start
    place = {id(prompt): i for i, prompt in enumerate(group)}
    mode.results += sorted(results, key=lambda result: place[id(result.prompt)])


@dataclasses.dataclass(frozen=True)
class PassSeconds:
    """What single passes of a mode take, alone.

    Attributes:
      prefill: One chunk of a prompt.
      step: One step of decoding.
    """

    prefill: float
    step: float


def measure_passes(
    modes: dict[str, ModeRun], num_rounds: int = 12
) -> dict[str, PassSeconds]:
    """Times the passes of each mode on a single request, for the predicted speed-up.

    The modes take turns, on a cache of their usual filling; medians count.
    """
    runs, times = {}, {name: ([], []) for name in modes}
    for _ in range(num_rounds):
        for name, mode in modes.items():
            engine, draft = mode.session.engine, mode.session.served_draft
            request = mode.session.probe_request()
            start = time.perf_counter()
            state, output = engine.prefill(
                draft, request, engine.capacity_for([request])
            )
            fetch(output)
            times[name][0].append(time.perf_counter() - start)
            runs.setdefault(name, state)
    for _ in range(num_rounds):
        for name, mode in modes.items():
            step, state = mode.session.engine.compiled("step", True), runs[name]
            # Rewinding keeps the cache's filling the same in every round.
            lengths, remaining = state.lengths + 0, state.num_remaining + 0
            start = time.perf_counter()
            state, output = step(
                mode.session.target.params, mode.session.served_draft, state
            )
            fetch(output)
            times[name][1].append(time.perf_counter() - start)
            runs[name] = state.replace(lengths=lengths, num_remaining=remaining)
    return {
        name: PassSeconds(*(statistics.median(seconds[2:]) for seconds in pair))
        for name, pair in times.items()
    }


def predicted_seconds(run: BenchRun, name: str) -> float:
    """What a mode's passes should take in all, by their number and single cost."""
    mode, cost = run.modes[name], run.pass_seconds[name]
    lengths = [
        len(encode(prompt, mode.session.target.tokenizer, run.config.is_raw))
        for prompt in run.prompts
    ]
    num_chunks = sum(-(-length // PREFILL_CHUNK) for length in lengths)
    return num_chunks * cost.prefill + mode.stats.num_drafts * cost.step


def to_rows(run: BenchRun) -> list[dict]:
    """The benchmark's JSON: one row a mode."""
    return [_row(run, name) for name in run.modes]


def _row(run: BenchRun, name: str) -> dict:
    mode, stats = run.modes[name], run.modes[name].stats
    session, learning = mode.session, mode.session.learning
    predicted = None
    if "autoregressive" in run.modes and run.config.batch_size == 1:
        plain = predicted_seconds(run, "autoregressive")
        predicted = plain / max(predicted_seconds(run, name), 1e-9)
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
