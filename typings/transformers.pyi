# SPDX-License-Identifier: Apache-2.0
"""Anything may be imported from it: its own thousands of modules take pyright long."""

from typing import Any

def __getattr__(name: str) -> Any: ...
