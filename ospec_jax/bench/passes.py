# SPDX-License-Identifier: Apache-2.0
"""What single passes cost: for predicted speed-ups and for the roofline."""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.decoding.batch import fetch
from ospec_jax.decoding.timing import time_steps
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import Target
from ospec_jax.models.layers import linear
from ospec_jax.models.quantization import cast_leaf
from ospec_jax.session import Session

_FEWEST_ROUNDS = 5
_ENOUGH_SECONDS = 10.0
_PROBE_BYTES = 1 << 28
_PROBE_FEATURES = 2048


@dataclasses.dataclass(frozen=True)
class PassSeconds:
    """What single passes of a mode take, alone.

    Attributes:
      prefill: One chunk of a prompt.
      step: One step of decoding.
    """

    prefill: float
    step: float


def _rounds(most: int) -> Iterator[int]:
    """Rounds to measure in: fewer where they take long, whose noise is less."""
    start = time.perf_counter()
    for number in range(most):
        is_long = time.perf_counter() - start > _ENOUGH_SECONDS
        if number >= _FEWEST_ROUNDS and is_long:
            return
        yield number


def measure_passes(
    sessions: dict[str, Session], num_rounds: int = 16
) -> dict[str, PassSeconds]:
    """Times the passes of each session on a single request.

    They take turns, on a cache of its usual filling; medians count. Steps are timed as
    the engine runs them, the next one sent before the last is read.
    """
    runs = {}
    times = {name: ([], []) for name in sessions}

    for _ in _rounds(num_rounds):
        for name, session in sessions.items():
            engine = session.engine
            draft = session.served_draft
            request = session.probe_request()
            start = time.perf_counter()
            state, output = engine.prefill(
                draft, request, engine.capacity_for([request])
            )
            fetch(output)
            times[name][0].append(time.perf_counter() - start)
            runs.setdefault(name, state)

    for _ in _rounds(num_rounds):
        for name, session in sessions.items():
            engine = session.engine
            step = functools.partial(
                engine.step, engine.action, "greedy", session.served_draft
            )
            seconds, runs[name] = time_steps(step, runs[name])
            times[name][1].append(seconds)

    return {
        name: PassSeconds(*(statistics.median(seconds[2:]) for seconds in pair))
        for name, pair in times.items()
    }


def measure_verification(
    sessions: dict[str, Session],
    capacity: int = 256,
    num_rounds: int = 16,
    num_passes: int = 8,
) -> dict[str, float]:
    """Seconds of the target's pass over each session's nodes, logits included.

    What a step takes beyond it is drafting, and the little that accepting takes. As
    steps are, passes are sent ahead, so that no dispatch is counted.
    """
    nodes = {name: session.tree.num_nodes for name, session in sessions.items()}
    target = next(iter(sessions.values())).target
    run, cache = _target_pass(target, capacity)
    times = {count: [] for count in nodes.values()}

    for _ in _rounds(num_rounds):
        for count, found in times.items():
            tokens = jnp.ones((1, count), jnp.int32)
            start = time.perf_counter()
            passes = [run(target.params, tokens, cache) for _ in range(num_passes)]
            jax.block_until_ready(passes)
            found.append((time.perf_counter() - start) / num_passes)

    medians = {count: statistics.median(found[2:]) for count, found in times.items()}

    return {name: medians[count] for name, count in nodes.items()}


def _target_pass(target: Target, capacity: int) -> tuple[Callable, kv.KVCache]:
    """A pass over tokens at the end of a full cache, compiled by their number."""
    config = target.config
    forward = llama.build(config, target.numerics)

    @jax.jit
    def run(params, tokens, cache):
        starts = jnp.full(1, capacity - tokens.shape[1], jnp.int32)
        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        bias = kv.causal_bias(starts, tokens.shape[1], capacity)
        hidden, _, _ = forward(params, tokens, positions, bias, cache, starts)
        return llama.target_logits(params, hidden, target.numerics)

    cache = llama.init_cache(config, target.numerics, 1, capacity)
    return run, cache


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine can do at best.

    Attributes:
      bytes_per_second: Reading memory, with all cores.
      operations_per_second: Multiplications and additions of the target's products.
    """

    bytes_per_second: float
    operations_per_second: float


@dataclasses.dataclass(frozen=True)
class PassCost:
    """A target pass over some rows, against what the machine could do.

    Attributes:
      num_bytes: Weights and cache, read once.
      num_operations: Multiplications and additions of the products.
      bound: Seconds that the slower of memory and arithmetic needs at best.
      seconds: Measured.
    """

    num_rows: int
    num_bytes: int
    num_operations: int
    bound: float
    seconds: float

    @property
    def fraction(self) -> float:
        """Of the bound that was reached; 1 is perfect."""
        return self.bound / self.seconds


def _best_seconds(function: Callable[[], Any], num_rounds: int = 6) -> float:
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)

    return min(times[1:])


def measure_machine(target: Target) -> Machine:
    """Measures memory by folding a large array, arithmetic by a large product."""
    parts = np.array_split(np.ones(_PROBE_BYTES // 8, np.int64), 16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = lambda: list(pool.map(np.bitwise_xor.reduce, parts))
        bytes_per_second = _PROBE_BYTES / _best_seconds(read)

    rng = np.random.default_rng(0)
    n = _PROBE_FEATURES
    params = cast_leaf("kernel", rng.normal(size=(n, n)), target.numerics.precision)
    x = jnp.asarray(rng.normal(size=(512, n)), jnp.float32)
    multiply = jax.jit(lambda x: linear(x, params, target.numerics))
    operations_per_second = 2 * 512 * n * n / _best_seconds(lambda: multiply(x))

    return Machine(bytes_per_second, operations_per_second)


def _multiplied(target: Target) -> list[jax.Array]:
    """All kernels that a pass multiplies with, of single layers or stacked."""
    looked_up = None if target.config.tie_embeddings else "embed_tokens_kernel"
    leaves = jax.tree_util.tree_leaves_with_path(target.params)
    return [
        leaf
        for path, leaf in leaves
        if path[-1].key.endswith("kernel") and path[-1].key != looked_up
    ]


def roofline(
    target: Target,
    machine: Machine,
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    capacity: int = 256,
) -> list[PassCost]:
    """Times passes of the target over so many rows, logits included."""
    run, cache = _target_pass(target, capacity)
    kernels = _multiplied(target)
    num_bytes = sum(x.nbytes for x in [*kernels, *jax.tree.leaves(cache)])
    costs = []

    for num_rows in rows:
        tokens = jnp.ones((1, num_rows), jnp.int32)
        seconds = _best_seconds(lambda t=tokens: run(target.params, t, cache), 12)
        num_operations = 2 * num_rows * sum(x.size for x in kernels)
        bound = max(
            num_bytes / machine.bytes_per_second,
            num_operations / machine.operations_per_second,
        )
        costs.append(PassCost(num_rows, num_bytes, num_operations, bound, seconds))

    return costs
