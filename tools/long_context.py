# SPDX-License-Identifier: Apache-2.0
"""Measures acceptance against context length, and against position in the answer.

    python tools/long_context.py --prompts gsm8k.jsonl --out out/long --windows 0 128

The last questions of a prompt file are asked alone, and behind conversations in which
the questions before them were answered: by the target itself, or as the file's
`reference` says. The target answers once; each draft, with each sliding window, is then
scored on what it answered (see `ospec_jax.replay`). That counts what decoding with a
chain would accept, whatever else the machine does, and costs a fraction of decoding.

OUT holds the recordings, which a second run goes on from, and the result as
`long_context.json`, `.md` and `.png`.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from ospec_jax import atomic
from ospec_jax.cli.arguments import PrecisionName, as_precision
from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import Prompt, read_prompts
from ospec_jax.data.templates import encode
from ospec_jax.drafters.eagle import eagle3_taps
from ospec_jax.loading import LoadedDraft, load_draft, with_sliding_window
from ospec_jax.models.hub import Target, load_target
from ospec_jax.online.redrafting import steps
from ospec_jax.replay.record import record
from ospec_jax.replay.replayer import Replayer
from ospec_jax.replay.score import whole_answer
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.reports.progress import say

_AT_ONCE = 4
"""Answers scored together: more need much memory behind long contexts."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      prompts: A JSONL file of questions, with `reference` answers if these are used.
      out: Folder of the recordings and results.
      drafts: Trained drafts, as for `ospec generate`.
      windows: Sliding windows of each draft, in tokens; 0 for none.
      preambles: Least tokens of the conversation before each question.
      num_questions: The file's last ones.
      solved: Who answered the questions of the conversation.
      max_new_tokens: Longest answer.
      num_speculative_tokens: Of a chain, K.
      bucket: Tokens of an answer that share a figure by position.
    """

    prompts: Path
    out: Path
    target: str = "smollm2-135m"
    precision: PrecisionName = "auto"
    drafts: tuple[str, ...] = ("shipped",)
    windows: tuple[int, ...] = (0, 64, 128, 192, 256)
    preambles: tuple[int, ...] = (0, 300, 800, 1500, 3000)
    num_questions: int = 10
    solved: Literal["target", "reference"] = "target"
    max_new_tokens: int = 128
    num_speculative_tokens: int = 3
    batch_size: int = 5
    bucket: int = 32


class Step(NamedTuple):
    """A step that decoding would make: where in the answer, and what it accepts."""

    position: int
    num_accepted: int


def solved_questions(
    settings: Settings, target: Target, questions: Sequence[Prompt]
) -> Iterator[list[dict]]:
    """Conversations of one question and its answer each."""
    if settings.solved == "reference":
        lines = settings.prompts.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        known = {str(row.get("id")): row.get("reference") for row in rows}
        answers = [known.get(question.id) for question in questions]
        if not all(answers):
            raise ConfigError(
                f"{settings.prompts} has rows without a `reference`; use --solved "
                f"target"
            )
    else:
        folder = settings.out / "solved"
        _record(settings, target, questions, folder)
        store = FeedbackStore(folder)
        entries = [store.recording(i) for i in range(len(store.entries))]
        known = {entry.id: whole_answer(entry) for entry in entries}
        decode = lambda ids: target.tokenizer.decode(ids, skip_special_tokens=True)
        answers = [decode(known[question.id]).strip() for question in questions]

    for question, answer in zip(questions, answers, strict=True):
        yield [*question.messages, {"role": "assistant", "content": answer}]


def behind(
    question: Prompt, solved: Sequence[list[dict]], num_tokens: int, tokenizer
) -> Prompt:
    """A question behind as many solved ones as reach so many tokens.

    Raises:
      ConfigError: All of them together are shorter.
    """
    alone = len(encode(question, tokenizer))
    turns: list[dict] = []

    for count in range(len(solved) + 1):
        messages = (*turns, *question.messages)
        asked = dataclasses.replace(question, messages=messages)
        if len(encode(asked, tokenizer)) - alone >= num_tokens:
            return asked
        if count < len(solved):
            turns += solved[count]

    raise ConfigError(
        f"{len(solved)} solved questions are too few for {num_tokens} tokens; use a "
        f"file with more"
    )


def _record(settings: Settings, target: Target, prompts, folder: Path) -> None:
    record(
        target,
        prompts,
        folder,
        eagle3_taps(target.config),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )


def scored(
    target: Target, draft: LoadedDraft, folder: Path, num_steps: int
) -> list[Step]:
    """The steps that a draft would make on all answers of a recording."""
    replayer = Replayer(target, draft, folder, num_steps)
    params = replayer.serving(draft.draft.params)
    found = []

    for first in range(0, len(replayer.order), _AT_ONCE):
        entries = replayer.order[first : first + _AT_ONCE]
        scores = replayer.score(params, entries)
        for entry, score in zip(entries, scores, strict=True):
            num_tokens = len(whole_answer(replayer.store.recording(entry)))
            found += [Step(*step) for step in steps(score.accepted, num_tokens)]

    return found


def acceptance_length(found: Sequence[Step]) -> float | None:
    """Tokens a target pass; None where there was no pass."""
    return 1 + float(np.mean([s.num_accepted for s in found])) if found else None


def by_position(found: Sequence[Step], bucket: int, length: int) -> list[float | None]:
    """Acceptance length of the steps that begin in each part of an answer."""
    return [
        acceptance_length([s for s in found if first <= s.position < first + bucket])
        for first in range(0, length, bucket)
    ]


def table(rows: Sequence[dict], key: str, columns: str) -> str:
    """Markdown: a line for each draft and window."""
    shown = lambda x: "-" if x is None else f"{x:.2f}"
    names = list(rows[0][key])
    lines = [f"| draft | window | {' | '.join(names)} |", "|---" * (len(names) + 2)]
    lines[1] += "|"

    for row in rows:
        cells = [row["draft"], str(row["window"] or "all")]
        cells += [shown(row[key][name]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")

    return "\n".join([columns, "", *lines])


def plot(rows: Sequence[dict], path: Path) -> Path:
    """Draws both tables into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    drawn = {
        "by_preamble": "tokens before the question",
        "by_position": "position in the answer, all preambles",
    }

    for panel, (key, label) in zip(axes, drawn.items(), strict=True):
        for row in rows:
            x = [int(name) for name in row[key]]
            y = np.array(list(row[key].values()), float)
            name = f"{row['draft']}, {row['window'] or 'all'}"
            panel.plot(x, y, ".-", label=name)
        panel.set(xlabel=label, ylabel="tokens a target pass")
        panel.grid(alpha=0.3)

    axes[0].legend(frameon=False, fontsize="small")

    return atomic.write_figure(figure, path)


def main(settings: Settings) -> list[dict]:
    """Records what is missing, scores all drafts, writes the result."""
    target = load_target(settings.target, as_precision(settings.precision))
    prompts = read_prompts(settings.prompts)
    questions = prompts[-settings.num_questions :]
    longest = max(settings.preambles, default=0)
    # No solved question has fewer tokens than this.
    others = prompts[: -settings.num_questions][-(longest // 64 + 1) :]
    solved = list(solved_questions(settings, target, others)) if longest else []
    folders = {}

    for length in settings.preambles:
        asked = [behind(q, solved, length, target.tokenizer) for q in questions]
        name = f"{settings.solved}-{length}" if length else "alone"
        folders[length] = settings.out / name
        _record(settings, target, asked, folders[length])
        sizes = [len(encode(prompt, target.tokenizer)) for prompt in asked]
        say(f"{length} tokens and more before: {np.mean(sizes):.0f} in all on average")

    drafts = {name: load_draft(name, target) for name in settings.drafts}
    rows = []

    for name, draft in drafts.items():
        for window in settings.windows:
            seeing = with_sliding_window(draft, window)
            found = {
                length: scored(target, seeing, folder, settings.num_speculative_tokens)
                for length, folder in folders.items()
            }
            rows.append(_row(settings, name, window, found))
            say(json.dumps(rows[-1]))

    return rows


def _row(settings: Settings, name: str, window: int, found: dict) -> dict:
    everything = [step for of_length in found.values() for step in of_length]
    positions = range(0, settings.max_new_tokens, settings.bucket)
    values = by_position(everything, settings.bucket, settings.max_new_tokens)
    lengths = {str(k): acceptance_length(steps_) for k, steps_ in found.items()}

    return {
        "draft": name,
        "window": window,
        "num_steps": len(everything),
        "by_preamble": lengths,
        "by_position": dict(zip(map(str, positions), values, strict=True)),
    }


def write(rows: Sequence[dict], folder: Path) -> None:
    """Writes JSON, Markdown and a plot."""
    tables = (
        table(rows, "by_preamble", "Acceptance length by tokens before the question:"),
        table(rows, "by_position", "By position in the answer, after any of these:"),
    )
    text = "\n\n".join(tables)
    atomic.write_text(folder / "long_context.json", json.dumps(rows, indent=1))
    atomic.write_text(folder / "long_context.md", text + "\n")
    plot(rows, folder / "long_context.png")
    say(text)


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    write(main(chosen), chosen.out)
