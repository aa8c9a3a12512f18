# SPDX-License-Identifier: Apache-2.0
"""optax optimizers by name, those without a learning rate among them."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ospec_jax.config import ConfigError

PARAMETER_FREE = (
    "mechanize",
    "cocob",
    "dog",
    "dowg",
    "prodigy",
    "dadapt_adamw",
    "momo",
)
"""Optimizers that find their own step size; a learning rate would be in the way."""


def make_optimizer(
    name: str, learning_rate: float, **options
) -> optax.GradientTransformation:
    """The optax optimizer of that name, behind a global-norm clip.

    Args:
      name: Of `optax` or `optax.contrib`. `mechanize` tunes Adam's step; any other
        optimizer's as `mechanize:NAME`.
      learning_rate: Not used by those of `PARAMETER_FREE`, which run at 1.
      options: Further arguments of the optimizer.

    Raises:
      ConfigError: optax has none of that name, or it needs more than a learning rate.
    """
    # One odd batch of traffic must not throw the draft far off.
    return optax.chain(_clipped(1.0), _bare(name, learning_rate, options))


def _clipped(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, which may be told the norm.

    Whoever moves a part of the parameters would else compute it of all of them, part by
    part.
    """

    def update(updates, state, params=None, *, grad_norm=None, **_):
        norm = optax.global_norm(updates) if grad_norm is None else grad_norm
        is_short = norm < max_norm
        clip = lambda x: jnp.where(is_short, x, (x / norm.astype(x.dtype)) * max_norm)
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def is_parameter_free(name: str) -> bool:
    """Whether the optimizer finds its own step size."""
    return name.partition(":")[0] in PARAMETER_FREE


def _bare(name: str, learning_rate: float, options: dict) -> Any:
    kind, _, wrapped = name.partition(":")
    if kind == "mechanize":
        # Its own weight decay pulls towards 0, which no trained draft wants.
        options = dict[str, Any]({"weight_decay": 0.0} | options)
        return optax.contrib.mechanize(_bare(wrapped or "adam", 1.0, {}), **options)

    # optax has no registry: a name is looked up in its modules, and what is found there
    # must behave like an optimizer.
    factory = getattr(optax, kind, None) or getattr(optax.contrib, kind, None)
    rate = 1.0 if kind in PARAMETER_FREE else learning_rate
    found = None
    if callable(factory) and not wrapped and _takes_rate(factory):
        found = factory(learning_rate=rate, **options)
    if not isinstance(found, optax.GradientTransformation):
        raise ConfigError(
            f"optax has no optimizer {name!r} that needs a learning rate alone; use "
            f"adam, sgd, lion, ..., or one that finds its own step size: "
            f"{', '.join(PARAMETER_FREE)}"
        )

    return found


def _takes_rate(factory) -> bool:
    """Whether a learning rate is all that the optimizer must be told."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # not everything has a signature
        return False

    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return "learning_rate" in parameters and needed in ([], ["learning_rate"])
