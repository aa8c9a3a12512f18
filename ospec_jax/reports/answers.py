# SPDX-License-Identifier: Apache-2.0
"""Answers as JSON lines: each is on disk before the next one is begun.

A checkpoint counts answers only after their lines are written. So of a run that was
killed the file may hold more answers than its last checkpoint counts, never fewer: who
resumes keeps what is counted, and gives the rest again.
"""

import contextlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ospec_jax import atomic
from ospec_jax.config import ConfigError

STANDARD_OUTPUT = Path("-")


class AnswerLog:
    """Writes answers line by line, and remembers them.

    Attributes:
      rows: All answers of the run in their order, also those before it was resumed.
    """

    def __init__(
        self,
        files: Iterable[Path | None],
        answered: Sequence[str] = (),
        older: Path | None = None,
        json_file: Path | None = None,
    ):
        """Opens the files, each with the lines of what was answered before.

        Args:
          files: To write; None for none, `-` for standard output.
          answered: Of a resumed run: ids of the answers that it goes on behind, in
            order. Each is taken from the first file that has it; others, which will be
            given again, are dropped.
          older: Lines that are not added to, but read, and cut likewise.
          json_file: A list of answers that is only read, if there is one.

        Raises:
          ConfigError: A file of lines holds something else.
        """
        wanted = [file for file in files if file is not None]
        # A progress bar redirects `sys.stdout` while it is shown.
        self._output = sys.stdout if STANDARD_OUTPUT in wanted else None
        paths = {file.resolve(): None for file in wanted if file != STANDARD_OUTPUT}

        # Every file that may hold earlier answers, in the order in which they are
        # believed.
        sources = [read_answers(path) for path in paths if path.is_file()]
        if older is not None and older.is_file():
            sources.append(read_answers(older))
            kept = _ordered([sources[-1]], answered)
            atomic.write_text(older, _lines(kept))

        sources.append(_read_list(json_file))
        self.rows = _ordered(sources, answered)
        if paths or json_file is not None:
            _warn_of_missing(sources, answered)

        self._files = []

        for path in paths:
            # Written anew and whole, then added to: what is not counted is gone from
            # all files.
            atomic.write_text(path, _lines(self.rows))
            self._files.append(path.open("a", encoding="utf-8"))

    def add(self, row: dict) -> None:
        """Writes one answer, `Result.to_json()`."""
        self.rows.append(row)
        for file in self._files:
            with atomic.named_errors(Path(file.name)):
                file.write(_lines([row]))
                file.flush()

        if self._output is not None:
            self._output.write(_lines([row]))
            self._output.flush()

    def close(self) -> None:
        """Ends writing."""
        for file in self._files:
            # What could not be written was said when it was added.
            with contextlib.suppress(OSError):
                file.close()


def check_unused(file: Path | None) -> None:
    """Refuses to begin a run's answers in a file that holds others.

    Raises:
      ConfigError: It does.
    """
    if file is not None and file.is_file() and file.stat().st_size > 0:
        raise ConfigError(
            f"{file} exists, and answers are only added to by the same run: choose "
            f"another file, or resume"
        )


def read_answers(file: Path) -> list[dict]:
    """The answers of a file of lines; a last one cut short is dropped with a warning.

    Raises:
      ConfigError: A line is no answer.
    """
    *lines, rest = file.read_bytes().split(b"\n")
    if rest:
        warnings.warn(
            f"the last line of {file} was cut short, and is left out", stacklevel=2
        )

    rows = []

    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["id"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{file}, line {number}: no answer; move the file away to go on "
                f"without the answers that it holds"
            ) from error

    return rows


def _read_list(file: Path | None) -> list[dict]:
    """The answers of a JSON list; none where there is nothing of that kind."""
    if file is None or not file.is_file():
        return []

    try:
        rows = json.loads(file.read_text("utf-8"))
    except ValueError:
        return []

    if not isinstance(rows, list):
        return []

    return [row for row in rows if isinstance(row, dict) and "id" in row]


def _counted(ids: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each id with how often it came before: different prompts may share a name."""
    counts: Counter = Counter()
    for name in ids:
        yield name, counts[name]
        counts[name] += 1


def _by_id(sources: Iterable[list[dict]]) -> dict[tuple[str, int], dict]:
    """Rows by their counted ids; the first source that has one wins."""
    found: dict[tuple[str, int], dict] = {}
    for rows in sources:
        ids = _counted(row["id"] for row in rows)
        for key, row in zip(ids, rows, strict=True):
            found.setdefault(key, row)

    return found


def _ordered(sources: Iterable[list[dict]], answered: Sequence[str]) -> list[dict]:
    """The row of each of these ids, in their order."""
    found = _by_id(sources)
    # Rows that are not counted are dropped here: the run gives them again.
    return [found[key] for key in _counted(answered) if key in found]


def _warn_of_missing(sources: list[list[dict]], answered: Sequence[str]) -> None:
    found = _by_id(sources)
    missing = [key[0] for key in _counted(answered) if key not in found]
    if missing:
        warnings.warn(
            f"{len(missing)} of {len(answered)} earlier answers were not kept, the "
            f"first is {missing[0]!r}: what is written goes without them",
            stacklevel=3,
        )


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
