# SPDX-License-Identifier: Apache-2.0
"""A finished benchmark by its prompts' domains, by their lengths, and by task.

Each mode's row holds what it did on a part of the prompts, beside what it did on all.
"""

from collections.abc import Sequence

import numpy as np

from ospec_jax.bench.runs import UNPADDED, BenchRun, ModeRun, Turns
from ospec_jax.data.conversations import TASKS
from ospec_jax.decoding.stats import DecodingStats

PLAIN = "autoregressive"
UNNAMED = "unnamed"
"""The domain of prompts that have none."""
OVERALL = "overall"
"""All tasks of Spec-Bench together."""

_BUCKET_ENDS = (128, 512, 1024, 2048)
"""Tokens of the longest prompt of each bucket but the last."""


def length_bucket(num_tokens: int) -> str:
    """Between which lengths a prompt's lies, in tokens."""
    begin = 1

    for end in _BUCKET_ENDS:
        if num_tokens <= end:
            return f"{begin}-{end}"
        begin = end + 1

    return f"over {_BUCKET_ENDS[-1]}"


def by_domain(run: BenchRun) -> dict[str, list[int]]:
    """Places of each domain's prompts; Spec-Bench's tasks stand in their order."""
    places: dict[str, list[int]] = {task: [] for task in TASKS}

    for i, prompt in enumerate(run.prompts):
        places.setdefault(prompt.domain or UNNAMED, []).append(i)

    return {domain: where for domain, where in places.items() if where}


def by_length(run: BenchRun) -> dict[str, list[int]]:
    """Places of each bucket's prompts, by their lengths."""
    places: dict[str, list[int]] = {}

    for i in np.argsort(run.prompt_lengths, kind="stable"):
        bucket = length_bucket(run.prompt_lengths[i])
        places.setdefault(bucket, []).append(int(i))

    return {bucket: sorted(where) for bucket, where in places.items()}


def add_parts(run: BenchRun, rows: Sequence[dict]) -> list[dict]:
    """Rows of modes and peers with lists `by_domain` and `by_prompt_length`.

    Of Spec-Bench's questions also with `spec_bench`, as it is published.
    """
    takers = [*run.modes.values(), *run.peers.values()]
    names = [row["mode"] for row in rows]
    extended = [dict(row) for row in rows]
    splits = {
        "domain": by_domain(run),
        "prompt_length": by_length(run),
    }

    for key, places in splits.items():
        for row in extended:
            row[f"by_{key}"] = []
        for label, where in places.items():
            parts = [
                {"mode": name} | _part(run, taker, where)
                for name, taker in zip(names, takers, strict=True)
            ]
            for row, part in zip(extended, add_speedups(parts), strict=True):
                del part["mode"]
                row[f"by_{key}"].append({key: label} | part)

    if run.prompts and None not in run.conversations:
        published = _published(run, dict(zip(names, takers, strict=True)))
        for row in extended:
            row["spec_bench"] = published[row["mode"]]

    return extended


def add_speedups(rows: Sequence[dict]) -> list[dict]:
    """Rows of modes on the same prompts with `speedup`, learning time included.

    It is relative to plain decoding; where that was also measured without row
    invariance, `speedup_over_fastest_plain` to the faster of the two. None where a time
    is not known.
    """
    pace = {row["mode"]: row["tokens_per_second"] for row in rows}
    plains = [pace[name] for name in (PLAIN, UNPADDED) if pace.get(name) is not None]
    plain = pace.get(PLAIN)
    extended = []

    for row in rows:
        speed = row["tokens_per_second_with_learning"]
        extra = {"speedup": None if None in (speed, plain) else speed / plain}
        if None not in (speed, plain) and len(plains) > 1:
            extra["speedup_over_fastest_plain"] = speed / max(plains)
        # What they say of other rows, which may have been more, does not count.
        old = {key: row[key] for key in row if not key.startswith("speedup")}
        extended.append(old | extra)

    return extended


def paired_quartiles(
    plain: Turns, other: Turns, turns: Sequence[int]
) -> list[float] | None:
    """Quartiles of the speed-up over plain decoding in some turns, each by itself."""
    if not len(turns):
        return None

    ratios = _paces(plain, turns) / _paces(other, turns)
    return [float(q) for q in np.percentile(ratios, (25, 50, 75))]


def _paces(taker: Turns, turns: Sequence[int]) -> np.ndarray:
    """Seconds a token, of each turn."""
    seconds = np.take(taker.turn_seconds, turns)
    return seconds / np.maximum(np.take(taker.turn_tokens, turns), 1)


def _part(run: BenchRun, taker: Turns, where: Sequence[int]) -> dict:
    """What a mode or a peer did on some of the prompts."""
    size = run.config.batch_size
    turns = sorted({i // size for i in where})
    covered = [i for turn in turns for i in range(turn * size, (turn + 1) * size)]
    # The time of a batch cannot be told apart by its rows.
    is_timed = set(covered) & set(range(len(run.prompts))) == set(where)
    num_tokens = int(np.take(taker.turn_tokens, turns).sum())
    learning = 0.0

    if isinstance(taker, ModeRun):
        results = [taker.results[i] for i in where]
        learning = sum(result.learning_seconds for result in results)
        num_tokens = sum(len(result.token_ids) for result in results)

    seconds = float(np.take(taker.turn_seconds, turns).sum())
    plain = run.modes.get(PLAIN)
    speed = lambda seconds: num_tokens / max(seconds, 1e-9) if is_timed else None
    quartiles = None
    if plain is not None and is_timed:
        quartiles = paired_quartiles(plain, taker, turns)

    return {
        "num_prompts": len(where),
        "num_tokens": num_tokens,
        "mean_acceptance_length": _acceptance_length(taker, where),
        "tokens_per_second": speed(seconds - learning),
        "tokens_per_second_with_learning": speed(seconds),
        "paired_speedup_quartiles": quartiles,
    }


def _published(run: BenchRun, takers: dict[str, Turns]) -> dict[str, dict]:
    """Of each mode and peer, what Spec-Bench publishes, learning time included.

    As its own scripts count: a speed is the mean over questions of tokens/s, all turns
    of a question together; the speed-up is the ratio of two such means. Mean accepted
    tokens are those of all passes.
    """
    places = by_domain(run) | {OVERALL: list(range(len(run.prompts)))}
    speeds = {
        name: {
            task: _question_speed(run, taker, where) for task, where in places.items()
        }
        for name, taker in takers.items()
    }
    plains = [name for name in (PLAIN, UNPADDED) if name in takers]
    baseline = max(plains, key=lambda name: speeds[name][OVERALL], default=None)

    def describe(name: str, task: str) -> dict:
        speed = speeds[name][task]
        where = places[task]
        return {
            "num_questions": len({run.conversations[i] for i in where}),
            "tokens_per_second": speed,
            "speedup": speed / speeds[baseline][task] if baseline else None,
            "mean_accepted_tokens": _acceptance_length(takers[name], where),
        }

    return {
        name: {
            "baseline": baseline,
            "by_task": {task: describe(name, task) for task in places},
        }
        for name in takers
    }


def _acceptance_length(taker: Turns, where: Sequence[int]) -> float | None:
    """Tokens a target pass, of some answers; nobody knows that of other decoders."""
    if not isinstance(taker, ModeRun):
        return None

    empty = DecodingStats(num_spec_tokens=taker.session.tree.num_steps)
    return sum((taker.results[i].stats for i in where), empty).mean_acceptance_length


def _question_speed(run: BenchRun, taker: Turns, where: Sequence[int]) -> float:
    """Tokens/s, the mean over questions."""
    names = [run.conversations[i] for i in where]
    tokens = dict.fromkeys(names, 0)
    seconds = dict.fromkeys(names, 0.0)

    for name, i in zip(names, where, strict=True):
        tokens[name] += taker.turn_tokens[i]
        seconds[name] += taker.turn_seconds[i]

    return float(np.mean([tokens[name] / seconds[name] for name in tokens]))
