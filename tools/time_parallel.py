# SPDX-License-Identifier: Apache-2.0
"""Times drafting in parallel, a process and a core for each model, against in turns.

    python tools/time_parallel.py --prompts FILE.jsonl --target BIG --draft-model SMALL

The target's process is pinned to the first half of the cores, the draft's to the other
half, and both talk through a pipe: virtual devices of one process would share its
threads. What it is held against has all cores for whoever's turn it is: plain decoding,
and speculation in turns at several lengths. All take turns prompt by prompt, in
processes that sleep meanwhile. Outputs are compared with plain decoding's.
"""

import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ospec_jax import Session
from ospec_jax._platform import device_name
from ospec_jax.config import Precision, SamplingConfig, TreeConfig
from ospec_jax.data.prompts import Prompt, read_prompts
from ospec_jax.decoding.engine import PREFILL_CHUNK
from ospec_jax.decoding.request import Request
from ospec_jax.loading import load_draft
from ospec_jax.models.hub import load_target
from ospec_jax.parallel.measuring import measure_sides
from ospec_jax.parallel.pearl import Parallel
from ospec_jax.parallel.places import Place, Places
from ospec_jax.parallel.rounds import Chunk
from ospec_jax.parallel.sides import DraftSide
from ospec_jax.session.requests import tokenized

PLAIN = "plain, all cores"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      prompts: A JSONL file.
      target: Answers; `draft_model` drafts for it.
      precision: Of both.
      lengths: Drafted tokens, in turns and in parallel.
      num_prompts: From the file's beginning.
      max_new_tokens: Of each answer.
      out: A JSON file of a row for each way.
    """

    prompts: Path
    target: str
    draft_model: str
    precision: Precision = "int8"
    lengths: tuple[int, ...] = (2, 3, 4)
    num_prompts: int = 10
    max_new_tokens: int = 64
    out: Path | None = None


class Remote:
    """A draft in another process; see `ospec_jax.parallel.sides.Drafting`."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.length = 0

    def begin(self, request: Request, ordinal: int, capacity: int) -> None:
        """Sends a prompt."""
        self.pipe.send(("begin", self.length, request, ordinal, capacity))

    def ask(self, newest: tuple[int, int], position: int) -> None:
        """Asks for a chunk."""
        self.pipe.send(("ask", self.length, newest, position))

    def take(self) -> Chunk:
        """Waits for the chunk: the target's pass has been sent to its threads."""
        return Chunk(self.pipe.recv())


def run_draft(pipe: Connection, settings: Settings, cores: set[int]) -> None:
    """The draft's process: answers what a `Remote` asks."""
    os.sched_setaffinity(0, cores)
    place = Place(jax.devices()[0])
    # The target is loaded for its tokenizer alone, which a draft is checked against.
    target = load_target(settings.target, settings.precision)
    draft = load_draft(f"model:{settings.draft_model}", target)
    del target
    sides = {
        length: DraftSide(draft, TreeConfig(num_steps=length), place)
        for length in settings.lengths
    }
    pipe.send(None)

    while (asked := pipe.recv()) is not None:
        what, length, *args = asked
        side = sides[length]
        if what == "begin":
            request, ordinal, capacity = args
            # Native layers read whole vectors of slots.
            more = -(-side.drafter.num_scratch // PREFILL_CHUNK) * PREFILL_CHUNK
            side.begin(request, ordinal, capacity + more)
        else:
            side.ask(*args)
            pipe.send(np.asarray(side.take().tokens))


def run_pair(
    pipe: Connection, drafting: Connection, settings: Settings, cores: set[int]
) -> None:
    """The target's process, beside that of the draft."""
    os.sched_setaffinity(0, cores)
    place = Place(jax.devices()[0])
    target = load_target(settings.target, settings.precision)
    remotes = {length: Remote(drafting) for length in settings.lengths}
    pairs = {}
    for length, remote in remotes.items():
        remote.length = length
        pairs[length] = Parallel(
            target, None, Places(place, place), length, drafting=remote
        )
    drafting.recv()
    pipe.send(None)

    while (asked := pipe.recv()) is not None:
        length, prompt = asked
        ((_, request),) = tokenized(
            [prompt], target.tokenizer, settings.max_new_tokens, SamplingConfig()
        )
        if prompt.id == "times":
            times = measure_sides(pairs[length], request)
            pipe.send(dataclasses.asdict(times))
            continue
        answer = pairs[length].answer(request)
        found = {"rate": answer.acceptance_rate, "length": answer.tokens_per_round}
        pipe.send((list(answer.token_ids), answer.seconds, found))

    drafting.send(None)


def run_in_turns(pipe: Connection, settings: Settings) -> None:
    """All else, on all cores."""
    target = load_target(settings.target, settings.precision)
    draft = load_draft(f"model:{settings.draft_model}", target)
    sessions = {0: Session(target)}
    for length in settings.lengths:
        tree = TreeConfig(num_steps=length)
        sessions[length] = Session(target, draft, tree=tree, ngrams=False)
    pipe.send(None)

    while (asked := pipe.recv()) is not None:
        length, prompt = asked
        begin = time.perf_counter()
        (result,) = sessions[length].generate([prompt], settings.max_new_tokens)
        seconds = time.perf_counter() - begin
        stats = result.stats
        # Of tokens that were judged behind accepted ones, as in parallel.
        histogram = stats.acceptance_histogram
        num_rejected = sum(histogram[:length])
        judged = stats.num_accepted_tokens + num_rejected
        found = {
            "rate": stats.num_accepted_tokens / max(judged, 1),
            "length": stats.mean_acceptance_length,
        }
        pipe.send((list(result.token_ids), seconds, found))


def measure(settings: Settings) -> list[dict[str, Any]]:
    """A row for each way, measured in turns, prompt by prompt."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(
            f"each side needs a core of its own, and there is {len(cores)}"
        )

    middle = len(cores) // 2
    context = multiprocessing.get_context("spawn")
    ours, its = zip(*[context.Pipe() for _ in range(3)], strict=True)
    start = lambda run, *args: context.Process(target=run, args=args, daemon=True)
    workers = [
        start(run_draft, its[0], settings, set(cores[middle:])),
        start(run_pair, its[1], ours[0], settings, set(cores[:middle])),
        start(run_in_turns, its[2], settings),
    ]
    for worker in workers:
        worker.start()
    pair, turns = ours[1:]
    for pipe in (pair, turns):
        pipe.recv()

    ways = {PLAIN: (turns, 0)}
    for length in settings.lengths:
        ways[f"in turns, all cores, K = {length}"] = turns, length
        ways[f"in parallel, half each, K = {length}"] = pair, length

    prompts = read_prompts(settings.prompts)[: settings.num_prompts]
    answers = {name: [] for name in ways}
    # The first prompt is answered twice: the first time everything is compiled.
    for number, prompt in enumerate([prompts[0], *prompts]):
        for name, (pipe, length) in ways.items():
            answer = _ask(pipe, length, prompt)
            if number:
                answers[name].append(answer)
        print(f"{number} of {len(prompts)} prompts", flush=True)

    probe = dataclasses.replace(prompts[0], id="times")
    times = {length: _ask(pair, length, probe) for length in settings.lengths}
    for pipe in (pair, turns):
        pipe.send(None)
    for worker in workers:
        worker.join(timeout=30)

    return [_row(name, answers, times.get(ways[name][1])) for name in ways]


def _ask(pipe: Connection, length: int, prompt: Prompt) -> Any:
    pipe.send((length, prompt))
    return pipe.recv()


def _row(name: str, answers: dict[str, list], times: Any) -> dict[str, Any]:
    """One way's figures."""
    own = answers[name]
    plain = answers[PLAIN]
    pairs = list(zip(own, plain, strict=True))
    speed = lambda answer: len(answer[0]) / answer[1]
    return {
        "way": name,
        "tokens_per_second": sum(len(a[0]) for a in own) / sum(a[1] for a in own),
        "speedup": statistics.median(speed(a) / speed(b) for a, b in pairs),
        "tokens_per_pass": statistics.mean(a[2]["length"] for a in own),
        "acceptance_rate": statistics.mean(a[2]["rate"] for a in own),
        "num_mismatched_outputs": sum(a[0] != b[0] for a, b in pairs),
        "sides": times if "parallel" in name else None,
        "device": device_name(),
    }


def main() -> None:
    """Measures, prints a table, and writes what was asked for."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = measure(settings)
    print(f"{'':32} tokens/s  speed-up  a pass  accepted  mismatched")
    for row in rows:
        print(
            f"{row['way']:32} {row['tokens_per_second']:8.2f}  {row['speedup']:8.2f}"
            f"  {row['tokens_per_pass']:6.2f}  {row['acceptance_rate']:8.0%}"
            f"  {row['num_mismatched_outputs']:10}"
        )
    if settings.out is not None:
        settings.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
