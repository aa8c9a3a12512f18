# SPDX-License-Identifier: Apache-2.0
"""`ospec reason`: answering by steps that a smaller model drafts."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Group

from ospec_jax.cli.arguments import PrecisionName, as_precision, write_json
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.config.fields import read_json
from ospec_jax.data.prompts import (
    Prompt,
    parse_line,
    parse_prompt,
    read_lines,
    read_prompts,
)
from ospec_jax.data.templates import encode
from ospec_jax.models.hub import Target, load_target
from ospec_jax.reasoning.grading import (
    Share,
    is_right_number,
    last_number,
    passes_tests,
)
from ospec_jax.reports.progress import Interrupt, progress_bar, say
from ospec_jax.reports.tables import print_table, records_table
from ospec_jax.session.session import Session
from ospec_jax.storage.checkpoint import steps

if TYPE_CHECKING:
    from ospec_jax.reasoning.lookahead import Reasoner
    from ospec_jax.reasoning.preferences import PreferenceLearner
    from ospec_jax.reasoning.steps import StepRule

Row = dict[str, Any]


def reason(
    prompts: Path,
    draft_model: str,
    target: str = "smollm2-135m",
    precision: PrecisionName = "auto",
    verifier: str = "text",
    num_ahead: int = 3,
    max_step_tokens: int = 100,
    max_new_tokens: int = 256,
    num_prompts: int | None = None,
    ngrams: bool = True,
    learner: Literal["none", "dpo", "sft"] = "none",
    chunk_size: int = 25,
    learning_rate: float = 1e-4,
    checkpoint: Path | None = None,
    run_code: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Answers by steps that a smaller model drafts (Lookahead Reasoning), lossy.

    Beside it the target answers alone, prompt by prompt in turns, so that speed and
    right answers compare. With every --verifier but exact an answer holds steps that
    the target did not write.

    Args:
      prompts: A JSONL file. Where rows have a `reference` that ends with a number, as
        GSM8K's, it says which answers are right.
      draft_model: Drafts steps: a GGUF file, a folder or a hub id, of the target's
        tokenizer.
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      precision: Of weights and products; auto measures which is fastest on this device.
      verifier: exact, text (the same but for white space and case), states or
        states:COSINE (the target's own states of both steps), judge (the target is
        asked whether both mean the same).
      num_ahead: Steps that are drafted in a cycle.
      max_step_tokens: Longest step; others end with a blank line.
      max_new_tokens: Longest answer, in tokens.
      num_prompts: Taken from the file's beginning; by default all.
      ngrams: Let n-grams draft tokens for both models, and for the target alone.
      learner: Of the drafting model: none, dpo (it learns to prefer the target's steps
        to its own rejected ones, Online-LR), or sft (the target's steps alone).
      chunk_size: Prompts between two updates.
      learning_rate: Of Adam, on low-rank differences of the last four layers.
      checkpoint: Folder that what is learned is kept in, after each chunk and at the
        end; the same command goes on with the prompts that are left.
      run_code: Where rows have `meta.test_list`, as MBPP's, run the answers' code with
        it; that is code which a model wrote.
      json_file: Write a row for each prompt. With --checkpoint, rows that the file has
        of prompts answered before are kept.
    """
    from ospec_jax.reasoning.steps import StepRule
    from ospec_jax.reasoning.stream import OnlineReasoner
    from ospec_jax.reasoning.verifiers import check_verifier

    check_outputs([json_file], folders=[checkpoint], inputs=[prompts])
    check_verifier(verifier)
    if checkpoint is not None and learner == "none":
        raise ConfigError(
            "--checkpoint keeps what is learned; give --learner dpo or sft, too"
        )
    whole_number("--num-ahead", num_ahead, least=1)
    whole_number("--max-new-tokens", max_new_tokens, least=1)
    whole_number("--chunk-size", chunk_size, least=1)
    if num_prompts is not None:
        whole_number("--num-prompts", num_prompts, least=1)
    rows = read_prompts(prompts)[:num_prompts]
    is_right = _graders(prompts, run_code)
    rule = StepRule(max_tokens=max_step_tokens)

    large = load_target(target, as_precision(precision))
    # A layer that learns is a tree of its own.
    is_scanned = None if learner == "none" else False
    small = load_target(draft_model, as_precision(precision), is_scanned=is_scanned)
    token_draft = "ngram" if ngrams else None
    alone = Session(large, token_draft)
    reasoner = _build_reasoner(large, small, token_draft, verifier, rule, num_ahead)
    rule_of = _build_learner(small, learner, learning_rate)
    online = OnlineReasoner(reasoner, rule_of, chunk_size)
    if checkpoint is not None:
        hold(checkpoint)
        rows = _resumed(online, checkpoint, rows)
        if not rows:
            return

    _say_that_it_is_lossy(reasoner.verifier.is_lossless, verifier)
    say("compiling, with the first prompt")
    # So that neither side's first answer is the one that compiles.
    reasoner.answer(encode(rows[0], large.tokenizer), min(max_new_tokens, 64))
    list(alone.generate(rows[:1], min(max_new_tokens, 64)))

    # A run that goes on keeps the rows that the file has of those before it.
    found = _earlier_rows(json_file, online.answered)
    num_earlier = len(found)
    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("reason", total=len(rows))
        for solved in online.answer(rows, max_new_tokens, lambda: bool(interrupt)):
            (plain,) = alone.generate([solved.prompt], max_new_tokens)
            grade = is_right.get(solved.prompt.id)
            found.append(_row_of(solved, plain, grade))
            bar.update(task, advance=1, description=_live(found))
            if checkpoint is not None and solved.info is not None:
                with interrupt.held():
                    online.save(checkpoint)

    if checkpoint is not None and len(found) > num_earlier:
        online.save(checkpoint)
        say(f"saved version {online.version} in {checkpoint}")
    write_json(json_file, found, is_list=True)
    if found:
        print_table(_table(found))
    if len(found) - num_earlier < len(rows):
        interrupt.raise_if_set()


def _build_reasoner(
    large: Target,
    small: Target,
    token_draft: str | None,
    verifier: str,
    rule: "StepRule",
    num_ahead: int,
) -> "Reasoner":
    """What answers by steps: the small model writes them, the large one verifies."""
    from ospec_jax.reasoning.lookahead import Reasoner
    from ospec_jax.reasoning.verifiers import build_verifier
    from ospec_jax.reasoning.writing import Writer

    session = Session(large, token_draft, batch_size=num_ahead + 1)
    drafting = Session(small, token_draft)

    return Reasoner(
        Writer(drafting, rule),
        Writer(session, rule),
        build_verifier(verifier, session),
        num_ahead,
    )


def _build_learner(
    small: Target, learner: Literal["none", "dpo", "sft"], learning_rate: float
) -> "PreferenceLearner | None":
    """What the drafting model learns by, if it learns."""
    from ospec_jax.reasoning.preferences import PreferenceConfig, preference_learner

    if learner == "none":
        return None

    config = PreferenceConfig(
        loss=learner,
        learning_rate=learning_rate,
        num_epochs=3 if learner == "dpo" else 1,
    )
    return preference_learner(small, config)


def _earlier_rows(file: Path | None, answered: list[str]) -> list[Row]:
    """What a file of rows has of prompts that were answered before."""
    if not answered or file is None or not file.is_file():
        return []

    rows = read_json(file)
    known = set(answered)
    return [row for row in rows if row["id"] in known]


def _resumed(online, folder: Path, rows: list[Prompt]) -> list[Prompt]:
    """Goes on from what a folder holds, if anything; returns the prompts left."""
    if not steps(folder):
        return rows

    online.resume(folder)
    left = [row for row in rows if row.id not in set(online.answered)]
    say(
        f"{folder} holds version {online.version} behind {len(online.answered)} "
        f"answers; {len(left)} of these prompts are left"
    )
    return left


def _say_that_it_is_lossy(is_lossless: bool, verifier: str) -> None:
    if not is_lossless:
        say(
            f"lossy: with the verifier {verifier} answers hold steps that the target "
            f"did not write; see docs/reasoning.md",
            "yellow",
        )


def _graders(file: Path, runs_code: bool) -> dict[str, Callable[[str], bool]]:
    """By prompt, whether a text is a right answer, as far as rows tell."""
    found = {}
    for number, line in read_lines(file.expanduser()):
        row = parse_line(line)
        name = parse_prompt(row, f"{file.stem}-{number}").id
        if grader := _grader(row, runs_code):
            found[name] = grader

    return found


def _grader(row: Row, runs_code: bool) -> Callable[[str], bool] | None:
    """By its tests, else by its reference's number; None where there is neither."""
    reference = row.get("reference")
    meta = row.get("meta")
    if isinstance(meta, dict) and meta.get("test_list"):
        tests = meta["test_list"]
        setup = str(meta.get("test_setup_code") or "")
        return (lambda text: passes_tests(text, tests, setup)) if runs_code else None
    if not isinstance(reference, str):
        return None

    has_number = last_number(reference.rpartition("####")[2]) is not None
    return (lambda text: is_right_number(text, reference)) if has_number else None


def _row_of(solved, plain, grade: Callable[[str], bool] | None) -> Row:
    """What is known of a prompt's two answers."""
    answer = solved.answer
    return {
        "id": solved.prompt.id,
        "domain": solved.prompt.domain,
        "text": solved.text,
        "is_right": None if grade is None else grade(solved.text),
        "num_tokens": len(answer.token_ids),
        "seconds": answer.seconds,
        "draft_seconds": answer.draft_seconds,
        "verify_seconds": answer.verify_seconds,
        "learning_seconds": solved.learning_seconds,
        "num_cycles": len(answer.cycles),
        "num_drafted_steps": answer.num_drafted,
        "num_accepted_steps": answer.num_accepted,
        "version": solved.version,
        "learning": solved.info and solved.info._asdict(),
        "target_text": plain.text,
        "target_is_right": None if grade is None else grade(plain.text),
        "target_num_tokens": len(plain.token_ids),
        "target_seconds": plain.seconds,
        "is_same": list(answer.token_ids) == list(plain.token_ids),
    }


def _total(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows)


def _live(rows: list[Row]) -> str:
    accepted = _total(rows, "num_accepted_steps")
    drafted = max(_total(rows, "num_drafted_steps"), 1)
    return f"reason, {accepted / drafted:.0%} of {drafted:.0f} steps kept"


def _table(rows: list[Row]) -> Group:
    """The two sides, a row each."""
    accepted = _total(rows, "num_accepted_steps")
    drafted = max(_total(rows, "num_drafted_steps"), 1)
    same = sum(row["is_same"] for row in rows)
    heads = ("", "tokens/s", "with learning", "right", "steps kept", "same answers")
    learning = _total(rows, "learning_seconds")
    return records_table(
        heads,
        [
            (*_side("target alone", rows, "target_", 0.0), "-", "-"),
            (
                *_side("lookahead", rows, "", learning),
                f"{accepted / drafted:.0%}",
                f"{same} of {len(rows)}",
            ),
        ],
    )


def _side(name: str, rows: list[Row], prefix: str, learning: float) -> tuple[str, ...]:
    """Speed, the time of learning counted, and the share of right answers."""
    tokens = _total(rows, f"{prefix}num_tokens")
    seconds = max(_total(rows, f"{prefix}seconds"), 1e-9)
    graded = [row for row in rows if row["is_right"] is not None]
    right = sum(bool(row[f"{prefix}is_right"]) for row in graded)
    share = Share.of(right, len(graded))
    told = f"{share.mean:.0%} ({share.low:.0%} - {share.high:.0%})" if graded else "-"
    return (
        name,
        f"{tokens / seconds:.1f}",
        f"{tokens / (seconds + learning):.1f}",
        told,
    )
