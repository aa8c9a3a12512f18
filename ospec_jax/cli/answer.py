# SPDX-License-Identifier: Apache-2.0
"""`ospec generate`, `ospec learn`: answering."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ospec_jax import atomic
from ospec_jax.cli.arguments import (
    Decoding,
    Given,
    LearnBudget,
    Learner,
    LearningRate,
    LearnMembers,
    Optimizer,
    Shared,
    learner_config,
    write_json,
)
from ospec_jax.cli.outputs import check_outputs, hold, run_then
from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import (
    Prompt,
    add_predictions,
    parse_prompt,
    read_prediction,
    read_prompts,
)
from ospec_jax.reports.answers import AnswerLog, check_unused
from ospec_jax.reports.progress import Interrupt, live, progress_bar, say
from ospec_jax.reports.summary import describe_use, summarize_learning
from ospec_jax.reports.telemetry import Telemetry
from ospec_jax.session import Result, Session
from ospec_jax.storage import checkpoint


def generate(
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None,
    prompts: Path | None = None,
    decoding: Shared = Given,
    prediction: Path | None = None,
    stream: bool = False,
    logprobs: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    jsonl: Path | None = None,
) -> None:
    """Answers a prompt, or every prompt of a file.

    Args:
      prompt: The prompt's text.
      prompts: A JSONL file of prompts instead; - for standard input.
      prediction: A file that the answer to --prompt is expected to resemble, such as
        the one that it edits; rows of --prompts have a key `prediction`.
      stream: Print text as it comes.
      logprobs: Report each token's log-probability.
      json_file: Write one object (a list for several prompts); - for standard output.
      jsonl: Write each answer as one line, as soon as it is complete; - likewise.
    """
    # Whatever is wrong with the arguments is said before a model is loaded.
    check_outputs([json_file, jsonl], inputs=[prompts, prediction])
    check_unused(jsonl)
    rows = _asked(prompt, prompts, prediction)
    # A prediction is verified as a draft: without another one it is the draft.
    if decoding.draft == "none" and any(row.prediction for row in rows):
        decoding = dataclasses.replace(decoding, draft="prediction")

    target, draft = decoding.load()
    session = decoding.open(target, draft, has_log_probs=logprobs)
    write = lambda _, text: print(text, end="", flush=True)
    log = AnswerLog([jsonl])

    def answer_all() -> None:
        answers = session.generate(
            rows,
            decoding.max_new_tokens,
            decoding.sampling,
            is_raw=decoding.raw,
            on_text=write if stream else None,
            should_stop=interrupt.is_over,
        )
        for result in answers:
            if stream:
                print()
            log.add(result.to_json())
            if not stream and json_file is None and jsonl is None:
                print(result.text, flush=True)
            length = result.stats.mean_acceptance_length
            say(
                f"{len(result.token_ids)} tokens, "
                f"{len(result.token_ids) / result.seconds:.1f} tokens/s (compilation "
                f"included), mean acceptance length {length:.2f}",
                "dim",
            )
            if interrupt:
                break

    def write_answers() -> None:
        # Else a failure before the first answer would empty what an earlier run wrote.
        if log.rows:
            write_json(json_file, log.rows, is_list=prompts is not None)

    # Nobody waits for the rest of an answer that is not kept.
    with Interrupt(grace=0.0) as interrupt:
        run_then(interrupt, answer_all, [log.close, write_answers])

    if len(log.rows) < len(rows):
        interrupt.raise_if_set()


def _asked(
    prompt: str | None, prompts: Path | None, prediction: Path | None
) -> list[Prompt]:
    """What is to be answered.

    Raises:
      ConfigError: Flags contradict each other, or a file has another form.
    """
    if prompts is not None and prompt is None:
        rows = read_prompts(prompts)
    elif prompt is not None and prompts is None:
        rows = [parse_prompt({"prompt": prompt}, "prompt-0")]
    else:
        raise ConfigError("give either --prompt or --prompts")

    if prediction is None:
        return rows
    if prompts is not None:
        raise ConfigError(
            "--prediction goes with --prompt; give the rows of --prompts a key "
            "`prediction`"
        )

    return add_predictions(rows, [read_prediction(prediction)])


def learn(
    prompts: Path,
    decoding: Shared = Given,
    learner: Learner = "auto",
    learning_rate: LearningRate = None,
    optimizer: Optimizer = None,
    learn_budget: LearnBudget = None,
    update_interval: int | None = None,
    pace: Literal["always", "pays"] | None = None,
    promotion: Literal["always", "guarded"] | None = None,
    learn_members: LearnMembers = None,
    checkpoint_dir: Annotated[Path | None, tyro.conf.arg(name="checkpoint")] = None,
    resume: bool = False,
    save_every: int = 50,
    save_feedback: bool = True,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    jsonl: Path | None = None,
    telemetry: Path | None = None,
    tensorboard: Path | None = None,
) -> None:
    """Answers a stream of prompts, learns from it, and saves the draft.

    Args:
      prompts: A JSONL file; - for standard input.
      update_interval: Tokens between updates; 0, the default, derives it from the
        budget.
      pace: Learn always, the default, or ever more rarely while learning does not pay
        for its time.
      promotion: Serve every iterate of the learner, the default, or only those that
        proved better.
      checkpoint_dir: Where to save; Ctrl-C saves too. The answers are kept there as
        well, in `answers.jsonl`.
      resume: Go on where the checkpoint stopped: at batch size 1 as if nothing had
        happened; in a larger batch, requests that were on their way begin again. Where
        there is no checkpoint yet, begin.
      save_every: Prompts between two checkpoints.
      save_feedback: Also save recent traffic, which learning needs to go on as before,
        and the answers.
      json_file: Write the answers and metrics at the end; with --resume those of the
        whole run.
      jsonl: Write each answer as one line, before a checkpoint counts it.
      telemetry: File to write what learning does to, line by line; see `ospec
        telemetry`.
      tensorboard: Folder to write the same to for TensorBoard; needs --telemetry.
    """
    # From cheap to dear: arguments, places, the folder's lock, and only then models.
    check_outputs(
        [json_file, jsonl, telemetry],
        [checkpoint_dir, tensorboard],
        inputs=[prompts],
    )
    rows = read_prompts(prompts)
    if tensorboard is not None and telemetry is None:
        raise ConfigError("--tensorboard needs --telemetry, a file, beside it")
    if decoding.draft == "none":
        raise ConfigError("learning needs a draft: --draft shipped or a folder")
    # Held before the look at what is there: two runs of one folder would both find it
    # empty.
    hold(checkpoint_dir, files=[jsonl, telemetry])
    if save_every < 1:
        raise ConfigError(f"--save-every is {save_every}; use 1 or more prompts")
    resume = _is_resumed(resume, checkpoint_dir, jsonl, telemetry)
    if not resume:
        check_unused(jsonl)

    config = learner_config(
        learner,
        optimizer=optimizer,
        learning_rate=learning_rate,
        budget=learn_budget,
        update_interval=update_interval,
        pace=pace,
        promotion=promotion,
        members=learn_members,
    )
    if checkpoint_dir is None:
        say("nothing of what is learned is kept: give --checkpoint FOLDER to save it")

    target, draft = decoding.load()
    session = decoding.open(target, draft, config)
    if resume and checkpoint_dir is not None:
        rows = _gone_on(session, checkpoint_dir, rows)

    # The logs are cut to what the checkpoint counts before anything is added.
    log = _open_log(session, checkpoint_dir, save_feedback, jsonl, json_file)
    num_answered = len(session.answered) if resume else None
    writer = None
    if telemetry:
        writer = Telemetry(telemetry, tensorboard, num_answered)
    # Compiled before the clock starts.
    if rows:
        has_predictions = any(row.prediction for row in rows)
        session.warm_up(sampling=decoding.sampling, has_predictions=has_predictions)

    session.on_update = writer.update if writer else None
    run = _Learning(
        session,
        rows,
        decoding,
        log,
        writer,
        checkpoint_dir,
        save_every,
        save_feedback,
        beside=draft.beside,
    )
    with Interrupt() as interrupt:
        # The answers' lines are complete before a checkpoint counts them.
        last = [log.close, run.save, lambda: run.write(json_file), run.summarize]
        if writer:
            last.append(writer.close)
        run_then(interrupt, lambda: run.answer_all(interrupt), last)

    if len(run.results) < len(rows):
        interrupt.raise_if_set()


@dataclasses.dataclass
class _Learning:
    """A run of `learn`: what it answers, and where that goes.

    Attributes:
      folder: Of checkpoints, if any are kept.
      save_every: Prompts between two of them.
      save_feedback: Whether they hold recent traffic.
      start: When it began, by `time.perf_counter`.
      beside: What stood in front of the draft's name, as `longer:ngram,`.
      results: Answers so far.
    """

    session: Session
    rows: list[Prompt]
    decoding: Decoding
    log: AnswerLog
    writer: Telemetry | None
    folder: Path | None
    save_every: int
    save_feedback: bool
    start: float = dataclasses.field(default_factory=time.perf_counter)
    beside: str = ""
    results: list[Result] = dataclasses.field(default_factory=list)

    def answer_all(self, interrupt: Interrupt) -> None:
        """Answers the prompts, and saves now and then."""
        with progress_bar() as bar:
            task = bar.add_task("learn", total=len(self.rows))
            answers = self.session.generate(
                self.rows,
                self.decoding.max_new_tokens,
                self.decoding.sampling,
                is_raw=self.decoding.raw,
                should_stop=interrupt.is_over,
            )
            for result in answers:
                self.results.append(result)
                # The line first, then the checkpoint that counts it: a kill in between
                # repeats an answer, and never loses one.
                self.log.add(result.to_json())
                bar.update(task, advance=1, description=live(result, self.results))
                self._tell(result)
                is_due = len(self.results) % self.save_every == 0
                if self.folder is not None and is_due:
                    # A save that has begun is finished.
                    with interrupt.held():
                        self.session.save(self.folder, self.save_feedback)
                if interrupt:
                    break

    def _tell(self, result: Result) -> None:
        """Writes an answer's line of telemetry."""
        if not self.writer:
            return

        self.writer.answer(
            result.prompt.id,
            result.prompt.domain,
            len(result.token_ids),
            result.stats,
            result.version,
            result.learning_seconds,
            self.session.chooser.report(),
        )

    def save(self) -> None:
        """Saves the draft as it is at the end."""
        if self.folder is not None:
            path = self.session.save(self.folder, self.save_feedback)
            say(f"saved {path}")
            say(describe_use(self.folder, self.beside))

    def write(self, file: Path | None) -> None:
        """Writes the answers, those of earlier parts of the run among them."""
        if self.log.rows or not self.rows:
            write_json(file, self.log.rows, is_list=True)

    def summarize(self) -> None:
        """Says how fast it was."""
        if self.results:
            say(summarize_learning(self.results, time.perf_counter() - self.start))


def _gone_on(session: Session, folder: Path, rows: list[Prompt]) -> list[Prompt]:
    """Goes on from a checkpoint; returns the prompts that are left."""
    answered = session.resume(folder)
    # By content, so a stream may have grown or been moved since.
    rows = session.unanswered(rows)
    say(
        f"{len(answered)} prompts were answered before, {len(rows)} are left; "
        f"draft version {session.version}"
    )

    return rows


def _is_resumed(
    resume: bool, folder: Path | None, jsonl: Path | None, telemetry: Path | None
) -> bool:
    """Whether there is a run to go on with; where there is none, it begins.

    Raises:
      ConfigError: There is no folder, or it has a run that nobody asked to go on with.
    """
    if folder is None:
        if resume:
            raise ConfigError("--resume needs --checkpoint")
        return False

    has_run = bool(checkpoint.steps(folder))
    if has_run and not resume:
        raise ConfigError(
            f"{folder} holds an earlier run; go on with --resume, or choose another "
            f"folder"
        )
    if resume and not has_run:
        _begin_anew(folder, jsonl, telemetry)

    return has_run


def _begin_anew(folder: Path, *others: Path | None) -> None:
    """Makes way for a run that shall go on, but was never saved.

    What a killed one wrote before its first checkpoint is kept under other names.
    """
    say(f"{folder} holds no checkpoint yet: this run begins anew")
    for file in (folder / "answers.jsonl", *others):
        before = file and atomic.set_aside(file)
        if before:
            say(f"what {file} held is now {before}")


def _open_log(
    session: Session,
    folder: Path | None,
    save_feedback: bool,
    jsonl: Path | None,
    json_file: Path | None,
) -> AnswerLog:
    """The log of a run, behind what its session has resumed.

    Answers are the users' as feedback is: without it the folder gets none of them.
    """
    kept = folder and folder / "answers.jsonl"
    files = [kept if save_feedback else None, jsonl]
    older = None if save_feedback else kept
    return AnswerLog(files, session.answered, older, json_file)
