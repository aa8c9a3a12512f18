# SPDX-License-Identifier: Apache-2.0
"""The commands, on files as a user has them."""

import functools
import inspect
import itertools
import json
import re
import runpy
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from model_files import hf_tensors, model_config, write_folder
from reference import random_params

import ospec_jax
from ospec_jax import LearnerConfig, cli, loading
from ospec_jax.bench.runs import MODES
from ospec_jax.cli import answer, arguments, make
from ospec_jax.cli.recipes import with_recipe
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.control.ltd import LtdConfig
from ospec_jax.data.prompts import read_prompts
from ospec_jax.distill import kinds, self_config
from ospec_jax.distill.self_config import SelfPromptConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.registry import LEARNER_NAMES
from ospec_jax.parallel import places
from ospec_jax.replay.ltd import Teacher
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.storage.policies import load_policies
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

CONFIGS = Path(__file__).parents[2] / "configs"
BENCH_KEYS = {
    "mode", "num_prompts", "left_out", "num_tokens", "tokens_per_second", "speedup",
    "by_domain", "by_prompt_length",
    "tokens_per_second_with_learning", "paired_speedup_quartiles",
    "predicted_speedup", "mean_acceptance_length",
    "mean_draft_length", "draft_acceptance_rate",
    "acceptance_per_position", "num_mismatched_outputs",
    "num_tie_flips", "repeated_token_share", "learner", "optimizer",
    "learning_rate", "num_updates", "num_promotions",
    "learning_seconds", "num_exercises", "idle_seconds", "compile_seconds",
    "peak_rss_mb", "target", "precision",
    "num_speculative_tokens", "controller", "device", "jax_version", "git_commit",
    "date",
}  # fmt: skip


def run_here(*args):
    """Exit code of `ospec` with these arguments, in this process."""
    before = sys.argv, warnings.showwarning
    sys.argv = ["ospec", *map(str, args)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv, warnings.showwarning = before
    return 0


class CommandLine:
    """Runs `ospec` in this process, on a tiny model and a draft distilled for it."""

    def __init__(self, folder):
        config = model_config(tie_embeddings=False, num_layers=2)
        tensors = hf_tensors(config, random_params(config))
        self.folder = folder
        self.target = write_folder(folder / "model", config, tensors)
        rows = [{"id": f"q{i}", "prompt": f"What is {i} + {i}?"} for i in range(8)]
        self.rows = [json.dumps(row) for row in rows]
        self.prompts = self.write_prompts("prompts", self.rows)
        self.draft = str(folder / "run" / "draft")

    def write_prompts(self, name, lines):
        file = self.folder / f"{name}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return str(file)

    def __call__(self, command, *args):
        """Exit code of `ospec COMMAND --target TINY ...`."""
        limits = "--precision", "float32", "--max-new-tokens", 20
        return self.run(command, *args, "--target", self.target, *limits)

    def run(self, *args):
        """Exit code of `ospec` with these arguments alone."""
        return run_here(*args)

    def json(self, command, *args):
        file = self.folder / "result.json"
        assert self(command, *args, "--json", file) == 0
        return json.loads(file.read_text())


@pytest.fixture(scope="session")  # of other modules, too
def ospec(tmp_path_factory):
    run = CommandLine(tmp_path_factory.mktemp("cli"))
    assert run(
        "distill", "--prompts", run.prompts, "--out", run.folder / "run",
        "--num-updates", 2, "--batch-size", 2, "--draft-vocab-size", 100,
        "--collect-batch-size", 2, "--ship", run.folder / "shipped",
    ) == 0  # fmt: skip
    return run


def test_generate_writes_one_object(ospec, capsys):
    args = ("--prompt", "Hello there", "--logprobs", "--stream")
    plain = ospec.json("generate", *args, "--draft", "none")
    assert capsys.readouterr().out.strip() == plain["text"].strip()
    drafted = ospec.json("generate", *args, "--draft", ospec.draft)
    assert set(plain) == {
        "id",
        "text",
        "token_ids",
        "finish_reason",
        "precision",
        "metrics",
        "logprobs",
    }
    assert plain["precision"] == "float32"
    assert drafted["token_ids"] == plain["token_ids"]
    assert len(plain["logprobs"]) == len(plain["token_ids"])
    metrics = drafted["metrics"]["speculative_decoding"]
    assert metrics["num_draft_tokens"] > 0
    # Without a prediction no step is longer than the tree.
    assert metrics["num_spec_tokens"] == 3
    assert len(metrics["acceptance_histogram"]) == 4
    assert plain["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


def test_generate_chooses_tokens_as_asked(ospec, capsys):
    args = ("--prompt", "Hello there", "--draft")
    usual = ospec.json("generate", *args, "none")
    first = usual["token_ids"][0]
    flags = (
        "--presence-penalty", -0.5, "--frequency-penalty", 1.5,
        "--repetition-penalty", 1.2, "--logit-bias", f"{first}:-100", "2:-100",
    )  # fmt: skip
    plain = ospec.json("generate", *args, "none", *flags)
    assert not {first, 2} & set(plain["token_ids"])
    drafted = ospec.json("generate", *args, ospec.draft, *flags)
    assert drafted["token_ids"] == plain["token_ids"]

    sampled = ("--temperature", 5.0, "--min-p", 1.0)
    sure = ospec.json("generate", *args, "none", *sampled)
    assert sure["token_ids"] == usual["token_ids"]
    capsys.readouterr()
    for flags, message in (
        (("--logit-bias", "5=1"), "cannot read '5=1' of --logit-bias; write ID:VALUE"),
        (("--logit-bias", "99999:1"), "the token ids [99999], for which the model"),
        (("--min-p", "2"), "min_p is 2.0; it lies in [0, 1]"),
    ):
        assert ospec("generate", *args, "none", *flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "draft", ["none", pytest.param("ngram", marks=pytest.mark.thorough), None]
)
def test_generate_verifies_a_prediction(ospec, tmp_path, draft):
    args = ("--prompt", "Hello there", "--draft")
    plain = ospec.json("generate", *args, "none")
    file = tmp_path / "expected.txt"
    file.write_text(plain["text"] or "Hello", "utf-8")
    predicted = ospec.json(
        "generate", *args, draft or ospec.draft, "--prediction", file
    )
    assert predicted["token_ids"] == plain["token_ids"]
    metrics = predicted["metrics"]["speculative_decoding"]
    assert metrics["num_draft_tokens"] > 0
    bins = metrics["acceptance_histogram"]
    assert len(bins) == metrics["num_spec_tokens"] + 1
    assert sum(bins) == metrics["num_spec_steps"]


# Trees that decode exactly are `decoding/test_exactness.py`'s.
@pytest.mark.parametrize(
    "tree",
    [
        pytest.param("chain", marks=pytest.mark.thorough),
        pytest.param("static:2,1", marks=pytest.mark.thorough),
        "dynamic:2,4",
    ],
)
def test_generate_answers_a_file(ospec, tree):
    args = ("--prompts", ospec.prompts, "--batch-size", 2)
    plain = ospec.json("generate", *args, "--draft", "none")
    drafted = ospec.json(
        "generate", *args, "--draft", ospec.folder / "shipped", "--tree", tree
    )
    answers = lambda rows: {row["id"]: row["token_ids"] for row in rows}
    assert answers(plain) == answers(drafted)
    assert len(plain) == 8


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_drafts_move_out_and_back_in(ospec, layout, tmp_path):
    public, again = tmp_path / "public", tmp_path / "again"
    to = ("--format", layout, "--target", ospec.target, "--out")
    assert ospec.run("export", ospec.draft, *to, public) == 0
    assert ospec.run(
        "import", public, "--out", tmp_path / "draft", "--target", ospec.target,
        "--precision", "float32", "--no-check",
    ) == 0  # fmt: skip
    assert ospec.run("export", tmp_path / "draft", *to, again) == 0
    weights = [(f / "model.safetensors").read_bytes() for f in (public, again)]
    assert weights[0] == weights[1]
    prompt = ("--prompt", "Hello there")
    drafted = ospec.json("generate", *prompt, "--draft", public)
    plain = ospec.json("generate", *prompt, "--draft", "none")
    assert drafted["token_ids"] == plain["token_ids"]
    ours = ospec.json("generate", *prompt, "--draft", ospec.draft)
    assert drafted["metrics"] == ours["metrics"]


def test_imports_name_what_is_wrong(ospec, tmp_path, capsys):
    assert ospec.run("export", ospec.draft, "--out", tmp_path) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 262}))
    out = tmp_path / "draft"
    assert ospec.run("import", tmp_path, "--out", out, "--target", ospec.target) == 2
    assert "t2d of" in capsys.readouterr().err
    assert ospec.run("import", tmp_path / "nowhere", "--out", out) == 2
    assert "no config.json" in capsys.readouterr().err
    assert not out.exists()


def test_only_heads_with_a_public_format_are_exported(ospec, tmp_path, capsys):
    target = tiny_target()
    config = tiny_draft_config(target.config, family="hydra")
    head = tiny_draft(build_drafter("hydra", config, TreeConfig()), config)
    meta = Meta.create(target, config, "hydra")
    checkpoint.save(tmp_path / "draft", 0, meta, head)
    assert ospec.run("export", tmp_path / "draft", "--out", tmp_path / "public") == 2
    assert "of the family 'hydra'" in capsys.readouterr().err


# Families are trained in `distill/test_distill.py`.
@pytest.mark.thorough
def test_another_family_is_distilled(ospec, tmp_path):
    assert ospec(
        "distill", "--prompts", ospec.prompts, "--out", tmp_path, "--family", "hydra",
        "--data", ospec.folder / "run" / "data", "--num-updates", 1, "--batch-size", 2,
        "--draft-vocab-size", 100, "--collect-batch-size", 2,
    ) == 0  # fmt: skip
    draft = tmp_path / "draft"
    assert checkpoint.load(draft).meta.family == "hydra"
    assert (draft / "training.png").exists()
    assert len(ospec.json("generate", "--prompt", "Hi", "--draft", draft)) > 0


def test_experts_that_cannot_be_kept_as_differences_are_refused(
    ospec, tmp_path, capsys
):
    args = (
        "distill", "--prompts", ospec.prompts, "--data", ospec.folder / "run" / "data",
        "--num-updates", 1, "--batch-size", 1, "--collect-batch-size", 2,
        "--out", tmp_path / "run", "--ship", tmp_path / "expert", "--delta", 2,
    )  # fmt: skip
    assert ospec(*args) == 2
    assert "name it with --from" in capsys.readouterr().err
    unshipped = [arg for arg in args if arg not in ("--ship", tmp_path / "expert")]
    assert ospec(*unshipped, "--from", ospec.draft) == 2
    assert "the draft that --ship saves" in capsys.readouterr().err
    assert ospec(*args, "--from", ospec.draft, "--domain", "nowhere") == 2
    assert "no prompt is of the domains 'nowhere'" in " ".join(
        capsys.readouterr().err.split()
    )


# Differences are those of `storage/test_low_rank.py`, a window that a start draft is
# given that of `distill/test_distill.py`.
@pytest.mark.thorough
def test_an_expert_with_a_window_drafts(ospec, tmp_path):
    args = (
        "distill", "--prompts", ospec.prompts, "--data", ospec.folder / "run" / "data",
        "--num-updates", 1, "--batch-size", 1, "--collect-batch-size", 2,
        "--out", tmp_path / "run", "--ship", tmp_path / "expert", "--delta", 2,
        "--sliding-window", 40, "--from", ospec.draft,
    )  # fmt: skip
    assert ospec(*args) == 0
    meta = checkpoint.load(tmp_path / "expert").meta
    assert meta.draft is not None
    assert meta.draft.sliding_window == 40
    assert (meta.base, meta.rank, meta.storage) == (ospec.draft, 2, "int8")
    prompt = ("--prompt", "Hello there")
    drafted = ospec.json("generate", *prompt, "--draft", tmp_path / "expert")
    plain = ospec.json("generate", *prompt, "--draft", "none")
    assert drafted["token_ids"] == plain["token_ids"]
    assert ospec.run("export", tmp_path / "expert", "--out", tmp_path / "public") == 0


def test_a_parallel_draft_is_no_difference(ospec, tmp_path, capsys):
    args = (
        "distill", "--prompts", ospec.prompts, "--data", ospec.folder / "run" / "data",
        "--num-updates", 1, "--batch-size", 1, "--collect-batch-size", 2,
        "--num-steps", 4, "--out", tmp_path, "--family", "peagle",
        "--from", ospec.draft,
    )  # fmt: skip
    assert ospec(*args, "--ship", tmp_path / "expert", "--delta", 2) == 2
    assert "leave out --delta" in " ".join(capsys.readouterr().err.split())


# How it begins is held by `drafters/test_onepass.py`, how it is trained by
# `distill/test_distill.py`.
@pytest.mark.thorough
def test_a_parallel_draft_is_trained_from_an_eagle3_one(ospec, tmp_path):
    args = (
        "distill", "--prompts", ospec.prompts, "--data", ospec.folder / "run" / "data",
        "--num-updates", 1, "--batch-size", 1, "--collect-batch-size", 2,
        "--num-steps", 4, "--out", tmp_path, "--family", "peagle",
        "--from", ospec.draft,
    )  # fmt: skip
    assert ospec(*args) == 0
    meta = checkpoint.load(tmp_path / "draft").meta
    assert (meta.family, meta.draft.depth, meta.draft.num_layers) == ("peagle", 4, 1)
    prompt = ("--prompt", "Hello there")
    drafted = ospec.json("generate", *prompt, "--draft", tmp_path / "draft")
    plain = ospec.json("generate", *prompt, "--draft", "none")
    assert drafted["token_ids"] == plain["token_ids"]


def test_learn_resumes_where_it_stopped(ospec, tmp_path):
    few = ospec.write_prompts("few", ospec.rows[:5])
    args = ("--draft", ospec.draft, "--update-interval", 30, "--checkpoint", tmp_path)
    args += ("--telemetry", tmp_path / "told.jsonl", "--learner", "gradient")
    assert len(ospec.json("learn", *args, "--prompts", few)) == 5
    saved = checkpoint.load(tmp_path).meta
    assert saved.answered == tuple(f"q{i}" for i in range(5))
    assert saved.draft_version > 0
    assert ospec("learn", *args, "--prompts", few) == 2  # the folder is in use
    rest = ospec.json("learn", *args, "--prompts", ospec.prompts, "--resume")
    assert [row["id"] for row in rest] == [f"q{i}" for i in range(8)]
    assert len(checkpoint.load(tmp_path).meta.answered) == 8
    told = [json.loads(x) for x in (tmp_path / "told.jsonl").read_text().splitlines()]
    numbers = [row["number"] for row in told if row["kind"] == "answer"]
    assert numbers == list(range(1, 9))
    assert told[-1]["version"] > saved.draft_version
    assert sum(row["kind"] == "update" for row in told) > saved.draft_version
    assert ospec.run(
        "telemetry", tmp_path / "told.jsonl", "--plot", tmp_path / "told.png"
    ) == 0  # fmt: skip
    assert (tmp_path / "told.png").exists()


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def read_lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.filterwarnings("default")
def test_a_killed_run_loses_no_answer_and_repeats_none(ospec, tmp_path, monkeypatch):
    args = ("--draft", ospec.draft, "--learner", "memory")
    args += ("--prompts", ospec.prompts, "--save-every", 2, "--checkpoint")
    straight = ospec.json("learn", *args, tmp_path / "straight")

    kept, told = tmp_path / "run" / "answers.jsonl", tmp_path / "told.jsonl"
    args += (kept.parent, "--jsonl", told)
    save = checkpoint.save

    def dying_save(folder, step, *rest):
        if step == 6:
            raise Killed
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", dying_save)
    with pytest.raises(Killed):
        ospec("learn", *args)
    monkeypatch.undo()
    # Six answers were given, of which the checkpoint counts four.
    assert checkpoint.steps(kept.parent) == [2, 4]
    assert read_lines(kept) == read_lines(told) == straight[:6]

    told.unlink()
    stale = straight[:4] + [straight[4] | {"text": "before"}, straight[5]]
    kept.write_text("".join(json.dumps(row) + "\n" for row in stale) + '{"id": "q')
    assert ospec.json("learn", *args, "--resume") == straight
    assert read_lines(kept) == read_lines(told) == straight


def test_a_finished_run_that_is_resumed_writes_nothing_new(ospec, tmp_path):
    few = ospec.write_prompts("few", ospec.rows[:2])
    args = ("--draft", ospec.draft, "--learner", "memory", "--prompts", few)
    args += ("--checkpoint", tmp_path, "--save-every", 2)
    rows = ospec.json("learn", *args)
    before = (tmp_path / "2").stat().st_ino
    assert ospec.json("learn", *args, "--resume") == rows
    assert (tmp_path / "2").stat().st_ino == before


@pytest.mark.filterwarnings("default")
def test_answers_stay_out_of_a_folder_without_feedback(ospec, tmp_path, capsys):
    few = ospec.write_prompts("few", ospec.rows[:2])
    args = ("--draft", ospec.draft, "--learner", "memory", "--no-save-feedback")
    args += ("--checkpoint", tmp_path, "--prompts")
    rows = ospec.json("learn", *args, few)
    assert not (tmp_path / "answers.jsonl").exists()
    args += (ospec.write_prompts("more", ospec.rows[:3]), "--resume")
    # The file that the earlier run wrote is written again.
    whole = ospec.json("learn", *args)
    assert whole[:2] == rows
    assert [row["id"] for row in whole] == ["q0", "q1", "q2"]
    assert ospec("learn", *args, "--jsonl", tmp_path / "none.jsonl") == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "3 of 3 earlier answers were not kept, the first is 'q0'" in printed


def test_generate_writes_each_answer_as_a_line(ospec, tmp_path, capsys):
    few = ospec.write_prompts("few", ospec.rows[:2])
    args = ("--prompts", few, "--draft", "none", "--jsonl")
    file = tmp_path / "told.jsonl"
    rows = ospec.json("generate", *args, file)
    assert read_lines(file) == rows
    capsys.readouterr()
    assert ospec("generate", *args, "-") == 0
    assert list(map(json.loads, capsys.readouterr().out.splitlines())) == rows
    for command in ("generate", "learn"):
        assert ospec(command, *args, file) == 2
    assert read_lines(file) == rows


# Others end a server and a training; see `test_serving.py`, `test_outputs.py`.
@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("SIGINT", 130, marks=pytest.mark.thorough),
        ("SIGTERM", 143),
        pytest.param("SIGHUP", 129, marks=pytest.mark.thorough),
    ],
)
def test_signals_save_and_tell_whether_work_is_left(
    ospec, tmp_path, monkeypatch, name, code
):
    few = ospec.write_prompts("few", ospec.rows[:3])
    args = ("--draft", ospec.draft, "--learner", "memory", "--prompts", few)
    args += ("--checkpoint", tmp_path, "--json", tmp_path / "result.json")
    save, live = checkpoint.save, answer.live
    interrupt = lambda: signal.raise_signal(signal.Signals[name])

    def interrupted_live(result, results):
        if result.prompt.id in ("q1", "q2"):
            interrupt()
        return live(result, results)

    def interrupted_save(*rest):
        interrupt()  # the second one: it waits until the step is whole
        return save(*rest)

    monkeypatch.setattr(answer, "live", interrupted_live)
    monkeypatch.setattr(checkpoint, "save", interrupted_save)
    assert ospec("learn", *args) == code
    assert checkpoint.steps(tmp_path) == [2]
    assert len(json.loads((tmp_path / "result.json").read_text())) == 2
    # After the last answer there is nothing to go on with.
    assert ospec("learn", *args, "--resume") == 0
    assert checkpoint.load(tmp_path).meta.answered == ("q0", "q1", "q2")


@pytest.mark.filterwarnings("default")
def test_a_resumed_run_knows_prompts_by_what_they_ask(ospec, tmp_path, capsys):
    texts = [json.dumps({"prompt": f"Count to {i}."}) for i in range(4)]
    args = ("--draft", ospec.draft, "--learner", "memory", "--checkpoint", tmp_path)
    first = ospec.write_prompts("day", texts[:2])
    answers = ospec.json("learn", *args, "--prompts", first)

    # A line in front and one behind, in a file of the same name.
    again = ospec.write_prompts("day", [texts[3], *texts[:2], texts[2]])
    whole = ospec.json("learn", *args, "--prompts", again, "--resume")
    assert whole[:2] == answers
    assert len(whole) == len({row["id"] for row in whole}) == 4
    printed = " ".join(capsys.readouterr().err.split())
    assert "2 prompts are there under other names, the first is 'day-2'" in printed
    assert "1 prompts have names under which others are there" in printed

    renamed = ospec.write_prompts("night", texts)
    assert ospec.json("learn", *args, "--prompts", renamed, "--resume") == whole


def test_telemetry_of_the_default_learner(ospec, tmp_path):
    file = tmp_path / "told.jsonl"
    few = ospec.write_prompts("few", ospec.rows[:3])
    args = ("--draft", ospec.draft, "--prompts", few, "--telemetry", file)
    assert ospec("learn", *args, "--pace", "pays") == 0
    told = [json.loads(line) for line in file.read_text().splitlines()]
    updates = [row for row in told if row["kind"] == "update"]
    assert len(updates) == 3
    assert (updates[0]["stride"], updates[0]["loss"] > 0) == (1, True)
    assert updates[-1]["path_length"] > updates[0]["step_length"] > 0


def test_rules_are_compared_on_recorded_trees(ospec, tmp_path, capsys):
    folder, file = tmp_path / "recording", tmp_path / "rules.json"
    args = ("--draft", ospec.draft, "--batch-size", 2, "--trees", "2,2,4")
    prompts = ospec.write_prompts("few", ospec.rows[:3])
    assert ospec("record", "--prompts", prompts, "--out", folder, *args) == 0
    command = ("rules", folder, "--trees", "2,2,4", "--clock")
    assert ospec.run(*command, "flat", "--json", file, "--num-training", 1) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    speeds = {name: row["tokens_per_second"] for name, row in rows.items()}
    assert max(speeds, key=lambda name: speeds[name]) == "oracle"
    assert rows["plain"]["acceptance_length"] == 1
    assert "depth" in rows["best fixed"]["settings"]
    assert "| marginal |" in capsys.readouterr().out

    assert ospec.run(*command, "flat", "--num-training", 3) == 2
    assert "leave none to report" in capsys.readouterr().err
    assert ospec.run("rules", folder, "--trees", "3,2,4", "--clock", "flat") == 2
    assert "holds no trees" in capsys.readouterr().err


TINY_LTD = """
from ospec_jax.control.ltd import LtdConfig
from ospec_jax.control.ppo import PpoConfig

def get_config():
    ppo = PpoConfig(num_steps=128, rollout=64, num_envs=4, minibatch=32, num_epochs=1,
                    actor=(4,), critic=(4,))
    return LtdConfig(ppo, ppo, in_turns=("size",), num_validations=1)
"""


ON_TREES = ("--trees", "2,2,4", "--clock", "flat", "--num-training")
# They are taught by the flat clock.
of_another_clock = pytest.mark.filterwarnings(
    "ignore:the policies of .* were taught by another clock"
)


@pytest.fixture(scope="module")
def recording(ospec, tmp_path_factory):
    """A folder of recorded trees, and how policies are taught on them."""
    folder = tmp_path_factory.mktemp("recording")
    config = tmp_path_factory.mktemp("config") / "tiny.py"
    config.write_text(TINY_LTD)
    args = ("--draft", ospec.draft, "--batch-size", 2, "--trees", "2,2,4")
    prompts = ospec.write_prompts("few", ospec.rows[:4])
    assert ospec("record", "--prompts", prompts, "--out", folder, *args) == 0
    return folder, ("train-control", folder, "--config", config, *ON_TREES)


@of_another_clock
def test_policies_are_taught_and_decode(
    ospec, recording, tmp_path, capsys, monkeypatch
):
    folder, teach = recording
    out, file = tmp_path / "policies", tmp_path / "rules.json"
    to = ("--out", out)

    # Interrupted while the second policy is taught, it goes on where it was.
    run = Teacher.run
    count = itertools.count()
    stopping = lambda self, course, show, save, should_stop: run(
        self,
        course,
        show,
        save,
        lambda: next(count) == 3 and signal.raise_signal(2) or should_stop(),
    )
    monkeypatch.setattr(Teacher, "run", stopping)
    assert ospec.run(*teach, 3, *to) == 130
    monkeypatch.setattr(Teacher, "run", run)
    assert load_policies(out)[1].progress["stage"] == 1
    assert ospec.run(*teach, 3, *to) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert ospec.run(*teach, 2, *to, "--resume") == 2
    assert "had another answers" in capsys.readouterr().err
    assert ospec.run(*teach, 3, *to, "--resume") == 0
    policies, meta = load_policies(out)
    assert meta.progress is None
    assert [row["stage"] for row in meta.history][::2] == [
        "size by itself",
        "depth by itself",
        "size in turn",
    ]

    judge = ("rules", folder, *ON_TREES)
    assert ospec.run(*judge, 3, "--policies", out, "--json", file) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert rows[f"LTD, {out}"]["num_cycles"] > 0
    assert ospec.run(*judge, 2, "--policies", out) == 2
    assert "were taught on 1 of the answers" in capsys.readouterr().err

    asked = ("generate", "--prompt", "Why?", "--draft", ospec.draft)
    answers = []
    for controller in ("fixed", f"ltd:{out}"):
        assert ospec(*asked, "--controller", controller) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    learns = ("--learn-control", 0.1)
    assert ospec(*asked, "--controller", "auto", *learns) == 2
    assert "of --controller ltd:DIR on, not 'auto'" in capsys.readouterr().err
    assert ospec("bench", "--controllers", f"ltd:{out}", *learns) == 2
    assert "are for serving, and bench compares" in capsys.readouterr().err
    assert ospec(*asked, "--controller", "ltx") == 2
    assert "marginal, joint, load or ltd:DIR" in capsys.readouterr().err
    assert ospec("bench", "--controller", f"ltd:{out}") == 2
    assert f"use --controllers ltd:{out}" in capsys.readouterr().err

    contenders = [f"ltd:{out}"]
    args = ("--num-prompts", 1, "--max-new-tokens", 6, "--draft", ospec.draft)
    compared = ("bench", "--controllers", ",".join(contenders), *args)
    assert ospec(*compared, "--json", file) == 0
    rows = json.loads(file.read_text())
    assert [row["mode"] for row in rows] == ["autoregressive", *contenders]
    assert {row["num_mismatched_outputs"] for row in rows} == {0}
    assert ospec("bench", "--controllers", "2,often", *args) == 2
    assert "unknown controller 'often'" in capsys.readouterr().err


# That no output depends on either is held by `control/test_taught.py` and
# `control/test_drift.py`.
@pytest.mark.thorough
@of_another_clock
def test_policies_learn_on_and_others_follow_the_clock(
    ospec, recording, tmp_path, capsys
):
    _, teach = recording
    assert ospec.run(*teach, 3, "--out", tmp_path) == 0
    asked = ("generate", "--prompt", "Why?", "--draft", ospec.draft, "--controller")
    answers = []
    for how in (
        ("fixed",),
        (f"ltd:{tmp_path}", "--learn-control", 0.1),
        ("auto", "--follow-clock"),
    ):
        capsys.readouterr()
        assert ospec(*asked, *how) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]


# That a course goes on bit by bit is held without a command by `replay/test_ltd.py`.
@pytest.mark.thorough
def test_an_interrupted_teaching_ends_as_a_straight_one(
    ospec, recording, tmp_path, monkeypatch
):
    _, teach = recording
    run = Teacher.run
    count = itertools.count()
    stopping = lambda self, course, show, save, should_stop: run(
        self,
        course,
        show,
        save,
        lambda: next(count) == 3 and signal.raise_signal(2) or should_stop(),
    )
    monkeypatch.setattr(Teacher, "run", stopping)
    assert ospec.run(*teach, 3, "--out", tmp_path / "part") == 130
    monkeypatch.setattr(Teacher, "run", run)
    assert ospec.run(*teach, 3, "--out", tmp_path / "part", "--resume") == 0
    assert ospec.run(*teach, 3, "--out", tmp_path / "straight") == 0
    found = [load_policies(tmp_path / name)[0] for name in ("part", "straight")]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.thorough
def test_controllers_that_measure_are_compared(ospec, tmp_path):
    file = tmp_path / "rows.json"
    args = ("--num-prompts", 1, "--max-new-tokens", 6, "--draft", ospec.draft)
    compared = ("bench", "--controllers", "2,auto,marginal", *args)
    assert ospec(*compared, "--json", file) == 0
    rows = json.loads(file.read_text())
    assert [row["mode"] for row in rows[1:]] == ["2", "auto", "marginal"]
    assert {row["num_mismatched_outputs"] for row in rows} == {0}


def test_streams_are_recorded_and_replayed(ospec, tmp_path, capsys):
    parts = ",".join(
        f"{name}={ospec.write_prompts(name, rows)}"
        for name, rows in (("sums", ospec.rows[:4]), ("more", ospec.rows[4:]))
    )
    drift, folder = tmp_path / "drift.jsonl", tmp_path / "recording"
    args = ("--num-prompts", 6, "--kind", "alternating", "--block", 1, "--out", drift)
    assert ospec.run("stream", "--domains", parts, *args) == 0
    args = ("--draft", ospec.draft, "--batch-size", 2)
    assert ospec("record", "--prompts", drift, "--out", folder, *args) == 0

    results, plot = tmp_path / "results.json", tmp_path / "replays.png"
    command = (
        "replay", folder, "--target", ospec.target, "--draft", ospec.draft,
        "--learners", "static,gradient,head", "--update-interval", 20,
        "--learning-rate", 0.002, "--optimizer", "sgd", "--json", results,
    )  # fmt: skip
    assert ospec.run(*command, "--telemetry", tmp_path / "told") == 0
    first = json.loads(results.read_text())["runs"]
    assert [row["learner"] for row in first] == ["static", "gradient", "head"]
    assert first[0]["answers"]["domain"] == ["sums", "more"] * 3
    assert first[1]["num_updates"] > 0
    used = [(row["optimizer"], row["learning_rate"]) for row in first]
    assert used == [(None, None), ("sgd", 0.002), (None, None)]
    table = capsys.readouterr().out
    assert "| learner | optimizer | rate | seed |" in table
    assert "| gradient | sgd | 0.002 | 0 |" in table
    assert "| head | - | - | 0 |" in table
    assert (tmp_path / "told" / "gradient-0.jsonl").exists()

    # Finished runs are not replayed again, unless they lack what is asked for.
    # Those that draw nothing run once, whatever the seeds.
    drawing = tmp_path / "drawing.py"
    drawing.write_text(
        "from ospec_jax import LearnerConfig\n"
        "get_config = lambda: LearnerConfig(replay_share=0.5)\n"
    )
    args = ("--learners", f"static,{drawing}", "--seeds", "0,1", "--plot", plot)
    assert ospec.run(*command, *args) == 0
    second = json.loads(results.read_text())["runs"]
    assert second[:3] == first
    assert [row["seed"] for row in second] == [0, 0, 0, 0, 1]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    args = ("--learners", "static", "--prompts", drift, "--regret", "--chunk-size", 4)
    assert ospec.run(*command, *args) == 0
    assert "| static | - | - | 0 |" in capsys.readouterr().out
    third = json.loads(results.read_text())
    static = next(row for row in third["runs"] if row["config"] is None)
    assert (
        static["answers"]["num_accepted_tokens"]
        == (first[0]["answers"]["num_accepted_tokens"])
    )
    assert len(static["answers"]["loss"]) == 6
    assert [len(losses) for losses in third["hindsight"].values()] == [6]


# Batches and contenders are those of `bench/test_parts.py` and `bench/test_drafts.py`.
@pytest.mark.thorough
def test_bench_of_batches(ospec):
    rows = ospec.json(
        "bench", "--draft", ospec.draft, "--prompts", ospec.prompts,
        "--num-prompts", 5, "--batch-size", 2, "--modes", "ngrams,learned",
    )  # fmt: skip
    for row in rows:
        assert row["num_prompts"] == 5
        assert row["num_mismatched_outputs"] == 0
        assert row["predicted_speedup"] is None


def test_bench_reports_every_mode(ospec, tmp_path):
    plot = tmp_path / "plot.png"
    rows = ospec.json(
        "bench", "--draft", ospec.draft, "--prompts", ospec.prompts,
        "--num-prompts", 3, "--plot", plot,
    )  # fmt: skip
    assert [row["mode"] for row in rows] == list(MODES)
    for row in rows:
        assert set(row) == BENCH_KEYS
        assert row["num_mismatched_outputs"] == 0
        assert row["num_prompts"] == 3
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_bench_asks_spec_bench(ospec, tmp_path):
    turns = {"translation": ["Guten Tag."], "writing": ["Write.", "Again."]}
    lines = [
        json.dumps({"question_id": f"{name}{i}", "category": name, "turns": texts})
        for name, texts in turns.items()
        for i in range(2)
    ]
    file = ospec.write_prompts("questions", lines)
    table, plot = tmp_path / "table.md", tmp_path / "plot.png"
    modes = ("--modes", "autoregressive,ngrams", "--draft", ospec.draft)
    outputs = ("--markdown", table, "--plot", plot)
    args = ("--spec-bench", file, "--num-prompts", 1, "--shuffle", 3)
    plain, ngrams = ospec.json("bench", *args, *modes, *outputs)
    assert plain["num_prompts"] == 3  # two turns, and one
    assert ngrams["num_mismatched_outputs"] == 0
    labels = [part["domain"] for part in ngrams["by_domain"]]
    assert labels == ["multi-turn conversation", "translation"]
    assert ngrams["spec_bench"]["by_task"]["overall"]["num_questions"] == 2
    headings = "| Models | Multi-turn Conversation | Translation |"
    assert headings in table.read_text()
    assert plot.exists()


@pytest.mark.thorough
def test_bench_compares_drafts(ospec, tmp_path):
    table = tmp_path / "table.md"
    rows = ospec.json(
        "bench", "--prompts", ospec.prompts, "--num-prompts", 2, "--markdown", table,
        "--drafts", ospec.draft, f"{ospec.draft}@static:2,1", "ngram",
    )  # fmt: skip
    names = ["autoregressive", ospec.draft, f"{ospec.draft}@static:2,1", "ngram"]
    assert [row["mode"] for row in rows if row["domain"] == "all"] == names
    assert all(row["num_mismatched_outputs"] == 0 for row in rows)
    assert f"| {ospec.draft}@static:2,1 |" in table.read_text()


def test_targets_without_a_shipped_draft_are_drafted_for_by_ngrams(ospec, capsys):
    (answer,) = ospec.json("generate", "--prompts", ospec.prompts)[:1]
    assert "no draft comes with the package for model" in capsys.readouterr().err
    (plain,) = ospec.json("generate", "--prompts", ospec.prompts, "--draft", "none")[:1]
    assert answer["text"] == plain["text"]
    assert answer["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


@pytest.mark.parametrize(
    ("flags", "is_compared", "name"),
    [
        ({}, False, "longer:ngram,shipped"),
        ({"num_predicted_tokens": 5}, False, "longer:ngram,shipped"),
        ({"num_speculative_tokens": 5}, False, "shipped"),
        ({"num_speculative_tokens": 0}, False, "shipped"),
        ({"controller": "auto"}, False, "shipped"),
        ({"num_speculative_tokens": "auto"}, False, "shipped"),
        ({"tree": "static:2,1"}, False, "shipped"),
        ({"ngrams": False}, False, "shipped"),
        ({"batch_size": 2}, False, "shipped"),
        ({}, True, "shipped"),  # modes add n-grams themselves
    ],
)
def test_single_requests_get_longer_chains_unless_told_how(
    ospec, monkeypatch, flags, is_compared, name
):
    asked = []
    monkeypatch.setattr(arguments, "load_draft", lambda name, _: asked.append(name))
    arguments.Decoding(target=ospec.target, **flags).load(is_compared)
    assert asked == [name]


def test_a_damaged_shipped_draft_is_told_of(ospec, capsys, monkeypatch, tmp_path):
    (tmp_path / "smollm2-135m-eagle3" / "7").mkdir(parents=True)
    monkeypatch.setattr(loading, "_SHIPPED", tmp_path)
    assert ospec("generate", "--prompt", "x") == 2
    assert "smollm2-135m-eagle3" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "args", "message"), [
    ("generate", [], "give either --prompt or --prompts"),
    ("generate", ["--prompt", "x", "--draft", "nowhere"], "holds no checkpoint"),
    ("generate", ["--prompt", "x", "--draft", "shipped"], "made for smollm2-135m"),
    ("generate", ["--prompt", "x", "--tree", "bush"], "unknown tree 'bush'"),
    ("generate", ["--prompt", "x " * 600, "--draft", "none"], "shorten the prompt"),
    ("generate", ["--prompts", "nowhere.jsonl"], "no prompt file nowhere.jsonl"),
    ("generate", ["--prompt", "x", "--prediction", "nowhere"], "no prediction file"),
    ("generate", ["--prompts", "{prompts}", "--prediction", "{bad}"], "goes with"),
    ("learn", ["--prompts", "{prompts}", "--draft", "none"], "learning needs a draft"),
    ("learn", ["--prompts", "{prompts}", "--resume"], "--resume needs --checkpoint"),
    ("learn", ["--prompts", "{prompts}", "--learner", "magic"], "unknown learner"),
    ("learn", ["--prompts", "{bad}"], "line 2"),
    ("learn", ["--prompts", "{prompts}", "--tensorboard", "x"], "needs --telemetry"),
    ("learn", ["--prompts", "{prompts}", "--save-every", "0"], "1 or more prompts"),
    ("generate", ["--prompt", "x", "--batch-size", "0"], "--batch-size is 0"),
    ("bench", ["--prompts", "{empty}"], "holds no prompts"),
    ("bench", ["--prompts", "{prompts}", "--modes", "fast"], "unknown modes"),
    ("bench", ["--prompts", "{prompts}", "--spec-bench", "{bad}"], "give either"),
    ("bench", ["--spec-bench", "{prompts}"], "line 1: a question of Spec-Bench has"),
    ("bench", ["--prompts", "{prompts}", "--num-prompts", "0"], "--num-prompts is 0"),
    ("bench", ["--prompts", "{prompts}", "--shuffle", "-1"], "--shuffle is -1"),
    ("bench", ["--drafts", "ngram", "--batch-size", "2"], "batch size of 1"),
    ("bench", ["--prompts", "{prompts}", "--drafts", "none"], "names no draft"),
    ("generate", ["--prompt", "x", "--draft", "shipped:x"], "there are shipped:"),
])  # fmt: skip
def test_errors_name_value_and_remedy(ospec, capsys, command, args, message):
    files = {
        "prompts": ospec.prompts,
        "bad": ospec.write_prompts("bad", ['{"prompt": "a"}', "{prompt"]),
        "empty": ospec.write_prompts("empty", [""]),
    }
    filled = [files.get(arg.strip("{}"), arg) for arg in args]
    assert ospec(command, *filled) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "error:" in printed
    assert message in printed


@pytest.mark.parametrize(("command", "message"), [
    (("stream", "--domains", "math", "--out", "x"), "use NAME=FILE"),
    (("stream", "--domains", "a={prompts}", "--out", "x"), "has 8 prompts"),
    (("replay", "nowhere"), "holds no recording"),
    (("replay", "nowhere", "--learners", "magic"), "unknown learner 'magic'"),
    (("replay", "nowhere", "--seeds", "one"), "whole seeds"),
    (("replay", "nowhere", "--learners", "gradient,optimistic", "--learning-rate",
      "1e-3"), "optimizer 'sgd' (--optimizer sgd), or 'adam'"),
    (("replay", "nowhere", "--learners", "momentum", "--optimizer", "adam"),
     "SGD with momentum, not 'adam'"),
    (("demo", "--learner", "optimistic", "--learning-rate", "1e-3"),
     "published with 'sgd' at a rate of 0.1"),
    (("telemetry", "nowhere", "--plot", "x"), "no telemetry file"),
])  # fmt: skip
def test_streams_name_what_is_wrong(ospec, capsys, command, message):
    assert ospec.run(*[part.format(prompts=ospec.prompts) for part in command]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_unknown_flags_are_refused(ospec, capsys):
    assert ospec("generate", "--promt", "x") == 2
    assert "--promt" in capsys.readouterr().err


def test_the_version_is_told(ospec, capsys):
    assert ospec.run("--version") == 0
    assert capsys.readouterr().out.strip() == f"ospec {ospec_jax.__version__}"


def test_help_has_groups_an_example_and_the_learners(ospec, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert ospec.run("learn", "--help") == 0
    shown = capsys.readouterr().out
    assert "Example: ospec learn --prompts FILE.jsonl" in shown
    for group in ("model", "drafting", "answer"):
        assert f"{group} options" in shown
    assert max(map(len, shown.splitlines())) <= 80
    # What happens by default stands in words.
    assert "None" not in shown
    words = " ".join(re.sub("[│─]", " ", shown).split())
    assert ", ".join(LEARNER_NAMES) in words
    assert "for learning, by default 0.02." in words


def test_progress_tells_of_loading_and_compiling(ospec, capsys):
    assert ospec("generate", "--prompt", "Hello", "--draft", "ngram") == 0
    told = capsys.readouterr().err
    assert told.index("loading") < told.index("is loaded in float32")
    assert "compiling 1 of 2: the pass over a prompt" in told
    assert "compiling 2 of 2: a step of depth 3" in told


def test_learning_says_what_is_kept(ospec, tmp_path, capsys):
    args = ("learn", "--prompts", ospec.write_prompts("few", ospec.rows[:2]))
    assert ospec(*args, "--draft", "ngram") == 0
    told = capsys.readouterr().err
    assert "nothing of what is learned is kept: give --checkpoint" in told
    assert told.index("is kept") < told.index("loading")
    assert "2 answers, " in told
    assert ospec(*args, "--draft", "ngram", "--checkpoint", tmp_path / "d") == 0
    told = capsys.readouterr().err
    assert f"serve it with --draft {tmp_path / 'd'}" in told
    assert "is kept" not in told


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("nowhere", "nowhere holds no checkpoint"),
        ("model:nothing", "no target 'nothing'"),
        ("self:int3", "no draft 'self:int3'"),
        ("mixed:ngram,nowhere", "nowhere holds no checkpoint"),
    ],
)
def test_a_bad_draft_is_refused_before_the_target_loads(ospec, capsys, draft, message):
    assert ospec("generate", "--prompt", "Hello", "--draft", draft) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "loading" not in told


def test_brackets_in_paths_and_messages_stay(ospec, tmp_path, capsys):
    odd = tmp_path / "c[/k] [red]"
    prompts = ospec.write_prompts("bracket", ospec.rows[:1])
    args = ("--prompts", prompts, "--draft", "ngram", "--checkpoint", odd)
    assert ospec("learn", *args) == 0
    assert str(odd) in capsys.readouterr().err
    assert ospec("generate", "--prompts", tmp_path / "[torch]") == 2
    assert str(tmp_path / "[torch]") in capsys.readouterr().err


@pytest.mark.parametrize("name", LEARNER_NAMES)
def test_learners_are_known_by_name(name):
    config = arguments.learner_config(name, seed=5, budget=None)
    assert (config.name, config.seed) == (name, 5)
    assert arguments.learner_config(name) == LearnerConfig(name=name)
    if name in ("head", "preference", "memory"):
        with pytest.raises(ConfigError, match="does not read learning_rate"):
            arguments.learner_config(name, learning_rate=0.5)
    elif name in ("momentum", "optimistic"):
        with pytest.raises(ConfigError, match="--optimizer sgd"):
            arguments.learner_config(name, learning_rate=0.5)
    else:
        assert arguments.learner_config(name, learning_rate=0.5).learning_rate == 0.5


def test_step_sizes_follow_the_optimizer():
    rate = lambda name, **flags: arguments.learner_config(name, **flags).learning_rate
    assert (rate("optimistic"), rate("optimistic", optimizer="adam")) == (0.1, 3e-4)
    assert (rate("gradient"), rate("gradient", optimizer="sgd")) == (3e-4, 0.1)
    file = str(CONFIGS / "online_eagle3.py")
    assert (rate(file), rate(file, optimizer="sgd")) == (3e-4, 0.1)
    assert rate(file, optimizer="sgd", learning_rate=0.5) == 0.5
    # A rate alone is for the file's optimizer, whatever the rule was published with.
    config = arguments.learner_config(str(CONFIGS / "opt_hydra.py"), learning_rate=0.5)
    assert (config.optimizer, config.learning_rate) == ("sgd", 0.5)
    assert LearnerConfig(name="osd", update_interval=9).update_every_prompts == 1


def test_published_rules_keep_their_loss():
    losses = {name: LearnerConfig(name=name).loss for name in ("optimistic", "osd")}
    assert losses == {"optimistic": "jsd", "osd": "forward_kl"}
    assert LearnerConfig(name="osd", loss="jsd").loss == "jsd"


def test_a_flag_for_the_interval_wins_over_a_file_that_counts_prompts():
    file = str(CONFIGS / "opt_hydra.py")
    config = arguments.learner_config(file, update_interval=256)
    assert (config.update_interval, config.update_every_prompts) == (256, 0)
    assert arguments.learner_config(file).update_every_prompts == 80


@pytest.mark.parametrize("setting", [{"loss": "jsd"}, {"pace": "pays"}, {}])
def test_the_automatic_choice_remembers_what_was_set(setting):
    assert LearnerConfig(name="auto", **setting).given == tuple(setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "head", "loss": "jsd"}, "'head' does not read loss"),
        ({"radius": 1.0}, "or use the learner `optimistic` or `shared_ensemble`"),
        ({"learning_rat": 1.0}, "did you mean 'learning_rate'"),
        ({"name": "osd", "update_every_prompts": 0}, "counts requests: use 1 or more"),
        ({"name": "osd", "positions": "all"}, "'osd' does not read positions"),
        ({"name": "auto", "head_rate": 0.5, "loss": "jsd"}, "does not read head_rate"),
    ],
)
def test_what_a_learner_does_not_read_cannot_be_set(settings, message):
    with pytest.raises(ConfigError, match=message):
        LearnerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"promotion": "guard"}, "use always or guarded"),
        ({"replay_share": 0.9}, "leaves no window to new traffic"),
        ({"window": 0}, "window is 0; use 1 or more"),
        ({"name": "head", "head_damping": 0.0}, "head_damping is 0.0; use above 0"),
        ({"name": "head", "head_patience": 0.0}, "head_patience is 0.0; use above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LearnerConfig(**settings)


RECIPES = sorted(CONFIGS.glob("distill_*.py"))
CONTROL = sorted(CONFIGS.glob("ltd*.py"))
TABLES = sorted(CONFIGS.glob("*_table.py"))
LEARNERS = sorted({*CONFIGS.glob("*.py")} - {*RECIPES, *CONTROL, *TABLES})


@pytest.mark.parametrize("file", LEARNERS, ids=lambda f: f.stem)
def test_shipped_configurations_are_learners(file):
    assert isinstance(arguments.learner_config(str(file)), LearnerConfig)
    assert arguments.learner_config(str(file), learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize("file", CONTROL, ids=lambda f: f.stem)
def test_shipped_configurations_teach_policies(file):
    config = arguments.run_config(str(file), LtdConfig)
    assert [str(stage) for stage in config.stages][:2] == [
        "size by itself",
        "depth by itself",
    ]
    assert config.fixed_size == 60


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes_are_of_flags(file):
    command = with_recipe(make.distill, ["--recipe", str(file), "--out", "x"])
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(command).parameters.items()
    }
    given = runpy.run_path(str(file))["get_config"]()
    assert given.items() <= defaults.items()
    # Others keep theirs.
    assert defaults["family"] == "eagle3"
    assert with_recipe(make.distill, ["--out", str(file)]) is make.distill


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{'num_update': 3}", "none of the flags; did you mean 'num_updates'?"),
        ("{'num_updates': 'many'}", "num_updates is 'many'"),
        ("{'recipe': 'x'}", "'recipe' is none of the flags"),
        ("[]", "has no get_config() -> dict"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_recipes_that_are_none_are_refused(ospec, tmp_path, capsys, values, message):
    file = tmp_path / "recipe.py"
    file.write_text(f"def get_config():\n    return {values}\n")
    assert ospec.run("distill", "--recipe", file, "--out", tmp_path / "run") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert ospec.run("distill", f"--recipe={file}x", "--out", tmp_path / "run") == 2
    assert "no recipe" in capsys.readouterr().err


@pytest.fixture
def writes(ospec, monkeypatch):
    """What a random model writes is taken as it is."""
    fault = lambda text, config: "" if text.strip() else "too short"
    monkeypatch.setattr(kinds, "find_fault", fault)
    chat_alone = (("self-chat", 1.0),)
    monkeypatch.setattr(self_config, "DEFAULT_KINDS", chat_alone)
    shorter = functools.partial(SelfPromptConfig, kinds=chat_alone, max_turn_tokens=90)
    monkeypatch.setattr(self_config, "SelfPromptConfig", shorter)
    return ospec


def test_prompts_are_written_and_gone_on_with(writes, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    args = (
        "write-prompts", "--target", writes.target, "--precision", "float32", "--out",
        file, "--batch-size", 2,
    )  # fmt: skip
    assert writes.run(*args, "--num", 2) == 0
    told = capsys.readouterr().err
    assert f"{file} holds 2 prompts" in told
    assert "self-chat" in told
    first = file.read_text()
    assert writes.run(*args, "--num", 4) == 0
    assert file.read_text().startswith(first)
    assert [p.domain for p in read_prompts(file)] == ["self-chat"] * 4
    assert writes.run(*args, "--num", 4, "--seed", 1) == 2
    assert "was written with seed 0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--num", 0), "--num is 0"),
        (("--num", 2, "--kinds", "self-chat"), "use NAME=WEIGHT"),
        (("--num", 2, "--kinds", "chat=2"), "unknown kind of prompts 'chat'"),
        (("--num", 2, "--batch-size", 0), "--batch-size is 0"),
    ],
)
def test_prompts_that_cannot_be_written_are_refused(
    ospec, tmp_path, capsys, args, message
):
    command = "write-prompts", "--target", ospec.target, "--out", tmp_path / "x.jsonl"
    assert ospec.run(*command, *args) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_drafts_learn_from_prompts_of_the_target(writes, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    values = {"self_prompts": 5, "num_updates": 1, "batch_size": 2}
    recipe.write_text(f"def get_config():\n    return {values}\n")
    args = "distill", "--recipe", recipe, "--collect-batch-size", 2, "--out"
    out = tmp_path / "alone"
    assert writes(*args, out, "--self-prompts", 3, "--collect-only") == 0
    assert len(read_prompts(out / "self_prompts.jsonl")) == 3
    store = FeedbackStore(out / "data")
    assert {entry.domain for entry in store.entries} == {"self-chat"}
    assert not (out / "draft").exists()

    # Without the flag the recipe's number holds, and other prompts come beside.
    size = "--draft-vocab-size", 100
    assert writes(*args, out, "--prompts", writes.prompts, *size) == 0
    assert len(FeedbackStore(out / "data").entries) == 5 + 8
    assert checkpoint.load(out / "draft").step == 1

    capsys.readouterr()
    assert writes("distill", "--out", tmp_path / "none") == 2
    assert "give --prompts FILE.jsonl, or --self-prompts" in capsys.readouterr().err


def test_both_models_answer_side_by_side(ospec, capsys, tmp_path, monkeypatch):
    prompts = ospec.write_prompts("pair", ['{"prompt": "One?"}', '{"prompt": "Two?"}'])
    args = "--prompts", prompts, "--target", ospec.target, "--draft-model", ospec.target
    args = "parallel", *args, "--max-new-tokens", 9
    if jax.device_count() == 1:
        assert ospec(*args) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "jax has 1 (cpu:0). Two devices are the least" in told
    # Tests have one device, which changes no token.
    place = places.Place(jax.devices()[0])
    both = places.Places(place, place)
    monkeypatch.setattr(places, "find_places", lambda *_: both)
    file = tmp_path / "rows.json"
    assert ospec(*args, "--num-speculative-tokens", 2, "--json", file) == 0
    found = json.loads(file.read_text())
    assert [row["is_same"] for row in found] == [True, True]
    # The model drafts for itself, so that all is accepted.
    assert {row["acceptance_rate"] for row in found} == {1.0}
    told = capsys.readouterr()
    assert "2 of 2" in told.out
    assert "in turns" in told.out
    assert "a drafted token" in told.err

    assert ospec(*args, "--num-speculative-tokens", 0) == 2
    assert "--num-speculative-tokens is 0" in capsys.readouterr().err
    assert ospec(*args, "--num-prompts", 0) == 2
    assert "--num-prompts is 0" in capsys.readouterr().err


def test_steps_are_drafted_and_graded(ospec, capsys, tmp_path):
    rows = [
        {"id": "a", "prompt": "What is 1 + 1?", "reference": "1 + 1 = 2\n#### 2"},
        {"id": "b", "prompt": "Twice?", "meta": {"test_list": ["assert f(1) == 2"]}},
        {"id": "c", "prompt": "Who?"},
    ]
    prompts = ospec.write_prompts("problems", [json.dumps(row) for row in rows])
    args = "--prompts", prompts, "--draft-model", ospec.target, "--run-code"
    steps = "--max-step-tokens", 6, "--num-ahead", 2, "--verifier", "exact"
    kept = "--learner", "dpo", "--chunk-size", 2, "--checkpoint", tmp_path / "kept"
    # In two goes, of which the second keeps the rows of the first.
    file = tmp_path / "rows.json"
    goes = "reason", *args, *steps, *kept, "--json", file
    assert ospec(*goes, "--num-prompts", 2) == 0
    capsys.readouterr()
    assert ospec(*goes) == 0
    found = json.loads(file.read_text())
    assert [row["id"] for row in found] == ["a", "b", "c"]
    # The model drafts for itself, so that all its steps are kept.
    assert all(row["is_same"] for row in found)
    assert all(row["num_accepted_steps"] == row["num_drafted_steps"] for row in found)
    assert [row["is_right"] for row in found] == [False, False, None]
    # Nothing was rejected, so there was nothing to learn from.
    assert [row["version"] for row in found] == [0, 0, 0]
    assert found[1]["learning"]["num_pairs"] == 0
    told = capsys.readouterr()
    assert "lossy" not in told.err
    assert "3 of 3" in told.out
    assert ospec("reason", *args, *steps, *kept) == 0
    assert "3 answers; 0 of these prompts are left" in capsys.readouterr().err

    folder = "--checkpoint", tmp_path / "other"
    assert ospec("reason", *args, *folder) == 2
    assert "give --learner dpo or sft" in capsys.readouterr().err
    assert ospec("reason", *args, "--verifier", "nobody") == 2
    assert "unknown verifier 'nobody'" in capsys.readouterr().err
    assert ospec("reason", *args, "--num-prompts", 0) == 2
    assert "--num-prompts is 0" in capsys.readouterr().err
