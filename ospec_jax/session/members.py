# SPDX-License-Identifier: Apache-2.0
"""Which members of a pool learn, and with what."""

import dataclasses
from collections.abc import Callable

from ospec_jax.config import RECORDS_STATES, ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.sharing import caster
from ospec_jax.online.members import Learning, members_trainer
from ospec_jax.online.memory import with_memory
from ospec_jax.online.redrafting import Redrafting, with_redrafting
from ospec_jax.online.registry import build_trainer
from ospec_jax.online.trainer import Trainer
from ospec_jax.storage.checkpoint import record_of
from ospec_jax.types import Draft

_OF_THE_LAST_LAYER = ("head", "preference")


def learner_of_members(
    learner: LearnerConfig, draft: LoadedDraft, target: Target
) -> LearnerConfig:
    """What can be learned by members of a pool, and what `auto` is: `head` where each
    of them has an output projection of its own, else `gradient`.

    Raises:
      ConfigError: The draft is no pool, or none of those that are to learn can.
    """
    if draft.pool is None:
        raise ConfigError(
            f"members is {learner.members!r}, and the draft {draft.meta.family!r} has "
            f"none; leave it out, or give a pool, as in pool:shipped+shipped"
        )
    if learner.recording == "nothing":
        raise ConfigError(
            f"members is {learner.members!r}, and the learner {learner.name!r} changes "
            f"no draft; use another one, like 'head', or leave members out"
        )
    if learner.delta_rank:
        raise ConfigError(
            f"delta_rank is {learner.delta_rank}, and a pool adds no differences of "
            f"scopes to its members' logits; leave it out"
        )

    # Who can follow gradients can do so whatever else it can.
    trained = numbers_of(learner.decided(can_learn_head=False), draft, target)
    can_learn_head = not any(
        _reason(LearnerConfig("head"), draft.members[i], target) for i in trained
    )
    learner = learner.decided(can_learn_head)
    numbers_of(learner, draft, target)

    return learner


def numbers_of(
    learner: LearnerConfig, draft: LoadedDraft, target: Target
) -> tuple[int, ...]:
    """The members that learn, in ascending order.

    Args:
      draft: A pool.

    Raises:
      ConfigError: One that was named cannot learn, or none can.
    """
    names = _names_of(draft)
    reasons = {
        number: _reason(learner, member, target)
        for number, member in enumerate(draft.members)
    }
    if learner.members in ("all", "chosen"):
        found = tuple(number for number, reason in reasons.items() if not reason)
        if found:
            return found
        told = "; ".join(f"{names[i]} {reason}" for i, reason in reasons.items())
        raise ConfigError(
            f"no member of the pool can learn with the learner {learner.name!r}: "
            f"{told}; add a trained draft, like shipped, or leave members out to learn "
            f"n-grams alone"
        )

    wanted = sorted({int(number) for number in learner.members.split(",")})
    for number in wanted:
        if number not in reasons:
            raise ConfigError(
                f"members is {learner.members!r}, and there is no member {number}; the "
                f"pool's are 0 to {len(names) - 1}, in the order of their names"
            )
        if reasons[number]:
            raise ConfigError(
                f"members is {learner.members!r}, and {names[number]}, the member "
                f"{number}, cannot learn: it {reasons[number]}; name others, or use "
                f"'all' for those that can"
            )

    return tuple(wanted)


def _names_of(draft: LoadedDraft) -> list[str]:
    names = str(draft.meta.card.get("model", "")).split("+")
    if len(names) == len(draft.members):
        return names

    return [member.meta.family for member in draft.members]


def _reason(learner: LearnerConfig, member: LoadedDraft, target: Target) -> str:
    """Why a member cannot learn; empty if it can."""
    if member.meta.draft is None:
        return "has no parameters of its own to train"
    if member.own_family is not None:
        return "is of a family of your own, which a pool's checkpoint does not know"

    drafter = _drafter_of(member, target)
    is_last = learner.name in _OF_THE_LAST_LAYER
    if is_last and (drafter.head_inputs is None or drafter.unroll_outputs is None):
        return "has no output projection of its own"

    return ""


def _drafter_of(member: LoadedDraft, target: Target) -> Drafter:
    """What trains a member; the tree does not matter to that."""
    tree = TreeConfig(num_steps=1)
    return build_drafter(member.family, member.meta.draft, tree, target.numerics)


def trainer_of_members(
    learner: LearnerConfig,
    target: Target,
    draft: LoadedDraft,
    serve: Callable[[Draft], Draft],
    orders: tuple[int, ...],
    num_steps: int,
) -> Trainer:
    """What learning runs of a pool whose members learn; see `build.trainer_for`.

    Args:
      learner: From `learner_of_members`.
      num_steps: Tokens of a chain, K.
    """
    assert draft.pool is not None
    numbers = numbers_of(learner, draft, target)
    is_chosen_only = learner.members == "chosen"
    # The budget is that of all who learn from the same answers.
    own = learner
    if not is_chosen_only and "budget" in learner.settings:
        own = learner.replace(budget=learner.budget / len(numbers))

    learning = [
        Learning(i, _trainer_of_one(own, target, draft.members[i], num_steps))
        for i in numbers
    ]
    trainer = members_trainer(learning, draft.pool.columns, serve, is_chosen_only)
    num_slots = learner.memory_slots if orders else 0
    return with_memory(trainer, num_slots, orders, target.mesh)


def _trainer_of_one(
    learner: LearnerConfig, target: Target, member: LoadedDraft, num_steps: int
) -> Trainer:
    drafter = _drafter_of(member, target)
    shared = shared_tables(target.params)
    cast = caster(target.numerics.precision, target.mesh)
    width = target.config.hidden_size
    trainer = build_trainer(
        learner,
        drafter,
        shared,
        lambda one: one.replace(params=cast(one.params)),
        tap_width=len(member.taps) * width,
        hidden_size=width,
        vocab_size=target.config.vocab_size,
        numerics=target.numerics,
        mesh=target.mesh,
    )
    if trainer.recording not in RECORDS_STATES:
        return trainer

    how = Redrafting(drafter, target.numerics, shared, max(num_steps, 1))
    return with_redrafting(trainer, how)


def with_records(
    draft: LoadedDraft, learner: LearnerConfig | None, target: Target
) -> LoadedDraft:
    """The draft, whose record says which members of a pool a checkpoint holds."""
    if learner is None or not learner.members:
        return draft

    numbers = numbers_of(learner, draft, target)
    records = {str(i): record_of(draft.members[i].meta) for i in numbers}
    # Those that learned before are kept, too.
    meta = dataclasses.replace(draft.meta, members=draft.meta.members | records)

    return dataclasses.replace(draft, meta=meta)
