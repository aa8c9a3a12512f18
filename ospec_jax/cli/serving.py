# SPDX-License-Identifier: Apache-2.0
"""`ospec serve`, `ospec load`, `ospec chat`: answering as requests come."""

import dataclasses
import importlib.util
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ospec_jax.cli.arguments import (
    Decoding,
    Given,
    LearnBudget,
    Learner,
    LearnMembers,
    Served,
    Shared,
    learner_config,
    write_json,
    write_text,
)
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.data.prompts import read_prompts
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.reports.progress import Interrupt, progress_bar, say
from ospec_jax.serving.settings import HttpConfig, ServiceConfig
from ospec_jax.session.how_much import LOAD
from ospec_jax.session.session import Session
from ospec_jax.storage import checkpoint

_NOT_LEFT_OUT = ("none", "pool:", "mixed:", "longer:")
"""Drafts for which there is no choice between drafting and not, or another rule."""
_GRACE = 10.0
"""Seconds that answers may still take behind a signal."""


def serve(
    decoding: Served = Given,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_model_len: int = 2048,
    max_waiting: int = 64,
    kept_mib: int = 512,
    learner: Learner = "auto",
    learn_budget: LearnBudget = None,
    learn_members: LearnMembers = None,
    learn_idle: int = 0,
    delta_rank: int | None = None,
    promotion: Literal["always", "guarded"] | None = None,
    promote: Literal["automatic", "manual"] = "automatic",
    learn: Literal["auto", "opt-in", "opt-out", "off"] = "auto",
    checkpoint_dir: Annotated[Path | None, tyro.conf.arg(name="checkpoint")] = None,
    save_every: float = 300.0,
    save_feedback: bool = False,
    drafts: Path | None = None,
    api_key_file: Path | None = None,
    admin_key_file: Path | None = None,
    allow_no_key: bool = False,
    allowed_hosts: Annotated[
        tuple[str, ...], tyro.conf.arg(help_behavior_hint="")
    ] = (),
    default_temperature: float = 1.0,
    obfuscate: bool = False,
    stream_interval: float = 0.0,
) -> None:
    """Serves OpenAI's API, and learns from what it serves.

    Args:
      host: Address to listen on; others than loopback need --api-key-file.
      port: 0 takes one that is free.
      name: Of the model, as clients say it; by default that of --target.
      max_model_len: Tokens of a prompt and its answer together, at most.
      max_waiting: Answers that may wait for a row; more are told to come again.
      kept_mib: Memory for the caches of answered requests, in MiB: a conversation's
        next turn runs only what is new in it. 0 keeps none.
      learn_idle: While nobody asks, have the target write more of what it was lately
        asked, so many exercises for each answer, and the draft learn from that. An
        exercise gives way to whoever comes, within a step.
      delta_rank: Give each key and tenant a draft of its own, that differs from the
        shared one by so many directions and learns from its answers alone; 16 is a
        good number. 0, the default, leaves all with the shared draft.
      promotion: Serve every iterate of the learner, the default, or only those that
        proved better.
      promote: When what is learned is served: automatic, as --promotion says; manual,
        once an administrator says so (POST /admin/draft/promote, which needs
        --admin-key-file).
      learn: Learn from answers unless a request says `"learn": false` (opt-out), only
        if it says `true` (opt-in), or never (off). By default opt-in where there are
        several API keys, else opt-out.
      checkpoint_dir: Where to keep what is learned, every so often and at the end. If
        there is something, the server goes on from there.
      save_every: Seconds between two checkpoints.
      save_feedback: Also keep recent traffic, from which prompts and answers can be
        read back.
      drafts: Folder whose drafts an administrator may have loaded, by name.
      api_key_file: Keys of clients, one a line: `name key`, or a key alone. Of several
        keys, only answers to those with `share` behind them (`name key share`) teach
        the draft; the others' n-grams serve themselves.
      admin_key_file: A key for /admin/, which is closed without one.
      allow_no_key: Listen on any address without API keys.
      allowed_hosts: Names in Host headers, beside loopback's, that are let in without a
        key.
      default_temperature: Of requests that name none.
      obfuscate: Pad the chunks of streams, which hides the lengths of tokens.
      stream_interval: Seconds between two chunks of a stream, at least.
    """
    _check_installed()
    check_outputs(folders=[checkpoint_dir])
    config = ServiceConfig(
        model=name or Path(decoding.target).name,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        checkpoint=checkpoint_dir,
        checkpoint_seconds=save_every,
        drafts=drafts,
        keeps_traffic=save_feedback,
        kept_mib=kept_mib,
    )
    http = HttpConfig(
        host=host,
        port=port,
        allow_no_key=allow_no_key,
        allowed_hosts=allowed_hosts,
        api_key_file=api_key_file,
        admin_key_file=admin_key_file,
        default_temperature=default_temperature,
        learn=learn,
        obfuscate=obfuscate,
        stream_interval=stream_interval,
    )
    rule = None
    if learn != "off" and decoding.draft != "none":
        rule = learner_config(
            learner,
            budget=learn_budget,
            promotion=promotion,
            delta_rank=delta_rank,
            members=learn_members,
        )
    elif delta_rank:
        raise ConfigError(
            f"--delta-rank {delta_rank}, and nothing learns; leave it out"
        )
    elif learn_members is not None:
        raise ConfigError(
            f"--learn-members {learn_members}, and nothing learns; leave it out"
        )
    if checkpoint_dir is not None and decoding.draft == "none":
        raise ConfigError("without a draft nothing is learned: leave --checkpoint out")

    if learn_idle and rule is None:
        raise ConfigError(
            f"--learn-idle {learn_idle}, and nothing learns; leave it out"
        )

    if promote == "manual" and rule is None:
        raise ConfigError("--promote manual, and nothing learns; leave it out")
    if promote == "manual" and admin_key_file is None:
        raise ConfigError(
            "--promote manual, and nobody may say so: give --admin-key-file"
        )

    hold(checkpoint_dir)
    decoding = by_load(decoding)
    session = _open(decoding, rule, checkpoint_dir, learn_idle, promote)
    _run(session, config, http)


def by_load(decoding: Decoding) -> Decoding:
    """Has a server draft where that pays with as many requests as run.

    Whoever says how much is drafted has it drafted.
    """
    said = (decoding.controller, decoding.select, decoding.num_speculative_tokens)
    is_chain = decoding.tree == "chain" and not decoding.draft.startswith(_NOT_LEFT_OUT)
    if any(one is not None for one in said) or not is_chain:
        return decoding
    # One request at a time: there is no load.
    if decoding.batch_size == 1:
        return decoding

    return dataclasses.replace(decoding, controller=LOAD)


def _open(
    decoding: Decoding,
    rule: LearnerConfig | None,
    folder: Path | None,
    learn_idle: int,
    promote: Literal["automatic", "manual"],
) -> Session:
    """The session that is served; it goes on from a checkpoint, if there is one."""
    target, draft = decoding.load()
    session = decoding.open(target, draft, rule, learn_idle=learn_idle, promote=promote)
    if folder is None and rule is not None:
        say("nothing of what is learned is kept: give --checkpoint FOLDER to keep it")
    elif folder is not None and checkpoint.steps(folder):
        session.resume(folder)
        waiting = session.num_waiting
        more = f", {waiting} updates wait to be promoted" if waiting else ""
        say(f"going on from {folder}: draft version {session.version}{more}")

    return session


def _run(session: Session, config: ServiceConfig, http: HttpConfig) -> None:
    """Serves until a signal comes, or the service fails.

    Raises:
      OSError: The address cannot be listened on.
    """
    from ospec_jax.serving.http import make_app, make_server
    from ospec_jax.serving.service import Service

    service = Service(session, config)
    # Read before anything is compiled: a key file may be missing.
    app = make_app(service, http)
    server = make_server(app, http, grace=int(_GRACE))
    failures: list[BaseException] = []
    watcher = threading.Thread(
        target=_watch, args=(service, server, failures), daemon=True
    )

    # uvicorn ends at a signal and then raises it once more, to whoever was before it.
    with Interrupt() as interrupt:
        service.start()
        watcher.start()
        try:
            server.run()
        finally:
            say("ending: what was learned is written")
            service.stop(0.0 if interrupt.is_over() else 1.0)

    if failures:
        raise failures[0]
    if not server.started:
        raise OSError(f"cannot listen on {http.host}:{http.port}; is it in use?")

    totals = service.status()["totals"]
    say(
        f"{totals['num_answers']} answers, {totals['num_tokens']} tokens; draft "
        f"version {service.version}"
    )


def _watch(service: Any, server: Any, failures: list[BaseException]) -> None:
    """Says when the service is ready, and ends the server if it never will be."""
    try:
        service.wait_until_ready()
    except RuntimeError as error:
        failures.append(error.__cause__ or error)
        server.should_exit = True
        return

    # Port 0 is another one by now.
    while not server.started and not server.should_exit:
        time.sleep(0.05)
    for listener in [s for one in getattr(server, "servers", []) for s in one.sockets]:
        host, port = listener.getsockname()[:2]
        say(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}", "green")


def _check_installed() -> None:
    """Refuses to begin without the web server, which is an extra of the package.

    Raises:
      ConfigError: It is not installed.
    """
    for name in ("prometheus_client", "starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"serving needs {name}: pip install 'ospec-jax[serve]'")


def load(
    prompts: Path,
    url: str = "http://127.0.0.1:8000",
    num_requests: int | None = None,
    clients: int = 1,
    rate: float | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    api_key: str | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    jsonl: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Loads a server with prompts, and measures what its users would see.

    Args:
      prompts: A JSONL file; asked in its order, from the beginning again if it is
        shorter than --num-requests.
      url: Of the server.
      num_requests: By default one a prompt.
      clients: Of a closed loop: each asks again when it is answered.
      rate: Requests a second of an open loop in place of it; they come at random.
      max_new_tokens: Longest answer, in tokens.
      temperature: 0 takes the most probable token.
      seed: Of the times at which requests come.
      api_key: For a server that wants one.
      json_file: Write the figures; - for standard output.
      jsonl: Write a line a request.
      plot: Draw acceptance and latency over time.
    """
    from ospec_jax.serving.load import LoadConfig, plot_load, run_load, summarize

    check_outputs([json_file, jsonl], figures=[plot], inputs=[prompts])
    config = LoadConfig(url, clients, rate, max_new_tokens, temperature, seed, api_key)
    rows = read_prompts(prompts)
    if num_requests is not None:
        count = whole_number("--num-requests", num_requests, least=1)
        rows = list(itertools.islice(itertools.cycle(rows), count))

    with progress_bar() as bar:
        task = bar.add_task("load", total=len(rows))
        advance = lambda asked: bar.update(task, advance=1)
        results, seconds = run_load(rows, config, advance)

    figures = summarize(results, seconds)
    write_json(json_file, [figures], is_list=False)
    if jsonl is not None:
        lines = [json.dumps(dataclasses.asdict(asked)) for asked in results]
        write_text(jsonl, "\n".join(lines))
    if plot is not None and figures["completed"]:
        plot_load(results, plot)

    for name, value in figures.items():
        shown = f"{value:10.2f}" if isinstance(value, float) else f"{value:10}"
        say(f"{name:32} {shown}")
    for error in sorted({asked.error for asked in results if asked.error})[:3]:
        say(f"failed: {error}", "yellow")


def chat(
    decoding: Shared = Given,
    learner: Learner = "auto",
    system: str | None = None,
) -> None:
    """Chats in the terminal; the draft learns from the conversation.

    An empty line or Ctrl-D ends it.

    Args:
      system: What the model is told before the first turn.
    """
    rule = None if decoding.draft == "none" else learner_config(learner)
    target, draft = decoding.load()
    session = decoding.open(target, draft, rule)
    turns = [] if system is None else [{"role": "system", "content": system}]
    write = lambda _, text: print(text, end="", flush=True)

    while text := _ask():
        turns.append({"role": "user", "content": text})
        # A Ctrl-C ends the answer, and the conversation goes on without it.
        with Interrupt(grace=0.0) as interrupt:
            results = session.generate(
                {"messages": turns},
                decoding.max_new_tokens,
                decoding.sampling,
                on_text=write,
                should_stop=interrupt.is_over,
            )
            result = next(iter(results), None)
        print()
        if result is None:
            turns.pop()
            continue

        turns.append({"role": "assistant", "content": result.text})
        speed = len(result.token_ids) / result.seconds
        length = result.stats.mean_acceptance_length
        say(
            f"{speed:.1f} tokens/s, {length:.2f} tokens a pass, draft version "
            f"{session.version}",
            "dim",
        )


def _ask() -> str:
    """What the user says next; empty for nothing more."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)

    return sys.stdin.readline().strip()
