# SPDX-License-Identifier: Apache-2.0
"""Training a whole draft while serving: on windows of the answers' features.

`WindowsState` is all there is to checkpoint. What happens is a function of it and of
the traffic, never of the clock: a budget in seconds becomes an interval in target
passes once. Not in tokens, for those cost less as the draft learns.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import sharding
from ospec_jax.decoding.request import Completion
from ospec_jax.learners.base import Learner, LearnerState, Segments, restarted
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.models import finite
from ospec_jax.models.sharing import share
from ospec_jax.online import batches, pace, promotion, rounds
from ospec_jax.online.promotion import GuardState
from ospec_jax.online.ring import (
    add_window,
    init_ring,
    window_starts,
)
from ospec_jax.online.rounds import WindowsState
from ospec_jax.online.scopes import nobody
from ospec_jax.online.slices import Slices, run, update_in_slices
from ospec_jax.online.trainer import (
    Speed,
    Traffic,
    Trainer,
    UpdateReport,
    new_counts,
)
from ospec_jax.types import Draft, SharedTables

_FIRST_SPAN = 8
"""Rounds of a regime's first span (see `pace`)."""
_TOKENS_OF_AN_ANSWER = 64
"""Taken for granted where what updates cost has not been measured."""


def windows_trainer(
    config: LearnerConfig,
    learner: Learner,
    shared: SharedTables,
    serve: Callable[[Draft], Draft],
    tap_width: int,
    hidden_size: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Trainer:
    """Trains the draft as a whole, along gradients.

    Args:
      learner: The update rule.
      shared: The target's embedding and head.
      serve: Makes the draft that decodes of one in float32.
      tap_width: Width of the features that are recorded for the draft.
      hidden_size: Width of the target's final states.
    """
    windows = Windows(config, learner, shared, serve, tap_width, hidden_size, mesh)
    return Trainer(
        recording="features",
        init=windows.init,
        serve=serve,
        warm_up=windows.warm_up,
        is_ready=functools.partial(rounds.is_ready, config),
        observe=windows.observe,
        is_due=functools.partial(rounds.is_due, config),
        answers_until_due=functools.partial(rounds.answers_until_due, config),
        update=windows.update,
        update_in_slices=windows.slicing,
        rehearse_slices=windows.rehearse_slices,
        label=windows.label,
        remedy=windows.remedy,
    )


class _Learning(NamedTuple):
    """A learner's jitted functions.

    Attributes:
      begin: At the beginning of a round.
      update: `(opt_state, params, num_updates, segments, shared, token_ids) -> (state,
        info, is_finite)`. The iterate may be what is being served: only the optimizer's
        state is donated.
      evaluate: See `Learner`.
    """

    begin: Callable
    update: Callable
    evaluate: Callable


@share
def _compiled_learner(learner: Learner, mesh: jax.sharding.Mesh | None) -> _Learning:
    def update(opt_state, params, num_updates, *data):
        state = LearnerState(params, opt_state, num_updates)
        state, info = learner.update(state, *data)
        return state, info, finite.is_finite((state.params, state.opt_state))

    pinned = lambda function, *places: sharding.pinned(function, mesh, *places)
    everywhere = sharding.replicated
    params = sharding.param_shardings

    return _Learning(
        begin=jax.jit(pinned(learner.begin, params)),
        update=jax.jit(
            pinned(update, params, everywhere, everywhere), donate_argnums=0
        ),
        evaluate=jax.jit(pinned(learner.evaluate, everywhere, everywhere)),
    )


class _Batching(NamedTuple):
    """Jitted functions of the ring and what is drawn from it.

    Attributes:
      add_window: Into the ring, which is donated.
      make_batch: See `batches.make_batch`.
      of_request: See `batches.of_request`.
      gain_of: See `promotion.gain_of`; the weight is that of each position.
      window_of: `(batch, number) -> batch`, of a single window.
    """

    add_window: Callable
    make_batch: Callable
    of_request: Callable
    gain_of: Callable
    window_of: Callable


@share
def _compiled_batching(
    config: LearnerConfig, mesh: jax.sharding.Mesh | None
) -> _Batching:
    def gain_of(candidate, served, weight):
        weight = jnp.sum(weight, axis=1)
        return promotion.gain_of(candidate, served, weight, config.num_steps)

    def window_of(batch: Segments, number):
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1)
        return jax.tree.map(take, batch)

    pinned = lambda function, place: sharding.pinned(function, mesh, place)
    everywhere = sharding.replicated
    # Windows are split over devices, as rows of a batch are.
    rows = sharding.row_shardings

    return _Batching(
        add_window=jax.jit(pinned(add_window, everywhere), donate_argnums=0),
        make_batch=jax.jit(pinned(functools.partial(batches.make_batch, config), rows)),
        of_request=jax.jit(pinned(functools.partial(batches.of_request, config), rows)),
        gain_of=jax.jit(pinned(gain_of, everywhere)),
        window_of=jax.jit(window_of),
    )


class _Way(NamedTuple):
    """How a round's work is done: at once, or in slices.

    Attributes:
      learn: `(learner state, draft, batch)` to its state, info, and whether it is
        finite.
      accepted: `(params, draft, batch) -> [b]`; see `Windows._accepted`.
      serve: See `Trainer`.
    """

    learn: Callable[..., Slices]
    accepted: Callable[..., Slices]
    serve: Callable[[Draft], Slices[Draft]]


def _as_slices(function: Callable) -> Callable[..., Slices]:
    """Without any slice: all that there is to do comes at once."""

    def whole(*args) -> Slices:
        return function(*args)
        yield

    return whole


class Windows:
    """What `windows_trainer` runs; holds no state."""

    def __init__(
        self,
        config: LearnerConfig,
        learner: Learner,
        shared: SharedTables,
        serve: Callable[[Draft], Draft],
        tap_width: int,
        hidden_size: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config = config
        self.learner = learner
        self.shared = shared
        self.serve = serve
        self.mesh = mesh
        # A window holds its context, its trained pairs, and a token more for each
        # depth.
        self._ring_shape = (
            config.ring_capacity,
            config.num_context + config.window + config.num_steps,
            tap_width,
            hidden_size,
        )
        self._learning = _compiled_learner(learner, mesh)
        self._batching = _compiled_batching(config, mesh)

    def init(self, draft: Draft) -> tuple[WindowsState, Traffic]:
        """A state that has seen nothing.

        Raises:
          ConfigError: The mesh cannot split what the optimizer remembers.
        """
        config = self.config
        zero = jnp.zeros((), jnp.int32)
        learner = _owned(self.learner.init(draft.params))
        who = f"the optimizer of the learner {self.label}"
        sharding.check_state(self.mesh, learner.opt_state, draft.params, who)
        state = WindowsState(
            *new_counts(),
            learner=learner,
            num_waiting=zero,
            num_fresh=zero,
            update_interval=jnp.asarray(config.update_interval, jnp.int32),
        )
        if config.promotion == "guarded":
            state = state.replace(guard=promotion.init_guard(learner.params))

        if config.pace == "pays":
            first = pace.start(learner.params, _FIRST_SPAN, self._expected_cost())
            state = state.replace(pace=first)

        traffic = Traffic(ring=init_ring(*self._ring_shape))

        return sharding.put_params((state, traffic), self.mesh)

    def _expected_cost(self) -> float:
        """Of an update, in tokens, before it is measured: what the budget allows."""
        interval = self.config.update_interval
        if every := self.config.update_every_prompts:
            interval = every * _TOKENS_OF_AN_ANSWER

        return self.config.budget_share * interval

    @property
    def label(self) -> str:
        """The rule and its rate."""
        if self.config.rule is not None:
            return repr(self.config.name)

        return f"{self.config.name!r} with learning_rate {self.config.learning_rate}"

    @property
    def remedy(self) -> str:
        """What helps against updates that are not finite."""
        return "a lower learning_rate" if self.config.rule is None else "smaller steps"

    def warm_up(
        self,
        state: WindowsState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
        speed: Speed | None = None,
    ) -> WindowsState:
        """See `Trainer`."""
        # Adding windows overwrites the ring.
        copy = traffic.replace(ring=jax.tree.map(jnp.copy, traffic.ring))
        self.observe(state, copy, draft, completion)
        # As updates get them, or they would be dispatched anew.
        zero = jnp.int32(0)
        none = np.int32(0)
        batch = self._batching.make_batch(
            traffic.ring, zero, zero, none, np.bool_(True)
        )
        # An empty ring weighs nothing, and an update of nothing would cost less.
        batch = batch.replace(weight=jnp.ones_like(batch.weight))
        learner = jax.tree.map(jnp.copy, self._learning.begin(state.learner))
        # Once to compile. What comes of it is dropped: a warm-up learns nothing.
        learner, *_ = self._learn(learner, draft, batch)
        if state.pace is not None:
            accepted = self._accepted(draft.params, draft, batch)
            pace.warm_up(state.pace, len(accepted))

        guard = state.guard
        if guard is not None:
            guard = self._scored(guard, traffic, draft, none)

        jax.block_until_ready((learner, guard))
        if speed is None:
            return state

        # Some rules do more in the last update of a round than in the others.
        num_updates = max(2, self.config.method.updates_of_round)
        start = time.perf_counter()

        for _ in range(num_updates):
            learner, *_ = self._learn(learner, draft, batch)
            if guard is not None:  # an answer is scored for each update
                guard = self._scored(guard, traffic, draft, none)

        jax.block_until_ready((learner, guard))
        seconds = (time.perf_counter() - start) / num_updates

        return self._set_costs(state, seconds, speed)

    def rehearse_slices(
        self,
        state: WindowsState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> None:
        """See `Trainer`."""
        zero = jnp.int32(0)
        batch = self._batching.make_batch(
            traffic.ring, zero, zero, np.int32(0), np.bool_(True)
        )
        # What weighs nothing takes no slice.
        batch = batch.replace(weight=jnp.ones_like(batch.weight))
        learner = self._learning.begin(state.learner)
        run(self._learn_in_slices(learner, draft, batch))
        run(self._serve_in_slices(draft))
        # What counts updates is a program, too.
        jax.block_until_ready(state.version + 1)
        if state.pace is not None:
            run(self._progress(state, draft, batch, self._in_slices))

    def _set_costs(self, state: WindowsState, seconds: float, speed: Speed):
        """Fixes what an update costs, and the interval that a budget buys."""
        if int(state.num_prompts) == 0:  # what is on its way keeps its price
            cost = pace.set_cost(state.pace, seconds / speed.seconds_per_token)
            state = state.replace(pace=cost)

        if rounds.is_ready(self.config, state):
            return state

        # The interval at which learning takes its share: an update's seconds over those
        # of so many passes is `budget_share`.
        seconds *= self.config.num_epochs / self.config.budget_share
        interval = max(1, round(seconds / speed.seconds_per_step))
        # All processes must come to the same interval, whatever their clocks say.
        interval = jnp.asarray(sharding.agreed(interval), jnp.int32)

        return state.replace(update_interval=interval)

    def observe(
        self,
        state: WindowsState,
        traffic: Traffic,
        draft: Draft,
        completion: Completion,
    ) -> tuple[WindowsState, Traffic]:
        """Keeps an answer's windows, and scores the candidate on them, if there is one.

        Each answer of a chunk is scored, and the last one of an interval: so that
        scoring is a bounded share of learning.
        """
        num_prompt = len(completion.request.prompt_ids)
        ring = traffic.ring
        starts = window_starts(
            num_prompt,
            completion.num_recorded,
            self.config.num_context,
            self.config.window,
        )

        for start in starts:
            ring = self._batching.add_window(
                ring,
                completion.feedback,
                np.int32(start),
                np.int32(num_prompt),
                np.int32(completion.num_recorded),
                completion.owner or nobody(),
            )

        traffic = traffic.replace(ring=ring)
        state = rounds.count_answer(self.config, state, completion, len(starts))
        take_snapshot = lambda: state.learner.params
        # Taken only when a regime ends; the iterate is never donated, so keeping it
        # copies nothing.
        state = state.replace(pace=pace.observe(state.pace, completion, take_snapshot))

        guard = state.guard
        # The windows that were just added came after the candidate was frozen, and
        # before anything was trained on them: neither draft has seen them.
        if guard is not None and self._is_scored(state, guard, len(starts)):
            guard = self._scored(guard, traffic, draft, np.int32(len(starts)))

        return state.replace(guard=guard), traffic

    def _is_scored(
        self, state: WindowsState, guard: GuardState, num_windows: int
    ) -> bool:
        """Whether the answer just observed tells of a candidate's gain."""
        if num_windows == 0 or bool(state.is_stopped):
            return False

        # An answer in the middle of an interval is not scored, so that scoring stays a
        # bounded share of learning.
        is_chunked = self.config.update_every_prompts > 0
        if not is_chunked and not rounds.is_due(self.config, state):
            return False

        return bool(guard.is_open) and self._verdict(guard) == "wait"

    def _scored(
        self, guard: GuardState, traffic: Traffic, draft: Draft, num_windows
    ) -> GuardState:
        batch = self._batching.of_request(traffic.ring, num_windows)
        gain = self._batching.gain_of(
            self._accepted(guard.candidate, draft, batch),
            self._accepted(draft.params, draft, batch),
            batch.weight,
        )
        return promotion.observe(guard, gain)

    def _verdict(self, guard: GuardState) -> str:
        config = self.config
        return promotion.verdict(
            guard, config.promotion_level, config.promotion_patience
        )

    def update(
        self,
        state: WindowsState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> tuple[WindowsState, Draft, Draft, UpdateReport]:
        """One round of learning; see `Trainer`.

        If the iterate is not finite after it, learning has stopped: what was served
        goes on being served, and there is nothing else left to learn from.
        """
        return run(self._round(state, traffic, draft, served, self._at_once))

    @property
    def slicing(self) -> Callable[..., Slices] | None:
        """See `Trainer.update_in_slices`; None where the rule gives no parts."""
        # Windows of a mesh are split over its devices.
        if self.learner.given is None or self.mesh is not None:
            return None

        return self.update_in_slices

    def update_in_slices(
        self,
        state: WindowsState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> Slices[tuple[WindowsState, Draft, Draft, UpdateReport]]:
        """The same round, slice by slice; nothing that it is given is overwritten."""
        return self._round(state, traffic, draft, served, self._in_slices)

    def _round(
        self,
        state: WindowsState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        way: "_Way",
    ) -> Slices[tuple[WindowsState, Draft, Draft, UpdateReport]]:
        start = time.perf_counter()
        before = state
        was_served = draft
        # The verdict on the old candidate comes first: a rollback changes what is
        # trained.
        state, draft, decision = self._decided(state, draft)
        trained = yield from self._train(state, traffic, draft, way)
        state, info, num_passes, is_finite = trained
        # All updates are under way before anybody waits for them.
        if not bool(is_finite):
            state = self._stopped(before, state.learner, was_served)
            draft = was_served
            decision = "stopped"
        else:
            state, draft = self._offered(state, draft)
            take_snapshot = lambda: state.learner.params
            after = pace.finish_round(state.pace, num_passes, take_snapshot)
            zero = jnp.zeros((), jnp.int32)
            state = state.replace(pace=after, num_waiting=zero, num_fresh=zero)
            jax.block_until_ready(state.learner.params)

        seconds = time.perf_counter() - start
        report = UpdateReport(info, decision, seconds, before.stride)
        if decision == "promote":
            served = yield from way.serve(draft)

        return state, draft, served, report

    @property
    def _at_once(self) -> "_Way":
        """As few and as long pieces of work as there can be."""
        return _Way(
            learn=_as_slices(self._learn),
            accepted=_as_slices(self._accepted),
            serve=_as_slices(self.serve),
        )

    @property
    def _in_slices(self) -> "_Way":
        return _Way(
            learn=self._learn_in_slices,
            accepted=self._accepted_in_slices,
            serve=self._serve_in_slices,
        )

    def _learn_in_slices(
        self, learner: LearnerState, draft: Draft, batch: Segments
    ) -> Slices[tuple]:
        args = (batch, self.shared, draft.token_ids)
        return tuple((yield from update_in_slices(self.learner, learner, *args)))

    def _accepted_in_slices(self, params, draft: Draft, batch: Segments) -> Slices:
        found = []
        for number in range(batch.start.shape[0]):
            window = self._batching.window_of(batch, np.int32(number))
            found.append(self._accepted(params, draft, window))
            jax.block_until_ready(found[-1])
            yield

        return jnp.concatenate(found)

    def _serve_in_slices(self, draft: Draft) -> Slices[Draft]:
        """Casts the largest part of the parameters by itself."""
        params = draft.params
        if not isinstance(params, dict):
            return self.serve(draft)

        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        largest = max(params, key=lambda name: size(params[name]))
        rest = {name: x for name, x in params.items() if name != largest}
        served = self.serve(draft.replace(params={largest: params[largest]}))
        jax.block_until_ready(served.params)
        yield
        others = self.serve(draft.replace(params=rest)).params
        jax.block_until_ready(others)
        cast = {**served.params, **others}
        return served.replace(params={name: cast[name] for name in params})

    def _train(
        self, state: WindowsState, traffic: Traffic, draft: Draft, way: "_Way"
    ) -> Slices[tuple]:
        """All updates of a round.

        Returns:
          The state, the last update's info, how many passes were made, and whether all
          of it is finite.
        """
        assert traffic.ring is not None
        info = None
        num_passes = 0
        is_finite = np.bool_(True)
        is_compared = state.pace is not None and pace.is_compared(state.pace)
        num_fresh = int(state.num_fresh)
        state = state.replace(learner=self._learning.begin(state.learner))

        # Fresh windows are trained on from the oldest to the newest, as they came.
        for epoch in range(self.config.num_epochs):
            for num_newer in batches.of_round(self.config, traffic.ring, num_fresh):
                batch = self._batching.make_batch(
                    traffic.ring,
                    state.num_fresh,
                    state.learner.num_updates,
                    num_newer,
                    np.bool_(epoch == 0),
                )
                # Before the iterate has trained on them: so the comparison is fair.
                if epoch == 0 and is_compared:
                    compared = yield from self._progress(state, draft, batch, way)
                    state = state.replace(pace=compared)
                    num_passes += 1
                learned = yield from way.learn(state.learner, draft, batch)
                learner, info, is_good = learned
                num_passes += 1
                # Not read yet: the device would have to be waited for each time.
                is_finite = is_good & is_finite
                state = state.replace(learner=learner)

        assert info is not None

        return state, info, num_passes, is_finite

    def _decided(self, state: WindowsState, draft: Draft):
        """Acts on the candidate's verdict, if promotion is guarded."""
        guard = state.guard
        if guard is None:
            return state, draft, "promote"

        decision = self._verdict(guard)
        if decision == "wait":
            return state, draft, decision

        # Exactly what was scored is served, not what the learner has become meanwhile.
        if decision == "promote":
            draft = draft.replace(params=guard.candidate)
            state = state.replace(version=state.version + 1)

        if decision == "rollback":
            learner = restarted(self.learner, state.learner, draft.params)
            state = state.replace(learner=_owned(learner))

        # Whatever the verdict, the evidence is used up.
        guard = promotion.dismiss(guard, state.learner.params)

        return state.replace(guard=guard), draft, decision

    def _offered(self, state: WindowsState, draft: Draft):
        """Serves the new iterate, or makes it the candidate if there is none."""
        if state.guard is None:
            draft = draft.replace(params=state.learner.params)
            return state.replace(version=state.version + 1), draft

        if not bool(state.guard.is_open):
            guard = promotion.nominate(state.guard, state.learner.params)
            state = state.replace(guard=guard)

        return state, draft

    def _stopped(
        self, before: WindowsState, learner: LearnerState, draft: Draft
    ) -> WindowsState:
        """The state before a round that failed; its optimizer's was overwritten."""
        # The old optimizer state was donated, so it is begun anew from the last good
        # draft; everything else is as it was before.
        learner = learner.replace(num_updates=before.learner.num_updates)
        learner = _owned(restarted(self.learner, learner, draft.params))
        return before.replace(learner=learner, is_stopped=jnp.ones((), bool))

    def _learn(self, learner: LearnerState, draft: Draft, batch: Segments):
        """State, info, and whether the state is finite."""
        return self._learning.update(
            learner.opt_state,
            learner.params,
            learner.num_updates,
            batch,
            self.shared,
            draft.token_ids,
        )

    def _accepted(self, params, draft: Draft, batch: Segments):
        """`[b]` tokens that a step would get accepted, by window."""
        return self._learning.evaluate(params, batch, self.shared, draft.token_ids)[1]

    def _progress(
        self, state: WindowsState, draft: Draft, batch: Segments, way: "_Way"
    ) -> Slices[pace.PaceState]:
        """Compares the iterate with that of the span's beginning, on fresh windows."""
        assert state.pace is not None
        score = lambda params: way.accepted(params, draft, batch)
        newest = yield from score(state.learner.params)
        oldest = yield from score(state.pace.snapshot)
        assert batch.is_fresh is not None
        weight = jnp.sum(batch.weight, axis=1) * batch.is_fresh

        return pace.record_gain(state.pace, newest, oldest, weight)


def _owned(learner: LearnerState) -> LearnerState:
    """Updates overwrite all but the parameters: so none of that may be another's."""
    return learner.replace(opt_state=_copied(learner.opt_state))


@jax.jit
def _copied(tree):
    return jax.tree.map(jnp.copy, tree)
