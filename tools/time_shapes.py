# SPDX-License-Identifier: Apache-2.0
"""Times steps of models whose weights are not here: drawn at random, of their shapes.

    python tools/time_shapes.py --target llama-3.1-8b --draft eagle3 --depths 0 3 7

What a step takes does not depend on what the weights say. So on any device the cost of
drafting and verifying is known by depth and number of rows, and with it which mean
acceptance length pays, before a weight is downloaded. Kinds of steps take turns, the
next step is always sent before the last is read, and the fastest turn counts.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from ospec_jax._platform import device_name
from ospec_jax.config import (
    AttentionKind,
    ConfigError,
    ModelConfig,
    Precision,
    TreeConfig,
)
from ospec_jax.decoding.batch import fetch
from ospec_jax.decoding.step import StepConfig, build_step, empty_state
from ospec_jax.decoding.timing import seconds_of_steps
from ospec_jax.drafters.ngram import init_memory
from ospec_jax.drafters.registry import (
    TRAINED,
    build_drafter,
    public_draft_config,
)
from ospec_jax.models.architectures import ARCHITECTURES, with_layers
from ospec_jax.models.layers import Numerics
from ospec_jax.models.llama import init_params, stack_layers
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.tpu_options import compiler_options
from ospec_jax.reports.progress import say
from ospec_jax.types import Draft

_COPIED = 1 << 30
"""Bytes of the array whose copying measures the memory's speed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      target: A shape of `ospec_jax.models.architectures`.
      draft: A trained family, as large as public heads of it are.
      draft_vocab_size: Tokens that it can draft, if it has a head of its own.
      depths: Drafted tokens, K; 0 is a plain step.
      batch_sizes: Rows.
      capacity: Slots of each row's cache; half of them are filled.
      precision: Of weights and products.
      num_layers: Of the target; all by default.
      is_scanned: Stack the layers.
      has_dear_launches: Write the caches of all rows at once; see `layers.Numerics`.
      attention: Who computes it; see `models.attention`.
      num_rounds: Turns of each kind.
      out: A JSON file of what was found.
    """

    target: str = "llama-3.1-8b"
    draft: str = "eagle3"
    draft_vocab_size: int = 32000
    depths: tuple[int, ...] = (0, 1, 3, 5, 7)
    batch_sizes: tuple[int, ...] = (1, 8)
    capacity: int = 2048
    precision: Precision = "bfloat16"
    num_layers: int = 0
    is_scanned: bool = False
    has_dear_launches: bool = jax.default_backend() == "gpu"
    attention: AttentionKind = "xla"
    num_rounds: int = 5
    out: Path | None = None


def copied_bytes_a_second() -> float:
    """What the device's memory gives, read and written bytes counted."""
    source = jnp.ones(_COPIED // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(source))
    least = float("inf")

    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([copy(source) for _ in range(4)])
        least = min(least, (time.perf_counter() - start) / 4)

    return 2 * _COPIED / least


def shape_of(settings: Settings) -> ModelConfig:
    """The target's."""
    if settings.target not in ARCHITECTURES:
        raise ConfigError(
            f"no shape {settings.target!r} is known; use {', '.join(ARCHITECTURES)}"
        )

    model = ARCHITECTURES[settings.target]
    return with_layers(model, settings.num_layers or model.num_layers)


def random_target(settings: Settings) -> Any:
    """A target's parameters, drawn where they will lie."""
    model = shape_of(settings)

    @jax.jit
    def make(key):
        params = cast_params(init_params(model, key), settings.precision)
        return stack_layers(params) if settings.is_scanned else params

    return make(jax.random.key(0))


def measure(
    settings: Settings,
    target_params: Any = None,
    say_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row for each number of rows and depth.

    Args:
      target_params: From `random_target`; by default drawn here.
      say_row: Called with each as soon as it is known.
    """
    model = shape_of(settings)
    if settings.draft not in TRAINED:
        raise ConfigError(
            f"the draft is {settings.draft!r}; use one of {', '.join(TRAINED)}"
        )

    deepest = max(1, *settings.depths)
    size = settings.draft_vocab_size
    head = public_draft_config(model, settings.draft, deepest, size)
    numerics = Numerics(
        settings.precision,
        is_row_invariant=False,
        is_scanned=settings.is_scanned,
        has_dear_launches=settings.has_dear_launches,
        attention=settings.attention,
    )
    if target_params is None:
        target_params = random_target(settings)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(target_params))
    found = []

    for batch_size in settings.batch_sizes:
        start = time.perf_counter()
        build = lambda depth: _drafter(settings, head, numerics, depth or deepest)
        drafters = {depth: build(depth) for depth in settings.depths}
        draft = _random_draft(build(0), head, settings.precision)
        config = StepConfig(model, numerics, TreeConfig(num_steps=0), taps=head.taps)
        state = _running(config, build(0), batch_size, settings.capacity)
        lowered = {}
        for depth, drafter in drafters.items():
            own = dataclasses.replace(config, tree=TreeConfig(num_steps=depth))
            step = jax.jit(
                build_step(own, drafter),
                donate_argnums=2,
                compiler_options=compiler_options(),
            )
            lowered[depth] = step.lower(target_params, draft, state)

        with ThreadPoolExecutor(len(lowered)) as pool:
            programs = pool.map(lambda one: one.compile(), lowered.values())
            compiled = dict(zip(lowered, programs, strict=True))

        say(f"{batch_size} rows: compiled in {time.perf_counter() - start:.0f} s")
        steps = {
            depth: functools.partial(program, target_params, draft)
            for depth, program in compiled.items()
        }
        least, state = seconds_of_steps(steps, state, settings.num_rounds)
        in_use = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        fetch(state.lengths)

        for depth, seconds in least.items():
            memory = compiled[depth].memory_analysis()
            row = {
                "target": settings.target,
                "precision": settings.precision,
                "is_scanned": settings.is_scanned,
                "batch_size": batch_size,
                "depth": depth,
                "milliseconds": seconds * 1e3,
                "plain_steps": seconds / least[0] if 0 in least else None,
                "target_bytes": num_bytes,
                "target_bytes_a_second": num_bytes / seconds,
                "argument_bytes": memory.argument_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "peak_bytes_in_use": in_use,
            }
            found.append(row)
            say_row(row)

    return found


def _drafter(settings: Settings, head, numerics: Numerics, depth: int):
    """What drafts a chain of so many tokens."""
    tree = TreeConfig(num_steps=depth)
    return build_drafter(settings.draft, head, tree, numerics, has_ngrams=True)


def _random_draft(drafter, head, precision: Precision) -> Draft:
    make = jax.jit(lambda key: cast_params(drafter.init_params(key), precision))
    ids = jnp.arange(head.draft_vocab_size, dtype=jnp.int32)
    return Draft(
        make(jax.random.key(1)), ids if head.has_own_head else None, init_memory(65536)
    )


def _running(config: StepConfig, drafter, batch_size: int, capacity: int):
    """A state whose rows are half filled, and go on."""
    state = empty_state(config, drafter, batch_size, capacity)
    filled = jnp.full((batch_size,), capacity // 2, jnp.int32)
    return state.replace(
        lengths=filled,
        num_remaining=filled - 1,
        is_finished=jnp.zeros((batch_size,), bool),
    )


def main(settings: Settings) -> None:
    """Measures, and says what came out."""
    speed = copied_bytes_a_second()
    say(f"{device_name()}: copies {speed / 1e9:.0f} GB/s, read and written")
    print("| rows | K | ms | plain steps | share of the memory's speed |")
    print("|---|---|---|---|---|")

    def say_row(row: dict[str, Any]) -> None:
        steps = row["plain_steps"]
        shown = "-" if steps is None else f"{steps:.2f}"
        share = row["target_bytes_a_second"] / speed
        print(
            f"| {row['batch_size']} | {row['depth']} | {row['milliseconds']:.2f} | "
            f"{shown} | {share:.0%} |",
            flush=True,
        )

    rows = measure(settings, say_row=say_row)
    if settings.out is not None:
        facts = {"device": device_name(), "copied_bytes_a_second": speed, "rows": rows}
        settings.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
