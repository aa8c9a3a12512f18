# SPDX-License-Identifier: Apache-2.0
"""Layers of int8 models in C++, built with the machine's compiler at first use.

XLA:CPU packs the kernel of an int8 product at every call, which costs more than the
product itself when there are few rows, makes five calls of an attention that a loop
does in one, and hands some twenty small operations of a layer over from thread to
thread. All this is for CPUs with AVX-512 VNNI; where there is AMX, too, products of
several rows use its tiles, with the same bits. Elsewhere, and without a compiler, XLA's
own code does the same, slower, and differing in last bits.
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
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import atomic
from ospec_jax.kernels import checks

_FOLDER = Path(__file__).parent
_SOURCES = ("int8_linear.cc", "attention.cc", "decoder_layers.cc", "most_probable.cc")
_HANDLERS = {
    "ospec_int8_linear": "OspecInt8Linear",
    "ospec_attention": "OspecAttention",
    "ospec_decoder_layers": "OspecDecoderLayers",
    "ospec_most_probable": "OspecMostProbable",
}
_REGISTERED: set[str] = set()
_SUFFIXES = (".cc", ".h")
_LANES = 16
_MAX_WAIT = 300
"""Seconds for another process to build."""
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-w",
)


def int8_linear(
    x, kernel, scale, has_tiles: bool = True, *, gain=None, eps: float = 0.0
):
    """`quantize_rows(x) @ kernel.T * scale`, in float32.

    Args:
      x: `[..., in]` float32.
      kernel: `[out, in]` int8.
      scale: `[out]` float32.
      has_tiles: Use AMX where the CPU has it. The bits are the same without.
      gain: `[in]` of a norm in front of the product, with the bits that it has in
        `decoder_layer`; None for no norm.
      eps: Of the norm.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((rows.shape[0], kernel.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("ospec_int8_linear", out, vmap_method="sequential")
    gain = jnp.zeros(0, jnp.float32) if gain is None else gain
    y = call(
        rows,
        kernel,
        scale,
        gain,
        eps=np.float32(eps),
        has_tiles=np.bool_(has_tiles),
    )
    return y.reshape(*x.shape[:-1], -1)


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


def most_probable(logits, count: int):
    """The largest entries of each row in falling order; of equal ones the first.

    Args:
      logits: `[..., v]` float32.

    Returns:
      Their log-probabilities, `[..., count]`, and places.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    shape = (rows.shape[0], count)
    out = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)]
    call = jax.ffi.ffi_call("ospec_most_probable", out, vmap_method="sequential")
    log_probs, places = call(rows)

    return tuple(x.reshape(*logits.shape[:-1], count) for x in (log_probs, places))


def decoder_layers(
    x,
    angles,
    bias,
    keys,
    values,
    starts,
    weights,
    eps: float,
    has_tiles: bool = True,
    *,
    taps: tuple[int, ...] = (),
    beside=None,
    head=None,
    has_normed_residual: bool = False,
    num_valid=None,
):
    """Pre-norm blocks of the Llama family, or one of a draft like it, in int8.

    Norms, rotary embedding and SwiGLU add and multiply in an order of their own: their
    last bits differ from XLA's, but depend on nothing beside a row.

    Args:
      x: `[b, t, d]`, all in float32.
      angles: Cosines and sines, `[b, t, 1, e]`.
      bias: `[b, t, s]`.
      keys: `[layers, b, h, e, s]`; written in place where nobody else reads them.
      values: `[layers, b, h, s, e]`, likewise.
      starts: `[b]`, first slot that each row's tokens are written to.
      weights: What `layer_weights` found of stacked layers, `[layers, ...]`. There may
        be more of them than keys: the first ones are run.
      eps: Of the norms.
      taps: Layers whose input is wanted; each of `0, ..., layers - 1` at most once.
      beside: `(rows [b, t, d'], gain [1, d'])`, which attention reads in front of `x`,
        each normed by itself; for a single layer. None for `x` alone.
      head: `(gain [d], kernel [v, d], scale [v])` of the norm and the projection behind
        the blocks; an empty gain stands for no norm, None for no head.
      has_normed_residual: The residual stream of a single layer begins with the normed
        `x`.
      num_valid: `[1]`, tokens of a lone request that are no padding, at least one. What
        lies behind them is not computed: its results are zeros, and its slots are not
        written. None, and of several requests any, stands for all.

    Returns:
      The new `x`, `keys` and `values`; the inputs of the `taps`, `[taps, b, t, d]`; and
      `[b, t, v]` logits, where v = 0 without a head.
    """
    b, t, d = x.shape
    nothing = jnp.zeros(0, jnp.float32)
    beside = beside or (nothing, nothing)
    gain, kernel, scale = head or (nothing, jnp.zeros((0, 0), jnp.int8), nothing)
    gain = gain if gain.shape == nothing.shape else gain[None]
    shapes = (
        x.shape,
        keys.shape,
        values.shape,
        (len(taps), b, t, d),
        (b, t, kernel.shape[0]),
    )
    call = jax.ffi.ffi_call(
        "ospec_decoder_layers",
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        input_output_aliases={4: 1, 5: 2},
        vmap_method="sequential",
    )
    cos, sin = (half.reshape(b, t, -1) for half in angles)

    return call(
        x,
        cos,
        sin,
        bias,
        keys,
        values,
        starts.astype(jnp.int32),
        jnp.zeros(0, jnp.int32) if num_valid is None else num_valid.astype(jnp.int32),
        *weights,
        *beside,
        gain,
        kernel[None],
        scale[None],
        eps=np.float32(eps),
        has_tiles=np.bool_(has_tiles),
        has_normed_residual=np.bool_(has_normed_residual),
        taps=np.asarray(taps, np.int64),
    )


def decoder_layer(x, angles, bias, keys, values, starts, weights, *args, **kwargs):
    """`decoder_layers` of a single one, whose arrays are not stacked.

    Args:
      keys: `[b, h, e, s]`.
      values: `[b, h, s, e]`.
      weights: What `layer_weights` found of a layer.
      args: Further ones of `decoder_layers`, as are `kwargs`.

    Returns:
      The new `x`, `keys` and `values`, and logits.
    """
    stacked = lambda array: array if array.shape == (0,) else array[None]
    if kwargs.get("beside"):
        rows, gain = kwargs["beside"]
        kwargs["beside"] = rows, gain[None]
    out, keys, values, _, logits = decoder_layers(
        x,
        angles,
        bias,
        keys[None],
        values[None],
        starts,
        tuple(map(stacked, weights)),
        *args,
        **kwargs,
    )
    return out, keys[0], values[0], logits


def layer_weights(params, input_norm: str = "input_layernorm") -> tuple | None:
    """What is read of a layer's parameters; None if they are not int8.

    Args:
      params: A target's layer, or all of them stacked, or a draft's layer, whose
        attention lies among the others.
      input_norm: Of `x`.
    """
    attention = params.get("self_attn", params)
    mlp = params["mlp"]
    products = (
        attention["qkv_proj"],
        attention["o_proj"],
        mlp["gate_up_proj"],
        mlp["down_proj"],
    )
    if any(product["kernel"].dtype != jnp.int8 for product in products):
        return None

    qkv, o, gate_up, down = ((p["kernel"], p["scale"]) for p in products)
    nothing = jnp.zeros(0, jnp.float32)
    gain_of = lambda module, name: module[name]["scale"] if name in module else nothing

    return (
        gain_of(params, input_norm),
        *qkv,
        attention["qkv_proj"].get("bias", nothing),
        gain_of(attention, "q_norm"),
        gain_of(attention, "k_norm"),
        *o,
        gain_of(params, "post_attention_layernorm"),
        *gate_up,
        *down,
    )


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

    functions = int8_linear, attention, decoder_layer, most_probable
    if not checks.is_correct(*functions):
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

    with _alone_in(place):
        # A damaged file is deleted, so that it is built anew below.
        for library in sorted(place.glob(f"{name}-*.so")):
            with contextlib.suppress(OSError):
                if library.stem == f"{name}-{_digest(library.read_bytes())}":
                    return ctypes.cdll.LoadLibrary(str(library))
                library.unlink()

        return _build(compiler, place, name)


def _build(compiler: str, place: Path, name: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as building:
        built = Path(building) / "kernels.so"
        include = f"-I{jax.ffi.include_dir()}"

        def compiled(source: str) -> str:
            place = str(Path(building) / f"{source}.o")
            code = str(_FOLDER / source)
            _run(compiler, *_FLAGS, include, "-c", code, "-o", place)
            return place

        # A process for each of them: on two cores that takes half the time.
        with ThreadPoolExecutor(len(_SOURCES)) as pool:
            objects = list(pool.map(compiled, _SOURCES))

        _run(compiler, "-shared", *objects, "-o", str(built))
        content = built.read_bytes()
        library = place / f"{name}-{_digest(content)}.so"
        if not atomic.keep(library, content):
            library = built  # what is loaded stays, also when its file is gone

        return ctypes.cdll.LoadLibrary(str(library))


@contextlib.contextmanager
def _alone_in(place: Path) -> Generator[None]:
    """Waits while another process builds, so that it is done once."""
    lock = filelock.FileLock(place / "building.lock")
    # Where nothing can be written nobody waits, and whatever is built is not kept.
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_MAX_WAIT)

    try:
        yield
    finally:
        lock.release()


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
