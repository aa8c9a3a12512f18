# SPDX-License-Identifier: Apache-2.0
"""What is asked of the machine."""

import gc
import sys
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import _platform


class Node:
    """Holds itself, so that counting references does not free it."""

    def __init__(self):
        self.itself = self


def test_memory_is_handed_back_of_what_holds_itself():
    gc.disable()
    try:
        seen = weakref.ref(Node())
        assert seen() is not None
        _platform.release_memory()
        assert seen() is None
    finally:
        gc.enable()


def large_pages_at(address):
    """Bytes on large pages of the mapping that holds an address."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            holds = begin <= address < end
        elif holds and first == "AnonHugePages:":
            return 1024 * int(line.split()[1])

    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has them")
def test_large_arrays_move_to_large_pages():
    numbers = np.arange(4 << 20, dtype=np.int32)
    array = jnp.asarray(numbers.copy()) + 0
    small = jnp.arange(10)
    found = _platform.use_large_pages([small, array])
    if not found:
        pytest.skip("this system gives no large pages")
    assert found >= array.nbytes - 2 * (2 << 20)
    assert large_pages_at(array.unsafe_buffer_pointer() + array.nbytes // 2) >= found
    np.testing.assert_array_equal(array, numbers)
