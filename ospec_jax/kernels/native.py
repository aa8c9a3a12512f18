# SPDX-License-Identifier: Apache-2.0
"""int8 products in C++, built with the machine's compiler at first use.

XLA:CPU packs the kernel of an int8 product at every call, which costs more than the
product itself when there are few rows. `int8_linear.cc` reads it in place. Both find
the same integers; XLA may round what it scales them by together with what follows, so
a machine without a compiler is slower and differs in last bits.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

_SOURCE = Path(__file__).with_name("int8_linear.cc")
_TARGET = "ospec_int8_linear"
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-shared", "-fPIC", "-w",
)  # fmt: skip


def int8_linear(x, kernel, scale):
    """`quantize_rows(x) @ kernel.T * scale`, in float32.

    Args:
      x: `[..., in]` float32.
      kernel: `[out, in]` int8.
      scale: `[out]` float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((rows.shape[0], kernel.shape[0]), jnp.float32)
    y = jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")(rows, kernel, scale)
    return y.reshape(*x.shape[:-1], -1)


@functools.cache
def is_available(folder: Path) -> bool:
    """Builds and registers the products, unless that was done before.

    False, with a warning that says why, where they cannot be used: no compiler, or one
    whose code fails the check against numpy. `OSPEC_NATIVE=0` turns them off.

    Args:
      folder: Where the compiled library is kept.
    """
    if os.environ.get("OSPEC_NATIVE") == "0" or jax.default_backend() != "cpu":
        return False
    try:
        library = ctypes.cdll.LoadLibrary(str(_build(folder)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"int8 products fall back to XLA's, at about half the speed: {detail}. "
            f"Install a C++ compiler, or set OSPEC_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return False
    handler = jax.ffi.pycapsule(library.OspecInt8Linear)
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    if not _is_correct():
        warnings.warn(
            "int8 products fall back to XLA's: this machine's compiler built them "
            "wrongly. Set CXX to another one, or OSPEC_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return False
    return True


def _build(folder: Path) -> Path:
    """The compiled library; another CPU, compiler, jaxlib or source has its own."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((p for n in names if n and (p := shutil.which(n))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    version = _run(compiler, "--version").splitlines()[0]
    key = (
        version,
        _cpu_features(),
        importlib.metadata.version("jaxlib"),
        *_FLAGS,
        _SOURCE.read_text(),
    )
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    library = folder / "native" / f"int8_linear-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}.part")
        include = f"-I{jax.ffi.include_dir()}"
        _run(compiler, *_FLAGS, include, str(_SOURCE), "-o", str(part))
        part.rename(library)
    return library


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def _cpu_features() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _is_correct() -> bool:
    """Compares products of odd shapes with numpy's, bit for bit."""
    rng = np.random.default_rng(0)
    for rows, features, columns in ((1, 5, 7), (2, 64, 64), (9, 70, 100), (16, 33, 63)):
        x = rng.normal(size=(rows, columns)).astype(np.float32)
        kernel = rng.integers(-127, 128, size=(features, columns)).astype(np.int8)
        scale = rng.random(features).astype(np.float32)
        row_scale = np.max(np.abs(x), axis=1, keepdims=True) * np.float32(1 / 127)
        quantized = np.rint(x / row_scale).astype(np.int32)
        expected = (quantized @ kernel.T.astype(np.int32)).astype(np.float32)
        expected = expected * row_scale * scale
        if not np.array_equal(expected, np.asarray(int8_linear(x, kernel, scale))):
            return False
    return True
