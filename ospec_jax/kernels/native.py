# SPDX-License-Identifier: Apache-2.0
"""int8 products and attention in C++, built with the machine's compiler at first use.

XLA:CPU packs the kernel of an int8 product at every call, which costs more than the
product itself when there are few rows, and makes five calls of an attention that a loop
does in one. Both are for CPUs with AVX-512 VNNI. Elsewhere, and without a compiler,
XLA's own code does the same, slower, and differing in last bits.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import atomic

_FOLDER = Path(__file__).parent
_SOURCES = ("int8_linear.cc", "attention.cc")
_HANDLERS = {
    "ospec_int8_linear": "OspecInt8Linear",
    "ospec_attention": "OspecAttention",
}
_REGISTERED: set[str] = set()
_SUFFIXES = (".cc", ".h")
_LANES = 16
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-w",
)


def int8_linear(x, kernel, scale):
    """`quantize_rows(x) @ kernel.T * scale`, in float32.

    Args:
      x: `[..., in]` float32.
      kernel: `[out, in]` int8.
      scale: `[out]` float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((rows.shape[0], kernel.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("ospec_int8_linear", out, vmap_method="sequential")
    return call(rows, kernel, scale).reshape(*x.shape[:-1], -1)


def can_attend(queries, keys) -> bool:
    """Whether `attention` takes these shapes and types."""
    is_float32 = queries.dtype == keys.dtype == jnp.float32
    return is_float32 and not queries.shape[-1] % _LANES and not keys.shape[-1] % _LANES


def attention(queries, keys, values, bias):
    """Softmax attention; query head i reads key-value head `i // group`.

    Args:
      queries: `[b, t, heads, e]`, all in float32.
      keys: `[b, h, e, s]`.
      values: `[b, h, s, e]`.
      bias: `[b, t, s]`.

    Returns:
      `[b, t, heads * e]`.
    """
    out = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
    call = jax.ffi.ffi_call("ospec_attention", out, vmap_method="sequential")
    return call(queries, keys, values, bias).reshape(*queries.shape[:2], -1)


@functools.cache
def is_available(folder: Path) -> bool:
    """Builds and registers the functions, unless that was done before.

    False where they cannot be used: on accelerators and other CPUs, and, with a warning
    that says why, without a compiler or where its code fails the check against numpy.
    `OSPEC_NATIVE=0` turns them off.

    Args:
      folder: Where the compiled library is kept.
    """
    is_off = os.environ.get("OSPEC_NATIVE") == "0" or jax.default_backend() != "cpu"
    if is_off or "avx512_vnni" not in _cpu_features():
        return False

    try:
        library = _load(folder)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"int8 decoding falls back to XLA's products, at about half the speed: "
            f"{detail}. Install a C++ compiler, or set OSPEC_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return False

    for target, handler in _HANDLERS.items():
        if target not in _REGISTERED:  # a name can be given only once
            capsule = jax.ffi.pycapsule(getattr(library, handler))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
            _REGISTERED.add(target)

    if not _is_correct():
        warnings.warn(
            "int8 decoding falls back to XLA's products: this machine's compiler built "
            "ours wrongly. Set CXX to another one, or OSPEC_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return False

    return True


def _load(folder: Path) -> ctypes.CDLL:
    """The compiled library; another CPU, compiler, jaxlib or source has its own.

    Its name holds a digest of its content: loading a damaged one would end the process.
    """
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((p for n in names if n and (p := shutil.which(n))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")

    # Whatever could make another binary is a part of its name, so that no stale one is
    # ever loaded.
    version = _run(compiler, "--version").splitlines()[0]
    jaxlib = importlib.metadata.version("jaxlib")
    texts = [p.read_text() for p in sorted(_FOLDER.iterdir()) if p.suffix in _SUFFIXES]
    key = "\n".join((version, _cpu_features(), jaxlib, *_FLAGS, *texts))
    name = f"kernels-{_digest(key.encode())}"
    place = folder / "native"

    # A damaged file is deleted, so that it is built anew below.
    for library in sorted(place.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):
            if library.stem == f"{name}-{_digest(library.read_bytes())}":
                return ctypes.cdll.LoadLibrary(str(library))
            library.unlink()

    with tempfile.TemporaryDirectory() as building:
        built = Path(building) / "kernels.so"
        sources = [str(_FOLDER / source) for source in _SOURCES]
        include = f"-I{jax.ffi.include_dir()}"
        _run(compiler, *_FLAGS, include, *sources, "-o", str(built))
        content = built.read_bytes()
        library = place / f"{name}-{_digest(content)}.so"
        if not atomic.keep(library, content):
            library = built  # what is loaded stays, also when its file is gone

        return ctypes.cdll.LoadLibrary(str(library))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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
    """Compares results of odd shapes with numpy's."""
    rng = np.random.default_rng(0)

    for rows, features, columns in ((1, 5, 7), (2, 64, 64), (9, 70, 100), (16, 33, 63)):
        x = rng.normal(size=(rows, columns)).astype(np.float32)
        kernel = rng.integers(-127, 128, size=(features, columns)).astype(np.int8)
        scale = rng.random(features).astype(np.float32)
        # As `quantize_rows` computes it, bit by bit: the integer product must be equal.
        row_scale = np.max(np.abs(x), axis=1, keepdims=True) * np.float32(1 / 127)
        quantized = np.rint(x / row_scale).astype(np.int32)
        expected = (quantized @ kernel.T.astype(np.int32)).astype(np.float32)
        expected = expected * row_scale * scale
        if not np.array_equal(expected, np.asarray(int8_linear(x, kernel, scale))):
            return False

    q, k, v = (
        rng.normal(size=s) for s in ((1, 3, 2, 16), (1, 1, 16, 32), (1, 1, 32, 16))
    )
    scores = np.einsum("bthe,bes->bths", q, k[:, 0]) / 4
    weights = np.exp(scores) / np.sum(np.exp(scores), axis=-1, keepdims=True)
    expected = np.einsum("bths,bse->bthe", weights, v[:, 0]).reshape(1, 3, 32)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    found = attention(q, k, v, np.zeros((1, 3, 32), np.float32))

    return np.allclose(found, expected, rtol=1e-4, atol=1e-5)
