# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced passes of the target, cut at will: to tell a tie from an error."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.decoding.engine import CAPACITIES
from ospec_jax.decoding.step import StepConfig
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.typing import Params


def teacher_forced_logits(
    config: StepConfig, target_params: Params, token_ids: Sequence[int], num_rows: int
) -> np.ndarray:
    """Logits `[v]` after the last of `token_ids`.

    Args:
      num_rows: Tokens of the last pass; those before it are run in one pass.
    """
    c = config.model
    numerics = config.numerics
    target = llama.build(c, numerics)
    # The caches that decoding is compiled for, so that products have the shapes it
    # uses.
    capacity = next(size for size in CAPACITIES if size > len(token_ids) + 1)
    cache = llama.init_cache(c, numerics, 1, capacity)

    @jax.jit
    def run(params, tokens, start, cache):
        starts = start[None]
        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        bias = kv.causal_bias(starts, tokens.shape[1], capacity)
        hidden, _, cache = target(params, tokens, positions, bias, cache, starts)
        return llama.target_logits(params, hidden[:, -1:], numerics)[0, 0], cache

    ids = np.asarray(token_ids, np.int32)[None]
    cut = ids.shape[1] - num_rows
    logits = None

    # All but the last rows first: what they write to the cache is what the last ones
    # read.
    for start, stop in ((0, cut), (cut, ids.shape[1])):
        if stop > start:
            logits, cache = run(
                target_params, ids[:, start:stop], np.int32(start), cache
            )

    return np.asarray(logits)


def is_tie(config: StepConfig, target_params: Params, prefix: Sequence[int]) -> bool:
    """Whether the token after `prefix` is too close to call between two passes.

    It is when the plain path's two best logits lie no further apart than twice the
    largest difference between a pass of one row and one of several.
    """
    # The passes differ in their number of rows alone, as a plain step and a
    # verification do: their difference is what rounding does to logits here.
    single = teacher_forced_logits(config, target_params, prefix, 1)
    several = teacher_forced_logits(config, target_params, prefix, min(8, len(prefix)))
    second, best = np.partition(single, -2)[-2:]
    return bool(best - second <= 2 * np.max(np.abs(single - several)))
