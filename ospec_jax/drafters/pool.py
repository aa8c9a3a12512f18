# SPDX-License-Identifier: Apache-2.0
"""Several drafters behind one: each step, one of them proposes.

Each member has its own parameters, cache and context. They stand in `Members`, and the
first of these proposes: who wants another one to propose puts it first, in the draft
and in the state (`bring_first`). So members of one shape share a compiled step; which
of them proposes is a matter of arguments.

Whatever is chosen, and however often, output stays exact: a choice is made before
anything is drafted, and a tree is verified with the distributions that drew it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ospec_jax.config import ConfigError, DraftConfig, TreeConfig
from ospec_jax.drafters.base import Drafter, Family, Hints
from ospec_jax.drafters.combine import combine, inner_tree
from ospec_jax.drafters.ngram import with_ngrams
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.drafters.wellformed import build_checked
from ospec_jax.models.layers import Numerics
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Pairs,
    Roots,
    SharedTables,
    Suggested,
)
from ospec_jax.typing import struct


@struct
class Members:
    """What a pool holds of each member: its draft, its cache or its context."""

    items: tuple[Any, ...]

    def swapped(self, number: int) -> "Members":
        """The same, the first one and that of the number in each other's place."""
        items = list(self.items)
        items[0], items[number] = items[number], items[0]
        return Members(tuple(items))

    def alone(self, number: int) -> "Members":
        """The one of the number."""
        return Members((self.items[number],))

    def with_one(self, number: int, other: "Members") -> "Members":
        """The same, with what another one holds alone in the number's place."""
        [item] = other.items
        return Members((*self.items[:number], item, *self.items[number + 1 :]))


def bring_first(tree: Any, number: int) -> Any:
    """A draft or a state in which the member of this number proposes.

    Applied once more, it restores the order. Moves references on the host; nothing is
    copied.
    """
    if number <= 0:
        return tree

    return _map_members(lambda members: members.swapped(number), tree)


def take_chosen(tree: Any, number: int) -> Any:
    """A draft or a state with the member of this number alone.

    Who does not run need not be given to a step, which takes time for each of its
    arguments. Moves references on the host; nothing is copied.
    """
    return _map_members(lambda members: members.alone(number), tree)


def put_back(tree: Any, number: int, chosen: Any) -> Any:
    """A state after a step of one member: the others are as they were before it.

    Args:
      tree: What `take_chosen` was given.
      chosen: What became of that which it returned.
    """
    replace = lambda old, new: old.with_one(number, new) if _is_members(old) else new
    return jax.tree.map(replace, tree, chosen, is_leaf=_is_members)


def _is_members(node: Any) -> bool:
    return isinstance(node, Members)


def _map_members(change: Callable[[Members], Members], tree: Any) -> Any:
    # Everything else of a state belongs to the request, not to a drafter, and stays.
    own = lambda node: change(node) if _is_members(node) else node
    return jax.tree.map(own, tree, is_leaf=_is_members)


def with_members(draft: Draft, changed: dict[int, Draft]) -> Draft:
    """A pool's draft, some members of which are others, by their numbers."""
    items = tuple(changed.get(i, one) for i, one in enumerate(draft.params.items))
    return draft.replace(params=Members(items))


class Member(NamedTuple):
    """One drafter of a pool, as it is built.

    Attributes:
      config: Of its architecture, if its family has one.
      mix: How chains of suggestions stand beside it; see `combine.MIXES`.
      needs_ngrams: Without n-grams to look up it would have nothing to suggest.
    """

    family: Family
    config: Any
    mix: str = ""
    needs_ngrams: bool = False

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose inputs it reads."""
        return self.config.taps if isinstance(self.config, DraftConfig) else ()


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """What a pool is built from.

    Attributes:
      members: In the order of their numbers; the first one proposes.
      extends: Who runs over the tokens of a step: `all` members, so that each can take
        over at any time, or only the one that was `chosen` for it. What the others
        miss stays missing in their caches, and their contexts are of earlier tokens:
        they draft worse for it, never wrongly. Prompts are run over by all.
      has_ngrams: The pool is lent n-grams, from which all members get suggestions; else
        those that live on them look them up for themselves.
    """

    members: tuple[Member, ...]
    extends: Literal["all", "chosen"] = "all"
    has_ngrams: bool = False

    def __post_init__(self):
        if self.extends not in ("all", "chosen"):
            raise ConfigError(f"extends is {self.extends!r}; use 'all' or 'chosen'")
        if len(self.members) < 2:
            raise ConfigError(
                f"a pool of {len(self.members)} drafts leaves nothing to choose from; "
                f"give two or more, as in pool:shipped+ngram"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose inputs any member reads, ascending."""
        return tuple(sorted({tap for member in self.members for tap in member.taps}))

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """Of each member, which of the pool's taps it reads."""
        place = {tap: i for i, tap in enumerate(self.taps)}
        return tuple(
            tuple(place[tap] for tap in member.taps) for member in self.members
        )

    def first(self, number: int) -> "PoolConfig":
        """The same pool, in which the member of this number proposes."""
        members = Members(self.members).swapped(number).items
        return dataclasses.replace(self, members=members)


def pool(
    drafters: tuple[Drafter, ...],
    columns: tuple[tuple[int, ...] | None, ...] | None = None,
    extends: Literal["all", "chosen"] = "all",
) -> Drafter:
    """One drafter of several, of which the first proposes.

    Its `Draft` has `Members` of drafts for parameters; they share one memory, its own.

    Args:
      columns: For each drafter, which of the pool's taps it reads; by default all.
      extends: See `PoolConfig`. With `chosen` it is given the first one's draft, cache
        and context alone; see `take_chosen`.
    """
    init_params = functools.partial(_init_members, drafters)
    chosen = drafters[0]
    columns = columns or (None,) * len(drafters)
    if extends == "chosen":
        drafters = drafters[:1]

    def init_cache(batch_size: int, capacity: int) -> Members:
        return Members(tuple(one.init_cache(batch_size, capacity) for one in drafters))

    def init_context(batch_size: int) -> Members:
        return Members(tuple(one.init_context(batch_size) for one in drafters))

    def extend(
        draft: Draft, shared: SharedTables, cache: Members, pairs: Pairs
    ) -> tuple[Members, Members]:
        caches = []
        contexts = []
        blank = init_context(pairs.inputs.shape[0]).items

        for i, (one, own) in enumerate(zip(drafters, _drafts_of(draft), strict=True)):
            read = pairs.replace(taps=taps_of(pairs.taps, columns, i))
            now, context = one.extend(own, shared, cache.items[i], read)
            # Where logits can be had later, none are computed for those who wait.
            if one.predict is not None:
                context = context.replace(logits=blank[i].logits)
            caches.append(now)
            contexts.append(context)

        return Members(tuple(caches)), Members(tuple(contexts))

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: Members,
        context: Members,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[Members, Members, Members]:
        caches = []
        contexts = []
        found = []
        blank = init_context(pairs.inputs.shape[0]).items

        for i, (one, own) in enumerate(zip(drafters, _drafts_of(draft), strict=True)):
            assert one.retrace is not None
            read = pairs.replace(taps=taps_of(pairs.taps, columns, i))
            args = own, shared, cache.items[i], context.items[i], read, suggested
            now, following, retraced = one.retrace(*args)
            # As in `extend`: logits that can be had later are not kept.
            if one.predict is not None:
                following = following.replace(logits=blank[i].logits)
            caches.append(now)
            contexts.append(following)
            found.append(retraced)

        return Members(tuple(caches)), Members(tuple(contexts)), Members(tuple(found))

    can_retrace = extends == "all" and all(one.retrace for one in drafters)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: Members,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, Members]:
        # The engine makes logits late only for a drafter that has `predict`, which a
        # pool has not: of its members the one that proposes makes its own here.
        own = _drafts_of(draft)[0]
        context: DraftContext = roots.context.items[0]
        if chosen.predict is not None:
            logits = chosen.predict(own, shared, context.hidden)
            context = context.replace(logits=logits)

        tree, first = chosen.propose(
            own, shared, cache.items[0], roots.replace(context=context), hints
        )
        return tree, Members((first, *cache.items[1:]))

    return Drafter(
        init_params=init_params,
        init_cache=init_cache,
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=_refuse_training,
        num_scratch=max(one.num_scratch for one in drafters),
        reads_target=any(one.reads_target for one in drafters),
        retrace=retrace if can_retrace else None,
        takes_chosen=extends == "chosen",
    )


def _init_members(drafters: tuple[Drafter, ...], key) -> Members:
    """Drafts that know nothing, one for each drafter."""
    keys = jax.random.split(key, len(drafters))
    pairs = zip(drafters, keys, strict=True)
    return Members(tuple(Draft(one.init_params(own)) for one, own in pairs))


def _drafts_of(draft: Draft) -> list[Draft]:
    """The members' drafts, with the memory that they share."""
    return [one.replace(memory=draft.memory) for one in draft.params.items]


def _refuse_training(*_, **__):
    raise ConfigError("a pool is not trained as a whole; its members are, one by one")


def taps_of(taps: jax.Array, columns: tuple, number: int) -> jax.Array:
    """The part of the pool's taps `[..., f]` that one member reads.

    Args:
      columns: See `pool`.
    """
    own = columns[number]
    if own is None:
        return taps

    # The target taps every layer that any member reads, one beside the other in
    # ascending order of layers.
    num_taps = 1 + max((i for some in columns for i in some or ()), default=0)
    width = taps.shape[-1] // num_taps
    parts = [taps[..., i * width : (i + 1) * width] for i in own]
    # A member without taps gets features of width zero.
    return jnp.concatenate(parts, axis=-1) if parts else taps[..., :0]


def build_pool(
    config: PoolConfig,
    tree: TreeConfig,
    numerics: Numerics,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafters of all members, for one tree, and pools them.

    Raises:
      ConfigError: One of them cannot draft such a tree.
    """
    drafters = tuple(
        _build_member(member, config.has_ngrams, tree, numerics, stop_fn)
        for member in config.members
    )
    return pool(drafters, config.columns, config.extends)


def _build_member(
    member: Member, has_ngrams: bool, tree, numerics: Numerics, stop_fn
) -> Drafter:
    # Mixing and n-grams belong to the member, not to the pool: two members may differ
    # in them.
    inner = inner_tree(member.mix, tree) if member.mix else tree
    drafter = build_checked(member.family, member.config, inner, numerics, stop_fn)
    if member.mix:
        drafter = combine(member.mix, drafter, tree)
    if member.needs_ngrams and not has_ngrams:
        drafter = with_ngrams(drafter, tree, numerics.has_batched_writes)

    return drafter


def _max_depth(config: PoolConfig) -> int:
    """What the shallowest member can draft; there need not be a limit."""
    # Every action's tree must be one that whoever is chosen can draft.
    limits = [
        member.family.max_depth(member.config)
        for member in config.members
        if member.family.max_depth is not None
    ]
    return min(limits, default=sys.maxsize)


POOL = Family(
    name="pool",
    description="several drafters, of which a controller chooses one each step",
    build=build_pool,
    config=PoolConfig,
    max_depth=_max_depth,
)
