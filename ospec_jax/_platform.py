# SPDX-License-Identifier: Apache-2.0
"""XLA's flags for the CPU, set when the package is imported first.

By default XLA:CPU fuses large products with their neighbours, in a library: attention's
scores with the softmax, whose exponentials have other last bits there than behind small
products. With `INDIVIDUAL_DOT` the library gets every product, each by itself. Its
results do not depend on the number of rows, which is what row invariance rests on (see
`models.layers`).
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_VALUE = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
_KNOWN_TO = ("0.10.", "0.11.", "0.12.")
"""Versions of jaxlib that know the flag and need it: all that the package allows."""


def set_flags() -> None:
    """Adds the flag unless the user chose a value, or this jaxlib may not know it."""
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA ends the process at a flag that it does not know.
    is_known = importlib.metadata.version("jaxlib").startswith(_KNOWN_TO)
    if is_known and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}={_VALUE}".strip()


def cpu_name() -> str:
    """The processor's, as the system has it; `unknown` where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"

    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else "unknown"


def device_name() -> str:
    """What computes, so that figures of one machine are told from another's.

    Of a CPU that is the processor, and how many cores it has.
    """
    # The flags come first.
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)

    return f"{cpu_name()}, {os.cpu_count()} cores"


def release_memory() -> None:
    """Hands back what the allocator keeps of loading and compiling.

    Measured on SmolLM2 with a learning session: 290 MB of 1.1 GB, in 20 ms. A no-op
    where the C library is not glibc.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def use_large_pages(arrays: Iterable[Any]) -> int:
    """Asks Linux for pages of 2 MB under arrays that a CPU reads again and again.

    With pages of 4 KB a core looks up a page every 64 lines of memory, and prefetching
    ends at each. Contents and addresses stay as they are.

    Args:
      arrays: On this machine's CPU, ready or not.

    Returns:
      The bytes that lie on such pages now; 0 where the system has none to give.
    """
    if not sys.platform.startswith("linux"):
        return 0

    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    num_bytes = 0

    for array in arrays:
        address = array.unsafe_buffer_pointer()
        begin = -(-address // _LARGE_PAGE) * _LARGE_PAGE
        size = (address + array.nbytes) // _LARGE_PAGE * _LARGE_PAGE - begin
        if size <= 0:
            continue
        madvise(begin, size, _MADV_HUGEPAGE)
        # An older kernel refuses this, and moves the pages by and by.
        if madvise(begin, size, _MADV_COLLAPSE) == 0:
            num_bytes += size

    return num_bytes


set_flags()
