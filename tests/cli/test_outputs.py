# SPDX-License-Identifier: Apache-2.0
"""Results that cannot be written, and signals: nothing that was done is lost."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_cli

from ospec_jax import atomic
from ospec_jax.cli import answer
from ospec_jax.cli.outputs import check_outputs, run_then
from ospec_jax.config import ConfigError
from ospec_jax.distill import train
from ospec_jax.replay import collect
from ospec_jax.replay.store import recorded_ids
from ospec_jax.reports.progress import Interrupt
from ospec_jax.session import Session
from ospec_jax.storage import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")
ospec = test_cli.ospec
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no full device")


def test_places_are_tried_and_left_as_they_were(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    check_outputs(
        [file, None, Path("-"), Path(os.devnull), tmp_path / "new" / "a.json"],
        [tmp_path / "new" / "folder", tmp_path],
        [tmp_path / "new" / "a.svg", tmp_path / "without"],
    )
    assert [file] == list(tmp_path.iterdir())
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"files": ["."]}, "is a folder; name a file"),
        ({"folders": ["file"]}, "is a file; name a folder"),
        ({"files": ["file/under"]}, "file/under: not a directory; choose another"),
        ({"folders": ["file/under"]}, "file/under: not a directory; choose another"),
        ({"files": ["a", "a"]}, "written twice"),
        ({"files": ["a"], "figures": ["a"]}, "written twice"),
        ({"files": ["file"], "inputs": ["link"]}, "is read by this command"),
        ({"figures": ["a.gpx"]}, "'gpx' is none of .*png"),
    ],
)
def test_places_of_the_wrong_kind_are_refused(tmp_path, places, message):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    places = {
        kind: [tmp_path / name for name in names] for kind, names in places.items()
    }
    with pytest.raises(ConfigError, match=message):
        check_outputs(**places)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_places_that_may_not_be_written_are_refused(tmp_path):
    tmp_path.chmod(0o500)
    for places in ({"files": [tmp_path / "a"]}, {"folders": [tmp_path]}):
        with pytest.raises(ConfigError, match="permission denied"):
            check_outputs(**places)


def test_what_comes_last_is_done_whatever_fails():
    done = []

    def fail(what):
        done.append(what)
        raise OSError(what)

    last = [
        lambda: fail("second"),
        lambda: fail("third"),
        lambda: done.append("end"),
    ]
    with Interrupt() as interrupt, pytest.raises(OSError, match="third"):
        run_then(interrupt, lambda: fail("first"), last)
    assert done == ["first", "second", "third", "end"]


OUTPUTS = [
    ("generate", "--prompt", "Hi", "--json"),
    ("generate", "--prompt", "Hi", "--jsonl"),
    ("learn", "--prompts", "PROMPTS", "--json"),
    ("learn", "--prompts", "PROMPTS", "--telemetry"),
    ("bench", "--json"),
    ("bench", "--markdown"),
    ("bench", "--plot"),
    ("replay", "recording", "--json"),
    ("replay", "recording", "--plot"),
    ("stream", "--domains", "a=PROMPTS", "--out"),
    ("telemetry", "PROMPTS", "--plot"),
]
FOLDERS = [
    ("learn", "--prompts", "PROMPTS", "--checkpoint"),
    ("learn", "--prompts", "PROMPTS", "--telemetry", "t", "--tensorboard"),
    ("distill", "--prompts", "PROMPTS", "--out"),
    ("distill", "--prompts", "PROMPTS", "--out", "x", "--ship"),
    ("distill", "--prompts", "PROMPTS", "--out", "x", "--data"),
    ("record", "--prompts", "PROMPTS", "--out"),
    ("replay", "recording", "--telemetry"),
    ("import", "head", "--out"),
    ("export", "shipped", "--out"),
    ("lower", "--out"),
    ("demo", "--out"),
]


@pytest.mark.parametrize("args", OUTPUTS + FOLDERS, ids="-".join)
def test_outputs_are_refused_before_anything_is_loaded(
    ospec, tmp_path, monkeypatch, capsys, args
):
    def load(*_, **__):
        raise AssertionError("loaded first")

    for module in ("arguments", "make", "streams", "measure"):
        monkeypatch.setattr(f"ospec_jax.cli.{module}.load_target", load)
    monkeypatch.setattr("ospec_jax.bench.demo.load_target", load)
    monkeypatch.chdir(tmp_path)
    wrong = tmp_path / "wrong"
    if args in OUTPUTS:
        wrong.mkdir()
    else:
        wrong.write_text("old")
    args = [part.replace("PROMPTS", ospec.prompts) for part in args]
    assert ospec.run(*args, wrong) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "wrong: it is a" in printed
    assert list(tmp_path.iterdir()) == [wrong]


@needs_full
def test_a_full_disk_is_named_and_what_was_learned_is_saved(ospec, tmp_path, capsys):
    args = ("--draft", ospec.draft, "--learner", "memory", "--prompts", ospec.prompts)
    args += ("--checkpoint", tmp_path / "run", "--json", tmp_path / "answers.json")
    assert ospec("learn", *args, "--jsonl", FULL) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "error: /dev/full: no space left on device; make room" in printed
    assert checkpoint.load(tmp_path / "run").meta.answered == ("q0",)
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 1

    # The same command goes on once there is room.
    assert ospec("learn", *args, "--jsonl", tmp_path / "a.jsonl", "--resume") == 0
    assert len(test_cli.read_lines(tmp_path / "a.jsonl")) == 8


def test_a_failure_before_the_first_answer_empties_no_file(
    ospec, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise ConfigError("no")

    monkeypatch.setattr(Session, "generate", fail)
    file = tmp_path / "answers.json"
    file.write_text("old")
    args = ("--draft", ospec.draft, "--prompts", ospec.prompts, "--json", file)
    assert ospec("generate", *args) == ospec("learn", *args) == 2
    assert file.read_text() == "old"


def test_one_command_survives_restarts(ospec, tmp_path, capsys):
    run, told, seen = (tmp_path / name for name in ("run", "told.jsonl", "seen.jsonl"))
    args = ("--draft", ospec.draft, "--learner", "memory", "--prompts", ospec.prompts)
    args += ("--checkpoint", run, "--resume", "--jsonl", told, "--telemetry", seen)
    run.mkdir()
    # What a run leaves that is killed before its first checkpoint.
    for file in (run / "answers.jsonl", told, seen):
        file.write_text('{"id": "q0", "kind": "answer", "number": 1}\n')

    assert ospec("learn", *args) == 0
    assert "holds no checkpoint yet" in " ".join(capsys.readouterr().err.split())
    assert len(test_cli.read_lines(told)) == 8
    for file in (run / "answers.jsonl", told, seen):
        assert file.with_name(file.name + ".before").read_text().count("\n") == 1
    assert ospec("learn", *args) == 0
    assert "8 prompts were answered before" in " ".join(capsys.readouterr().err.split())


def interrupting(number):
    """`Interrupt.is_over`, which gets a signal when it is asked for that time."""
    count = itertools.count(1)
    is_over = Interrupt.is_over

    def asked(self):
        if next(count) == number:
            signal.raise_signal(signal.SIGTERM)
        return is_over(self)

    return asked


@pytest.mark.parametrize("command", ["generate", "learn"])
def test_a_signal_within_an_answer_drops_it(ospec, tmp_path, monkeypatch, command):
    file = tmp_path / "a.json"
    args = ("--draft", ospec.draft, "--prompts", ospec.prompts)
    args += ("--learner", "memory") * (command == "learn")
    whole = ospec.json(command, *args)
    args += ("--checkpoint", tmp_path / "run") * (command == "learn")
    args += ("--json", file)
    monkeypatch.setattr(Interrupt, "is_over", interrupting(50))
    monkeypatch.setattr(answer, "Interrupt", lambda **_: Interrupt(grace=0.0))
    assert ospec(command, *args) == 143
    found = json.loads(file.read_text())
    assert 0 < len(found) < 8
    assert found == whole[: len(found)]
    monkeypatch.undo()
    if command == "learn":
        assert ospec("learn", *args, "--resume") == 0
        assert json.loads(file.read_text()) == whole


# Signals while recording are in the next test, and while training in
# `distill/test_distill.py`.
@pytest.mark.thorough
def test_distilling_stops_where_a_signal_comes(ospec, tmp_path, monkeypatch):
    out, ship = tmp_path / "out", tmp_path / "ship"
    args = ("--prompts", ospec.prompts, "--out", out, "--num-updates", 3)
    args += ("--batch-size", 2, "--draft-vocab-size", 100, "--ship", ship)
    interrupt = lambda: signal.raise_signal(signal.SIGTERM)
    write = collect.write_shard
    monkeypatch.setattr(collect, "write_shard", lambda *a: (write(*a), interrupt()))
    # It comes with the last answer: nothing is left to record, but all to train.
    assert ospec("distill", *args) == 143
    assert not (out / "draft").exists()
    monkeypatch.undo()

    describe = train._describe
    monkeypatch.setattr(
        train, "_describe", lambda info: (interrupt(), describe(info))[1]
    )
    assert ospec("distill", *args) == 143
    assert checkpoint.steps(out / "draft") == [1]
    assert not ship.exists()
    monkeypatch.undo()

    assert ospec("distill", *args) == 0
    assert checkpoint.steps(ship) == [3]


def test_recording_keeps_every_complete_answer(ospec, tmp_path, monkeypatch):
    args = ("--prompts", ospec.prompts, "--out", tmp_path, "--draft", ospec.draft)
    args += ("--batch-size", 2)
    monkeypatch.setattr(Interrupt, "is_over", interrupting(30))
    assert ospec("record", *args) == 143
    monkeypatch.undo()
    # All of them would go into one shard.
    kept = recorded_ids(tmp_path)
    assert 2 <= len(kept) < 8
    assert ospec("record", *args) == 0
    assert kept < recorded_ids(tmp_path)
    assert len(recorded_ids(tmp_path)) == 8


@pytest.mark.parametrize(
    "args",
    [
        ("learn", "--checkpoint"),
        ("distill", "--out"),
        ("distill", "--out", "other", "--data"),
        ("record", "--out"),
    ],
    ids=" ".join,
)
def test_a_second_run_on_a_folder_hears_who_holds_it(
    ospec, tmp_path, monkeypatch, capsys, args
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    with atomic.locked(folder / ".lock", folder):
        assert ospec(*args, folder, "--prompts", ospec.prompts) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"is used by process {os.getpid()} on" in printed
    # What a command held before it failed is free again.
    with atomic.locked(tmp_path / "other" / ".lock", "other"):
        pass


@pytest.mark.parametrize("flag", ["--jsonl", "--telemetry"])
def test_a_second_run_on_a_file_hears_who_holds_it(ospec, tmp_path, capsys, flag):
    file = tmp_path / "rows.jsonl"
    with atomic.locked(tmp_path / ".rows.jsonl.lock", file):
        assert ospec("learn", flag, file, "--prompts", ospec.prompts) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"is used by process {os.getpid()} on" in printed
    assert not file.exists()


def test_output_that_nobody_reads_any_more_is_no_failure():
    code = (
        "import sys\n"
        "from ospec_jax import cli\n"
        "def talk() -> None:\n"
        "    '''Talks.'''\n"
        "    while True:\n"
        "        print('text' * 1000)\n"
        "cli.COMMANDS = {'talk': talk, 'drafters': cli.drafters}\n"
        "cli.EXAMPLES['talk'] = 'ospec talk'\n"
        "sys.argv = ['ospec', 'talk']\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert told == b""
