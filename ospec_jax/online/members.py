# SPDX-License-Identifier: Apache-2.0
"""Members of a pool that learn while others serve: a trainer for each of them.

Verification tells every draft what the target said, whoever drafted. So each member
that learns has a trainer of its own, which sees every answer as if it had drafted it,
or those alone that it drafted most of. Nothing else of a pool changes: who does not
learn keeps its bits, and who selects among them judges them as they are by then.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ospec_jax.decoding.request import Completion
from ospec_jax.drafters.pool import taps_of, with_members
from ospec_jax.online.slices import Slices, run
from ospec_jax.online.trainer import (
    Speed,
    Traffic,
    Trainer,
    TrainerState,
    UpdateReport,
    new_counts,
)
from ospec_jax.types import Draft
from ospec_jax.typing import struct


@struct
class MembersState(TrainerState):
    """What is counted of a pool that learns, and what each learning member remembers.

    Attributes:
      members: The states of their trainers, in the order of their numbers.
      has_heard: Which of them observed the last answer.
    """

    members: tuple[Any, ...] = flax.struct.field(kw_only=True)
    has_heard: Bool[Array, " n"] = flax.struct.field(kw_only=True)

    def going_on_from(self, before: Any) -> Any:
        """See `TrainerState`."""
        pairs = zip(self.members, before.members, strict=True)
        return (
            super()
            .going_on_from(before)
            .replace(members=tuple(new.going_on_from(old) for new, old in pairs))
        )

    @property
    def num_updates(self) -> Int[Array, ""] | int:
        """Steps that the update rules of all members have taken."""
        return sum(one.num_updates for one in self.members)


class Learning(NamedTuple):
    """A member that learns.

    Attributes:
      number: Of the member.
      trainer: Of its draft alone, that wants features recorded.
    """

    number: int
    trainer: Trainer


def members_trainer(
    learning: Sequence[Learning],
    columns: tuple[tuple[int, ...], ...],
    serve: Callable[[Draft], Draft],
    is_chosen_only: bool = False,
) -> Trainer:
    """Trains some members of a pool, each by itself.

    Args:
      learning: At least one, by ascending numbers; all of one learner.
      columns: Of each member of the pool, which of its taps it reads.
      serve: Makes the pool that decodes of one in float32.
      is_chosen_only: Of an answer only the member learns that drafted most of its
        steps; nobody, if that one does not learn.
    """
    pool = _Pool(tuple(learning), columns, serve, is_chosen_only)
    trainers = [one.trainer for one in learning]
    has_slices = all(trainer.update_in_slices for trainer in trainers)
    numbers = ", ".join(str(one.number) for one in learning)

    return Trainer(
        recording="features",
        init=pool.init,
        serve=lambda draft: pool.own(serve(draft)),
        warm_up=pool.warm_up,
        is_ready=pool.is_ready,
        observe=pool.observe,
        is_due=lambda state: bool(pool.due(state)),
        answers_until_due=pool.answers_until_due,
        update=pool.update,
        update_in_slices=pool.update_in_slices if has_slices else None,
        rehearse_slices=pool.rehearse_slices,
        label=f"{trainers[0].label}, of the pool's members {numbers},",
        remedy=trainers[0].remedy,
        own=pool.own,
    )


class _Given(NamedTuple):
    """What a member's trainer is given of the pool's; see `Trainer`."""

    state: Any
    traffic: Traffic
    draft: Draft
    served: Draft
    completion: Completion


@dataclasses.dataclass(frozen=True)
class _Pool:
    """What `members_trainer` runs; holds no state. See there."""

    learning: tuple[Learning, ...]
    columns: tuple[tuple[int, ...], ...]
    serve: Callable[[Draft], Draft]
    is_chosen_only: bool

    def init(self, draft: Draft) -> tuple[MembersState, Traffic]:
        """A state that has seen nothing."""
        found = [
            one.trainer.init(draft.params.items[one.number]) for one in self.learning
        ]
        state = MembersState(
            *new_counts(),
            members=tuple(state for state, _ in found),
            has_heard=jnp.zeros(len(self.learning), bool),
        )
        return state, Traffic(members=tuple(traffic for _, traffic in found))

    def own(self, draft: Draft) -> Draft:
        """See `Trainer`."""
        changed = {
            one.number: one.trainer.own(draft.params.items[one.number])
            for one in self.learning
        }
        return with_members(draft, changed)

    def warm_up(
        self,
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
        speed: Speed | None = None,
    ) -> MembersState:
        """See `Trainer`."""
        warm = [
            one.trainer.warm_up(*given, speed)
            for one, given in self._given(state, traffic, draft, served, completion)
        ]
        return state.replace(members=tuple(warm))

    def is_ready(self, state: MembersState) -> bool:
        """Whether it is known of all when to learn."""
        pairs = zip(self.learning, state.members, strict=True)
        return all(one.trainer.is_ready(own) for one, own in pairs)

    def observe(
        self,
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        completion: Completion,
    ) -> tuple[MembersState, Traffic]:
        """Has those members observe an answer that are to learn from it."""
        has_heard = self._hearers(completion)
        members = list(state.members)
        kept = list(traffic.members)
        given = self._given(state, traffic, draft, draft, completion)

        for place, (one, own) in enumerate(given):
            if has_heard[place]:
                args = own.state, own.traffic, own.draft, own.completion
                members[place], kept[place] = one.trainer.observe(*args)

        state = state.replace(
            num_prompts=state.num_prompts + 1,
            members=tuple(members),
            has_heard=jnp.asarray(has_heard),
        )
        return state, traffic.replace(members=tuple(kept))

    def _hearers(self, completion: Completion) -> np.ndarray:
        """Which of the learning members are to learn from an answer."""
        numbers = np.asarray([one.number for one in self.learning])
        if not self.is_chosen_only:
            return np.ones(len(numbers), bool)

        # Of several that drafted as often, the first.
        counts = completion.num_steps_of
        most = max(sorted(counts), key=lambda number: counts[number], default=-1)
        return numbers == most

    def due(self, state: MembersState) -> tuple[int, ...]:
        """Places of the members that are to be updated now."""
        if bool(state.is_stopped):
            return ()

        has_heard = np.asarray(state.has_heard)
        return tuple(
            place
            for place, one in enumerate(self.learning)
            if has_heard[place] and one.trainer.is_due(state.members[place])
        )

    def answers_until_due(self, state: MembersState, num_tokens: Sequence[int]) -> int:
        """See `Trainer`: until the first of them is due."""
        if bool(state.is_stopped):
            return len(num_tokens)

        return min(
            one.trainer.answers_until_due(own, num_tokens)
            for one, own in zip(self.learning, state.members, strict=True)
        )

    def update(
        self,
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> tuple[MembersState, Draft, Draft, UpdateReport]:
        """Updates the members that are due, one behind the other."""

        def at_once(one: Learning, given: _Given) -> Slices[tuple]:
            # From no slices: a generator, as the one below is.
            yield from ()
            return one.trainer.update(*given)

        return run(self._round(at_once, state, traffic, draft, served, completion))

    def update_in_slices(
        self,
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> Slices[tuple[MembersState, Draft, Draft, UpdateReport]]:
        """The same, slice by slice."""

        def in_slices(one: Learning, given: _Given) -> Slices[tuple]:
            assert one.trainer.update_in_slices is not None
            return (yield from one.trainer.update_in_slices(*given))

        return self._round(in_slices, state, traffic, draft, served, completion)

    def _round(
        self,
        way: Callable[[Learning, _Given], Slices[tuple]],
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> Slices[tuple[MembersState, Draft, Draft, UpdateReport]]:
        members = list(state.members)
        drafts = {}
        serving = {}
        reports = {}
        given = self._given(state, traffic, draft, served, completion)

        for place in self.due(state):
            if reports:
                yield
            one, own = given[place]
            updated = yield from way(one, own)
            members[place], drafts[one.number], serving[one.number], report = updated
            reports[one.number] = report

        report = _joined(reports)
        is_changed = any(one.decision == "promote" for one in reports.values())
        state = state.replace(
            members=tuple(members),
            version=state.version + int(is_changed),
            is_stopped=jnp.asarray(report.decision == "stopped"),
        )
        return state, with_members(draft, drafts), with_members(served, serving), report

    def rehearse_slices(
        self,
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> None:
        """See `Trainer`."""
        for one, given in self._given(state, traffic, draft, served, completion):
            one.trainer.rehearse_slices(*given)

    def _given(
        self,
        state: MembersState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> list[tuple[Learning, _Given]]:
        """Each member's part of what the pool's trainer is given."""
        return [
            (
                one,
                _Given(
                    state.members[place],
                    traffic.members[place],
                    draft.params.items[one.number],
                    served.params.items[one.number],
                    self._view(completion, one.number),
                ),
            )
            for place, one in enumerate(self.learning)
        ]

    def _view(self, completion: Completion, number: int) -> Completion:
        """An answer, with the part of its features that a member reads."""
        feedback = completion.feedback
        assert feedback is not None, "features are recorded"
        assert feedback.taps is not None, "features are recorded"
        own = feedback.replace(taps=taps_of(feedback.taps, self.columns, number))
        return dataclasses.replace(completion, feedback=own)


def _joined(reports: dict[int, UpdateReport]) -> UpdateReport:
    """One report of an update of several members.

    What was measured is their mean; what was done is what matters most: that learning
    stopped, or that somebody else is served now.
    """
    found = list(reports.values())
    decisions = [report.decision for report in found]
    ranked = [kind for kind in ("stopped", "promote") if kind in decisions]
    lengths = [report.step_length for report in found]
    step_length = None
    if None not in lengths:
        step_length = float(np.linalg.norm(np.asarray(lengths, float)))

    return UpdateReport(
        jax.tree.map(lambda *values: np.mean(values, axis=0), *(r.info for r in found)),
        (ranked or decisions)[0],
        sum(report.seconds for report in found),
        min(report.stride for report in found),
        step_length,
        members=tuple(reports),
    )
