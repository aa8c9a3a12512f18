# SPDX-License-Identifier: Apache-2.0
"""The inverse of a positive definite matrix, without LAPACK.

XLA:CPU hands decompositions to the LAPACK that SciPy brings, whose threads wait by
spinning: beside other work a Cholesky inverse of 576 x 576 took up to a second on two
cores. Products are XLA's own. Of these the inverse below consists, but for small
blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.typing import typed

_SMALL = 72
"""Width of the blocks that are eliminated row by row; a model's width is a multiple."""


@typed
def inverse(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Inverts a symmetric, positive definite matrix.

    By halves: with A the first diagonal block, B beside it and S = C - B' A^-1 B the
    Schur complement of the last one, C, all of the inverse follows from those of A
    and S, which are positive definite, too.
    """
    width = matrix.shape[0]
    if width <= _SMALL:
        return _eliminated(matrix)

    half = width // 2
    beside = matrix[:half, half:]
    first = inverse(matrix[:half, :half])
    across = first @ beside
    last = inverse(matrix[half:, half:] - beside.T @ across)
    corner = -across @ last

    return jnp.block([[first - corner @ across.T, corner], [corner.T, last]])


def _eliminated(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Gauss-Jordan elimination in place; positive definite pivots need no exchange."""

    def eliminate(k, matrix):
        pivot = matrix[k, k]
        row = matrix[k] / pivot
        column = matrix[:, k]
        matrix = matrix - column[:, None] * row
        matrix = matrix.at[k].set(row).at[:, k].set(-column / pivot)
        return matrix.at[k, k].set(1 / pivot)

    return jax.lax.fori_loop(0, matrix.shape[0], eliminate, matrix)
