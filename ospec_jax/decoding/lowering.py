# SPDX-License-Identifier: Apache-2.0
"""The decoding functions as portable artefacts for accelerators, made on any machine.

`jax.export` lowers a function for platforms that are not there. What it writes is
StableHLO with the weights as inputs: it can be deserialised and called wherever JAX
runs on one of its platforms. That a function lowers also proves that it holds nothing
that only the CPU can do.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from ospec_jax import atomic, sharding
from ospec_jax.config import (
    AttentionKind,
    ConfigError,
    DraftConfig,
    ModelConfig,
    Precision,
    TreeConfig,
)
from ospec_jax.decoding.engine import PREFILL_CHUNK
from ospec_jax.decoding.step import StepConfig, build_prefill, build_step, empty_state
from ospec_jax.drafters.ngram import init_memory
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.models.layers import Numerics
from ospec_jax.models.llama import init_params, stack_layers
from ospec_jax.models.quantization import cast_params
from ospec_jax.types import Draft

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MEMORY_SLOTS = 65536
_CUDNN_ATTENTION = "__cudnn$fmhaScaleBiasSoftmax"
"""No stability is promised for this call: an artefact with it belongs to one jaxlib."""


@dataclasses.dataclass(frozen=True)
class LoweringConfig:
    """Shapes that the artefacts are specialised to.

    Attributes:
      precision: Of weights and products.
      capacity: Slots of each row's cache.
      stop_ids: Tokens that end an answer.
      is_scanned: Lower one layer, run over stacked weights, instead of each.
      attention: `cudnn` for CUDA alone, on a machine that has the library; `pallas`
        for TPUs alone, of layers that are not scanned.
      mesh: Devices to split over. The artefacts then take parameters whose fused
        products are grouped; see `sharding`.
    """

    tree: TreeConfig = TreeConfig(num_steps=3)
    precision: Precision = "bfloat16"
    batch_size: int = 1
    capacity: int = 1024
    stop_ids: tuple[int, ...] = ()
    is_scanned: bool = True
    attention: AttentionKind = "xla"
    mesh: sharding.AnyMesh | None = None


def lower(
    model: ModelConfig,
    draft: DraftConfig | None,
    config: LoweringConfig,
    platforms: Sequence[str],
    family: str = "eagle3",
) -> dict[str, export.Exported]:
    """Lowers `prefill`, `plain_step` and, given a draft, `speculative_step`.

    The functions are `build_prefill`'s and `build_step`'s with flat arguments and
    results, in the form that `as_data` gives them.

    Args:
      family: The draft's.

    Raises:
      ConfigError: A platform is unknown, or lacks the attention asked for.
    """
    unknown = set(platforms) - set(PLATFORMS)
    if unknown or not platforms:
        raise ConfigError(f"unknown platforms {sorted(unknown)}; use {PLATFORMS}")
    if config.attention == "cudnn" and tuple(platforms) != ("cuda",):
        raise ConfigError(
            f"cuDNN's attention is for the platform cuda alone, not {platforms}"
        )
    if config.attention == "pallas" and tuple(platforms) != ("tpu",):
        raise ConfigError(
            f"the Pallas kernel is for the platform tpu alone, not {platforms}; use "
            f"attention='xla' for others"
        )

    functions = decoding_functions(model, draft, config, family)

    return {
        name: _export(function, args, platforms)
        for name, (function, args) in functions.items()
    }


def decoding_functions(
    model: ModelConfig,
    draft: DraftConfig | None,
    config: LoweringConfig,
    family: str = "eagle3",
) -> dict[str, tuple[Callable, tuple]]:
    """`prefill`, `plain_step` and `speculative_step`, and shapes of their arguments.

    The shapes say where on the mesh their arrays lie, if there is a mesh. The third
    argument of each is the state, which engines donate.

    Args:
      family: The draft's; without a draft there is no speculative step.

    Raises:
      ConfigError: The mesh does not divide the batch or a model.
    """
    numerics = Numerics(
        config.precision,
        is_row_invariant=False,
        is_scanned=config.is_scanned,
        attention=config.attention,
        mesh=config.mesh if config.attention == "pallas" else None,
        num_groups=sharding.num_groups(config.mesh),
        num_row_groups=sharding.num_row_groups(config.mesh),
    )
    sharding.check_batch(config.mesh, config.batch_size)
    sharding.check_model(config.mesh, model, "the target")
    if draft is not None:
        sharding.check_model(config.mesh, draft, "the draft")

    # Only shapes are traced from here on: no weights are made, whatever the size of the
    # model.
    cast = lambda params: cast_params(params, config.precision)
    stack = stack_layers if config.is_scanned else lambda params: params
    params = sharding.param_shardings
    rows = sharding.row_shardings
    placed = functools.partial(_placed, config.mesh)

    target = jax.eval_shape(lambda: stack(cast(init_params(model, jax.random.key(0)))))
    target = placed(target, params)
    plain = StepConfig(
        model,
        numerics,
        TreeConfig(num_steps=0),
        stop_ids=config.stop_ids,
        mesh=config.mesh,
    )
    functions = {}

    def add(name: str, function: Callable, *args):
        results = rows, sharding.replicated
        functions[name] = sharding.pinned(function, config.mesh, *results), args

    def state_of(step: StepConfig, drafter, batch_size: int):
        make = lambda: empty_state(step, drafter, batch_size, config.capacity)
        return placed(jax.eval_shape(make), rows)

    batch = config.batch_size
    state = state_of(plain, None, batch)
    add("plain_step", build_step(plain, None), target, None, state)
    step = plain
    drafter = None
    drafts = None
    if draft is not None:
        drafter = build_drafter(family, draft, config.tree, numerics, has_ngrams=True)
        step = dataclasses.replace(plain, tree=config.tree, taps=draft.taps)
        drafts = jax.eval_shape(lambda: _empty_draft(drafter, draft, cast))
        drafts = placed(drafts, params)
        state = state_of(step, drafter, batch)
        add("speculative_step", build_step(step, drafter), target, drafts, state)

    # A prompt is prefilled one row at a time, whatever the batch size of a step.
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    add(
        "prefill",
        build_prefill(step, drafter),
        target,
        drafts,
        state_of(step, drafter, 1),
        ints(1, PREFILL_CHUNK),
        ints(1),
        ints(1),
        ints(),
    )

    return functions


def _placed(mesh: sharding.AnyMesh | None, tree, place: Callable):
    """Shapes that say where their arrays lie."""
    if mesh is None:
        return tree

    at = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(at, tree, place(tree, mesh))


def _empty_draft(drafter, config: DraftConfig, cast) -> Draft:
    ids = jnp.zeros(config.draft_vocab_size, jnp.int32) if config.has_own_head else None
    params = cast(drafter.init_params(jax.random.key(0)))
    return Draft(params, ids, init_memory(_MEMORY_SLOTS))


def _export(function: Callable, args: tuple, platforms) -> export.Exported:
    # An artefact takes plain arrays in a flat list: it must be callable from programs
    # that know neither the package's classes nor JAX's typed keys.
    leaves, treedef = jax.tree.flatten(args)

    def flattened(*values):
        pairs = zip(values, leaves, strict=True)
        values = [jax.random.wrap_key_data(x) if is_key(old) else x for x, old in pairs]
        return tuple(as_data(function(*jax.tree.unflatten(treedef, values))))

    at = lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding)
    flat = list(map(at, jax.eval_shape(as_data, leaves), leaves))
    # Without this, export refuses every call that is not guaranteed to stay as it is.
    checks = [export.DisabledSafetyCheck.custom_call(_CUDNN_ATTENTION)]
    lower = export.export(
        jax.jit(flattened), platforms=platforms, disabled_checks=checks
    )

    try:
        return lower(*flat)
    except RuntimeError as error:
        if "cuDNN is not detected" not in str(error):
            raise
        raise ConfigError(
            "cuDNN is not on this machine; install ospec-jax[cuda], or lower with "
            "attention 'xla'"
        ) from error


def is_key(leaf) -> bool:
    """Whether an array holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_data(tree) -> list:
    """The leaves of a tree as an artefact takes and returns them."""
    leaves = jax.tree.leaves(tree)
    return [jax.random.key_data(x) if is_key(x) else x for x in leaves]


def write(lowered: dict[str, export.Exported], folder: Path) -> list[Path]:
    """Writes each artefact as `NAME.jax_export`, and `artefacts.json` about them."""
    paths = []
    facts = {}

    for name, exported in lowered.items():
        path = folder / f"{name}.jax_export"
        atomic.write_bytes(path, exported.serialize())
        paths.append(path)
        facts[name] = describe(exported) | {"bytes": path.stat().st_size}

    atomic.write_text(folder / "artefacts.json", json.dumps(facts, indent=1) + "\n")
    return paths


def describe(exported: export.Exported) -> dict[str, Any]:
    """Platforms, number of devices, and shapes of inputs and outputs."""
    shapes = lambda avals: [f"{a.dtype}{list(a.shape)}" for a in avals]
    return {
        "platforms": list(exported.platforms),
        "devices": exported.nr_devices,
        "inputs": shapes(exported.in_avals),
        "outputs": shapes(exported.out_avals),
    }
