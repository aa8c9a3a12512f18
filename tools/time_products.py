# SPDX-License-Identifier: Apache-2.0
"""Times the int8 products of a target's pass, and whole passes, by their rows.

    python tools/time_products.py --rows 1 2 4 6 8 16

*Products* are all products of some layers, one after the other, with nothing between
them; what the layers take beyond that is spent between products. Numbers of rows take
turns in short bursts, and the fastest of all runs counts: beside other work the mean
says what the others do. So compare ratios of one run, never seconds of two.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ospec_jax.bench.passes import measure_machine
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import Target, load_target
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.reports.progress import say


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      target: As for `ospec generate`; it is loaded in int8.
      rows: Numbers of rows, of which the first is what the others are compared with.
      num_layers: Layers of a pass. Few of them take less time than others' share of a
        busy core lasts, so that some run is not interrupted.
      capacity: Slots of the cache that a whole pass reads.
      num_rounds: Bursts of each number of rows.
      num_runs: Runs in a burst.
    """

    target: str = "smollm2-135m"
    rows: tuple[int, ...] = tuple(range(1, 17))
    num_layers: int = 6
    capacity: int = 256
    num_rounds: int = 60
    num_runs: int = 4


def layers_of(target: Target, num_layers: int) -> list[dict]:
    """The four projections of each of the first layers, in their order."""
    layers = [llama.layer_params(target.params, i) for i in range(num_layers)]
    return [
        {
            "qkv": layer["self_attn"]["qkv_proj"],
            "o": layer["self_attn"]["o_proj"],
            "gate_up": layer["mlp"]["gate_up_proj"],
            "down": layer["mlp"]["down_proj"],
        }
        for layer in layers
    ]


@functools.partial(jax.jit, static_argnums=(3, 4))
def products(x, layers, head, names: tuple[str, ...], numerics: Numerics):
    """Products in a chain: each reads what the one before it gave.

    Args:
      x: `[rows, d]` float32.
      head: The output projection, or None to leave it out.
    """
    fit = lambda y, columns: jnp.resize(y[:, :columns], (len(y), columns))
    for layer in layers:
        for name in names:
            x = linear(fit(x, layer[name]["kernel"].shape[1]), layer[name], numerics)

    return (
        x if head is None else linear(fit(x, head["kernel"].shape[1]), head, numerics)
    )


def layers_pass(target: Target, num_layers: int, capacity: int) -> Callable:
    """`tokens [1, t] -> hidden states`, at the end of a cache written in place."""
    config = dataclasses.replace(target.config, num_layers=num_layers)
    forward = llama.build(config, target.numerics, is_truncated=True)

    @functools.partial(jax.jit, donate_argnums=2)
    def run(params, tokens, cache):
        starts = jnp.full(1, capacity - 16 - tokens.shape[1], jnp.int32)
        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        bias = kv.causal_bias(starts, tokens.shape[1], capacity)
        hidden, _, cache = forward(params, tokens, positions, bias, cache, starts)
        return hidden, cache

    cache = llama.init_cache(config, target.numerics, 1, capacity)
    held = [cache]

    def call(tokens):
        hidden, held[0] = run(target.params, tokens, held[0])
        return hidden

    return call


def fastest(
    runs: dict[Any, Callable[[], Any]], num_rounds: int, num_runs: int
) -> dict[Any, float]:
    """Seconds of the fastest run of each, in bursts that take turns."""
    for run in runs.values():
        jax.block_until_ready(run())

    best = dict.fromkeys(runs, float("inf"))
    for _ in range(num_rounds):
        for key, run in runs.items():
            for _ in range(num_runs):
                start = time.perf_counter()
                jax.block_until_ready(run())
                best[key] = min(best[key], time.perf_counter() - start)

    return best


def table(times: dict[str, dict[int, float]], rows: Sequence[int]) -> str:
    """Milliseconds, and in brackets relative to the first number of rows."""
    lines = [
        f"| rows | {' | '.join(times)} |",
        "|---" * (len(times) + 1) + "|",
    ]
    for row in rows:
        cells = [
            f"{1e3 * by_rows[row]:.2f} ({by_rows[row] / by_rows[rows[0]]:.2f})"
            for by_rows in times.values()
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")

    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Times and prints."""
    target = load_target(settings.target, "int8")
    num_layers = min(settings.num_layers, target.config.num_layers)
    layers = layers_of(target, num_layers)
    head = llama.head_table(target.params)
    width = target.config.hidden_size
    rng = np.random.default_rng(0)
    inputs = {
        n: jnp.asarray(rng.normal(size=(n, width)), jnp.float32) for n in settings.rows
    }
    parts = {name: ((name,), None) for name in layers[0]}
    parts |= {"head": ((), head), "products": (tuple(layers[0]), None)}
    times = {}

    for name, (names, table_) in parts.items():
        run = lambda x, names=names, table_=table_: products(
            x, layers, table_, names, target.numerics
        )
        runs = {n: functools.partial(run, x) for n, x in inputs.items()}
        times[name] = fastest(runs, settings.num_rounds, settings.num_runs)

    run = layers_pass(target, num_layers, settings.capacity)
    runs = {
        n: functools.partial(run, jnp.ones((1, n), jnp.int32)) for n in settings.rows
    }
    times["layers"] = fastest(runs, settings.num_rounds, settings.num_runs)
    say(f"milliseconds of {num_layers} layers, and of the head")
    say(table(times, settings.rows))
    machine = measure_machine(target)
    num_bytes = sum(layer[name]["kernel"].nbytes for layer in layers for name in layer)
    say(
        f"memory: {machine.bytes_per_second / 1e9:.1f} GB/s reads the "
        f"{num_bytes / 1e6:.1f} MB of these layers in "
        f"{1e3 * num_bytes / machine.bytes_per_second:.2f} ms"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
