# SPDX-License-Identifier: Apache-2.0
"""What only a device can tell, asked in one go: run it once on a TPU or a GPU.

    python tools/first_hour.py --out first-hour

Everything in this project was measured on CPUs. This runs what was only lowered or
compiled for other devices: are outputs those of plain decoding up to ties, at every
precision, in batches and with trees; what do longer drafts cost; how fast is each mode;
does learning stay finite; does memory come out as the compiler says. Each part is a
command of its own with a log. Parts that are done are not run again by the same
command, one that fails stops no other, and `report.md` is written anew after each.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

_MEMORY = """
import json, sys
import jax
from ospec_jax import Session, load_draft, load_target

target = load_target(sys.argv[1], "bfloat16")
session = Session(target, load_draft(sys.argv[2], target))
session.warm_up([1024])
list(session.generate(["Count from one to twenty."], 32))
engine = session.engine
state = engine.start(session.served_draft, session.probe_request(24), 1, 1024)
step = engine.compiled(engine.action, "greedy")
arguments = engine.target_params, session.served_draft, state
memory = step.lower(*arguments).compile().memory_analysis()
found = jax.devices()[0].memory_stats() or {}
print(json.dumps({
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "aliased_bytes": memory.alias_size_in_bytes,
    "bytes_in_use": found.get("bytes_in_use"),
    "peak_bytes_in_use": found.get("peak_bytes_in_use"),
    "bytes_limit": found.get("bytes_limit"),
}))
"""
_DEVICE = """
import json, jax, jaxlib, platform
import ospec_jax
device = jax.devices()[0]
print(json.dumps({
    "platform": device.platform,
    "device": device.device_kind,
    "num_devices": jax.device_count(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "python": platform.python_version(),
}))
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      out: Folder of the report, of each part's result and its log.
      target: As for `ospec bench`.
      draft: Likewise.
      num_prompts: Of each benchmark; those that come with the package.
      max_new_tokens: Longest answer.
      depths: Drafted tokens, K, of the curve.
      batch_size: Of the part that decodes several at once.
      only: Parts by name; all by default.
      timeout: Seconds that a part may take.
    """

    out: Path = Path("first-hour")
    target: str = "smollm2-135m"
    draft: str = "shipped"
    num_prompts: int = 12
    max_new_tokens: int = 64
    depths: tuple[int, ...] = (1, 2, 3, 5, 7)
    batch_size: int = 4
    only: tuple[str, ...] = ()
    timeout: float = 900.0


@dataclasses.dataclass(frozen=True)
class Part:
    """One command, and what its result says.

    Attributes:
      question: What it answers, as the report's heading.
      command: Arguments behind the interpreter.
      read: The command's standard output to what is kept.
      tell: From what is kept to lines of the report.
      faults: What is wrong with it, a sentence each; none if it is as it should be.
    """

    question: str
    command: tuple[str, ...]
    read: Callable[[str], Any] = json.loads
    tell: Callable[[Any], list[str]] = lambda found: [f"`{json.dumps(found)}`"]
    faults: Callable[[Any], list[str]] = lambda found: []


def parts_of(settings: Settings) -> dict[str, Part]:
    """All parts by name, in the order in which they are run."""
    draft = ("--draft", settings.draft)
    target = ("--target", settings.target)
    size = ("--num-prompts", str(settings.num_prompts))
    size += ("--max-new-tokens", str(settings.max_new_tokens))

    def bench(question: str, *flags: str) -> Part:
        command = ("-m", "ospec_jax", "bench", *target, *draft, *size, *flags)
        command += ("--json", "-")
        return Part(question, command, _last_json, _table_of, _mismatches)

    found = {"device": Part("What is it?", ("-c", _DEVICE), _last_json)}
    modes = ("--modes", "autoregressive,static,ngrams,learned")
    few = ("--modes", "autoregressive,static")

    for precision in ("float32", "bfloat16", "int8"):
        found[precision] = bench(
            f"Is {precision} exact up to ties, and how fast is each mode?",
            *modes,
            "--precision",
            precision,
        )

    common = ("--precision", "bfloat16")
    found["batch"] = bench(
        f"And {settings.batch_size} at once?",
        *modes,
        *common,
        "--batch-size",
        str(settings.batch_size),
    )
    for name, tree in (
        ("static-tree", "static:3,2,1"),
        ("dynamic-tree", "dynamic:4,8"),
    ):
        found[name] = bench(f"With `--tree {tree}`?", *few, *common, "--tree", tree)

    for depth in settings.depths:
        found[f"depth-{depth}"] = bench(
            f"What does a draft of {depth} cost and bring?",
            *few,
            *common,
            "--num-speculative-tokens",
            str(depth),
        )

    found["gradients"] = bench(
        "Does gradient learning stay finite, and what does it take?",
        "--modes",
        "autoregressive,learned",
        *common,
        "--learner",
        "gradient",
    )
    found["passes"] = Part(
        "What do passes over several rows cost?",
        ("-m", "ospec_jax", "roofline", *target, *common),
        read=lambda text: text[text.index("|") :],
        tell=str.splitlines,
    )
    found["memory"] = Part(
        "Does memory come out as the compiler says?",
        ("-c", _MEMORY, settings.target, settings.draft),
        _last_json,
        faults=_memory_faults,
    )

    return found


def _last_json(text: str) -> Any:
    """What stands behind everything else that a command prints."""
    starts = [place for place, mark in enumerate(text) if mark in "[{"]
    for start in starts:
        try:
            return json.loads(text[start:])
        except json.JSONDecodeError:
            continue

    raise ValueError(f"no JSON at the end of {text[-200:]!r}")


def _table_of(rows: list[dict[str, Any]]) -> list[str]:
    """A benchmark's modes, a line each."""
    lines = [
        "| mode | tokens/s | speed-up | tokens a pass | a step in plain ones | "
        "differing outputs | of these at ties |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speedup = row["speedup"]
        length = row["mean_acceptance_length"]
        cost = f"{length / speedup:.2f}" if speedup else "-"
        lines.append(
            f"| {row['mode']} | {row['tokens_per_second']:.1f} | "
            f"{f'{speedup:.2f}' if speedup else '-'} | {length:.2f} | {cost} | "
            f"{row['num_mismatched_outputs']} | {row['num_tie_flips']} |"
        )

    return lines


def _mismatches(rows: list[dict[str, Any]]) -> list[str]:
    """Outputs that are others than plain decoding's, for no tie."""
    found = []
    for row in rows:
        wrong = row["num_mismatched_outputs"] - row["num_tie_flips"]
        if wrong:
            found.append(
                f"{wrong} outputs of {row['mode']} are wrong: no tie explains it"
            )

    return found


def _memory_faults(found: dict[str, Any]) -> list[str]:
    """A device that holds much more than the program's arguments and temporaries."""
    peak = found.get("peak_bytes_in_use")
    needed = found["argument_bytes"] + found["temporary_bytes"]
    if peak is None or peak < 2 * needed:
        return []

    return [f"{peak:,} bytes were in use, where the step needs {needed:,}"]


def run(part: Part, place: Path, timeout: float) -> dict[str, Any]:
    """Runs a part; what came of it, which is kept in `place` if it ended well.

    Args:
      place: Its result; the log stands beside it.
    """
    log = place.with_suffix(".log")
    begin = time.perf_counter()
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                [sys.executable, *part.command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=timeout,
                # Else a GPU's memory is all taken at once, and nothing can be measured.
                env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {timeout:.0f} s; see {log.name}"}

    seconds = time.perf_counter() - begin
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        return {"failed": f"exit status {done.returncode}: {last[:300]}"}

    try:
        found = part.read(done.stdout)
    except ValueError as error:
        return {"failed": f"its output could not be read: {error}"}

    result = {"found": found, "seconds": seconds}
    place.write_text(json.dumps(result, indent=1))
    return result


def faults_of(parts: dict[str, Part], results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong, by part."""
    found = []
    for name, result in results.items():
        if "failed" in result:
            found.append(f"{name}: {result['failed']}")
        else:
            wrong = parts[name].faults(result["found"])
            found += [f"{name}: {fault}" for fault in wrong]

    return found


def report(parts: dict[str, Part], results: dict[str, dict[str, Any]]) -> str:
    """What was found, the faults first."""
    sections = []
    for name, result in results.items():
        lines = [f"## {parts[name].question}", ""]
        if "failed" in result:
            lines.append(f"It failed: {result['failed']}")
        else:
            told = parts[name].tell(result["found"])
            lines += [*told, "", f"{result['seconds']:.0f} s."]
        sections.append("\n".join(lines))

    count = f"{len(results)} of {len(parts)} parts were run."
    faults = [f"- {fault}" for fault in faults_of(parts, results)]
    summary = "\n".join(faults) or "Nothing was found to be wrong."
    return "\n\n".join(["# First hour", count, summary, *sections]) + "\n"


def main(settings: Settings) -> int:
    """Runs what is left to run; 1 if anything was found to be wrong."""
    parts = parts_of(settings)
    unknown = [name for name in settings.only if name not in parts]
    if unknown:
        print(f"there is no part {unknown[0]!r}; there are: {', '.join(parts)}")
        return 2

    settings.out.mkdir(parents=True, exist_ok=True)
    chosen = settings.only or tuple(parts)
    results = {}

    for number, name in enumerate(chosen, start=1):
        place = settings.out / f"{name}.json"
        print(f"{number} of {len(chosen)}: {name}", flush=True)
        if place.exists():
            results[name] = json.loads(place.read_text())
        else:
            results[name] = run(parts[name], place, settings.timeout)
        if "failed" in results[name]:
            print(f"  failed: {results[name]['failed']}", flush=True)
        (settings.out / "report.md").write_text(report(parts, results))

    faults = faults_of(parts, results)
    print(f"{len(faults)} faults; {settings.out / 'report.md'} has it all")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
