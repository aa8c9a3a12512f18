# SPDX-License-Identifier: Apache-2.0
"""Whether answers are right: what lossy reasoning must be measured by."""

import math
import re
import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_CODE = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_SECONDS = 5
_MEBIBYTES = 1024
_Z = 1.959964
"""Of a two-sided interval of 95%."""


def last_number(text: str) -> float | None:
    """The number that an answer comes to: a boxed one, else the last one in the text.

    >>> last_number("So she sold 48 + 24 = 72 clips, for $1,440.")
    1440.0
    """
    boxed = _BOXED.findall(text)
    found = _NUMBER.findall(boxed[-1] if boxed else text)
    return float(found[-1].replace(",", "")) if found else None


def is_right_number(text: str, reference: str) -> bool:
    """Whether an answer and a reference come to the same number.

    Args:
      reference: GSM8K's solutions end with `#### 72`; a number alone will do.
    """
    wanted = last_number(reference.rpartition("####")[2])
    found = last_number(text)
    if wanted is None or found is None:
        return False

    return math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-6)


def code_of(text: str) -> str:
    """The first block of Python in an answer; without one, all of it."""
    blocks = _CODE.findall(text)
    return blocks[0] if blocks else text


def passes_tests(text: str, tests: Sequence[str], setup: str = "") -> bool:
    """Whether an answer's code passes assertions.

    **It runs what a model wrote**, in a process of its own, within limits of time,
    memory, files and processes and in an empty folder, but with the user's rights: use
    it for benchmarks alone.

    Args:
      tests: Lines of Python, such as MBPP's `assert f(2) == 4`.
      setup: Runs before them.
    """
    # Code that ends the program by itself has passed nothing: only the end of all tests
    # leaves with this number, which it cannot know.
    passed = 64 + secrets.randbelow(128)
    last = f"raise SystemExit({passed})"
    program = "\n".join([code_of(text), setup, *tests, last])
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * _SECONDS,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False

    return done.returncode == passed


def _limit() -> None:
    """Bounds of the process that it is called in."""
    size = _MEBIBYTES * 2**20
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


class Share(NamedTuple):
    """A share of right answers with its interval of 95% (Wilson's).

    >>> Share.of(8, 10)
    Share(mean=0.8, low=0.49, high=0.943)
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, num_right: int, num_all: int) -> "Share":
        """Of so many answers; nothing is known of none."""
        if not num_all:
            return cls(0.0, 0.0, 1.0)

        p = num_right / num_all
        scale = 1 + _Z**2 / num_all
        middle = (p + _Z**2 / (2 * num_all)) / scale
        spread = math.sqrt(p * (1 - p) / num_all + _Z**2 / (4 * num_all**2))
        half = _Z * spread / scale
        return cls(round(p, 3), round(middle - half, 3), round(middle + half, 3))
