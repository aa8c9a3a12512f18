# SPDX-License-Identifier: Apache-2.0
"""What is asked of the machine."""

import gc
import weakref

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
