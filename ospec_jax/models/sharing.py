# SPDX-License-Identifier: Apache-2.0
"""Compiled programs within a process: built once for the same arguments.

A second session of the same models, or a second learner of the same settings, compiles
nothing. What is kept holds no weights: they are arguments of the programs.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import TypeVar

import jax

from ospec_jax import sharding
from ospec_jax.config import Precision
from ospec_jax.models.quantization import cast_params

_NUM_KEPT = 64
_SHARED: dict = {}

Built = TypeVar("Built")


def share(build: Callable[..., Built]) -> Callable[..., Built]:
    """Keeps what `build` made of its latest arguments.

    Functions among them, as drafters are made of, are the same if they are one object.
    For arguments that cannot be hashed, as a user's own may be, it builds anew.
    """
    _SHARED[build] = _keeping(build)

    @functools.wraps(build)
    def find(*args):
        try:
            hash(args)
        except TypeError:
            return build(*args)

        return _SHARED[build](*args)

    return find


def _keeping(build: Callable) -> Callable:
    return functools.lru_cache(maxsize=_NUM_KEPT)(build)


def keep_programs(number: int) -> None:
    """Lets each builder keep so many from now on, and forgets what is shared.

    For a process of many engines: each asks for a dozen, most of which never run.
    """
    global _NUM_KEPT
    _NUM_KEPT = number
    _SHARED.update({build: _keeping(build) for build in _SHARED})


def forget_programs() -> None:
    """Lets go of all that is shared; what is in use stays with its users."""
    for kept in _SHARED.values():
        kept.cache_clear()


@contextlib.contextmanager
def own_programs() -> Generator[None]:
    """Within it nothing is shared with what was built before; afterwards that is again.

    For whoever counts programs, of a whole process: it is not for threads.
    """
    former = dict(_SHARED)
    _SHARED.update({build: _keeping(build) for build in former})
    try:
        yield
    finally:
        _SHARED.update(former)


@share
def caster(precision: Precision, mesh: sharding.AnyMesh | None = None) -> Callable:
    """The jitted function from parameters in float32 to those in a precision."""
    cast = lambda params: cast_params(params, precision)
    return jax.jit(sharding.pinned(cast, mesh, sharding.param_shardings))
