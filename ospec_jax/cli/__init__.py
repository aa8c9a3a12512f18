# SPDX-License-Identifier: Apache-2.0
"""The `ospec` command: thin wrappers that read arguments and print results."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

import ospec_jax
from ospec_jax.atomic import InUseError
from ospec_jax.cli.answer import generate, learn
from ospec_jax.cli.helping import summary_of, with_plain_help
from ospec_jax.cli.how_much import rules, train_control
from ospec_jax.cli.make import (
    distill,
    export_draft,
    import_draft,
    lower,
    write_prompts,
)
from ospec_jax.cli.measure import bench, demo, roofline, table
from ospec_jax.cli.outputs import describe_failure, release
from ospec_jax.cli.parallel import parallel
from ospec_jax.cli.reasoning import reason
from ospec_jax.cli.recipes import with_recipe
from ospec_jax.cli.serving import chat, load, serve
from ospec_jax.cli.streams import record, replay, stream, telemetry
from ospec_jax.config import InputError
from ospec_jax.drafters.combine import MIXES
from ospec_jax.drafters.registry import FAMILIES
from ospec_jax.loading import shipped_drafts
from ospec_jax.reports.progress import Interrupted, say, told
from ospec_jax.storage import checkpoint

_CONFIG = (tyro.conf.DisallowNone,)
"""What is not given is None; nobody types that."""

_USER_ERRORS = (InputError, InUseError, FileNotFoundError, FloatingPointError)


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
    "serve": serve,
    "chat": chat,
    "load": load,
    "write-prompts": write_prompts,
    "distill": distill,
    "bench": bench,
    "table": table,
    "roofline": roofline,
    "lower": lower,
    "drafters": drafters,
    "demo": demo,
    "stream": stream,
    "record": record,
    "replay": replay,
    "rules": rules,
    "train-control": train_control,
    "telemetry": telemetry,
    "reason": reason,
    "parallel": parallel,
    "import": import_draft,
    "export": export_draft,
}
"""Commands by name; `docs/cli.md` lists all of them."""

EXAMPLES = {
    "generate": 'ospec generate --prompt "Write a haiku about the sea." --stream',
    "learn": "ospec learn --prompts FILE.jsonl --checkpoint my-draft",
    "serve": "ospec serve --port 8000 --checkpoint my-draft",
    "chat": "ospec chat",
    "load": "ospec load --prompts FILE.jsonl --clients 4 --plot load.png",
    "write-prompts": "ospec write-prompts --num 200 --out FILE.jsonl",
    "distill": "ospec distill --prompts FILE.jsonl --out my-draft --num-updates 400",
    "bench": "ospec bench --prompts FILE.jsonl --num-prompts 20 --plot modes.png",
    "table": "ospec table configs/paper_table.py --prompts DIR --out my-table",
    "roofline": "ospec roofline --precision int8",
    "lower": "ospec lower --platforms tpu,cuda --out artefacts",
    "drafters": "ospec drafters",
    "demo": "ospec demo --num-prompts-per-domain 5",
    "stream": "ospec stream --domains math=M.jsonl,sql=S.jsonl --out FILE.jsonl",
    "record": "ospec record --prompts FILE.jsonl --out recording",
    "replay": "ospec replay recording --learners static,gradient,head --plot race.png",
    "rules": "ospec rules recording --trees 4,6,16",
    "train-control": "ospec train-control recording --trees 4,6,16 --out my-policies",
    "telemetry": "ospec telemetry FILE.jsonl --plot learning.png",
    "reason": "ospec reason --prompts FILE.jsonl --target LARGE --draft-model SMALL",
    "parallel": "ospec parallel --prompts FILE.jsonl --target LARGE "
    "--draft-model SMALL",
    "import": "ospec import HEAD --target smollm2-135m --out my-draft",
    "export": "ospec export my-draft --out head --format speculators",
}
"""How each command is typed; `docs/cli.md` and help show them."""


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}", "yellow")


def main() -> None:
    """Entry point of `ospec`."""
    # A line each, without the place in the code that only developers want.
    warnings.showwarning = _say_warning
    try:
        with told():
            _run(sys.argv[1:])
    # Foreseen errors are a line; what was not foreseen keeps its traceback.
    except _USER_ERRORS as error:
        say(f"error: {error}", "red")
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` has.
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        say(f"error: {describe_failure(error)}", "red")
        sys.exit(2)
    # As shells tell of a signal: 130 is a Ctrl-C that nothing was saved for.
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(Exception):
            say("interrupted")
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


def _run(args: list[str]) -> None:
    """Runs a command, or shows which there are."""
    if args == ["--version"]:
        print(f"ospec {ospec_jax.__version__}")
        return

    # tyro's own flags, as for a shell's completion, are about all commands.
    if any(arg.startswith("--tyro") for arg in args):
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="ospec", config=_CONFIG)
    elif args and args[0] in COMMANDS:
        name, *rest = args
        command = COMMANDS[name]
        if command is distill:
            command = with_recipe(distill, rest)
        command = with_plain_help(command)
        about = f"{summary_of(command)}\n\nExample: {EXAMPLES[name]}"
        tyro.cli(
            command, prog=f"ospec {name}", description=about, args=rest, config=_CONFIG
        )
    else:
        about = (
            f"{ospec_jax.__doc__} `ospec COMMAND --help` says more of a command, "
            f"`ospec --version` which version this is."
        )
        tyro.extras.subcommand_cli_from_dict(
            {name: _mentioned(command) for name, command in COMMANDS.items()},
            prog="ospec",
            description=about,
            args=args,
        )


def _mentioned(command: Callable[..., None]) -> Callable[[], None]:
    """A command for the list of all: the first paragraph of what it says."""

    def mention() -> None:
        raise AssertionError("only help is asked of it")

    mention.__doc__ = summary_of(command).partition("\n\n")[0]
    return mention
