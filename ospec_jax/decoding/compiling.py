# SPDX-License-Identifier: Apache-2.0
"""Decoding functions compiled by the TPU's own compiler, on a machine without a TPU.

`libtpu` compiles for a topology that is only described. What comes out is the program
that the devices would run: its memory is a fact, and so is what it moves. How long it
takes is not: the figures here are bounds, by a chip's published bandwidth and
arithmetic. Nothing is run.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ospec_jax import sharding
from ospec_jax.config import ConfigError, DraftConfig, ModelConfig, TreeConfig
from ospec_jax.decoding import traffic
from ospec_jax.decoding.lowering import LoweringConfig, decoding_functions
from ospec_jax.models.architectures import with_layers
from ospec_jax.models.tpu_options import OPTIONS

_STATE = 2
"""Which argument is donated, as engines do it."""
_ENVIRONMENT = {
    # Without these libtpu asks a cloud's metadata server which devices there are.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # There is no device that two processes could quarrel over.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has, by its maker's tables.

    Attributes:
      memory: Bytes.
      bandwidth: Of that memory, bytes a second.
      bfloat16: Operations a second; `int8` likewise.
    """

    name: str
    memory: int
    bandwidth: float
    bfloat16: float
    int8: float


CHIPS = {
    "TPU v4": Chip("v4", 32 << 30, 1228e9, 275e12, 275e12),
    "TPU v5 lite": Chip("v5e", 16 << 30, 819e9, 197e12, 394e12),
    "TPU v5": Chip("v5p", 95 << 30, 2765e9, 459e12, 918e12),
    "TPU v6 lite": Chip("v6e", 32 << 30, 1640e9, 918e12, 1836e12),
}
"""By the name that a device gives; cloud.google.com/tpu/docs has the figures."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of one function, for one device.

    Attributes:
      arguments: Bytes in the device's memory; `outputs`, `temporaries` and `code`
        likewise. `aliased` are those outputs that are arguments, written in place.
      flops: As the compiler counts them: a loop's body once.
      compiler_bytes: `bytes accessed`; see `traffic` for what is wrong with it.
      moved: Bytes through the device's memory, by our own account.
      needed: Bytes of those arguments that are read, each once: what nothing that
        computes the same can do without. Looked-up tables count as what is taken.
      reread: Bytes of arguments that are read again.
      written_back: Bytes written to arguments.
      temporary_traffic: Bytes of what is neither argument nor on the chip.
      cycles: The compiler's estimate for operations that carry one.
      loops: How many there are, and of how many the turns are not known.
      collectives: Number and bytes of each kind.
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    code: float
    flops: float
    compiler_bytes: float
    moved: float
    needed: float
    reread: float
    written_back: float
    temporary_traffic: float
    cycles: float
    loops: float
    unknown_loops: float
    collectives: Mapping[str, tuple[float, float]]

    @property
    def memory(self) -> float:
        """Bytes that a device must have."""
        new = self.outputs - self.aliased
        return self.arguments + new + self.temporaries + self.code

    def seconds(self, chip: Chip, is_int8: bool = False) -> tuple[float, str]:
        """The least time that a run can take, and what sets it."""
        times = {
            "bandwidth": self.moved / chip.bandwidth,
            "arithmetic": self.flops / (chip.int8 if is_int8 else chip.bfloat16),
        }
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit

    def as_data(self, chip: Chip, is_int8: bool = False) -> dict[str, Any]:
        """For JSON: all figures, in bytes and seconds, and what follows from them."""
        seconds, limit = self.seconds(chip, is_int8)
        return dataclasses.asdict(self) | {
            "memory": self.memory,
            "fits": self.memory <= chip.memory,
            "moved_over_arguments": self.moved / self.arguments,
            "moved_over_needed": self.moved / self.needed,
            "compiler_bytes_over_arguments": self.compiler_bytes / self.arguments,
            "bound_seconds": seconds,
            "bound_by": limit,
        }


def check_compiler() -> None:
    """Refuses to go on without the compiler.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu, the TPU's compiler, is not installed; install it with "
            "pip install 'ospec-jax[tpu-compile]'"
        )


def versions() -> dict[str, str]:
    """Of what compiled."""
    names = ("jax", "jaxlib", "libtpu")
    return {name: importlib.metadata.version(name) for name in names}


def described_mesh(topology: str, mesh: str = "") -> tuple[Mesh, Chip]:
    """Devices that are only described, and what each of them has.

    Args:
      topology: Like `v5e:2x2`, `v6e:2x2` or `v5p:2x2x1`.
      mesh: Like `data=2,model=2`; empty for a single device of them.

    Raises:
      ConfigError: There is no compiler, or no such topology, or it is too small.
    """
    check_compiler()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Nothing is run, and no TPU must be looked for.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    # jaxlib raises its own kind, of which there are several.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot compile for the topology {topology!r} ({reason}); use one like "
            f"v5e:2x2, v6e:2x2 or v5p:2x2x1"
        ) from error

    sizes = sharding.abstract_mesh(mesh).axis_sizes if mesh else (1, 1)
    count = int(np.prod(sizes))
    devices = described.devices
    if count > len(devices):
        raise ConfigError(
            f"the mesh {mesh} takes {count} devices, but the topology {topology} has "
            f"{len(devices)}; use a larger one"
        )

    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(
            f"nothing is known of the memory and bandwidth of {kind!r}; use a topology "
            f"of {', '.join(chip.name for chip in CHIPS.values())}"
        )

    types = sharding.abstract_mesh("data=1").axis_types
    grid = np.array(devices[:count]).reshape(sizes)

    return Mesh(grid, sharding.AXES, axis_types=types), CHIPS[kind]


def compile_programs(
    model: ModelConfig,
    draft: DraftConfig | None,
    config: LoweringConfig,
    depths: Sequence[int] = (3,),
    family: str = "eagle3",
) -> dict[str, Program]:
    """`prefill`, `plain_step`, and `speculative_step K` for each of the depths.

    Args:
      config: With a mesh of `described_mesh`. Its tree is that of the speculative
        steps, as deep as each of `depths`.

    Raises:
      ConfigError: The mesh does not divide the batch or a model.
    """
    assert isinstance(config.mesh, Mesh)
    programs = {}

    for depth in depths if draft is not None else (0,):
        tree = dataclasses.replace(config.tree, num_steps=depth)
        if draft is None:
            tree = TreeConfig(num_steps=0)
        each = dataclasses.replace(config, tree=tree)
        functions = decoding_functions(model, draft, each, family)
        for name, (function, args) in functions.items():
            title = f"{name} {depth}" if name == "speculative_step" else name
            if title not in programs:
                programs[title] = _compile(function, args, config.mesh)

    return programs


def _compile(function, args: tuple, mesh: Mesh) -> Program:
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding or everywhere
    )
    jitted = jax.jit(function, donate_argnums=_STATE)
    traced = jitted.trace(*jax.tree.map(place, args))
    # What the cache of programs would keep can be run by no device here.
    with _no_cache():
        lowered = traced.lower(lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile(compiler_options=dict(OPTIONS))
        # As on a TPU, a compiler that does not know an option is not told.
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            compiled = lowered.compile()

    return figures_of(compiled)


@contextlib.contextmanager
def _no_cache():
    was_enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_enabled)


def figures_of(compiled) -> Program:
    """Reads the figures of a compiled program, and of its text."""
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis()
    moves = traffic.account(compiled.as_text())
    by_argument = moves.by_argument()
    temporary = by_argument.pop("", (0, 0))
    sizes = moves.arguments
    reads = {name: read for name, (read, _) in by_argument.items()}
    # Small tables that are read in a loop may be read more than once: once is needed.
    needed = sum(min(read, sizes[name]) for name, read in reads.items())

    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=costs.get("flops", 0.0),
        compiler_bytes=costs.get("bytes accessed", 0.0),
        moved=moves.total,
        needed=needed,
        reread=sum(reads.values()) - needed,
        written_back=sum(written for _, written in by_argument.values()),
        temporary_traffic=sum(temporary),
        cycles=sum(moves.cycles.values()),
        loops=moves.num_loops,
        unknown_loops=moves.num_unknown_loops,
        collectives=moves.collectives,
    )


def extrapolate(few: Program, more: Program, layers: tuple[int, int, int]) -> Program:
    """A program of many layers by two of few: each figure grows by the layer.

    Args:
      layers: Of the first, of the second, and of what is asked for.
    """
    first, second, asked = layers
    share = (asked - first) / (second - first)
    line = lambda a, b: a + (b - a) * share
    values = {}

    for field in dataclasses.fields(Program):
        a = getattr(few, field.name)
        b = getattr(more, field.name)
        if field.name != "collectives":
            values[field.name] = line(a, b)
            continue

        nothing = (0, 0)
        values[field.name] = {
            kind: tuple(
                line(x, y)
                for x, y in zip(a.get(kind, nothing), b.get(kind, nothing), strict=True)
            )
            for kind in {**a, **b}
        }

    return Program(**values)


def compile_by_layers(
    model: ModelConfig,
    draft: DraftConfig | None,
    config: LoweringConfig,
    layers: tuple[int, int],
    depths: Sequence[int] = (3,),
    family: str = "eagle3",
) -> dict[str, Program]:
    """`compile_programs` of two short models, drawn out to all layers of the model."""
    short = [
        compile_programs(
            with_layers(model, count),
            _with_fitting_taps(draft, count),
            config,
            depths,
            family,
        )
        for count in layers
    ]
    asked = (*layers, model.num_layers)
    few, more = short

    return {name: extrapolate(few[name], more[name], asked) for name in few}


def _with_fitting_taps(draft: DraftConfig | None, num_layers: int):
    """A draft that reads as many layers, of those that there are."""
    if draft is None:
        return None

    fitting = tuple(min(tap, num_layers) for tap in draft.taps)
    return dataclasses.replace(draft, taps=fitting)


def predict_speed_ups(
    programs: Mapping[str, Program],
    chip: Chip,
    lengths: Sequence[float],
    is_int8: bool = False,
) -> dict[str, dict[str, float]]:
    """How much faster than plain steps, by depth and mean acceptance length.

    By the bounds of both steps; lengths that a depth cannot reach are left out.
    """
    plain, _ = programs["plain_step"].seconds(chip, is_int8)
    found = {}

    for name, program in programs.items():
        if not name.startswith("speculative_step"):
            continue
        depth = int(name.split()[1])
        seconds, _ = program.seconds(chip, is_int8)
        found[name] = {
            f"{length:g}": length * plain / seconds
            for length in lengths
            if length <= depth + 1
        }

    return found
