# SPDX-License-Identifier: Apache-2.0
"""What every member of a pool would draft from here, with nothing verified."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ospec_jax.decoding.step import StepConfig, propose_tree, shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.pool import bring_first
from ospec_jax.types import DecodeState, Draft
from ospec_jax.typing import Params

NO_TOKEN = -1


def build_proposals(config: StepConfig, drafters: tuple[Drafter, ...]) -> Callable:
    """Builds `(target_params, draft, state) -> tokens [b, n, k]`, to be jitted.

    The chain of each of the `n` members, -1 where it drafts no further. The state stays
    as it is.

    Args:
      config: Of chains of `topk` children.
      drafters: The pool, by the number of the member that proposes.
    """

    def propose(target_params: Params, draft: Draft, state: DecodeState):
        shared = shared_tables(target_params)
        chains = []

        for number, drafter in enumerate(drafters):
            if drafter.reads_target:
                shared = shared.replace(params=target_params, cache=state.cache)
            # The most probable children are no draws: any keys will do.
            tree, _ = propose_tree(
                config,
                drafter,
                bring_first(draft, number),
                shared,
                bring_first(state, number),
                state.request_keys,
            )
            # A chain ends at its first node that is none.
            is_valid = jnp.cumprod(tree.is_valid[:, 1:], axis=1).astype(bool)
            chains.append(jnp.where(is_valid, tree.tokens[:, 1:], NO_TOKEN))

        return jnp.stack(chains, axis=1)

    return jax.jit(propose)
