# SPDX-License-Identifier: Apache-2.0
"""The tool that counts how many requests a device holds."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "largest_batch.py"))
SETTINGS = TOOL["Settings"](depth=7)


def test_bytes_are_those_that_an_h100_held():
    """By the executables' own account of their arguments; see docs/devices.md."""
    bytes_of = lambda rows: TOOL["argument_bytes"](SETTINGS, 2048, rows, 1)
    assert bytes_of(1) == 17_189_669_061
    assert bytes_of(8) == 19_128_505_800


def test_more_devices_and_shorter_contexts_hold_more():
    gib = 1 << 30
    largest = lambda *args: TOOL["largest_batch"](SETTINGS, *args)
    assert largest(16 * gib, 2048, 1) == 0
    one = largest(32 * gib, 2048, 1)
    bytes_of = lambda rows: TOOL["argument_bytes"](SETTINGS, 2048, rows, 1)
    assert bytes_of(one) <= 0.9 * 32 * gib < bytes_of(one + 1)
    assert largest(32 * gib, 8192, 1) == one // 4
    assert largest(32 * gib, 2048, 4) > 4 * one
