# SPDX-License-Identifier: Apache-2.0
"""An update in slices, with whatever else there is to do between two of them.

A slice takes as long as a few plain steps, so that requests which are being answered
wait no longer for learning than for that; `docs/serving.md` has what was measured. What
comes of all slices is what the update does at once, up to the order in which float32
numbers are added. Nothing that there was before is overwritten: an update that is given
up has never been.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ospec_jax.learners.base import Learner, LearnerInfo, LearnerState, Segments
from ospec_jax.learners.losses import LossSums
from ospec_jax.learners.parts import (
    Gathered,
    Given,
    Parts,
    as_read,
    narrowed,
    num_tokens_of,
    widened,
)
from ospec_jax.models import finite
from ospec_jax.models.sharing import share
from ospec_jax.types import SharedTables

PAIRS = 16
"""Trained pairs of a slice. What else a slice does takes as long as some 20 of them,
with the shipped draft: fewer make an update dearer, and hardly shorter to wait for."""
_NUM_PROBS = 2**21
"""Probabilities of the target that a slice computes, to choose candidates."""
_NUM_MOVED = 2**23
"""Numbers of a learner's state that a slice moves on."""

Found = TypeVar("Found")
Slices = Generator[None, None, Found]
"""Runs one slice each time that it is asked on, and returns what all have come to."""


def run(slices: Slices[Found]) -> Found:
    """All slices at once."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


class SlicedUpdate(NamedTuple):
    """What an update came to.

    Attributes:
      is_finite: Whether all of the state is.
    """

    state: LearnerState
    info: LearnerInfo
    is_finite: Any


class _Programs(NamedTuple):
    """Jitted functions of an update's slices; see `_compiled`."""

    emphasis: Callable
    mass: Callable
    choose: Callable
    count: Callable
    nothing: Callable
    gather: Callable
    widen: Callable
    info: Callable


@share
def _compiled(parts: Parts) -> _Programs:
    """One for all learners of an objective."""

    def mass(segments: Segments, shared: SharedTables, token_ids, first, count: int):
        last = num_tokens_of(shared, token_ids) - 1
        entries = jnp.minimum(first + jnp.arange(count), last)
        if token_ids is not None:
            entries = token_ids[entries]
        return parts.mass(segments, shared, entries)

    def choose(masses, num_tokens: int):
        mass = jnp.concatenate(masses)[:num_tokens]
        return jax.lax.top_k(mass, parts.num_candidates)[1]

    def count(params, batch, emphasis, shared, token_ids, candidates, window, span):
        segments, counted = _window_of((batch, emphasis), window)
        sums = parts.sums(
            params, segments, counted, shared, token_ids, candidates, span
        )
        return sums.counted

    def nothing(params, shared, token_ids, candidates):
        narrow = _narrowed(params, shared, token_ids, candidates)
        none = LossSums(*(jnp.zeros(parts.num_steps) for _ in LossSums._fields))
        return Gathered(jax.tree.map(jnp.zeros_like, narrow), none)

    def gather(
        so_far: Gathered,
        params,
        batch,
        emphasis,
        shared,
        token_ids,
        candidates,
        counted,
        window,
        span,
    ) -> Gathered:
        segments, weight = _window_of((batch, emphasis), window)

        def loss_of(narrow):
            read = narrow
            if candidates is not None:
                number = num_tokens_of(shared, token_ids)
                read = as_read(narrow, params, candidates, number)
            sums = parts.sums(
                read, segments, weight, shared, token_ids, candidates, span
            )
            return parts.loss(sums, counted), sums

        narrow = _narrowed(params, shared, token_ids, candidates)
        grads, sums = jax.grad(loss_of, has_aux=True)(narrow)
        return jax.tree.map(jnp.add, so_far, Gathered(grads, sums))

    def info(sums: LossSums, grads, has_candidates: bool) -> LearnerInfo:
        found = parts.info(sums)._replace(grad_norm=optax.global_norm(grads))
        return found.of_candidates() if has_candidates else found

    return _Programs(
        emphasis=jax.jit(parts.emphasis),
        mass=jax.jit(mass, static_argnames="count"),
        choose=jax.jit(choose, static_argnames="num_tokens"),
        count=jax.jit(count, static_argnames="span"),
        nothing=jax.jit(nothing),
        gather=jax.jit(gather, static_argnames="span", donate_argnums=0),
        widen=jax.jit(_widened),
        info=jax.jit(info, static_argnames="has_candidates"),
    )


@share
def _pointing(learner: Learner) -> Callable:
    return jax.jit(learner.given.point, static_argnums=1)


def _window_of(batch, number):
    """One window of a batch, as a batch."""
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1)
    return jax.tree.map(take, batch)


def _widened(so_far: Gathered, params, shared: SharedTables, token_ids, candidates):
    """The gradient of all parameters, of what was gathered of some rows."""
    if candidates is None:
        return so_far.grads

    number = num_tokens_of(shared, token_ids)
    return widened(so_far.grads, params, candidates, number)


def _narrowed(params, shared: SharedTables, token_ids, candidates):
    if candidates is None:
        return params

    return narrowed(params, candidates, num_tokens_of(shared, token_ids))


def update_in_slices(
    learner: Learner,
    state: LearnerState,
    batch: Segments,
    shared: SharedTables,
    token_ids: Any,
) -> Slices[SlicedUpdate]:
    """An update of a learner that takes gradients which are given.

    Args:
      state: Nothing of it is overwritten.
      batch: `[b, t]` windows.
      token_ids: `[q]` the draft's vocabulary; None for the target's.
    """
    given: Given = learner.given
    parts = given.parts
    programs = _compiled(parts)
    data = (batch, shared, token_ids)
    emphasis = programs.emphasis(batch)
    candidates = yield from _candidates(parts, *data)
    found = []

    for number in range(given.num_points):
        params = state.params
        if given.num_points > 1:
            params = _waited(_pointing(learner)(state, number))
        spans = _spans(parts, batch)
        args = (params, batch, emphasis, shared, token_ids, candidates)
        if parts.is_counted_first:
            counted = jnp.zeros(parts.num_steps)
            for window, span in spans:
                counted = _waited(counted + programs.count(*args, window, span))
                yield
        else:
            counted = _counting(parts)(params, emphasis, *data, candidates)

        so_far = programs.nothing(params, shared, token_ids, candidates)
        for window, span in spans:
            so_far = programs.gather(so_far, *args, counted, window, span)
            _waited(so_far)
            yield

        grads = programs.widen(so_far, params, shared, token_ids, candidates)
        info = programs.info(so_far.sums, grads, candidates is not None)
        found.append(_waited((grads, info)))
        yield

    return (yield from _moved(learner, state, tuple(found), *data))


def _waited(result: Found) -> Found:
    """Waits until it is computed: a slice is over then."""
    return jax.block_until_ready(result)


def _spans(parts, batch: Segments) -> list[tuple[np.int32, tuple[int, int]]]:
    """Windows, and pairs of each, that are a slice; those that weigh nothing are none.

    What they would add is zero.
    """
    weight = np.asarray(batch.weight)
    num_windows, size = weight.shape
    num_pairs = size - parts.num_context - parts.num_steps
    found = []
    for window in range(num_windows):
        for first in range(0, num_pairs, PAIRS):
            last = min(first + PAIRS, num_pairs)
            rows = slice(parts.num_context + first + 1, size - num_pairs + last)
            if np.any(weight[window, rows]):
                found.append((np.int32(window), (first, last)))

    return found


def _candidates(
    parts: Parts, batch: Segments, shared: SharedTables, token_ids
) -> Slices[Any]:
    """`[c]` entries of the draft vocabulary that the update looks at; None for all."""
    programs = _compiled(parts)
    num_tokens = num_tokens_of(shared, token_ids)
    if not 0 < parts.num_candidates < num_tokens:
        return None

    masses = []
    width = min(num_tokens, max(256, _NUM_PROBS // batch.weight.size))
    for first in range(0, num_tokens, width):
        args = (batch, shared, token_ids, np.int32(first))
        masses.append(_waited(programs.mass(*args, count=width)))
        yield

    return _waited(programs.choose(tuple(masses), num_tokens=num_tokens))


@share
def _counting(parts: Parts) -> Callable:
    """How much each depth counts, of which the segments alone tell."""

    def counted(params, emphasis, batch, shared, token_ids, candidates):
        num_pairs = batch.weight.shape[1] - parts.num_context - parts.num_steps
        sums = parts.sums(
            params,
            batch,
            emphasis,
            shared,
            token_ids,
            candidates,
            (0, num_pairs),
        )
        return sums.counted

    # What is not asked for is not computed: of the draft's pass nothing is left.
    return jax.jit(counted)


class _Group(NamedTuple):
    """Rows of a state's arrays that are moved on in one slice.

    Attributes:
      spans: Of each array its number, and rows; None for all of it.
      run: `(out, state, found, *data) -> (out, is_finite)`, `out` being the arrays.
    """

    spans: tuple[tuple[int, tuple[int, int] | None], ...]
    run: Callable


def _moved(
    learner: Learner, state: LearnerState, found: tuple, *data
) -> Slices[SlicedUpdate]:
    """What the rule makes of given gradients, some of the state's numbers at a time."""
    leaves, structure = jax.tree.flatten(state)
    shapes = tuple(leaf.shape for leaf in leaves)
    out: list[Any] = [None] * len(leaves)
    is_finite = np.bool_(True)
    for group in _groups(learner, shapes):
        numbers = [number for number, _ in group.spans]
        args = (tuple(out[number] for number in numbers), state, found, *data)
        results, is_good = _waited(group.run(*args))
        is_finite = is_good & is_finite
        for number, array in zip(numbers, results, strict=True):
            out[number] = array
        yield

    info = _waited(_telling(learner)(state, found, *data))
    return SlicedUpdate(jax.tree.unflatten(structure, out), info, is_finite)


@share
def _telling(learner: Learner) -> Callable:
    return jax.jit(lambda *args: learner.given.update(*args)[1])


@share
def _groups(learner: Learner, shapes: tuple[tuple[int, ...], ...]) -> list[_Group]:
    """Slices in which a state is moved on.

    Each is the whole rule, of which no more is computed than what is asked for.
    """
    moved_leaves = _moved_leaves(learner)
    spans = [(number, None) for number in range(len(shapes))]
    if not learner.given.is_by_number:
        return [_Group(tuple(spans), _moving(moved_leaves, tuple(spans)))]

    groups: list[list] = [[]]
    room = _NUM_MOVED
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        if size <= room:
            groups[-1].append((number, None))
            room -= size
            continue
        if size <= _NUM_MOVED:
            groups.append([(number, None)])
            room = _NUM_MOVED - size
            continue
        # So many rows that none is left over.
        num_parts = -(-size // _NUM_MOVED)
        step = -(-shape[0] // num_parts)
        for first in range(0, shape[0], step):
            groups.append([(number, (first, min(first + step, shape[0])))])
        room = 0

    found = [tuple(group) for group in groups if group]
    return [_Group(group, _moving(moved_leaves, group)) for group in found]


def _moved_leaves(learner: Learner) -> Callable:
    """The whole rule: arrays of the state that it comes to.

    All groups' programs begin with it. It is traced once, and stands in each of them as
    if it had been traced there.
    """

    def move(*args):
        return jax.tree.leaves(learner.given.update(*args)[0])

    return jax.jit(move, inline=True)


def _moving(moved_leaves: Callable, spans: tuple) -> Callable:
    def run(out, state, found, *data):
        new = moved_leaves(state, found, *data)
        written = []
        for old, (number, span) in zip(out, spans, strict=True):
            if span is None:
                written.append(new[number])
                continue
            first, last = span
            old = jnp.zeros_like(new[number]) if old is None else old
            written.append(old.at[first:last].set(new[number][first:last]))

        # Looked at as they are written: with two readers, all rows of what they read
        # would be computed.
        written = jax.lax.optimization_barrier(tuple(written))
        rows = [
            array if span is None else array[slice(*span)]
            for array, (_, span) in zip(written, spans, strict=True)
        ]
        return written, finite.is_finite(rows)

    return jax.jit(run, donate_argnums=0)
