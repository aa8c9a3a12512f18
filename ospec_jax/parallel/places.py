# SPDX-License-Identifier: Apache-2.0
"""Where each side computes: on a device of its own, or on a part of all devices."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ospec_jax import sharding
from ospec_jax.config import ConfigError, Precision
from ospec_jax.loading import LoadedDraft, model_draft
from ospec_jax.models.hub import Target, load_target


@dataclasses.dataclass(frozen=True)
class Place:
    """A device, or several over which a model is split.

    Attributes:
      device: The only one, or the first of the mesh.
      mesh: None for a single device.
    """

    device: jax.Device
    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Mesh) -> "Place":
        """All devices of a mesh."""
        return cls(mesh.devices.flat[0], mesh)

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """All of them."""
        return (self.device,) if self.mesh is None else tuple(self.mesh.devices.flat)

    def put(self, tree: Any) -> Any:
        """Sends arrays there, whole; nobody waits for it."""
        if self.mesh is None:
            return jax.device_put(tree, self.device)

        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def chosen(self) -> contextlib.AbstractContextManager:
        """Within it new arrays are made there."""
        return jax.default_device(self.device)

    def __str__(self) -> str:
        return ", ".join(map(str, self.devices))


class Places(NamedTuple):
    """Where both sides are."""

    target: Place
    draft: Place


def find_places(
    mesh: str = "", draft_mesh: str = "", draft_device: int | None = None
) -> Places:
    """The first devices for the target, the last ones for the draft.

    Args:
      mesh: Of the target, like `model=4`; empty for a single device. `draft_mesh` is
        that of the draft.
      draft_device: Number of the draft's device instead, among all.

    Raises:
      ConfigError: There are not enough devices, or both sides would share some.
    """
    devices = jax.devices()
    sizes = [
        math.prod(sharding.abstract_mesh(text).axis_sizes) if text else 1
        for text in (mesh, draft_mesh)
    ]
    if sum(sizes) > len(devices):
        raise ConfigError(
            f"the target takes {sizes[0]} and the draft {sizes[1]} devices of their "
            f"own, and jax has {len(devices)} ({', '.join(map(str, devices))}). Two "
            f"devices are the least; with one use `ospec generate --draft "
            f"model:SMALL`, which drafts and verifies in turns. To try it on a CPU "
            f"set JAX_NUM_CPU_DEVICES=2"
        )
    if draft_device is not None and draft_mesh:
        raise ConfigError(
            f"draft_device={draft_device} contradicts draft_mesh={draft_mesh!r}; "
            f"leave one of the two out"
        )
    if draft_device is not None and not sizes[0] <= draft_device < len(devices):
        raise ConfigError(
            f"draft_device is {draft_device}; of {len(devices)} devices the target "
            f"takes the first {sizes[0]}, so use {sizes[0]} to {len(devices) - 1}"
        )

    last = devices[len(devices) - sizes[1] :]
    if draft_device is not None:
        last = [devices[draft_device]]

    return Places(_place(mesh, devices), _place(draft_mesh, last))


def _place(mesh: str, devices: list) -> Place:
    if not mesh:
        return Place(devices[0])

    return Place.of(sharding.make_mesh(mesh, devices))


def load_pair(
    target: str | Path,
    draft_model: str,
    places: Places,
    precision: Precision | Literal["auto"] | None = None,
) -> tuple[Target, LoadedDraft]:
    """Loads both models, each where it computes.

    Raises:
      CheckpointError: They have different tokenizers.
    """
    with places.target.chosen():
        large = load_target(target, precision, places.target.mesh)
    if places.target.mesh is None:
        large = dataclasses.replace(large, params=places.target.put(large.params))

    # In the target's precision, but split as its own devices are.
    like = dataclasses.replace(large, mesh=places.draft.mesh)
    with places.draft.chosen():
        small = model_draft(draft_model, like)

    return large, small
