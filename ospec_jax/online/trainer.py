# SPDX-License-Identifier: Apache-2.0
"""What learns from answers while serving: one protocol, whatever it is that learns.

All that happens is a function of a trainer's state and of the traffic, never of the
clock: what a budget in seconds buys is measured once, when everything is compiled.
"""

import dataclasses
import warnings
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ospec_jax.config import Recording
from ospec_jax.decoding.request import Completion
from ospec_jax.drafters import ngram
from ospec_jax.learners import deltas
from ospec_jax.learners.base import LearnerInfo
from ospec_jax.learners.projection import HeadInfo
from ospec_jax.online import ring
from ospec_jax.online.pace import PaceState
from ospec_jax.online.ring import FeedbackRing
from ospec_jax.types import Deltas, Draft, NgramMemory
from ospec_jax.typing import struct


@struct
class TrainerState:
    """What every trainer counts; those that train a draft remember more.

    Attributes:
      num_prompts: Answers observed, so that a resumed run knows where it stands.
      version: How often learning has replaced or changed the served draft. An update
        that is served counts as one, however many steps it took.
      is_stopped: Whether an update was not finite, behind which there is no learning.
      pace: How often learning is worth its time; None if it always is.
    """

    num_prompts: Int[Array, ""]
    version: Int[Array, ""]
    is_stopped: Bool[Array, ""]
    pace: PaceState | None = None

    @property
    def num_updates(self) -> Int[Array, ""] | int:
        """Steps that the update rule has taken."""
        return 0

    def going_on_from(self, before: Any) -> Any:
        """This state of a trainer that begins anew, with the counts of an earlier one.

        The draft that is served now is another version.
        """
        return self.replace(num_prompts=before.num_prompts, version=before.version + 1)

    @property
    def stride(self) -> int:
        """Occasions to learn, for each that is taken."""
        return 1 if self.pace is None else int(self.pace.stride)


@struct
class Traffic:
    """What is kept of users' prompts and answers; both can be read back from it.

    Attributes:
      ring: Recent windows to train on, or None.
      memory: n-grams, or None.
      deltas: What was learned of single scopes, or None.
      members: Of a pool, what is kept for each member that learns.
    """

    ring: FeedbackRing | None = None
    memory: NgramMemory | None = None
    deltas: Deltas | None = None
    members: "tuple[Traffic, ...]" = ()


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """What one round of learning did; for looking at.

    Attributes:
      decision: `promote`: the served draft is another one now. Of guarded promotion
        also `rollback`, `expire` or `wait`; see `promotion.verdict`. `stopped` if the
        update was not finite: learning has ended, the served draft stays.
      stride: Occasions to learn, for each that is taken.
      step_length: How far the served parameters moved, if the learner knows.
      members: Of a pool, the numbers of the members that were updated.
    """

    info: LearnerInfo | HeadInfo
    decision: str
    seconds: float
    stride: int = 1
    step_length: float | None = None
    members: tuple[int, ...] = ()


class Speed(NamedTuple):
    """How fast decoding is on this machine, learning not included.

    Attributes:
      seconds_per_token: Of an answer.
      seconds_per_step: Of a target pass and its draft.
    """

    seconds_per_token: float
    seconds_per_step: float


def speed_of(completion: Completion, batch_size: int = 1) -> Speed:
    """How fast an answer was decoded.

    Args:
      batch_size: Requests that were decoded beside each other in that time.
    """
    seconds = completion.seconds / batch_size
    return Speed(
        seconds_per_token=seconds / max(len(completion.token_ids), 1),
        seconds_per_step=seconds / max(completion.stats.num_drafts, 1),
    )


class Trainer(NamedTuple):
    """Learns from answered requests.

    In all of it `draft` is what is served, in float32, as it is learned and stored;
    `served` is the same draft in the precision that decodes. A trainer's state is a
    pytree whose class extends `TrainerState`. `observe` and `remember` may overwrite
    the traffic they are given, and `update` the state and the served draft: go on with
    what they return.

    Attributes:
      recording: What the engine must record of verified tokens.
      init: `draft -> (state, traffic)`.
      serve: `draft -> served`.
      warm_up: `(state, traffic, draft, served, completion, speed) -> state`: compiles
        what an answer in a cache of this size needs, and learns nothing. If `speed` is
        given, it also fixes the interval between updates and what they cost.
      is_ready: `state -> bool`: whether it is known when to learn; a budget of time
        has to be measured first.
      observe: `(state, traffic, draft, completion) -> (state, traffic)`: counts an
        answer that is shared, and keeps what may be learned from it.
      is_due: `state -> bool`: whether to update now, after the answer observed last.
      answers_until_due: `(state, num_tokens) -> int`: how many of the answers to come,
        of so many tokens each, will have been observed when the next update is due; all
        of them if that is later.
      update: `(state, traffic, draft, served, completion) -> (state, draft, served,
        UpdateReport)`, given the answer that was observed last.
      label: Of the learner, for messages: its name and its rate.
      remedy: What to start anew with where updates are not finite.
      remember: `(traffic, served, completion) -> traffic`: keeps of an answer what
        serves its own scope alone; before it is observed, if it is shared.
      own: `draft -> draft`, of a served one or one in float32: the same, of which no
        update overwrites anything.
      update_in_slices: As `update`, but a generator that runs one slice each time it is
        asked on, and returns what `update` does, up to the order of float32 sums. It
        overwrites nothing that it is given: one that is closed half-way has never been.
        None where it cannot be had so, or is short anyway.
      rehearse_slices: `(state, traffic, draft, served, completion) -> None`: compiles
        what slices need, and learns nothing.
    """

    recording: Recording
    init: Callable[[Draft], tuple[Any, Traffic]]
    serve: Callable[[Draft], Draft]
    warm_up: Callable[..., Any]
    is_ready: Callable[[Any], bool]
    observe: Callable[..., tuple[Any, Traffic]]
    is_due: Callable[[Any], bool]
    answers_until_due: Callable[..., int]
    update: Callable[..., tuple[Any, Draft, Draft, UpdateReport]]
    label: str
    remedy: str
    remember: Callable[[Traffic, Draft, Completion], Traffic] = lambda traffic, *_: (
        traffic
    )
    own: Callable[[Draft], Draft] = lambda draft: draft
    update_in_slices: Callable[..., Generator[None, None, Any]] | None = None
    rehearse_slices: Callable[..., None] = lambda *_: None


class Learned(NamedTuple):
    """Where a trainer and its draft stand after an answer.

    Attributes:
      state: The trainer's; `traffic` likewise.
      draft: In float32; `served`, as it decodes.
      report: Of the update, if one was due.
    """

    state: Any
    traffic: Traffic
    draft: Draft
    served: Draft
    report: UpdateReport | None = None


def go_on_from(trainer: Trainer, state: Any, traffic: Traffic, draft: Draft) -> Learned:
    """Where a trainer stands that begins, or was restored: with a draft to serve."""
    # n-grams and differences belong to traffic, not to the draft: they are attached
    # when it is served.
    served = attach_traffic(trainer.serve(draft), traffic)
    return Learned(state, traffic, draft, served)


def attach_traffic(served: Draft, traffic: Traffic) -> Draft:
    """A served draft with what is kept of its traffic for single scopes, if it is."""
    if traffic.memory is not None:
        served = served.replace(memory=traffic.memory)
    if traffic.deltas is not None:
        served = served.replace(deltas=traffic.deltas)

    return served


@jax.jit
def forget(traffic: Traffic, is_gone) -> Traffic:
    """Drops what is kept of some scopes' text.

    Args:
      is_gone: `[c]` which, by their numbers; see `scopes.as_mask`.
    """
    if traffic.ring is not None:
        traffic = traffic.replace(ring=ring.forget(traffic.ring, is_gone))
    if traffic.memory is not None:
        traffic = traffic.replace(memory=ngram.forget(traffic.memory, is_gone))
    if traffic.deltas is not None:
        traffic = traffic.replace(deltas=deltas.forget(traffic.deltas, is_gone))
    if traffic.members:
        kept = tuple(forget(one, is_gone) for one in traffic.members)
        traffic = traffic.replace(members=kept)

    return traffic


def learn_from(
    trainer: Trainer,
    now: Learned,
    completion: Completion,
    is_shared: bool = True,
    decoding: Draft | None = None,
) -> Learned:
    """Observes an answer, and learns where that is due; waits until it is done.

    Args:
      now: What an earlier call returned, or the beginning.
      is_shared: Learn also what serves others than the answer's own scope.
      decoding: The draft that decodes, where what is learned waits to be served.
    """
    # First what was seen, then what is learned from it, if that is due.
    now = observe(trainer, now, completion, is_shared, decoding)
    if is_shared and trainer.is_due(now.state):
        return taught(trainer, now, trainer.update(*now[:4], completion))

    return now


def observe(
    trainer: Trainer,
    now: Learned,
    completion: Completion,
    is_shared: bool = True,
    decoding: Draft | None = None,
) -> Learned:
    """Keeps of an answer what may be learned from it; arguments as of `learn_from`."""
    traffic = trainer.remember(now.traffic, decoding or now.served, completion)
    state = now.state
    if is_shared:
        state, traffic = trainer.observe(state, traffic, now.draft, completion)
    served = attach_traffic(now.served, traffic)

    # Wait here: learning would run during the next decoding, and be counted as that.
    jax.block_until_ready((state, traffic, served))
    return Learned(state, traffic, now.draft, served)


def taught(trainer: Trainer, now: Learned, updated: tuple) -> Learned:
    """Where it stands after an update; waits until that is done.

    Args:
      now: Before it.
      updated: What the trainer's `update` returned.
    """
    state, draft, served, report = updated
    served = attach_traffic(served, now.traffic)
    jax.block_until_ready((state, served))
    if report.decision == "stopped":
        warnings.warn(describe_stop(trainer, state), stacklevel=6)

    return Learned(state, now.traffic, draft, served, report)


def describe_stop(trainer: Trainer, state: TrainerState) -> str:
    """Why there is no more learning, and what to do."""
    return (
        f"learning has stopped: after {int(state.num_updates)} updates the next one of "
        f"the learner {trainer.label} was not finite; the last good draft is served "
        f"and saved. Start a new run from it with --draft and {trainer.remedy}"
    )


def new_counts() -> tuple[Array, Array, Array]:
    """`num_prompts`, `version` and `is_stopped` of a trainer that has seen nothing."""
    zero = jnp.zeros((), jnp.int32)
    return zero, zero, jnp.zeros((), bool)
