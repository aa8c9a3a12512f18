# SPDX-License-Identifier: Apache-2.0
"""Places that results go to: tried before any work, and named where they fail."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ospec_jax import atomic
from ospec_jax.config import ConfigError
from ospec_jax.reports.answers import STANDARD_OUTPUT
from ospec_jax.reports.progress import Interrupt

_PROBE = bytes(1 << 16)
"""More than a file system's last crumbs."""

_REMEDIES = {
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.EFBIG: "raise the limit of a file's size, or choose another place",
    errno.EIO: "the device fails; choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def check_outputs(
    files: Iterable[Path | None] = (),
    folders: Iterable[Path | None] = (),
    figures: Iterable[Path | None] = (),
    inputs: Iterable[Path | None] = (),
) -> None:
    """Refuses places that cannot be written to, while nothing has been done yet.

    Nothing is left there. None stands for no output, `-` for standard output.

    Args:
      figures: Files whose ending says their format.
      inputs: Files that are read, and must not be written over.

    Raises:
      ConfigError: One is of the wrong kind, or cannot be written; or two are the same.
    """
    drawn = [file for file in figures if file is not None]
    written = [file for file in files if file not in (None, STANDARD_OUTPUT)]
    written += drawn
    taken = {os.path.realpath(file) for file in inputs if file is not None}

    for file in written:
        assert file is not None
        if file.exists() and not file.is_file() and not file.is_dir():
            continue  # a device or a pipe
        if os.path.realpath(file) in taken:
            raise ConfigError(
                f"{file} is read by this command, or written twice; choose another file"
            )
        taken.add(os.path.realpath(file))
        _check_file(file)

    for file in drawn:
        _check_format(file)

    for folder in folders:
        if folder is not None:
            _check_folder(folder)


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise ConfigError(f"cannot write {file}: it is a folder; name a file in it")

    # What a link leads to is written, beside which the probe must fit.
    _probe(Path(os.path.realpath(file)).parent, file)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cannot write into {folder}: it is a file; name a folder")

    _probe(folder, folder)


def _check_format(file: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    ending = file.suffix.lstrip(".").lower()
    if ending and ending not in known:
        raise ConfigError(
            f"cannot draw {file}: {ending!r} is none of {', '.join(sorted(known))}"
        )


def _probe(folder: Path, wanted: Path) -> None:
    """Writes into a folder, or into the nearest one above that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent

    try:
        # A file without a name: nothing is left behind, whatever happens.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(_PROBE)
            probe.flush()
    except OSError as error:
        raise ConfigError(describe_failure(error, wanted)) from error


def describe_failure(error: OSError, path: object = None) -> str:
    """What the system refused, where, and what helps, in one line."""
    place = path if path is not None else error.filename
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    remedy = _REMEDIES.get(error.errno or 0, "choose another place")
    if place is None:
        return f"{reason}; {remedy}"

    return f"{place}: {reason}; {remedy}"


_HELD = contextlib.ExitStack()
_LOCK = ".lock"


def hold(*folders: Path | None, files: Sequence[Path | None] = ()) -> None:
    """Keeps other processes from folders and files until `release`.

    Raises:
      InUseError: One is held by another process, which the message names.
    """
    for folder in filter(None, folders):
        if not folder.exists():
            # The stack runs from its top: this comes when the lock is given back.
            _HELD.callback(_remove_if_unused, folder)
        _HELD.enter_context(atomic.locked(folder / _LOCK, folder))

    for file in filter(None, files):
        # Standard output, devices and pipes belong to whoever redirected them.
        if file != STANDARD_OUTPUT and (file.is_file() or not file.exists()):
            lock = file.with_name(f".{file.name}.lock")
            _HELD.enter_context(atomic.locked(lock, file))


def _remove_if_unused(folder: Path) -> None:
    """Removes a folder that holds nothing but its lock."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def release() -> None:
    """Gives back all that `hold` took."""
    _HELD.close()


def run_then(
    interrupt: Interrupt,
    work: Callable[[], None],
    last: Sequence[Callable[[], object]],
) -> None:
    """Works, and then does what comes last, whatever ended the work.

    Each of the last things is done in its order, also where another one fails; then the
    failure is raised. Meanwhile no signal ends anything.
    """
    try:
        work()
    finally:
        with interrupt.held(), contextlib.ExitStack() as ends:
            # The stack runs from its top.
            for end in reversed(last):
                ends.callback(end)
