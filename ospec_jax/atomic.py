# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whenever a process is killed."""

import contextlib
import itertools
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path

import filelock


@contextlib.contextmanager
def replacing(file: Path) -> Generator[Path]:
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
        with named_errors(file):
            yield file
        return

    # A link stays a link: what it leads to is replaced.
    file = Path(os.path.realpath(file))
    with named_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    # Other machines that write here, too, may have processes of the same number.
    part = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")

    try:
        with named_errors(file):
            yield part
            if file.exists():
                # A file keeps the rights that its owner gave it.
                shutil.copymode(file, part)
            os.replace(part, file)
    finally:
        with contextlib.suppress(OSError):
            # After a success there is nothing left of that name.
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: Path) -> Generator[None]:
    """Lets errors of the system name `path`: a full disk does not say whose file it
    has no room for."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # Errors of a renaming name both files already.
        if error.filename2 is None and error.errno is not None:
            error.filename = str(path)
        raise


class InUseError(RuntimeError):
    """Another process, or another thread of this one, works on the same."""


@contextlib.contextmanager
def locked(
    lock: Path, what: object, patience: float = 0.0, on_wait: Callable = print
) -> Generator[None]:
    """Keeps other processes from what a lock file stands for.

    The system releases the lock of a process that ends, however it ends. Where locks
    are not possible, as on some network drives, nothing is kept from anybody.

    Args:
      what: Is named to others who want it.
      patience: Seconds to wait for who holds it.
      on_wait: Called with a line about that one before waiting.

    Raises:
      InUseError: It is held for longer.
    """
    holder = lock.with_name(f"{lock.name}-holder")
    guard = filelock.FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Without waiting first: only who must wait is told of it.
            guard.acquire(timeout=0)
        except filelock.Timeout:
            if patience > 0:
                on_wait(f"waiting for {what}, which is used by {_read_holder(holder)}")
            guard.acquire(timeout=patience)
    except filelock.Timeout:
        raise InUseError(
            f"{what} is used by {_read_holder(holder)}; wait until that ends, or use "
            f"another place"
        ) from None
    except (OSError, NotImplementedError):
        yield
        return

    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        keep(holder, f"{os.getpid()} on {platform.node()}, since {since}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        guard.release()


def _read_holder(holder: Path) -> str:
    try:
        return f"process {holder.read_text()}"
    except (OSError, ValueError):
        return "another process"


def set_aside(file: Path) -> Path | None:
    """Gives what a file holds another name, `FILE.before`, or `FILE.before-2`, ...

    Returns:
      The new name; None if the file is not there, or empty.
    """
    if not file.is_file() or not file.stat().st_size:
        return None

    for number in itertools.count(1):
        ending = ".before" if number == 1 else f".before-{number}"
        place = file.with_name(file.name + ending)
        if not place.exists():
            file.rename(place)
            return place

    raise AssertionError("numbers do not end")


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 text in place of what `file` held."""
    with replacing(file) as part:
        part.write_text(text, "utf-8")


def write_bytes(file: Path, content: bytes | bytearray) -> None:
    """Writes bytes in place of what `file` held."""
    with replacing(file) as part:
        part.write_bytes(content)


def keep(file: Path, content: bytes) -> bool:
    """Writes what can be made again, if there is a place for it; tells whether."""
    try:
        write_bytes(file, content)
    except OSError:
        return False

    return True


def write_figure(figure, file: Path) -> Path:
    """Draws a figure of matplotlib into `file`, by its ending, and closes it."""
    import matplotlib.pyplot as plt

    with replacing(file) as part:
        # The part's own ending says nothing of the format.
        figure.savefig(part, dpi=140, format=file.suffix.lstrip(".") or "png")

    plt.close(figure)
    return file
