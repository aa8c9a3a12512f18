# SPDX-License-Identifier: Apache-2.0
"""Learning while serving: when to update, what from, and what to serve.

`AdaptationState` is all there is to checkpoint. What happens is a function of it and of
the traffic, never of the clock: a budget in seconds becomes an interval in target
passes once. Not in tokens, for those cost less as the draft learns.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import sharding
from ospec_jax.config import LearnerConfig
from ospec_jax.decoding.request import Completion
from ospec_jax.drafters import ngram
from ospec_jax.learners.base import Learner, LearnerState, Segments, restarted
from ospec_jax.learners.registry import build_learner
from ospec_jax.models import finite
from ospec_jax.online import batches, pace, promotion
from ospec_jax.online.last_layer import CHUNK, HeadAdaptation
from ospec_jax.online.pace import PaceState
from ospec_jax.online.promotion import GuardState
from ospec_jax.online.ring import (
    add_window,
    init_ring,
    window_starts,
)
from ospec_jax.online.state import AdaptationState, Traffic, UpdateReport
from ospec_jax.types import Draft, NgramMemory, SharedTables

_FIRST_SPAN, _FIRST_HEAD_SPAN = 8, 16
"""Rounds of a regime's first span (see `pace`); an answer's are the smaller ones."""
_TOKENS_OF_AN_ANSWER = 64
"""Taken for granted where what updates cost has not been measured."""


class Adaptation:
    """Compiled learning functions for one draft; holds no state."""

    def __init__(
        self, config: LearnerConfig, unroll, shared: SharedTables, tap_width: int,
        hidden_size: int, has_memory: bool = True,
        mesh: jax.sharding.Mesh | None = None,
        orders: tuple[int, ...] = ngram.ORDERS,
    ):  # fmt: skip
        self.config, self.shared = config, shared
        self._orders = orders
        self.has_memory = has_memory and config.memory_slots > 0
        self._ring_shape = (
            config.ring_capacity,
            config.num_context + config.window + config.num_steps,
            tap_width,
            hidden_size,
        )
        self._learner = build_learner(config, unroll)
        pinned = lambda function, *places, **options: jax.jit(
            sharding.pinned(function, mesh, *places), **options
        )
        everywhere, params = sharding.replicated, sharding.param_shardings
        if self.has_gradient:
            self._begin = pinned(self.learner.begin, params)
            # The iterate may be what is being served: it alone is never donated.
            self._update = pinned(
                self._updated, params, everywhere, everywhere, donate_argnums=0
            )
            self._evaluate = pinned(self.learner.evaluate, everywhere, everywhere)
        add = sharding.pinned(add_window, mesh, everywhere)
        self._add = jax.jit(add, donate_argnums=0)
        self._remember = pinned(ngram.remember, everywhere)
        # Windows are split over devices, as rows of a batch are.
        place = sharding.row_shardings
        make_batch = functools.partial(batches.make_batch, config)
        self._batch = pinned(make_batch, place)
        self._request = pinned(functools.partial(batches.of_request, config), place)
        self._gain = pinned(self._gain_of, everywhere)
        self.mesh = mesh
        self.head: HeadAdaptation | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether the draft is trained."""
        return self._learner is not None

    @property
    def learner(self) -> Learner:
        """What trains the draft."""
        assert self._learner is not None, "only n-grams are remembered"
        return self._learner

    def init(self, draft: Draft) -> tuple[AdaptationState, Traffic]:
        """A state that has seen nothing."""
        zero = jnp.zeros((), jnp.int32)
        learner = LearnerState(params={}, opt_state=(), num_updates=zero)
        if self.has_gradient:
            learner = _owned(self.learner.init(draft.params))
        if self.head is not None:
            learner = learner.replace(opt_state=self.head.init(draft))
        state = AdaptationState(
            learner=learner, num_prompts=zero, num_waiting=zero, num_fresh=zero,
            version=zero, is_stopped=jnp.zeros((), bool),
            update_interval=jnp.asarray(self.config.update_interval, jnp.int32),
        )  # fmt: skip
        if self.has_gradient and self.config.promotion == "guarded":
            state = state.replace(guard=promotion.init_guard(learner.params))
        if self.config.pace == "pays" and (self.has_gradient or self.head is not None):
            state = state.replace(pace=self._started(state))
        ring = init_ring(*self._ring_shape) if self.has_gradient else None
        slots = self.config.memory_slots
        memory = ngram.init_memory(slots, self._orders) if self.has_memory else None
        return sharding.put_params((state, Traffic(ring, memory)), self.mesh)

    def learned(self, state: AdaptationState):
        """What is learned, as served and compared: the head alone, or all."""
        if self.head is None:
            return state.learner.params
        return self.head.served(state.learner.opt_state)

    def _started(self, state: AdaptationState, cost=None) -> PaceState:
        """A new regime; before they are measured, costs are what the budget allows."""
        if cost is None:
            interval = self.config.update_interval
            if self.head is not None:
                interval = CHUNK
            elif every := self.config.update_every_prompts:
                interval = every * _TOKENS_OF_AN_ANSWER
            cost = self.config.budget_share * interval
        first = _FIRST_SPAN if self.head is None else _FIRST_HEAD_SPAN
        return pace.start(self.learned(state), first, cost)

    def calibrate(
        self, state: AdaptationState, traffic: Traffic, draft: Draft,
        seconds_per_token: float | None = None, seconds_per_step: float = 0.0,
    ) -> AdaptationState:  # fmt: skip
        """Compiles everything, and turns the budget into an interval if there is none.

        Args:
          seconds_per_token: Of decoding, on this machine; None measures nothing.
          seconds_per_step: Of a target pass and its draft, likewise.
        """
        if not self.has_gradient:
            return state
        # As updates get them, or they would be dispatched anew.
        zero = jnp.int32(0)
        none = np.int32(0)
        batch = self._batch(traffic.ring, zero, zero, none, np.bool_(True))
        # An empty ring weighs nothing, and an update of nothing would cost less.
        batch = batch.replace(weight=jnp.ones_like(batch.weight))
        learner = jax.tree.map(jnp.copy, self._begin(state.learner))
        learner, *_ = self._learn(learner, draft, batch)
        if state.pace is not None:
            accepted = self._accepted(draft.params, draft, batch)
            pace.rehearse(state.pace, len(accepted))
        guard = state.guard
        if guard is not None:
            guard = self._scored(guard, traffic, draft, none)
        jax.block_until_ready(guard)
        if seconds_per_token is None:
            return state
        # Some rules do more in the last update of a round than in the others.
        num_updates = max(2, self.config.round_length)
        jax.block_until_ready(learner)
        start = time.perf_counter()
        for _ in range(num_updates):
            learner, *_ = self._learn(learner, draft, batch)
            if guard is not None:  # an answer is scored for each update
                guard = self._scored(guard, traffic, draft, none)
        jax.block_until_ready((learner, guard))
        seconds = (time.perf_counter() - start) / num_updates
        state = self.priced(state, seconds / seconds_per_token)
        if int(state.update_interval) > 0 or self.config.update_every_prompts:
            return state
        seconds *= self.config.num_epochs / self.config.budget_share
        interval = sharding.agreed(max(1, round(seconds / seconds_per_step)))
        return state.replace(update_interval=jnp.asarray(interval, jnp.int32))

    def priced(self, state: AdaptationState, cost: float) -> AdaptationState:
        """Fixes what an update costs, in tokens; what is on its way keeps its price."""
        if state.pace is None or int(state.num_prompts) > 0:
            return state
        agreed = jnp.asarray(sharding.agreed(cost), jnp.float32)
        return state.replace(pace=state.pace.replace(cost=agreed))

    def observe(
        self, state: AdaptationState, traffic: Traffic, completion: Completion
    ) -> tuple[AdaptationState, Traffic]:
        """Keeps what an answered request taught."""
        num_prompt = len(completion.request.prompt_ids)
        ring, starts = traffic.ring, self._window_starts(completion)
        for start in starts:
            ring = self._add(
                ring, completion.feedback, np.int32(start), np.int32(num_prompt),
                np.int32(completion.num_recorded),
            )  # fmt: skip
        is_timed, stats = self.config.update_interval == 0, completion.stats
        num_prompts, num_waiting, num_fresh = _counted(
            state.num_prompts, state.num_waiting, state.num_fresh,
            stats.num_drafts if is_timed else len(completion.token_ids),
            len(starts), self.config.update_every_prompts,
        )  # fmt: skip
        state = state.replace(
            num_prompts=num_prompts, num_waiting=num_waiting, num_fresh=num_fresh
        )
        state = self._paced(state, completion)
        return state, Traffic(ring, self._remembered(traffic.memory, completion))

    def _window_starts(self, completion: Completion) -> list[int]:
        if not self.has_gradient:
            return []
        return window_starts(
            len(completion.request.prompt_ids), completion.num_recorded,
            self.config.num_context, self.config.window,
        )  # fmt: skip

    def _paced(self, state: AdaptationState, completion: Completion):
        """Notes how the answer was drafted; after a shift, a new regime begins."""
        if state.pace is None:
            return state
        stats = completion.stats
        heard = pace.heard(
            state.pace, len(completion.token_ids), stats.num_draft_tokens,
            stats.num_accepted_tokens,
        )  # fmt: skip
        if pace.is_drift(heard):
            heard = self._started(state, heard.cost)
        return state.replace(pace=heard)

    def _remembered(self, memory: NgramMemory | None, completion: Completion):
        if memory is None:
            return None
        ids = [*completion.request.prompt_ids, *completion.token_ids]
        padded = np.zeros(completion.capacity, np.int32)  # few lengths, few executables
        padded[: len(ids)] = ids
        num_prompt = len(completion.request.prompt_ids)
        return self._remember(
            memory, padded, np.int32(num_prompt), np.int32(len(ids))
        )  # fmt: skip

    def is_due(self, state: AdaptationState) -> bool:
        """Whether enough prompts, tokens or passes came since the last update."""
        if bool(state.is_stopped):
            return False
        stride, num_prompts = self.stride(state), int(state.num_prompts)
        if self.head is not None:
            return num_prompts % stride == 0
        if not self.has_gradient:
            return False
        if every := self.config.update_every_prompts:
            return num_prompts % (every * stride) == 0 and int(state.num_fresh) > 0
        return int(state.num_waiting) >= int(state.update_interval) * stride

    def stride(self, state: AdaptationState) -> int:
        """Occasions to learn, for each that is taken."""
        return 1 if state.pace is None else int(state.pace.stride)

    def compare(
        self, state: AdaptationState, traffic: Traffic, served: Draft,
        completion: Completion,
    ) -> AdaptationState:  # fmt: skip
        """Scores the candidate on an answer just observed, which nobody trained on.

        Each answer of a chunk, and the last one of an interval: so that scoring is a
        bounded share of learning.
        """
        guard, num_windows = state.guard, len(self._window_starts(completion))
        if guard is None or num_windows == 0 or bool(state.is_stopped):
            return state
        is_wanted = bool(self.config.update_every_prompts) or self.is_due(state)
        if not is_wanted or not bool(guard.is_open) or self._verdict(guard) != "wait":
            return state
        return state.replace(
            guard=self._scored(guard, traffic, served, np.int32(num_windows))
        )

    def _scored(
        self, guard: GuardState, traffic: Traffic, served: Draft, num_windows
    ) -> GuardState:
        batch = self._request(traffic.ring, num_windows)
        gain = self._gain(
            self._accepted(guard.candidate, served, batch),
            self._accepted(served.params, served, batch),
            batch.weight,
        )
        return promotion.observe(guard, gain)

    def _verdict(self, guard: GuardState) -> str:
        config = self.config
        return promotion.verdict(
            guard, config.promotion_level, config.promotion_patience
        )

    def update(
        self, state: AdaptationState, traffic: Traffic, served: Draft
    ) -> tuple[AdaptationState, Draft, UpdateReport]:
        """One round of learning; returns the draft to serve from now on.

        If the iterate is not finite after it, learning has stopped: what was served
        goes on being served, and there is nothing else left to learn from.
        """
        start, before, was_served = time.perf_counter(), state, served
        info, stride, num_passes = None, self.stride(state), 0
        is_compared = state.pace is not None and pace.is_compared(state.pace)
        state, served, decision = self._decided(state, served)
        state = state.replace(learner=self._begin(state.learner))
        is_finite, num_fresh = np.bool_(True), int(state.num_fresh)
        assert traffic.ring is not None
        for epoch in range(self.config.num_epochs):
            for num_newer in batches.of_round(self.config, traffic.ring, num_fresh):
                batch = self._batch(
                    traffic.ring, state.num_fresh, state.learner.num_updates, num_newer,
                    np.bool_(epoch == 0),
                )  # fmt: skip
                if epoch == 0 and is_compared:
                    state = state.replace(pace=self._progress(state, served, batch))
                learner, info, is_good = self._learn(state.learner, served, batch)
                # Not read yet: the device would have to be waited for each time.
                is_finite = is_good & is_finite
                state = state.replace(learner=learner)
                num_passes += 1 + (epoch == 0 and is_compared)
        assert info is not None
        if not bool(is_finite):
            state = self._stopped(before, state.learner, was_served)
            seconds = time.perf_counter() - start
            return state, was_served, UpdateReport(info, "stopped", seconds, stride)
        state, served = self._offered(state, served)
        state = self.judged(state, num_passes)
        zero = jnp.zeros((), jnp.int32)
        state = state.replace(num_waiting=zero, num_fresh=zero)
        jax.block_until_ready(state.learner.params)
        seconds = time.perf_counter() - start
        return state, served, UpdateReport(info, decision, seconds, stride)

    def _decided(self, state: AdaptationState, served: Draft):
        """Acts on the candidate's verdict, if promotion is guarded."""
        guard = state.guard
        if guard is None:
            return state, served, "promote"
        decision = self._verdict(guard)
        if decision == "wait":
            return state, served, decision
        if decision == "promote":
            served = served.replace(params=guard.candidate)
            state = state.replace(version=state.version + 1)
        if decision == "rollback":
            learner = restarted(self.learner, state.learner, served.params)
            state = state.replace(learner=_owned(learner))
        guard = promotion.dismiss(guard, state.learner.params)
        return state.replace(guard=guard), served, decision

    def _offered(self, state: AdaptationState, served: Draft):
        """Serves the new iterate, or makes it the candidate if there is none."""
        if state.guard is None:
            served = served.replace(params=state.learner.params)
            return state.replace(version=state.version + 1), served
        if not bool(state.guard.is_open):
            guard = promotion.nominate(state.guard, state.learner.params)
            state = state.replace(guard=guard)
        return state, served

    def _stopped(
        self, before: AdaptationState, learner: LearnerState, served: Draft
    ) -> AdaptationState:
        """The state before a round that failed; its optimizer's was overwritten."""
        learner = learner.replace(num_updates=before.learner.num_updates)
        learner = _owned(restarted(self.learner, learner, served.params))
        return before.replace(learner=learner, is_stopped=jnp.ones((), bool))

    def _updated(self, opt_state, params, num_updates, *data):
        state = LearnerState(params, opt_state, num_updates)
        state, info = self.learner.update(state, *data)
        return state, info, finite.is_finite((state.params, state.opt_state))

    def _learn(self, learner: LearnerState, served: Draft, batch: Segments):
        """State, info, and whether the state is finite."""
        return self._update(
            learner.opt_state, learner.params, learner.num_updates, batch, self.shared,
            served.token_ids,
        )  # fmt: skip

    def _accepted(self, params, served: Draft, batch: Segments):
        """`[b]` tokens that a step would get accepted, by window."""
        return self._evaluate(params, batch, self.shared, served.token_ids)[1]

    def _progress(self, state: AdaptationState, served: Draft, batch: Segments):
        """Compares the iterate with that of the span's beginning, on fresh windows."""
        assert state.pace is not None
        score = lambda params: self._accepted(params, served, batch)
        newest, oldest = score(state.learner.params), score(state.pace.snapshot)
        assert batch.is_fresh is not None
        weight = jnp.sum(batch.weight, axis=1) * batch.is_fresh
        return pace.compared(state.pace, newest, oldest, weight)

    def _gain_of(self, candidate, served, weight):
        steps = self.config.num_steps
        return promotion.gain_of(candidate, served, jnp.sum(weight, axis=1), steps)

    def judged(self, state: AdaptationState, num_updates: int) -> AdaptationState:
        """Notes a round of learning, and sets the pace where a span ends with it."""
        if state.pace is None:
            return state
        after = pace.learned(state.pace, num_updates)
        if pace.is_over(after):
            after = pace.judged(after).replace(snapshot=self.learned(state))
        return state.replace(pace=after)


@functools.partial(jax.jit, static_argnames="every")
def _counted(num_prompts, num_waiting, num_fresh, num_waited, num_windows, every: int):
    """Counts an answer; windows of a chunk that was passed over are fresh no more."""
    if every:
        num_fresh = jnp.where(num_prompts % every == 0, 0, num_fresh)
    return num_prompts + 1, num_waiting + num_waited, num_fresh + num_windows


def _owned(learner: LearnerState) -> LearnerState:
    """Updates overwrite all but the parameters: so none of that may be another's."""
    return learner.replace(opt_state=jax.tree.map(jnp.copy, learner.opt_state))
