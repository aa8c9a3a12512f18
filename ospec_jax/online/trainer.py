# SPDX-License-Identifier: Apache-2.0
"""A session's learner: adaptation, or the head's, on the state that it owns."""

import dataclasses
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ospec_jax.config import LearnerConfig
from ospec_jax.decoding.request import Completion
from ospec_jax.online import pace
from ospec_jax.online.last_layer import HeadAdaptation
from ospec_jax.online.windows import Adaptation, AdaptationState, Traffic, UpdateReport
from ospec_jax.types import Draft


@dataclasses.dataclass
class Learning:
    """What to run, and where it stands."""

    config: LearnerConfig
    adaptation: Adaptation
    state: AdaptationState
    traffic: Traffic

    @property
    def head(self) -> HeadAdaptation | None:
        """What learns the projection alone, if that is learned."""
        return self.adaptation.head

    def rehearse(
        self, completion: Completion, served: Draft, num_rounds: int = 1
    ) -> float:
        """Compiles what an answer of this cache's size needs; remembers nothing.

        Returns:
          Seconds that the quickest round took.
        """
        seconds = float("inf")
        for _ in range(num_rounds):
            traffic = jax.tree.map(jnp.copy, self.traffic)  # observing donates it
            state, draft = self.state, served
            if state.pace is not None:  # which may pass over an answer
                stride = jnp.ones_like(state.pace.stride)
                state = state.replace(pace=state.pace.replace(stride=stride))
            if self.head is not None:
                state, draft = jax.tree.map(jnp.copy, (state, draft))
            copy = dataclasses.replace(self, state=state, traffic=traffic)
            jax.block_until_ready((state, draft, traffic))
            start = time.perf_counter()
            result = copy.observe(completion, draft)[0]
            jax.block_until_ready((result, copy.traffic))
            seconds = min(seconds, time.perf_counter() - start)
        return seconds

    def calibrate(
        self, completion: Completion, draft: Draft, served: Draft, batch_size: int = 1
    ) -> None:
        """Compiles; fixes the interval between updates, and what they cost.

        Args:
          completion: Decoded at full speed.
          batch_size: Requests that were decoded beside each other in that time.
        """
        seconds = completion.seconds / batch_size
        seconds_per_token = seconds / max(len(completion.token_ids), 1)
        seconds_per_step = seconds / max(completion.stats.num_drafts, 1)
        self.state = self.adaptation.calibrate(
            self.state, self.traffic, draft, seconds_per_token, seconds_per_step
        )
        if self.head is not None and self.state.pace is not None:
            seconds = self.rehearse(completion, served, num_rounds=4)
            self.head.compare(self.state.pace, served, completion)
            pace.rehearse(self.state.pace, num_windows=1)
            num_updates = self.head.num_chunks(completion)
            cost = seconds / max(num_updates, 1) / seconds_per_token
            self.state = self.adaptation.priced(self.state, cost)

    def learn_from(
        self, completion: Completion, draft: Draft, served: Draft,
        as_served: Callable[[Draft], Draft],
    ) -> tuple[Draft, Draft, UpdateReport | None]:  # fmt: skip
        """Remembers an answer, and learns when it is time; waits until that is done.

        Args:
          draft: In float32; `served`, what is served of it.
          as_served: What to serve of a draft.

        Returns:
          Both, from now on, and what was learned.
        """
        served, report = self.observe(completion, served)
        draft = self.master(draft)
        self.state = self.adaptation.compare(
            self.state, self.traffic, draft, completion
        )  # fmt: skip
        if self.is_due:
            draft, report = self.update(draft)
            if report.decision == "promote":
                served = as_served(draft)
        # The learner is drained here, so that its time is nobody else's.
        jax.block_until_ready((self.state, self.traffic, served))
        if report is not None and report.decision == "stopped":
            warnings.warn(f"{self.describe_stop()}", stacklevel=4)
        return draft, served, report

    def describe_stop(self) -> str:
        """Why there is no more learning, and what to do."""
        name = self.config.name
        key = "head_rate" if self.head is not None else "learning_rate"
        rate, count = getattr(self.config, key), int(self.state.learner.num_updates)
        return (
            f"learning has stopped: after {count} updates the next one of the learner "
            f"{name!r} with {key} {rate} was not finite; the last good draft is served "
            f"and saved. Start a new run from it with --draft and a lower {key}"
        )

    def observe(
        self, completion: Completion, served: Draft
    ) -> tuple[Draft, UpdateReport | None]:
        """Remembers an answer, and learns from it where the head alone is learned.

        Returns:
          The draft to serve, and what was learned.
        """
        report = None
        self.state, self.traffic = self.adaptation.observe(
            self.state, self.traffic, completion
        )
        if self.head is not None and self.adaptation.is_due(self.state):
            served, report = self._learn_head(self.head, completion, served)
        if self.traffic.memory is None:
            return served, report
        return served.replace(memory=self.traffic.memory), report

    def _learn_head(self, head: HeadAdaptation, completion: Completion, served: Draft):
        start, state, num_passes = time.perf_counter(), self.state, 1
        if state.pace is not None and pace.is_compared(state.pace):
            compared = head.compare(state.pace, served, completion)
            state, num_passes = state.replace(pace=compared), 2
        learned, served, info = head.observe(
            state.learner.opt_state, served, completion
        )
        learner = state.learner.replace(
            opt_state=learned, num_updates=learned.num_updates
        )
        stride = self.adaptation.stride(state)
        state = state.replace(learner=learner, version=learned.num_updates)
        num_passes *= head.num_chunks(completion)
        state = self.adaptation.judged(state, num_passes)
        info, decision = info(), "promote"  # waits
        if info.num_refused > 0:
            state, decision = state.replace(is_stopped=jnp.ones((), bool)), "stopped"
        self.state = state
        report = UpdateReport(
            info, decision, time.perf_counter() - start, stride, float(info.step_norm)
        )
        return served, report

    def master(self, draft: Draft) -> Draft:
        """The draft to keep, in float32, given the one before the last answer."""
        if self.head is None:
            return draft
        return self.head.master(self.state.learner.opt_state, draft)

    @property
    def is_calibrated(self) -> bool:
        """Whether it is known when to learn: a budget of time has to be measured."""
        if not self.adaptation.has_gradient or self.config.update_every_prompts:
            return True
        return int(self.state.update_interval) > 0

    @property
    def is_due(self) -> bool:
        """Whether a round of learning from all that waits has come."""
        return self.head is None and self.adaptation.is_due(self.state)

    def update(self, draft: Draft) -> tuple[Draft, UpdateReport]:
        """Learns; returns the draft to serve."""
        self.state, draft, report = self.adaptation.update(
            self.state, self.traffic, draft
        )
        return draft, report
