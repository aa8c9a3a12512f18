# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of policies for how much to draft, and of what teaches them.

A folder holds numbered steps of three items. `policies` and `meta`, what they are for,
can be loaded alone; `course` is all that training needs to go on. Arrays are NumPy's,
so that they can be read whatever devices there are.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ospec_jax.config import ConfigError, from_dict, naming
from ospec_jax.config.fields import parse_json
from ospec_jax.control.policy import Activation, Layers, Policies, PolicyShape
from ospec_jax.storage import checkpoint
from ospec_jax.storage.leaves import as_item, from_item

_NUM_KEPT = 2


@dataclasses.dataclass(frozen=True)
class PolicyMeta:
    """What policies are for, and where they come from.

    Attributes:
      topk: Of the trees; likewise `depth` and `sizes`, see `PolicyShape`.
      fixed_depth: See `Policies`; likewise `fixed_size` and `activation`.
      depth_widths: Of the depth policy's layers, the input first; empty if it is fixed.
      size_widths: Likewise.
      target: Fingerprint of the target's weights.
      draft: Of the draft's.
      clock: Where the clock was measured.
      answers: Ids of the recorded answers that they were taught and chosen on.
      config: Settings that they were taught with.
      history: What was found on the way, validation by validation.
      progress: Where training stands; None once it is through.
    """

    topk: int = 1
    depth: int = 1
    sizes: tuple[int, ...] = (1,)
    fixed_depth: int = 1
    fixed_size: int = 0
    activation: Activation = "relu"
    depth_widths: tuple[int, ...] = ()
    size_widths: tuple[int, ...] = ()
    target: str = ""
    draft: str = ""
    clock: str = ""
    answers: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    progress: dict[str, Any] | None = None

    @property
    def clock_device(self) -> str:
        """The machine that they were taught for; empty if it is not known."""
        device = self.clock.partition(";")[0]
        # Older records say no more of a CPU.
        return "" if device == "cpu" else device

    @property
    def shape(self) -> PolicyShape:
        """What the policies are for."""
        return PolicyShape(self.topk, self.depth, self.sizes)


def save_policies(
    folder: Path, step: int, policies: Policies, meta: PolicyMeta, course: Any
) -> None:
    """Writes one step; older ones but the one before are removed.

    Args:
      meta: Its fields of shapes are filled in from the policies.
      course: A pytree of what training needs to go on, or None.
    """
    meta = dataclasses.replace(
        meta,
        **dataclasses.asdict(policies.shape),
        fixed_depth=policies.fixed_depth,
        fixed_size=policies.fixed_size,
        activation=policies.activation,
        depth_widths=_widths(policies.depth),
        size_widths=_widths(policies.size),
    )
    items = {
        "meta": {"json": json.dumps(dataclasses.asdict(meta))},
        "policies": as_item((policies.depth, policies.size)),
    }
    if course is not None:
        items["course"] = as_item(course)

    checkpoint.save_items(folder, step, items, _NUM_KEPT)


def load_policies(folder: str | Path) -> tuple[Policies, PolicyMeta]:
    """The newest policies of a folder.

    Raises:
      ConfigError: There are none, or they are damaged.
    """
    folder = Path(folder)
    step = _newest(folder)
    with naming(folder):
        items = checkpoint.load_items(folder, step, ("meta", "policies"))
        text = str(items["meta"]["json"])
        meta = from_dict(PolicyMeta, parse_json(text, f"the record of {folder}"))
        like = _like(meta.depth_widths), _like(meta.size_widths)
        depth, size = from_item(items["policies"], like, folder)

    policies = Policies(
        depth or None,
        size or None,
        meta.fixed_depth,
        meta.fixed_size,
        meta.shape,
        meta.activation,
    )
    for kind, widths in (("depth", meta.depth_widths), ("size", meta.size_widths)):
        seen = policies.shape.num_seen(kind)  # type: ignore[arg-type]
        if widths and widths[0] != seen:
            raise ConfigError(
                f"the {kind} policy of {folder} reads {widths[0]} numbers, and trees "
                f"of its shape show {seen}; train it again"
            )

    return policies, meta


def load_course(folder: Path, like: Any) -> Any:
    """What training needs to go on.

    Args:
      like: A pytree of its shapes.

    Raises:
      ConfigError: It is not there, or of other shapes.
    """
    with naming(folder):
        items = checkpoint.load_items(folder, _newest(folder), ("course",))
        return from_item(items["course"], like, folder)


def _newest(folder: Path) -> int:
    found = checkpoint.steps(folder)
    if not found:
        raise ConfigError(
            f"{folder} holds no policies; `ospec train-control` makes them"
        )

    return found[-1]


def _widths(layers: Layers) -> tuple[int, ...]:
    if layers is None:
        return ()

    return (layers[0][0].shape[0], *(len(bias) for _, bias in layers))


def _like(widths: Sequence[int]) -> Layers:
    shape = jax.ShapeDtypeStruct
    return tuple(
        (shape((i, o), jnp.float32), shape((o,), jnp.float32))
        for i, o in zip(widths[:-1], widths[1:], strict=True)
    )
