# SPDX-License-Identifier: Apache-2.0
"""Plain, drafted and learning decoding of the same prompts, interleaved in one run.

Every prompt is answered by every mode in turn, in rotating order, so that drifts of the
machine hit all alike. Learning happens inside the learned mode's turn and is drained
before the next one; a prompt is always decoded before anything is learned from it.

Turns of a conversation follow each other. The answers within it are those of plain
decoding, so that all modes, and other decoders, are asked the same. They are each
mode's own answers, too, unless its draft draws its children: where they are not,
`num_mismatched_outputs` says so.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from ospec_jax.bench.asking import (
    first_turn,
    fitting_items,
    request_bounds,
    requests_of,
    rounds_of,
)
from ospec_jax.bench.passes import measure_passes, measure_verification
from ospec_jax.bench.peers import Peer
from ospec_jax.bench.runs import (
    IDLE,
    LEARNED_LONGER,
    LONGER,
    UNPADDED,
    BenchConfig,
    BenchRun,
    Contender,
    ModeRun,
    PeerRun,
    Turns,
)
from ospec_jax.config import ConfigError
from ospec_jax.data.conversations import Conversation
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.engine import CAPACITIES
from ospec_jax.drafters.registry import SUGGESTIONS
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.session import Session


def run_bench(
    target: Target,
    draft: LoadedDraft | None,
    prompts: Sequence[Prompt | Conversation],
    config: BenchConfig = BenchConfig(),
    on_result: Callable[[int, str, "Turns"], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_drop: Callable[[], bool] = lambda: False,
    peers: Sequence[Peer] = (),
    contenders: Mapping[str, Contender] | None = None,
) -> BenchRun:
    """Measures all modes, and other decoders, on all prompts.

    What does not fit into the context is left out, in all modes, with a warning.

    Args:
      prompts: Prompts, or conversations, whose turns are asked one after another.
      contenders: Further modes by these names. If all are drafts as they are, their
        passes are measured, too.
      peers: Take their turns like the modes.
      on_result: Called after each turn with the number of prompts begun, the mode's
        name and its run.
      should_stop: Asked before each round of turns.
      should_drop: Asked at every step: once it says so, the round is left out.

    Raises:
      ConfigError: Settings do not go together, or no prompt fits.
    """
    contenders = contenders or {}
    _check(config, prompts, draft is not None, peers)
    modes = {name: _open_mode(name, target, draft, config) for name in config.modes}
    modes |= {
        name: ModeRun(session=_open_session(target, contender, config))
        for name, contender in contenders.items()
    }
    # Mismatches are against plain decoding, which runs unscored if nobody asked for it.
    hidden = []
    if "autoregressive" not in modes:
        hidden = [_open_mode("autoregressive", target, draft, config)]
    plain = hidden[0] if hidden else modes["autoregressive"]

    sessions = {name: mode.session for name, mode in modes.items()}
    opened = [*sessions.values(), *(mode.session for mode in hidden)]
    items, left_out = fitting_items(prompts, opened, config)
    for mode in [*modes.values(), *hidden]:
        _warm_up(mode, items, config)

    pass_seconds = measure_passes(sessions)
    verify_seconds = {}
    if contenders and all(contender.is_static for contender in contenders.values()):
        verify_seconds = measure_verification(sessions)

    others = {peer.name: PeerRun() for peer in peers}
    for peer in peers:
        if items:  # warms up
            first = [first_turn(items[0])]
            _answer_by_peer(peer, PeerRun(), plain.session, first, config)

    run = BenchRun(
        config,
        [],
        modes,
        others,
        [],
        pass_seconds,
        verify_seconds,
        left_out=left_out,
        is_complete=False,
    )
    rounds = rounds_of(items, plain, opened, config, left_out)
    turns = _Turns(run, peers, plain, hidden, should_drop, on_result)

    for number, (name, group) in enumerate(rounds):
        if should_stop() or not turns.take(number, group):
            break
        run.prompts += group
        run.prompt_lengths += [
            len(request.prompt_ids)
            for request in requests_of(group, plain.session, config)
        ]
        run.conversations += [name] * len(group)
    else:
        run.is_complete = True

    run.reference = [result.token_ids for result in plain.results]

    return run


@dataclasses.dataclass(frozen=True)
class _Turns:
    """Who answers in turns.

    Attributes:
      plain: The mode of plain decoding; `hidden` has it where nobody asked for it.
    """

    run: BenchRun
    peers: Sequence[Peer]
    plain: ModeRun
    hidden: list[ModeRun]
    should_drop: Callable[[], bool]
    on_result: Callable[[int, str, Turns], None] | None

    def take(self, number: int, group: list[Prompt]) -> bool:
        """Has a group of prompts answered by all; False if the round was dropped.

        Args:
          number: Of the round, which says who begins.
        """
        run = self.run
        everybody = [*run.modes.values(), *run.peers.values(), *self.hidden]
        begun = [len(one.turn_seconds) for one in everybody]
        self._take_in_order(number, group)
        if self.hidden and not self.should_drop():
            _answer(self.plain, group, run.config, self.should_drop)
        if not self.should_drop():
            return True

        for one, count in zip(everybody, begun, strict=True):
            one.keep(count, len(run.prompts))
        return False

    def _take_in_order(self, number: int, group: list[Prompt]) -> None:
        """The turns that are scored, in an order that rotates."""
        run = self.run
        by_name = {peer.name: peer for peer in self.peers}
        names = [*run.modes, *by_name]
        first = number % len(names)
        num_begun = len(run.prompts) + len(group)

        for name in [*names[first:], *names[:first]]:
            if name in by_name:
                taken = run.peers[name]
                session = self.plain.session
                _answer_by_peer(by_name[name], taken, session, group, run.config)
            else:
                taken = run.modes[name]
                _answer(taken, group, run.config, self.should_drop)
            if self.should_drop():
                break
            if self.on_result is not None:
                self.on_result(num_begun, name, taken)


def _check(
    config: BenchConfig,
    prompts: Sequence[Prompt | Conversation],
    has_draft: bool,
    peers: Sequence[Peer],
) -> None:
    """Refuses what cannot be measured together; see `run_bench`."""
    if not has_draft and not set(config.modes) <= {"autoregressive", UNPADDED}:
        raise ConfigError("all modes but autoregressive and unpadded need a draft")
    if peers and (config.batch_size > 1 or config.sampling.temperature > 0):
        raise ConfigError("peers are compared greedily, with a batch size of 1")
    if peers and config.sampling.is_adjusted:
        raise ConfigError("peers are compared without penalties and biases of logits")
    if config.batch_size > 1 and any(isinstance(x, Conversation) for x in prompts):
        raise ConfigError("conversations are asked with a batch size of 1")


def _open_mode(
    name: str, target: Target, draft: LoadedDraft | None, config: BenchConfig
) -> ModeRun:
    """One of the configuration's modes."""
    if name == UNPADDED:
        numerics = dataclasses.replace(target.numerics, is_row_invariant=False)
        target = dataclasses.replace(target, numerics=numerics)

    if name in ("autoregressive", UNPADDED):
        session = Session(target, batch_size=config.batch_size, stop=config.stop)
    else:
        assert draft is not None, "it was checked"
        if name in (LONGER, LEARNED_LONGER):
            draft = _with_longer_chains(draft, name)
        is_learning = name in ("learned", LEARNED_LONGER, IDLE)
        own = Contender(
            draft,
            config.tree,
            ngrams=name == "ngrams" or (is_learning and config.ngrams),
            controller=config.select,
            learner=config.learner if is_learning else None,
            learn_idle=config.learn_idle if name == IDLE else 0,
        )
        session = _open_session(target, own, config)

    return ModeRun(session=session)


def _with_longer_chains(draft: LoadedDraft, mode: str) -> LoadedDraft:
    """The draft as `longer:ngram,DRAFT` has it."""
    if draft.mix or draft.pool is not None or draft.family.name in SUGGESTIONS:
        raise ConfigError(
            f"the mode {mode!r} lends a draft longer chains of n-grams, and this one "
            f"is {draft!r}; name a single draft that is not of n-grams, or leave the "
            f"mode out"
        )

    return dataclasses.replace(draft, mix="longer", suggestions="ngram")


def _open_session(target: Target, contender: Contender, config: BenchConfig) -> Session:
    return Session(
        target,
        contender.draft,
        learner=contender.learner,
        tree=contender.tree,
        ngrams=contender.ngrams,
        batch_size=config.batch_size,
        stop=config.stop,
        num_predicted_tokens=config.num_predicted_tokens,
        controller=contender.controller,
        learn_idle=contender.learn_idle,
    )


def _warm_up(
    mode: ModeRun, items: Sequence[Prompt | Conversation], config: BenchConfig
) -> None:
    """Compiles all that the mode will run, and books its time."""
    session = mode.session
    capacities = set()

    for begin in range(0, len(items), config.batch_size):
        group = items[begin : begin + config.batch_size]
        bounds = [request_bounds(item, session, config) for item in group]
        if isinstance(group[0], Conversation):
            each = [session.engine.capacity_for([bound]) for bound in bounds[0]]
            # Answers may be of any length: where 256 slots or 1,024 may be needed, so
            # may be 512.
            capacities |= {c for c in CAPACITIES if min(each) <= c <= max(each)}
        else:
            together = itertools.chain.from_iterable(bounds)
            capacities.add(session.engine.capacity_for(together))

    has_predictions = any(
        isinstance(item, Prompt) and item.prediction for item in items
    )
    mode.compile_seconds = session.warm_up(
        sorted(capacities), config.sampling, has_predictions
    )


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
    if mode.session.practice is not None:
        start = time.perf_counter()
        mode.num_exercises += len(mode.session.practise(should_stop=should_drop))
        mode.idle_seconds += time.perf_counter() - start


def _answer_by_peer(peer, run: PeerRun, session, group, config: BenchConfig) -> None:
    """The same for another decoder, which gets the same token ids."""
    prompts = [r.prompt_ids for r in requests_of(group, session, config)]
    stop_ids = session.engine.config.stop_ids
    start = time.perf_counter()
    counts = [peer.generate(ids, config.max_new_tokens, stop_ids) for ids in prompts]
    run.turn_seconds.append(time.perf_counter() - start)
    run.turn_tokens.append(sum(counts))
