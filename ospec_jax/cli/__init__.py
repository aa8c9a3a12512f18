# SPDX-License-Identifier: Apache-2.0
"""The `ospec` command: thin wrappers that read arguments and print results."""

import contextlib
import sys
import warnings

import tyro

from ospec_jax.cli.answer import generate, learn
from ospec_jax.cli.make import distill, export_draft, import_draft, lower
from ospec_jax.cli.measure import bench, demo, roofline
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
    ConfigError, PromptTooLongError, WeightsError, checkpoint.CheckpointError,
    FileNotFoundError, FloatingPointError,
)  # fmt: skip


def drafters() -> None:
    """Lists the families of drafters, and the drafts that come with the package."""
    families = {name: family.description for name, family in FAMILIES.items()}
    for name, description in (families | MIXES).items():
        print(f"{name:16} {description}")
    for name, folder in shipped_drafts().items():
        meta = checkpoint.load(folder).meta
        print(f"shipped:{name:8} {meta.family} for {meta.target}")


def main() -> None:
    """Entry point of `ospec`."""
    functions = (generate, learn, distill, bench, roofline, lower, drafters, demo)
    functions += (stream, record, replay, telemetry)
    commands = {function.__name__: function for function in functions}
    commands |= {"import": import_draft, "export": export_draft}
    warnings.showwarning = lambda message, *_: console.print(f"[yellow]{message}")
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="ospec")
    except _USER_ERRORS as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(Exception):
            console.print("interrupted")
        is_saved = isinstance(interrupt, Interrupted)
        sys.exit(interrupt.exit_code if is_saved else 130)
