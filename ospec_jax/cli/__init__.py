# SPDX-License-Identifier: Apache-2.0
"""The `ospec` command: thin wrappers that read arguments and print results."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable

import tyro

from ospec_jax.atomic import InUseError
from ospec_jax.cli.answer import generate, learn
from ospec_jax.cli.make import distill, export_draft, import_draft, lower
from ospec_jax.cli.measure import bench, demo, roofline
from ospec_jax.cli.outputs import describe_failure, release
from ospec_jax.cli.streams import record, replay, stream, telemetry
from ospec_jax.config import ConfigError
from ospec_jax.decoding.request import PromptTooLongError
from ospec_jax.drafters.combine import MIXES
from ospec_jax.drafters.registry import FAMILIES
from ospec_jax.loading import shipped_drafts
from ospec_jax.models.weights import WeightsError
from ospec_jax.reports.progress import Interrupted, console
from ospec_jax.storage import checkpoint

_USER_ERRORS = (
    ConfigError,
    PromptTooLongError,
    WeightsError,
    checkpoint.CheckpointError,
    FileNotFoundError,
    FloatingPointError,
    InUseError,
)


def drafters() -> None:
    """Lists the families of drafters, and the drafts that come with the package."""
    families = {name: family.description for name, family in FAMILIES.items()}
    for name, description in (families | MIXES).items():
        print(f"{name:16} {description}")

    for name, folder in shipped_drafts().items():
        meta = checkpoint.load(folder).meta
        print(f"shipped:{name:8} {meta.family} for {meta.target}")


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "learn": learn,
    "distill": distill,
    "bench": bench,
    "roofline": roofline,
    "lower": lower,
    "drafters": drafters,
    "demo": demo,
    "stream": stream,
    "record": record,
    "replay": replay,
    "telemetry": telemetry,
    "import": import_draft,
    "export": export_draft,
}
"""Commands by name; `docs/cli.md` lists all of them."""


def main() -> None:
    """Entry point of `ospec`."""
    warnings.showwarning = lambda message, *_: console.print(f"[yellow]{message}")
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="ospec")
    except _USER_ERRORS as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` has.
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        console.print(f"[red]error:[/red] {describe_failure(error)}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(Exception):
            console.print("interrupted")
        is_saved = isinstance(interrupt, Interrupted)
        sys.exit(interrupt.exit_code if is_saved else 130)
    finally:
        release()


def _drop_output() -> None:
    """Lets what is still to be written go nowhere: Python flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
