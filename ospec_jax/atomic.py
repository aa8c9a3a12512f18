# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whenever a process is killed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, which takes its place at the end.

    Until then `file` stays as it was, also if writing fails. The path's name ends in
    `.part`, so that nobody who looks for `*.safetensors` or the like takes a leftover
    of a killed process for a result. Missing folders are made.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "result.txt"
    >>> with replacing(file) as part:
    ...     _ = part.write_text("whole")
    >>> file.read_text()
    'whole'
    """
    if file.exists() and not file.is_file():
        # A device or a pipe, such as /dev/stdout, must not give way to a file.
        yield file
        return

    # A link stays a link: what it leads to is replaced.
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")

    try:
        yield part
        if file.exists():
            shutil.copymode(file, part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 text in place of what `file` held."""
    with replacing(file) as part:
        part.write_text(text, "utf-8")


def write_bytes(file: Path, content: bytes | bytearray) -> None:
    """Writes bytes in place of what `file` held."""
    with replacing(file) as part:
        part.write_bytes(content)


def write_figure(figure, file: Path) -> Path:
    """Draws a figure of matplotlib into `file`, by its ending, and closes it."""
    import matplotlib.pyplot as plt

    with replacing(file) as part:
        # The part's own ending says nothing of the format.
        figure.savefig(part, dpi=140, format=file.suffix.lstrip(".") or "png")

    plt.close(figure)
    return file
