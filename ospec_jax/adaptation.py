# SPDX-License-Identifier: Apache-2.0
"""Learning while serving: when to update, what from, and what to serve.

`AdaptationState` is all there is to checkpoint. What happens is a function of it and of
the traffic, never of the clock: a budget in seconds becomes an interval in target
passes once. Not in tokens, for those cost less as the draft learns.
"""

import dataclasses
import functools
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ospec_jax import sharding
from ospec_jax.config import LearnerConfig
from ospec_jax.decoding.request import Completion
from ospec_jax.drafters import ngram
from ospec_jax.head import CHUNK, HeadAdaptation
from ospec_jax.learners import buffer, pace, promotion
from ospec_jax.learners.base import (
    Learner,
    LearnerInfo,
    LearnerState,
    Segments,
    restarted,
)
from ospec_jax.learners.head import HeadInfo
from ospec_jax.learners.pace import PaceState
from ospec_jax.learners.registry import build_learner
from ospec_jax.types import Draft, NgramMemory, SharedTables

_FIRST_SPAN, _FIRST_HEAD_SPAN = 8, 16
"""Rounds of a regime's first span (see `pace`); an answer's are the smaller ones."""
_TOKENS_OF_AN_ANSWER = 64
"""Taken for granted where what updates cost has not been measured."""


@flax.struct.dataclass
class AdaptationState:
    """What learning remembers between requests.

    Attributes:
      learner: The iterate (`w_play`) and its optimizer.
      guard: Evidence for the next promotion.
      num_prompts: Requests seen, so that a resumed run knows where it stands.
      num_waiting: Answer tokens since the last update; under a budget, target passes.
      num_fresh: Windows added since the last update.
      version: Promotions so far; the version of the served draft.
      update_interval: Of what is waiting, between updates.
      pace: How often learning is worth its time; None if it always is.
    """

    learner: LearnerState
    guard: promotion.GuardState
    num_prompts: Int[Array, ""]
    num_waiting: Int[Array, ""]
    num_fresh: Int[Array, ""]
    version: Int[Array, ""]
    update_interval: Int[Array, ""]
    pace: PaceState | None = None


@flax.struct.dataclass
class Traffic:
    """What is kept of users' prompts and answers; both can be read back from it.

    Attributes:
      ring: Recent windows to train on, or None.
      memory: n-grams, or None.
    """

    ring: buffer.FeedbackRing | None
    memory: NgramMemory | None


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """What one round of learning did; for looking at.

    Attributes:
      stride: Occasions to learn, for each that is taken.
      step_length: How far the served parameters moved, if the learner knows.
    """

    info: LearnerInfo | HeadInfo
    decision: str
    seconds: float
    stride: int = 1
    step_length: float | None = None


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
            self._update = pinned(self._updated, params, everywhere, donate_argnums=0)
            self._evaluate = pinned(self.learner.evaluate, everywhere, everywhere)
        add = sharding.pinned(buffer.add_window, mesh, everywhere)
        self._add = jax.jit(add, donate_argnums=0)
        self._remember = pinned(ngram.remember, everywhere)
        # Windows are split over devices, as rows of a batch are.
        self._batch = pinned(self._make_batch, sharding.row_shardings)
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
            learner=learner, guard=promotion.init_guard(),
            num_prompts=zero, num_waiting=zero, num_fresh=zero, version=zero,
            update_interval=jnp.asarray(self.config.update_interval, jnp.int32),
        )  # fmt: skip
        if self.config.pace == "pays" and (self.has_gradient or self.head is not None):
            state = state.replace(pace=self._started(state))
        ring = buffer.init_ring(*self._ring_shape) if self.has_gradient else None
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
        none = jnp.int32(0)
        batch = self._batch(traffic.ring, none, none, none, np.bool_(True))
        # An empty ring weighs nothing, and an update of nothing would cost less.
        batch = batch.replace(weight=jnp.ones_like(batch.weight))
        learner = jax.tree.map(jnp.copy, self._begin(state.learner))
        learner, _ = self._learn(learner, draft, batch)
        is_compared = self.config.promotion == "guarded" or state.pace is not None
        if is_compared:
            accepted = jax.block_until_ready(self._accepted(draft.params, draft, batch))
        if state.pace is not None:
            pace.rehearse(state.pace, len(accepted))
        if seconds_per_token is None:
            return state
        # Some rules do more in the last update of a round than in the others.
        num_updates = max(2, self.config.round_length)
        jax.block_until_ready(learner)
        start = time.perf_counter()
        for _ in range(num_updates):
            learner, _ = self._learn(learner, draft, batch)
        if self.config.promotion == "guarded":
            for _ in range(2 * num_updates):  # the iterate's and the served draft's
                accepted = self._accepted(draft.params, draft, batch)
            jax.block_until_ready(accepted)
        jax.block_until_ready(learner)
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
        ring, starts = traffic.ring, []
        if self.has_gradient:
            starts = buffer.window_starts(
                num_prompt, completion.num_recorded, self.config.num_context,
                self.config.window,
            )  # fmt: skip
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

    def update(
        self, state: AdaptationState, traffic: Traffic, served: Draft
    ) -> tuple[AdaptationState, Draft, UpdateReport]:
        """One round of learning; returns the draft to serve from now on."""
        start = time.perf_counter()
        info, stride, num_passes = None, self.stride(state), 0
        is_compared = state.pace is not None and pace.is_compared(state.pace)
        state = state.replace(learner=self._begin(state.learner))
        for epoch in range(self.config.num_epochs):
            for num_newer in self._batches(state, traffic):
                batch = self._batch(
                    traffic.ring, state.num_fresh, state.learner.num_updates, num_newer,
                    np.bool_(epoch == 0),
                )  # fmt: skip
                if epoch == 0 and self.config.promotion == "guarded":
                    state = state.replace(guard=self._compare(state, served, batch))
                if epoch == 0 and is_compared:
                    state = state.replace(pace=self._progress(state, served, batch))
                learner, info = self._learn(state.learner, served, batch)
                state = state.replace(learner=learner)
                num_passes += 1 + (epoch == 0 and is_compared)
        state, served, decision = self._promote(state, served)
        state = self.judged(state, num_passes)
        zero = jnp.zeros((), jnp.int32)
        state = state.replace(num_waiting=zero, num_fresh=zero)
        jax.block_until_ready(state.learner.params)
        assert info is not None
        seconds = time.perf_counter() - start
        return state, served, UpdateReport(info, decision, seconds, stride)

    def _batches(self, state: AdaptationState, traffic: Traffic) -> list[np.int32]:
        """How many windows are newer than each batch's; the oldest batch comes first.

        An interval trains on one batch, a chunk of prompts on all that it left.
        """
        if not self.config.update_every_prompts:
            return [np.int32(0)]
        assert traffic.ring is not None
        num_held = min(int(state.num_fresh), traffic.ring.capacity)
        num_batches = -(-num_held // self._num_newest)
        return [np.int32(i * self._num_newest) for i in reversed(range(num_batches))]

    @property
    def _num_newest(self) -> int:
        """Windows of a batch that are not drawn from older ones."""
        num_old = round(self.config.batch_size * self.config.replay_share)
        return self.config.batch_size - num_old

    def _updated(self, opt_state, params, num_updates, *data):
        state = LearnerState(params, opt_state, num_updates)
        return self.learner.update(state, *data)

    def _learn(self, learner: LearnerState, served: Draft, batch: Segments):
        return self._update(
            learner.opt_state, learner.params, learner.num_updates, batch, self.shared,
            served.token_ids,
        )  # fmt: skip

    def _make_batch(
        self, ring, num_fresh, num_updates, num_newer, is_first_epoch
    ) -> Segments:
        """The newest windows but some, and older ones against forgetting."""
        num_old = self.config.batch_size - self._num_newest
        fresh = buffer.newest(ring, self._num_newest, num_fresh, num_newer)
        is_fresh = jnp.full((self._num_newest,), is_first_epoch)
        fresh = fresh.replace(is_fresh=is_fresh)
        if num_old == 0:
            return fresh
        key = jax.random.fold_in(jax.random.key(self.config.seed), num_updates)
        # Not from this round's: they would be trained on before they are judged.
        old = buffer.draw(ring, key, num_old, num_fresh)
        # Nothing fresh, nothing to learn: the batch must weigh nothing as a whole.
        old = old.replace(
            weight=old.weight * (num_fresh > 0), is_fresh=jnp.zeros((num_old,), bool)
        )
        join = lambda a, b: jnp.concatenate([a, b])
        return jax.tree.map(join, fresh, old)

    def _compare(self, state, served: Draft, batch: Segments) -> promotion.GuardState:
        """Scores windows that neither side has trained on."""
        score = lambda params: self._accepted(params, served, batch)
        gains = score(state.learner.params) - score(served.params)
        return promotion.observe(state.guard, gains, self._fresh_weight(batch))

    def _accepted(self, params, served: Draft, batch: Segments):
        """`[b]` tokens that a step would get accepted, by window."""
        return self._evaluate(params, batch, self.shared, served.token_ids)[1]

    def _progress(self, state: AdaptationState, served: Draft, batch: Segments):
        """Compares the iterate with that of the span's beginning, on fresh windows."""
        assert state.pace is not None
        score = lambda params: self._accepted(params, served, batch)
        newest, oldest = score(state.learner.params), score(state.pace.snapshot)
        return pace.compared(state.pace, newest, oldest, self._fresh_weight(batch))

    def _fresh_weight(self, batch: Segments):
        """`[b]`, without the windows that were drawn from older ones."""
        return jnp.sum(batch.weight, axis=1) * batch.is_fresh

    def judged(self, state: AdaptationState, num_updates: int) -> AdaptationState:
        """Notes a round of learning, and sets the pace where a span ends with it."""
        if state.pace is None:
            return state
        after = pace.learned(state.pace, num_updates)
        if pace.is_over(after):
            after = pace.judged(after).replace(snapshot=self.learned(state))
        return state.replace(pace=after)

    def _promote(self, state: AdaptationState, served: Draft):
        decision = "promote"
        if self.config.promotion == "guarded":
            decision = promotion.verdict(state.guard, self.config.min_windows)
        if decision == "wait":
            return state, served, decision
        state = state.replace(guard=promotion.init_guard())
        if decision == "rollback":
            learner = restarted(self.learner, state.learner, served.params)
            return state.replace(learner=_owned(learner)), served, decision
        served = served.replace(params=state.learner.params)
        return state.replace(version=state.version + 1), served, decision


@functools.partial(jax.jit, static_argnames="every")
def _counted(num_prompts, num_waiting, num_fresh, num_waited, num_windows, every: int):
    """Counts an answer; windows of a chunk that was passed over are fresh no more."""
    if every:
        num_fresh = jnp.where(num_prompts % every == 0, 0, num_fresh)
    return num_prompts + 1, num_waiting + num_waited, num_fresh + num_windows


def _owned(learner: LearnerState) -> LearnerState:
    """Updates overwrite all but the parameters: so none of that may be another's."""
    return learner.replace(opt_state=jax.tree.map(jnp.copy, learner.opt_state))
