# SPDX-License-Identifier: Apache-2.0
"""How many requests a device holds at once, by the length of their contexts.

    python tools/largest_batch.py --target llama-3.1-8b --draft eagle3

Counted from the shapes of what a step takes: the target, the draft, and the caches and
all else of each row. Nothing is compiled or run. A tenth of the memory is left for what
a step makes and for the allocator; `ospec lower --compile` says what a compiled step
takes on top (1% of its arguments for the shapes that were tried).
"""

import dataclasses
import functools

import jax
import numpy as np
import tyro

from ospec_jax.config import Precision, TreeConfig
from ospec_jax.decoding.compiling import CHIPS
from ospec_jax.decoding.lowering import LoweringConfig, decoding_functions
from ospec_jax.drafters.registry import public_draft_config
from ospec_jax.models.architectures import ARCHITECTURES
from ospec_jax.sharding import abstract_mesh

_SHARE = 0.9
_MEMORY = {chip.name: chip.memory for chip in CHIPS.values()} | {
    "L4": 24 << 30,
    "A100 40 GB": 40 << 30,
    "H100 80 GB": 80 << 30,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is counted.

    Attributes:
      target: A shape of `ospec_jax.models.architectures`.
      draft: A trained family, as large as public heads of it are.
      draft_vocab_size: Tokens that it can draft, if it has a head of its own.
      depth: Drafted tokens, K.
      precision: Of weights and products.
      devices: Each row of the table is for so many of a kind, the model split over
        them.
      capacities: Cache slots of a request.
    """

    target: str = "llama-3.1-8b"
    draft: str = "eagle3"
    draft_vocab_size: int = 32000
    depth: int = 3
    precision: Precision = "bfloat16"
    devices: tuple[int, ...] = (1, 4)
    capacities: tuple[int, ...] = (2048, 8192, 32768)


@functools.cache
def argument_bytes(
    settings: Settings, capacity: int, batch_size: int, num_devices: int
) -> int:
    """What one device must hold of a speculative step's arguments."""
    model = ARCHITECTURES[settings.target]
    size = settings.draft_vocab_size
    head = public_draft_config(model, settings.draft, settings.depth, size)
    config = LoweringConfig(
        TreeConfig(num_steps=settings.depth),
        settings.precision,
        batch_size,
        capacity,
        is_scanned=False,
        mesh=abstract_mesh(f"model={num_devices}") if num_devices > 1 else None,
    )
    functions = decoding_functions(model, head, config, settings.draft)
    _, arguments = functions["speculative_step"]
    return sum(map(_held, jax.tree.leaves(arguments)))


def _held(x) -> int:
    """Bytes of an array that lie on one device."""
    where = getattr(x, "sharding", None)
    shape = x.shape if where is None else where.shard_shape(x.shape)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return int(np.prod(shape)) * 8

    return int(np.prod(shape)) * x.dtype.itemsize


def largest_batch(
    settings: Settings, memory: float, capacity: int, num_devices: int
) -> int:
    """Requests that fit; 0 if not even the models do."""
    one, two = (argument_bytes(settings, capacity, n, num_devices) for n in (1, 2))
    room = _SHARE * memory - (one - (two - one))
    return max(0, int(room // (two - one)))


def main(settings: Settings) -> None:
    """Prints the table."""
    slots = " | ".join(f"{capacity:,} slots" for capacity in settings.capacities)
    print(f"| devices | {slots} |\n|---|{'---|' * len(settings.capacities)}")

    for name, memory in _MEMORY.items():
        for count in settings.devices:
            found = [
                str(largest_batch(settings, memory, capacity, count) or "-")
                for capacity in settings.capacities
            ]
            print(f"| {count} x {name} | {' | '.join(found)} |")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
