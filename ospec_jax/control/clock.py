# SPDX-License-Identifier: Apache-2.0
"""What a step takes, by how deep it drafts and how many rows it verifies.

The time of a step is that of drafting, which grows with the depth, and of everything
else, which depends on the rows that the target runs over and on how much they attend
to. Whole steps are measured, and the two parts are fitted to them. A clock only says
what pays: a wrong one makes decoding slow, and never changes what is emitted.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ospec_jax import atomic
from ospec_jax.config import ConfigError, from_dict, naming
from ospec_jax.config.fields import read_json


class Timed(NamedTuple):
    """A step that was measured.

    Attributes:
      depth: Of the tree; 0 for plain decoding.
      rows: Nodes that the target ran over, the root included.
      context: Tokens in the cache.
      seconds: It took.
    """

    depth: int
    rows: int
    context: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Clock:
    """A cost model of steps; JSON holds it exactly.

    Attributes:
      topk: Width of the trees.
      drafting: Seconds of growing a tree, by its depth from 0 on.
      rows: Numbers of rows that were measured, from 1 on.
      verifying: Seconds of all but drafting, at each of them.
      context: Tokens in the cache at which that holds.
      per_context: Seconds that one more token in the cache adds.
      per_row_context: Seconds that it adds for each row.
      device: Where it was measured.
      method: How.
      error: Largest error of the fit, relative to the step.
    """

    topk: int
    drafting: tuple[float, ...]
    rows: tuple[int, ...]
    verifying: tuple[float, ...]
    context: int = 0
    per_context: float = 0.0
    per_row_context: float = 0.0
    device: str = ""
    method: str = ""
    error: float = 0.0

    def __post_init__(self):
        rows = list(self.rows)
        if not rows or rows != sorted(set(rows)) or rows[0] != 1:
            raise ConfigError(
                f"a clock needs ascending numbers of rows from 1 on, not {self.rows}"
            )
        if len(self.verifying) != len(rows) or not self.drafting:
            raise ConfigError(
                f"a clock needs a time for each of the rows {self.rows} and for each "
                f"depth from 0 on, not {self.verifying} and {self.drafting}"
            )
        if not np.isfinite([*self.drafting, *self.verifying]).all():
            raise ConfigError(
                f"a clock's times are finite, not {self.drafting} and {self.verifying}"
            )

    def seconds(self, depth, rows, context):
        """What steps take; arguments are whole numbers or arrays, as is the result.

        Between numbers of rows that were measured it is interpolated, and beyond the
        last of them it goes on as before it.
        """
        depth = jnp.asarray(depth)
        rows = jnp.asarray(rows, jnp.float32)
        drafting = jnp.asarray(self.drafting, jnp.float32)[depth]
        verifying = jnp.interp(
            rows,
            jnp.asarray(self.rows, jnp.float32),
            jnp.asarray(self.verifying, jnp.float32),
        )
        if len(self.rows) > 1:
            run = self.rows[-1] - self.rows[-2]
            slope = (self.verifying[-1] - self.verifying[-2]) / run
            verifying += jnp.maximum(rows - self.rows[-1], 0) * max(slope, 0.0)

        more = jnp.asarray(context, jnp.float32) - self.context
        verifying += more * (self.per_context + self.per_row_context * rows)
        # Far below the contexts that were measured a line may fall below nothing.
        least = 0.1 * min(self.verifying)

        return drafting + jnp.maximum(verifying, least)

    def save(self, file: Path) -> None:
        """Writes it as JSON."""
        atomic.write_text(file, json.dumps(dataclasses.asdict(self), indent=1))


def read_clock(file: Path) -> Clock:
    """A clock that was saved.

    Raises:
      ConfigError: It is damaged.
    """
    with naming(file):
        return from_dict(Clock, read_json(file))


def fit_clock(
    timed: Sequence[Timed], topk: int, device: str = "", method: str = ""
) -> Clock:
    """Fits both parts of a step to measured ones.

    By least squares of relative errors. Depths and rows are told apart if some rows
    were measured at several depths, or some depths with several numbers of rows. Only
    plain steps run over one row, and they draft nothing, so one number stays free: what
    the fewest rows of a drafting step take beyond a single one is booked as drafting.
    It makes no difference to any step.

    Raises:
      ConfigError: Plain steps or some depths are missing, or the parts cannot be told
        apart.
    """
    depths = sorted({step.depth for step in timed})
    rows = sorted({step.rows for step in timed})
    contexts = sorted({step.context for step in timed})
    if not timed or depths != list(range(len(depths))) or rows[0] != 1:
        raise ConfigError(
            f"a clock is fitted to plain steps of one row and to steps of all depths "
            f"from 1 on, not to the depths {depths} with {rows} rows"
        )

    # Unknowns: a time for each depth but 0 and each number of rows, and two slopes.
    has_slopes = len(contexts) > 1
    middle = round(float(np.mean(contexts)))
    num_depths = len(depths) - 1
    num_times = max(len(rows) - 1, 1)
    equations = np.zeros((len(timed), num_depths + num_times + 2 * has_slopes))

    for equation, step in zip(equations, timed, strict=True):
        if step.depth:
            equation[step.depth - 1] = 1
        # One row shares its time with the next number of them.
        equation[num_depths + max(rows.index(step.rows) - 1, 0)] = 1
        if has_slopes:
            equation[-2] = step.context - middle
            equation[-1] = (step.context - middle) * step.rows

    seconds = np.asarray([step.seconds for step in timed])
    scaled = equations / seconds[:, None]
    # Columns of like size, or the rank could not be told.
    sizes = np.maximum(np.linalg.norm(scaled, axis=0), 1e-30)
    found, _, rank, _ = np.linalg.lstsq(scaled / sizes, np.ones(len(timed)))
    if rank < equations.shape[1]:
        raise ConfigError(
            f"{len(timed)} steps do not tell drafting and verification apart: measure "
            f"some depth with several numbers of rows"
        )

    found = found / sizes
    error = float(np.max(np.abs(equations @ found / seconds - 1)))
    slopes = found[-2:] if has_slopes else np.zeros(2)
    times = found[num_depths : num_depths + num_times].tolist()

    return Clock(
        topk=topk,
        drafting=(0.0, *found[:num_depths].tolist()),
        rows=tuple(rows),
        verifying=(*times[: len(rows) - num_times], *times),
        context=middle,
        per_context=float(slopes[0]),
        per_row_context=float(slopes[1]),
        device=device,
        method=method,
        error=error,
    )


def flat_clock(
    topk: int, depth: int, verifying: float = 5e-3, draft_pass: float = 5e-4
) -> Clock:
    """A clock like a TPU's: weights are read for one row or for many at one price.

    It is made up, to see what another machine would choose, and measured nowhere.

    Args:
      depth: Of the deepest tree.
      verifying: Seconds of the target's pass.
      draft_pass: Seconds of a pass of the draft; the first depth takes none, since its
        tokens come with verification.
    """
    passes = [max(d - 1, 0) * draft_pass for d in range(depth + 1)]
    return Clock(
        topk=topk,
        drafting=tuple(passes),
        rows=(1, 256),
        verifying=(verifying, verifying),
        device="flat",
        method="made up: any number of rows takes the same time",
    )
