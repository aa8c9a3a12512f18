# SPDX-License-Identifier: Apache-2.0
"""A loss and its gradient, a few pairs of the batch at a time.

The loss is a mean over the positions that count. So parts of a batch add up to its
gradient, once it is known how much all of it counts; and what a part takes is bounded,
whatever the batch. The sum is that of the whole batch up to the order in which float32
numbers are added.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ospec_jax.learners.losses import LossSums
from ospec_jax.types import SharedTables
from ospec_jax.typing import Params, struct


class Parts(NamedTuple):
    """An objective's loss in parts.

    Where there are candidates, they are chosen first, by `mass`. Of a window some pairs
    are a part, with all that they attend to.

    Attributes:
      num_context: Leading pairs of each window that are only attended to.
      num_steps: Depths.
      num_candidates: Tokens that an update looks at; 0 for all.
      is_counted_first: What counts is known from a forward pass alone; else it follows
        from the segments.
      emphasis: `segments -> [b, t]`: the weight of each row in the loss, of the rows
        that the first pair predicts and all later ones.
      mass: `(segments, shared, entries [n]) -> [n]`: how probable the target finds some
        tokens over the whole batch; `entries` are its ids.
      sums: `(params, segments, counted, shared, token_ids, candidates, (first, last))
        -> LossSums` of the trained pairs from `first` to before `last`.
      loss: `(sums, counted [d]) -> loss`: what the sums of a part add to the loss of a
        batch that counts so much.
      info: `sums -> LearnerInfo`, of those of all parts.
    """

    num_context: int
    num_steps: int
    num_candidates: int
    is_counted_first: bool
    emphasis: Callable
    mass: Callable
    sums: Callable
    loss: Callable
    info: Callable


class Given(NamedTuple):
    """An update of a learner whose gradients somebody else has found, part by part.

    Attributes:
      parts: Of the loss.
      num_points: Parameters at which the gradient is wanted.
      point: `(state, number) -> params`, one of them.
      update: `(state, found, segments, shared, token_ids) -> (state, LearnerInfo)`, as
        `Learner.update`, given a tuple of the gradient and its info for each point; the
        info knows the gradient's norm.
      is_by_number: Each number of the state moves by itself, so that a part of the
        state takes a part of the time.
    """

    parts: Parts
    num_points: int
    point: Callable
    update: Callable
    is_by_number: bool


def given_gradient(
    parts: Parts | None, update: Callable, is_by_number: bool = False
) -> Given | None:
    """A learner that wants the gradient at its iterate alone.

    Args:
      parts: None for an objective without any.
      update: `(state, grads, info, segments, shared, token_ids) -> (state, info)`.
    """
    if parts is None:
        return None

    return Given(
        parts=parts,
        num_points=1,
        point=lambda state, number: state.params,
        update=lambda state, found, *data: update(state, *found[0], *data),
        is_by_number=is_by_number,
    )


@struct
class Gathered:
    """What parts have come to so far.

    Attributes:
      grads: Sum of the gradients, of what `narrowed` leaves of the parameters.
      sums: Likewise of the loss.
    """

    grads: Params
    sums: LossSums


class _Rows:
    """Stands for a table of which the candidates' rows are read, and nothing else."""

    def __init__(self, rows, candidates):
        self._rows = rows
        self._candidates = candidates

    def __getitem__(self, index):
        if index is not self._candidates:
            raise TypeError("other rows than those of the candidates are read")

        return self._rows


def is_narrow(table: Any, num_tokens: int) -> bool:
    """Whether a table may be one of rows by token of the draft vocabulary."""
    return jnp.ndim(table) > 0 and jnp.shape(table)[0] == num_tokens


def narrowed(params: Params, candidates, num_tokens: int) -> Params:
    """Parameters with the candidates' rows alone, of tables by token."""
    take = lambda x: x[candidates] if is_narrow(x, num_tokens) else x
    return jax.tree.map(take, params)


def as_read(narrow: Params, params: Params, candidates, num_tokens: int) -> Params:
    """Narrowed parameters in the place of whole ones, to be read by a draft."""

    def stand_in(rows, whole):
        return _Rows(rows, candidates) if is_narrow(whole, num_tokens) else rows

    return jax.tree.map(stand_in, narrow, params)


def widened(narrow: Params, params: Params, candidates, num_tokens: int) -> Params:
    """A gradient of all parameters from that of narrowed ones."""

    def put(rows, whole):
        if not is_narrow(whole, num_tokens):
            return rows
        return jnp.zeros_like(whole).at[candidates].set(rows)

    return jax.tree.map(put, narrow, params)


def rows_of(head: dict, entries) -> dict:
    """Rows of a head by their tokens, in its own storage; None are all."""
    if entries is None:
        return head

    return {name: rows[entries] for name, rows in head.items()}


def num_tokens_of(shared: SharedTables, token_ids) -> int:
    """Of the draft vocabulary."""
    if token_ids is not None:
        return token_ids.shape[0]

    return next(iter(shared.head.values())).shape[0]
