# SPDX-License-Identifier: Apache-2.0
"""Casting parameters to a precision, and choosing one for this machine."""

import functools
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import atomic
from ospec_jax._platform import cpu_name
from ospec_jax.config import Precision
from ospec_jax.kernels import native
from ospec_jax.models.layers import Numerics, linear

_LOG = logging.getLogger(__name__)


def quantize_kernel(kernel):
    """Symmetric int8 by output channel: `kernel ~ q * scale[:, None]`.

    Of `[out, in]` it makes `[out, in]` int8 and a scale `[out]` in float32.

    Works on numpy arrays, for loading without a second copy on the device, and on JAX
    arrays, for use inside `jit`.
    """
    xp = jnp if isinstance(kernel, jax.Array) else np
    kernel = kernel.astype(xp.float32)
    # A row of zeros has no range, and must not divide by it.
    scale = xp.maximum(xp.max(xp.abs(kernel), axis=1), 1e-12) / 127.0
    quantized = xp.rint(kernel / scale[:, None]).astype(xp.int8)
    return quantized, scale.astype(xp.float32)


def cast_leaf(name: str, value, precision: Precision) -> dict:
    """Casts one named parameter; int8 kernels come with their scale.

    Args:
      name: `kernel`, `embed_tokens_kernel`, `scale`, ...; only kernels are quantised.
      value: `[out, in]` for kernels.
    """
    if not name.endswith("kernel") or precision == "float32":
        return {name: jnp.asarray(value, jnp.float32)}
    if precision == "bfloat16":
        return {name: jnp.asarray(value, jnp.bfloat16)}

    quantized, scale = quantize_kernel(value)
    scale_name = name.removesuffix("kernel") + "scale"
    return {name: jnp.asarray(quantized), scale_name: jnp.asarray(scale)}


def cast_params(params, precision: Precision):
    """Casts a whole tree of floating-point parameters."""
    cast = {}
    for name, value in params.items():
        if isinstance(value, dict):
            cast[name] = cast_params(value, precision)
        else:
            cast.update(cast_leaf(name, value, precision))

    return cast


_TIMED: tuple[Precision, ...] = ("int8", "float32")


@functools.partial(jax.jit, static_argnums=2)
def _products(x, kernels, numerics):
    for kernel in kernels:
        x = linear(x, kernel, numerics)

    return x


def _time_products(numerics: Numerics, rows: int, features: int = 1024) -> float:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, features)), jnp.float32)
    kernels = [
        cast_leaf(
            "kernel", rng.normal(size=(features, features)) / 32, numerics.precision
        )
        for _ in range(16)
    ]
    times = []

    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(_products(x, kernels, numerics))
        times.append(time.perf_counter() - start)

    # The first run compiles.
    return min(times[1:])


def calibrated_numerics(cache_folder: Path, precision: Precision | None) -> Numerics:
    """How to compute on this machine.

    Accelerators get bfloat16. A CPU is timed on products of 2 and 8 rows, the shapes of
    plain decoding and of a verification, once; the result is kept.

    Args:
      precision: None chooses the fastest.
    """
    platform_name = jax.default_backend()
    if platform_name != "cpu":
        return Numerics(
            precision or "bfloat16",
            is_row_invariant=False,
            has_dear_launches=platform_name == "gpu",
        )

    is_native = native.is_available(cache_folder)
    of = lambda precision: Numerics(precision, is_native=is_native)
    if precision is not None:
        return of(precision)

    file = cache_folder / "calibration.json"
    kind = "native" if is_native else "xla"
    # Another machine or version of jax that shares the folder is measured for itself.
    key = f"{platform.machine()} {cpu_name()} jax {jax.__version__} int8 {kind}"
    known = _read_calibrations(file)
    if key not in known:
        _LOG.info("measuring which precision is fastest on this machine, once")
        times = {
            precision: sum(_time_products(of(precision), rows) for rows in (2, 8))
            for precision in _TIMED
        }
        known[key] = min(times, key=times.__getitem__)
        atomic.keep(file, json.dumps(known, indent=1).encode())

    return of(known[key])


def _read_calibrations(file: Path) -> dict[str, Any]:
    """What was measured before; what is damaged is measured anew."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}

    kept = found.items() if isinstance(found, dict) else ()
    return {key: x for key, x in kept if x in _TIMED}
