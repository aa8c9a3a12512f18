# SPDX-License-Identifier: Apache-2.0
"""Plain, drafted and learning decoding of the same prompts, interleaved in one run.

Every prompt is answered by every mode in turn, in rotating order, so that drifts of the
machine hit all alike. Learning happens inside the learned mode's turn and is drained
before the next one; a prompt is always decoded before anything is learned from it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

from ospec_jax.bench.passes import (
    PassSeconds,
    measure_passes,
    measure_verification,
)
from ospec_jax.bench.peers import Peer
from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig, check_types
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.session import Result, Session

MODES = ("autoregressive", "static", "ngrams", "learned")
"""Without a draft; with the draft as it is; that with n-grams of the request; that with
learning from earlier requests."""

UNPADDED = "unpadded"
"""Plain decoding without what keeps a row's bits independent of the others: a lone
token is not computed twice. Faster, and no oracle: it may round differently."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
      modes: Some of `MODES`, and `UNPADDED`.
      max_new_tokens: Of each answer.
      ngrams: Let n-grams suggest tokens in the learned mode, too.
      stop: Strings that end an answer.
      num_predicted_tokens: Tokens verified at once while a prediction holds.
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
    stop: tuple[str, ...] = ()
    num_predicted_tokens: int = 12

    def __post_init__(self):
        check_types(self)
        known = (*MODES, UNPADDED)
        unknown = set(self.modes) - set(known)
        if unknown or not self.modes:
            raise ConfigError(f"unknown modes {sorted(unknown)}; use some of {known}")


@dataclasses.dataclass
class Turns:
    """What anybody did who took part.

    Attributes:
      turn_seconds: Wall-clock time of each turn, learning included.
      turn_tokens: Of each turn's answers.
    """

    compile_seconds: float = 0.0
    turn_seconds: list[float] = dataclasses.field(default_factory=list)
    turn_tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.turn_tokens)

    @property
    def total_seconds(self) -> float:
        """All wall-clock time."""
        return sum(self.turn_seconds)

    @property
    def tokens_per_second_with_learning(self) -> float:
        """All wall-clock time of all turns."""
        return self.num_tokens / max(self.total_seconds, 1e-9)

    def keep(self, num_turns: int, num_prompts: int) -> None:
        """Forgets what was done after so many turns and prompts."""
        del self.turn_seconds[num_turns:]
        del self.turn_tokens[num_turns:]


@dataclasses.dataclass
class PeerRun(Turns):
    """What another decoder did."""


@dataclasses.dataclass(kw_only=True)
class ModeRun(Turns):
    """What one mode did."""

    session: Session
    results: list[Result] = dataclasses.field(default_factory=list)

    def keep(self, num_turns: int, num_prompts: int) -> None:
        """Forgets what was done after so many turns and prompts."""
        super().keep(num_turns, num_prompts)
        del self.results[num_prompts:]

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


@dataclasses.dataclass
class BenchRun:
    """A finished benchmark.

    Attributes:
      verify_seconds: Of the target's pass over each mode's nodes; empty unless drafts
        were compared.
    """

    config: BenchConfig
    prompts: list[Prompt]
    modes: dict[str, ModeRun]
    peers: dict[str, PeerRun]
    reference: list[list[int]]
    pass_seconds: dict[str, PassSeconds]
    verify_seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def run_bench(
    target: Target,
    draft: LoadedDraft | None,
    prompts: Sequence[Prompt],
    config: BenchConfig = BenchConfig(),
    on_result: Callable[[int, str, "Turns"], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_drop: Callable[[], bool] = lambda: False,
    peers: Sequence[Peer] = (),
    drafts: dict[str, tuple[LoadedDraft, TreeConfig]] | None = None,
) -> BenchRun:
    """Measures all modes, and other decoders, on all prompts.

    Args:
      drafts: Drafts that are compared, each as it is: further modes by these names.
      peers: Take their turns like the modes.
      on_result: Called after each turn with the number of prompts begun, the mode's
        name and its run.
      should_stop: Asked before each round of turns.
      should_drop: Asked at every step: once it says so, the round is left out.
    """
    if draft is None and not set(config.modes) <= {"autoregressive", UNPADDED}:
        raise ConfigError("all modes but autoregressive and unpadded need a draft")
    if peers and (config.batch_size > 1 or config.sampling.temperature > 0):
        raise ConfigError("peers are compared greedily, with a batch size of 1")

    size = config.batch_size
    groups = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    open_mode = lambda name: _open_mode(name, target, draft, config, groups)
    modes = {name: open_mode(name) for name in config.modes}

    for name, (other, tree) in (drafts or {}).items():
        own = dataclasses.replace(config, tree=tree)
        modes[name] = _open_mode(name, target, other, own, groups)

    sessions = {name: mode.session for name, mode in modes.items()}
    pass_seconds = measure_passes(sessions)
    verify_seconds = measure_verification(sessions) if drafts else {}
    # Mismatches are against plain decoding, which runs unscored if nobody asked for it.
    plain = modes.get("autoregressive") or open_mode("autoregressive")
    others = {peer.name: PeerRun() for peer in peers}
    take_turn = {
        name: functools.partial(_answer, mode, config=config, should_drop=should_drop)
        for name, mode in modes.items()
    } | {
        peer.name: functools.partial(
            _answer_by_peer, peer, others[peer.name], plain.session, config=config
        )
        for peer in peers
    }

    for peer in peers:  # warms up
        _answer_by_peer(peer, PeerRun(), plain.session, groups[0], config)

    done: list[Prompt] = []
    turns = [*modes.values(), *others.values(), plain]

    for number, group in enumerate(groups):
        if should_stop():
            break
        begun = [len(one.turn_seconds) for one in turns]
        done += group
        turn = number % len(take_turn)
        for name in [*list(take_turn)[turn:], *list(take_turn)[:turn]]:
            take_turn[name](group)
            if should_drop():
                break
            if on_result is not None:
                on_result(len(done), name, modes.get(name) or others[name])
        if "autoregressive" not in modes and not should_drop():
            _answer(plain, group, config, should_drop)
        if should_drop():
            done = done[: -len(group)]
            for one, count in zip(turns, begun, strict=True):
                one.keep(count, len(done))
            break

    reference = [result.token_ids for result in plain.results]

    return BenchRun(
        config, done, modes, others, reference, pass_seconds, verify_seconds
    )


def _open_mode(name, target, draft, config: BenchConfig, groups) -> ModeRun:
    if name == UNPADDED:
        numerics = dataclasses.replace(target.numerics, is_row_invariant=False)
        target = dataclasses.replace(target, numerics=numerics)

    if name in ("autoregressive", UNPADDED):
        session = Session(target, batch_size=config.batch_size, stop=config.stop)
    else:
        is_learning = name == "learned" and draft is not None
        learner = config.learner if is_learning else None
        ngrams = name == "ngrams" or (name == "learned" and config.ngrams)
        session = Session(
            target,
            draft,
            learner=learner,
            tree=config.tree,
            ngrams=ngrams,
            batch_size=config.batch_size,
            stop=config.stop,
            num_predicted_tokens=config.num_predicted_tokens,
        )

    capacities = set()

    for group in groups:
        pairs = session.requests(
            group, config.max_new_tokens, config.sampling, config.is_raw
        )
        capacities.add(session.engine.capacity_for(request for _, request in pairs))

    has_predictions = any(prompt.prediction for group in groups for prompt in group)
    seconds = session.warm_up(sorted(capacities), config.sampling, has_predictions)

    return ModeRun(compile_seconds=seconds, session=session)


def _answer(
    mode: ModeRun,
    group: list[Prompt],
    config: BenchConfig,
    should_drop: Callable[[], bool] = lambda: False,
) -> None:
    """Answers a group of prompts in a mode's turn, and books its time."""
    start = time.perf_counter()
    results = list(
        mode.session.generate(
            group,
            config.max_new_tokens,
            config.sampling,
            is_raw=config.is_raw,
            should_stop=should_drop,
        )
    )
    mode.turn_seconds.append(time.perf_counter() - start)
    mode.turn_tokens.append(sum(len(result.token_ids) for result in results))
    place = {id(prompt): i for i, prompt in enumerate(group)}
    mode.results += sorted(results, key=lambda result: place[id(result.prompt)])


def _answer_by_peer(peer, run: PeerRun, session, group, config: BenchConfig) -> None:
    """The same for another decoder, which gets the same token ids."""
    pairs = session.requests(
        group, config.max_new_tokens, config.sampling, config.is_raw
    )
    prompts = [request.prompt_ids for _, request in pairs]
    stop_ids = session.engine.config.stop_ids
    start = time.perf_counter()
    answers = [peer.generate(ids, config.max_new_tokens, stop_ids) for ids in prompts]
    run.turn_seconds.append(time.perf_counter() - start)
    run.turn_tokens.append(sum(len(ids) for ids in answers))
