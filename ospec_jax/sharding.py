# SPDX-License-Identifier: Apache-2.0
"""Meshes: which axis of which array is split over which devices, by name rules.

`data` splits rows of a batch, `model` splits heads and feed-forward columns (tensor
parallelism as in Megatron-LM, arXiv 1909.08053): products that widen are split by
output, products that narrow by input, so that a layer communicates twice, with one
all-reduce of activations each. Embedding and head are split over the vocabulary: with
tied tables they are one array, the largest of small models, and a looked-up row or a
row's maximum is far smaller than the table.

**Groups.** q, k and v are one product, and so are gate and up. A device must hold its
own heads' rows of each part, but a plain split of `[q; k; v]` would give one device
queries and another one keys. So under a mesh the rows of fused products lie in groups,
`[q_0; k_0; v_0; q_1; k_1; v_1; ...]`, one group for each device of the `model` axis,
and layers take them apart by group (`Numerics.num_groups`): no weight ever moves. Only
arrays in memory are grouped; files are not, whatever mesh wrote them.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ospec_jax.config import ConfigError, DraftConfig, ModelConfig

P = PartitionSpec
AXES = ("data", "model")
_AUTO = (AxisType.Auto,) * len(AXES)
_FUSED = re.compile(r"(qkv_proj|gate_up_proj)/(kernel|scale|bias)$")
AnyMesh = Mesh | AbstractMesh
Rules = tuple[tuple[str, PartitionSpec], ...]

PARAM_RULES: Rules = (
    (r"(qkv_proj|gate_up_proj|lm_head|lm_heads_\d+)/kernel$", P("model", None)),
    (r"(qkv_proj|gate_up_proj|lm_head|lm_heads_\d+)/(scale|bias)$", P("model")),
    (r"(o_proj|down_proj|fc)/kernel$", P(None, "model")),
    (r"(embed_tokens|lm_head)_kernel$", P("model", None)),
    (r"(embed_tokens|lm_head)_scale$", P("model")),
    (r"(^|/)learner/(kernel|reference)$", P("model", None)),
    (r"(^|/)learner/energy$", P("model")),
    (r"(^|/)snapshot/kernel$", P("model", None)),
    (r"(^|/)snapshot/scale$", P("model")),
)
"""Of parameters, and of whatever has their names, such as an optimizer's moments.

They describe the last axes: stacked layers have one more in front. A learner of the
output projection alone has its rows where the draft has them. What no rule names
(norms, vocabularies, n-grams, counters, the ring) is on every device.
"""
OPTIMIZER_STATE = re.compile(r"(^|/)opt_state/")
"""Names of what a learner's rule remembers, such as moments.

Devices of the `data` axis have the same draft, and would all remember the same of it.
Each keeps a share instead, steps that share of the parameters, and sends it to the
others (ZeRO's first stage, arXiv 1910.02054): once an update, since decoding reads the
parameters at each step and they stay where the rules above put them.
"""
STATE_RULES: Rules = ((r"(keys|values)(/\d+)?$", P("data", "model", None, None)),)
"""Of decoding state; what they do not name is split by rows."""


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Reads `data=2,model=4`; an axis that is not named has one device.

    Args:
      devices: To take the first ones of; by default all.

    Raises:
      ConfigError: It cannot be read, or there are fewer devices.
    """
    shape = abstract_mesh(text).axis_sizes
    count = jax.device_count() if devices is None else len(devices)
    if np.prod(shape) > count:
        raise ConfigError(
            f"the mesh {text} takes {np.prod(shape)} devices, but there are {count}"
        )

    if devices is not None:
        devices = devices[: np.prod(shape)]

    return jax.make_mesh(shape, AXES, axis_types=_AUTO, devices=devices)


def abstract_mesh(text: str) -> AbstractMesh:
    """As `make_mesh`, of devices that need not be here: for lowering.

    Raises:
      ConfigError: It cannot be read.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"cannot read {part!r} of the mesh {text!r}; write data=2,model=4"
            )
        sizes[name] = int(size)

    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=_AUTO)


def num_groups(mesh: AnyMesh | None) -> int:
    """Groups in which rows of fused products lie: the size of the `model` axis."""
    return mesh.shape["model"] if mesh is not None else 1


def num_row_groups(mesh: AnyMesh | None) -> int:
    """Groups of rows that lie on different devices: the size of the `data` axis."""
    return mesh.shape["data"] if mesh is not None else 1


def check_model(
    mesh: AnyMesh | None, config: ModelConfig | DraftConfig, who: str
) -> None:
    """Refuses a model that the `model` axis does not divide.

    Raises:
      ConfigError: Heads or feed-forward columns cannot be split evenly.
    """
    size = num_groups(mesh)
    counts = {
        "key-value heads": config.num_kv_heads,
        "heads": config.num_heads,
        "feed-forward columns": config.intermediate_size,
    }
    for what, count in counts.items():
        if count % size:
            fitting = int(np.gcd.reduce(list(counts.values())))
            fitting = [n for n in range(1, fitting + 1) if fitting % n == 0]
            raise ConfigError(
                f"{who} has {count} {what}, which model={size} does not divide; use a "
                f"model axis of {' or '.join(map(str, fitting))} and give the other "
                f"devices to the data axis"
            )


def check_state(mesh: AnyMesh | None, state: Any, params: Any, who: str) -> None:
    """Refuses a learner's state that cannot be put into another mesh's order of rows.

    Args:
      params: Of the draft, whose names the state's arrays end with.

    Raises:
      ConfigError: It summarises fused products, by row or by column, as factored
        optimizers do; which of them a vector is about, its name does not say.
    """
    if num_groups(mesh) == 1:
        return

    named = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    fused = {
        name: shape for name, shape in named(params).items() if _FUSED.search(name)
    }

    for name, shape in named(state).items():
        for end, whole in fused.items():
            if name.endswith(f"/{end}") and shape[-len(whole) :] != whole:
                raise ConfigError(
                    f"{who} keeps {end} as an array of {shape}, not of {whole}, and "
                    f"its rows have no order that model={num_groups(mesh)} could "
                    f"split; use another optimizer, like adam, or give all devices to "
                    f"the data axis"
                )


def check_batch(mesh: AnyMesh | None, batch_size: int) -> None:
    """Refuses a batch of nothing, or one that the `data` axis does not divide.

    Raises:
      ConfigError: There is nothing to do, or some devices would repeat what others do.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; use 1 or more")
    if mesh is not None and batch_size % mesh.shape["data"]:
        raise ConfigError(
            f"batch_size is {batch_size}, which data={mesh.shape['data']} does not "
            f"divide; use a multiple of it, or give these devices to the model axis"
        )


def _spec(
    path, x, mesh: AnyMesh, rules: Rules, default: PartitionSpec
) -> PartitionSpec:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = default

    # The first rule that matches counts; it describes the last axes of the array.
    for pattern, found in rules:
        if re.search(pattern, name):
            spec = P(*(None,) * (x.ndim - len(found)), *found)
            break

    # One request's prefill, or an odd vocabulary, is on every device.
    return P(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, x.shape, strict=False)
        )
    )


def _split_over_data(x, mesh: AnyMesh, spec: PartitionSpec) -> PartitionSpec:
    """Also splits the largest axis that is whole, if the `data` axis divides it."""
    # A vector's share would be sent for longer than it takes to read the vector.
    if mesh.shape["data"] == 1 or x.ndim < 2:
        return spec

    axes = [*spec, *[None] * (x.ndim - len(spec))]
    fitting = [
        axis
        for axis, size in enumerate(x.shape)
        if axes[axis] is None and size % mesh.shape["data"] == 0
    ]
    if not fitting:
        return spec

    axes[max(fitting, key=lambda axis: x.shape[axis])] = "data"

    return P(*axes)


def param_shardings(tree: Any, mesh: AnyMesh) -> Any:
    """Where parameters, or a learner's state, belong.

    What an optimizer remembers is split over both axes; see `OPTIMIZER_STATE`.
    """

    def place(path, x):
        spec = _spec(path, x, mesh, PARAM_RULES, P())
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if OPTIMIZER_STATE.search(name):
            spec = _split_over_data(x, mesh, spec)

        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def row_shardings(tree: Any, mesh: AnyMesh) -> Any:
    """Where decoding state, or a batch to learn from, belongs: rows over `data`."""
    place = lambda path, x: NamedSharding(
        mesh, _spec(path, x, mesh, STATE_RULES, P("data"))
    )
    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(tree: Any, mesh: AnyMesh) -> Any:
    """Everything on every device: what a host reads, on any process."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def put_params(tree: Any, mesh: Mesh | None) -> Any:
    """Places parameters, or a learner's state; without a mesh, leaves them alone."""
    if mesh is None:
        return tree

    return jax.tree.map(jax.device_put, tree, param_shardings(tree, mesh))


def pinned(function: Callable, mesh: AnyMesh | None, *places: Callable) -> Callable:
    """A function whose results lie where they belong, to be jitted.

    Args:
      places: `param_shardings`, `row_shardings` or `replicated`, one for each of the
        function's results. What goes into the next call as it came out of the last one
        is compiled for once, and may be donated.
    """
    if mesh is None:
        return function

    # Without it the compiler chooses where results lie, and the next call may be
    # compiled anew for them.
    pin = lambda tree, place: jax.lax.with_sharding_constraint(tree, place(tree, mesh))

    @functools.wraps(function)
    def run(*args):
        results = function(*args)
        if len(places) == 1:
            return pin(results, places[0])

        pairs = zip(results, places, strict=True)
        return tuple(pin(result, place) for result, place in pairs)

    return run


def regroup(
    tree: Any, config: ModelConfig | DraftConfig, groups: int, is_inverse: bool = False
) -> Any:
    """Puts the rows of fused products into groups, or back into the files' order.

    Args:
      tree: Parameters, or anything with their names.
    """
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    parts = {"qkv_proj": (heads, kv_heads, kv_heads), "gate_up_proj": (1, 1)}

    def move(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for product, sizes in parts.items():
            if re.search(rf"{product}/(kernel|scale|bias)$", name):
                rows = lambda x, sizes=sizes: _regroup_rows(
                    x, sizes, groups, is_inverse
                )
                is_stacked = x.ndim > (2 if name.endswith("kernel") else 1)
                return jax.vmap(rows)(x) if is_stacked else rows(x)

        return x

    return tree if groups == 1 else jax.tree_util.tree_map_with_path(move, tree)


def _regroup_rows(x, sizes: tuple[int, ...], groups: int, is_inverse: bool):
    # Rows of a unit: `head_dim` for heads, all columns of one part for gate and up.
    unit = x.shape[0] // sum(sizes)
    rows = [size * unit for size in sizes]
    # `[groups, rows of a group]`, taken apart by part, and the parts of all groups put
    # one behind the other again.
    if is_inverse:
        rows = [size // groups for size in rows]
        x = x.reshape(groups, -1, *x.shape[1:])
        pieces = jnp.split(x, np.cumsum(rows)[:-1], axis=1)
        return jnp.concatenate([p.reshape(-1, *p.shape[2:]) for p in pieces])

    # Each part is cut into groups `[groups, rows, ...]`; joined along the rows of a
    # group they are `[q_0; k_0; v_0; q_1; ...]`.
    pieces = jnp.split(x, np.cumsum(rows)[:-1])
    pieces = [p.reshape(groups, -1, *p.shape[1:]) for p in pieces]

    return jnp.concatenate(pieces, axis=1).reshape(x.shape)


def agreed(value: Any) -> Any:
    """Process 0's value, on all processes: for what a clock or a user decides."""
    if jax.process_count() == 1:
        return value

    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(value)
