# SPDX-License-Identifier: Apache-2.0
"""Differences of low rank that scopes' own drafts have from the one that all share.

How they are learned says `learners.deltas`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.types import Deltas, RowDeltas


def no_rows(batch_size: int, rank: int, width: int, num_tokens: int) -> RowDeltas:
    """Rows whose draft is the shared one."""
    return RowDeltas(
        directions=jnp.zeros((batch_size, rank, width)),
        shifts=jnp.zeros((batch_size, rank, num_tokens)),
    )


def rows_of(deltas: Deltas, scopes: Int[Array, " b"]) -> RowDeltas:
    """The differences that rows of these scopes draft with."""
    is_own = (deltas.owners == scopes[:, None]) & (scopes[:, None] > 0)
    places = jnp.argmax(is_own, axis=1)
    is_helpful = jnp.any(is_own, axis=1) & (deltas.leads[places] > 0)
    shifts = jnp.where(is_helpful[:, None, None], deltas.shifts[places], 0.0)

    return RowDeltas(deltas.directions[places], shifts)


def add_rows(
    deltas: RowDeltas, inputs: Float[Array, "b t e"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t q"]:
    """Logits with each row's difference."""
    # Sums, not products of matrices: those may round differently over one token than
    # over several, and a token's logits shall be the same whatever is run beside it.
    along = jnp.sum(inputs[:, :, None] * deltas.directions[:, None], axis=-1)
    return logits + jnp.sum(along[..., None] * deltas.shifts[:, None], axis=2)
