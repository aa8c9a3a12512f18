# SPDX-License-Identifier: Apache-2.0
"""The inverse of a positive definite matrix, without LAPACK.

XLA:CPU hands decompositions to the LAPACK that SciPy brings, whose threads wait by
spinning: beside other work a Cholesky inverse of 576 x 576 took up to a second on two
cores. Products are XLA's own. Of these the inverse below consists, but for small
blocks.

It goes by the inverse of the Cholesky factor, as LAPACK does. Half by half with the
inverses of the blocks themselves would be as short, and is not to be done: of moments
with a condition of some thousands nothing was right of what came out in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.typing import typed

_SMALL = 72
"""Width of the blocks that are eliminated row by row; a model's width is a multiple."""


@typed
def inverse(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Inverts a symmetric, positive definite matrix."""
    factor = _inverse_factor(matrix)
    return factor.T @ factor


def _inverse_factor(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """L^-1, where the matrix is L L'; lower triangular.

    By halves: with W the inverse factor of the first diagonal block and B the block
    below that, the factor has M = B W' there, and then that of C - M M', C being the
    last block.
    """
    width = matrix.shape[0]
    if width <= _SMALL:
        return _eliminated(matrix)

    half = width // 2
    first = _inverse_factor(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T
    last = _inverse_factor(matrix[half:, half:] - below @ below.T)
    corner = -last @ (below @ first)
    nothing = jnp.zeros((half, width - half), matrix.dtype)

    return jnp.block([[first, nothing], [corner, last]])


def _eliminated(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """L^-1 by elimination; positive definite pivots need no exchange."""
    rows = jnp.arange(matrix.shape[0])

    def eliminate(k, state):
        matrix, found = state
        # Row k is taken off all rows below it; the same operations on the identity give
        # the inverse of L, once row k is divided by the root of its pivot.
        pivot = matrix[k, k]
        share = jnp.where(rows > k, matrix[:, k] / pivot, 0.0)[:, None]
        scaled = found.at[k].multiply(jax.lax.rsqrt(pivot))
        return matrix - share * matrix[k], scaled - share * found[k]

    start = matrix, jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jax.lax.fori_loop(0, matrix.shape[0], eliminate, start)[1]
