# SPDX-License-Identifier: Apache-2.0
"""Learning while serving: when to update, what from, and what to serve.

`AdaptationState` is all there is to checkpoint. What happens is a function of it and of
the traffic, never of the clock: a budget in seconds becomes an interval in tokens once.
"""

import dataclasses
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ospec_jax import sharding
from ospec_jax.config import LearnerConfig
from ospec_jax.decoding.engine import Completion
from ospec_jax.drafters import ngram
from ospec_jax.head import HeadAdaptation
from ospec_jax.learners import buffer, promotion
from ospec_jax.learners.base import (
    Learner,
    LearnerInfo,
    LearnerState,
    Segments,
    restarted,
)
from ospec_jax.learners.registry import build_learner
from ospec_jax.types import Draft, NgramMemory, SharedTables


@flax.struct.dataclass
class AdaptationState:
    """What learning remembers between requests.

    Attributes:
      learner: The iterate (`w_play`) and its optimizer.
      guard: Evidence for the next promotion.
      num_prompts: Requests seen, so that a resumed run knows where it stands.
      num_tokens: Answer tokens seen.
      num_waiting: Answer tokens since the last update.
      num_fresh: Windows added since the last update.
      version: Promotions so far; the version of the served draft.
      num_rollbacks: Times the iterate was thrown away.
      update_interval: Answer tokens between updates.
    """

    learner: LearnerState
    guard: promotion.GuardState
    num_prompts: Int[Array, ""]
    num_tokens: Int[Array, ""]
    num_waiting: Int[Array, ""]
    num_fresh: Int[Array, ""]
    version: Int[Array, ""]
    num_rollbacks: Int[Array, ""]
    update_interval: Int[Array, ""]


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
    """What one interval's learning did; for looking at."""

    info: LearnerInfo
    decision: str
    seconds: float


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
        # The iterate may be what is being served: it is never donated.
        pinned = lambda function, *places: jax.jit(
            sharding.pinned(function, mesh, *places)
        )
        everywhere, params = sharding.replicated, sharding.param_shardings
        if self.has_gradient:
            self._begin = pinned(self.learner.begin, params)
            self._update = pinned(self.learner.update, params, everywhere)
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
            learner = self.learner.init(draft.params)
        if self.head is not None:
            learner = learner.replace(opt_state=self.head.init(draft))
        state = AdaptationState(
            learner=learner, guard=promotion.init_guard(),
            num_prompts=zero, num_tokens=zero, num_waiting=zero, num_fresh=zero,
            version=zero, num_rollbacks=zero,
            update_interval=jnp.asarray(self.config.update_interval, jnp.int32),
        )  # fmt: skip
        ring = buffer.init_ring(*self._ring_shape) if self.has_gradient else None
        slots = self.config.memory_slots
        memory = ngram.init_memory(slots, self._orders) if self.has_memory else None
        return sharding.put_params((state, Traffic(ring, memory)), self.mesh)

    def calibrate(
        self, state: AdaptationState, traffic: Traffic, draft: Draft,
        seconds_per_token: float,
    ) -> AdaptationState:  # fmt: skip
        """Compiles everything, and turns the budget into an interval if there is none.

        Args:
          seconds_per_token: Of decoding, on this machine.
        """
        if not self.has_gradient:
            return state
        batch = self._batch(
            traffic.ring, jnp.int32(0), jnp.int32(0), jnp.int32(0)
        )  # fmt: skip
        # An empty ring weighs nothing, and an update of nothing would cost less.
        batch = batch.replace(weight=jnp.ones_like(batch.weight))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(self._learn(self._begin(state.learner), draft, batch))
            times.append(time.perf_counter() - start)
        if int(state.update_interval) > 0 or self.config.update_every_prompts:
            return state
        seconds = sum(times[1:]) / len(times[1:]) * self.config.num_epochs
        share = self.config.budget / (1 - self.config.budget)
        interval = max(1, round(seconds / (share * seconds_per_token)))
        interval = sharding.agreed(interval)
        return state.replace(update_interval=jnp.asarray(interval, jnp.int32))

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
        count = len(completion.token_ids)
        return state.replace(
            num_prompts=state.num_prompts + 1,
            num_tokens=state.num_tokens + count,
            num_waiting=state.num_waiting + count,
            num_fresh=state.num_fresh + len(starts),
        ), Traffic(ring, self._remembered(traffic.memory, completion))

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
        """Whether enough prompts or tokens have come since the last update."""
        if not self.has_gradient:
            return False
        if every := self.config.update_every_prompts:
            return int(state.num_prompts) % every == 0 and int(state.num_fresh) > 0
        return int(state.num_waiting) >= int(state.update_interval)

    def update(
        self, state: AdaptationState, traffic: Traffic, served: Draft
    ) -> tuple[AdaptationState, Draft, UpdateReport]:
        """One round of learning; returns the draft to serve from now on."""
        start = time.perf_counter()
        info = None
        state = state.replace(learner=self._begin(state.learner))
        for epoch in range(self.config.num_epochs):
            for num_newer in self._batches(state, traffic):
                batch = self._batch(
                    traffic.ring, state.num_fresh, state.learner.num_updates, num_newer
                )
                if epoch == 0 and self.config.promotion == "guarded":
                    state = state.replace(guard=self._compare(state, served, batch))
                learner, info = self._learn(state.learner, served, batch)
                state = state.replace(learner=learner)
        state, served, decision = self._promote(state, served)
        zero = jnp.zeros((), jnp.int32)
        state = state.replace(num_waiting=zero, num_fresh=zero)
        jax.block_until_ready(state.learner.params)
        assert info is not None
        return state, served, UpdateReport(info, decision, time.perf_counter() - start)

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

    def _learn(self, learner: LearnerState, served: Draft, batch: Segments):
        return self._update(learner, batch, self.shared, served.token_ids)

    def _make_batch(self, ring, num_fresh, num_updates, num_newer) -> Segments:
        """The newest windows but some, and older ones against forgetting."""
        num_old = self.config.batch_size - self._num_newest
        fresh = buffer.newest(ring, self._num_newest, num_fresh, num_newer)
        if num_old == 0:
            return fresh
        key = jax.random.fold_in(jax.random.key(self.config.seed), num_updates)
        old = buffer.draw(ring, key, num_old)
        # Nothing fresh, nothing to learn: the batch must weigh nothing as a whole.
        old = old.replace(weight=old.weight * (num_fresh > 0))
        join = lambda a, b: jnp.concatenate([a, b])
        return jax.tree.map(join, fresh, old)

    def _compare(self, state, served: Draft, batch: Segments) -> promotion.GuardState:
        """Scores windows that neither side has trained on."""
        score = lambda params: self._evaluate(
            params, batch, self.shared, served.token_ids
        )[1]
        gains = score(state.learner.params) - score(served.params)
        return promotion.observe(state.guard, gains, jnp.sum(batch.weight, axis=1))

    def _promote(self, state: AdaptationState, served: Draft):
        decision = "promote"
        if self.config.promotion == "guarded":
            decision = promotion.verdict(state.guard, self.config.min_windows)
        if decision == "wait":
            return state, served, decision
        state = state.replace(guard=promotion.init_guard())
        if decision == "rollback":
            learner = restarted(self.learner, state.learner, served.params)
            num_rollbacks = state.num_rollbacks + 1
            return (
                state.replace(learner=learner, num_rollbacks=num_rollbacks),
                served,
                (decision),
            )
        served = served.replace(params=state.learner.params)
        return state.replace(version=state.version + 1), served, decision


@dataclasses.dataclass
class Learning:
    """A session's learner: what to run and where it stands."""

    config: LearnerConfig
    adaptation: Adaptation
    state: AdaptationState
    traffic: Traffic

    @property
    def is_due(self) -> bool:
        """Whether enough tokens have come since the last update."""
        return self.adaptation.is_due(self.state)

    def calibrate(self, draft: Draft, seconds_per_token: float) -> None:
        """Compiles, and fixes the interval between updates."""
        self.state = self.adaptation.calibrate(
            self.state, self.traffic, draft, seconds_per_token
        )

    def rehearse(self, completion: Completion, served: Draft) -> None:
        """Compiles what an answer of this cache's size needs; remembers nothing."""
        traffic = jax.tree.map(jnp.copy, self.traffic)  # observing donates it
        state = self.state
        if self.adaptation.head is not None:
            state, served = jax.tree.map(jnp.copy, (state, served))
        copy = dataclasses.replace(self, state=state, traffic=traffic)
        jax.block_until_ready((copy.observe(completion, served), copy.traffic))

    def observe(self, completion: Completion, served: Draft) -> Draft:
        """Remembers an answer; returns the draft to serve."""
        self.state, self.traffic = self.adaptation.observe(
            self.state, self.traffic, completion
        )
        if self.adaptation.head is not None:
            learner, head = self.state.learner, self.adaptation.head
            learned, served = head.observe(learner.opt_state, served, completion)
            self.state = self.state.replace(
                learner=learner.replace(
                    opt_state=learned, num_updates=learned.num_updates
                ),
                version=learned.num_updates,
            )
        if self.traffic.memory is None:
            return served
        return served.replace(memory=self.traffic.memory)

    def master(self, draft: Draft) -> Draft:
        """The draft to keep, in float32, given the one before the last answer."""
        head = self.adaptation.head
        return (
            draft if head is None else head.master(self.state.learner.opt_state, draft)
        )

    def update(self, draft: Draft) -> tuple[Draft, UpdateReport]:
        """Learns; returns the draft to serve."""
        self.state, draft, report = self.adaptation.update(
            self.state, self.traffic, draft
        )
        return draft, report
