# SPDX-License-Identifier: Apache-2.0
"""What XLA:TPU is told when it compiles steps.

Left to itself it fetches whole caches onto the chip before a step's few entries are
written to them, and then writes whole caches back: at 32 rows a sixth of all bytes that
a step of Llama-3.1-8B moves over four v5e. Without such write-backs ("evictions") the
entries are written where the caches lie.
"""

import functools

import jax
import jax.numpy as jnp

OPTIONS = {"xla_msa_max_outstanding_evictions": "0"}


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """`OPTIONS` on a TPU whose compiler knows them, else None."""
    if jax.default_backend() != "tpu":
        return None

    # A compiler that does not know an option refuses it, and would refuse each step.
    trial = jax.jit(lambda x: x + 1, compiler_options=dict(OPTIONS))
    try:
        trial.lower(jnp.zeros(8)).compile()
    except Exception:
        return None

    return dict(OPTIONS)
