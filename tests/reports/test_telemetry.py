# SPDX-License-Identifier: Apache-2.0
"""Telemetry: what its rows say, that it resumes, and what it refuses."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.learners.base import LearnerInfo
from ospec_jax.learners.last_layer import HeadInfo
from ospec_jax.online.trainer import UpdateReport
from ospec_jax.reports.telemetry import (
    Telemetry,
    plot_telemetry,
    read_rows,
    tensorboard_writer,
)
from ospec_jax.types import Draft

# What a learner says beside the values common to all.
TOLD = {"expert_weights": jnp.asarray([0.25, 0.75]), "hint_error": jnp.ones(())}


def report(decision="promote", extra=TOLD):
    values = jnp.asarray([0.5, 0.25])
    loss, grad_norm, weight = jnp.float32(2.0), jnp.float32(1.5), jnp.float32(8.0)
    info = LearnerInfo(loss, values, values, grad_norm, weight, extra)
    return UpdateReport(info, decision, 0.125)


def draft(value):
    return Draft({"kernel": jnp.full((2, 2), value)}, jnp.arange(4))


def stats(num_accepted):
    found = DecodingStats(num_spec_tokens=3)
    found.add_step(3, num_accepted)
    return found


def write(telemetry, numbers):
    """Answers of ten tokens; the served draft moves after each second one."""
    for i in numbers:
        if i and i % 2 == 0:
            telemetry.update(report(), draft(i / 2 - 1), draft(i / 2))
        telemetry.answer(f"p{i}", "ab"[i % 2], 10, stats(i % 4), version=i // 2)
    telemetry.close()


@pytest.fixture
def rows(tmp_path):
    write(Telemetry(tmp_path / "new" / "all.jsonl"), range(8))
    return read_rows(tmp_path / "new" / "all.jsonl")


def test_answers_tell_acceptance_and_staleness(rows):
    answers = [row for row in rows if row["kind"] == "answer"]
    assert [row["number"] for row in answers] == list(range(1, 9))
    assert [row["staleness"] for row in answers] == [10, 20] * 4
    assert [row["mean_acceptance_length"] for row in answers] == [1, 2, 3, 4] * 2
    assert answers[3]["running_acceptance_length"] == pytest.approx(2.5)
    assert answers[-1]["version"] == 3


def test_updates_tell_movement_and_what_the_learner_says(rows):
    updates = [row for row in rows if row["kind"] == "update"]
    # Each update moves the four entries by one: a distance of two.
    assert [row["step_length"] for row in updates] == [2, 2, 2]
    assert [row["path_length"] for row in updates] == [2, 4, 6]
    assert [row["num_promotions"] for row in updates] == [1, 2, 3]
    assert [row["num_tokens"] for row in updates] == [20, 40, 60]
    assert updates[0]["extra"] == {"expert_weights": [0.25, 0.75], "hint_error": 1.0}
    assert updates[0]["agreement"] == [0.5, 0.25]
    assert updates[0]["seconds"] == 0.125


def test_answers_tell_what_decoding_accepted_by_position(rows):
    answers = [row for row in rows if row["kind"] == "answer"]
    # Steps that accepted 0, 1, 2, 3, 0, ... tokens.
    assert answers[1]["acceptance_per_position"] == [0.5, 0, 0]
    assert answers[3]["acceptance_per_position"] == [0.75, 0.5, 0.25]


def test_figures_of_candidates_have_names_of_their_own(tmp_path):
    told = report()
    told = dataclasses.replace(told, info=told.info.of_candidates())
    telemetry = Telemetry(tmp_path / "t.jsonl")
    telemetry.update(told, draft(0.0), draft(0.0))
    telemetry.close()
    (row,) = read_rows(tmp_path / "t.jsonl")
    assert row["candidate_agreement"] == row["candidate_acceptance"] == [0.5, 0.25]
    assert not {"agreement", "acceptance"} & set(row)


def test_plots_say_whose_agreement_it_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set", lambda axes, **said: titles.append(said["title"])
    )
    whole = {"kind": "update", "num_answers": 1, "loss": 2.0, "extra": {}}
    whole |= {"stride": 1, "path_length": 0.0}
    for name in ("agreement", "candidate_agreement"):
        plot_telemetry([whole | {name: [0.5]}], tmp_path / "t.png")
        is_named = ["candidates" in title for title in titles if "agree" in title]
        assert is_named == [name == "candidate_agreement"]
        titles.clear()


def test_a_head_tells_what_it_knows(tmp_path):
    """It overwrites the draft before, so that its movement is its own to tell."""
    values: Any = np.asarray([2.5, 0.25, 48.0, 0.75], np.float32)
    told = UpdateReport(HeadInfo(*values), "promote", 0.01, 4, step_length=0.75)
    telemetry = Telemetry(tmp_path / "t.jsonl")
    gone: Any = None
    for _ in range(2):
        telemetry.update(told, gone, gone)
    telemetry.close()
    row = read_rows(tmp_path / "t.jsonl")[-1]
    assert (row["loss"], row["agreement"], row["num_samples"]) == (2.5, 0.25, 48)
    assert (row["step_length"], row["path_length"], row["stride"]) == (0.75, 1.5, 4)
    assert "grad_norm" not in row
    assert plot_telemetry([row], tmp_path / "t.png").exists()


def test_what_is_not_served_moves_nothing(tmp_path):
    telemetry = Telemetry(tmp_path / "t.jsonl")
    telemetry.update(report("wait"), draft(0.0), draft(0.0))
    telemetry.update(report("rollback", {}), draft(0.0), draft(0.0))
    telemetry.close()
    first, second = read_rows(tmp_path / "t.jsonl")
    assert first["path_length"] == second["path_length"] == 0
    assert second["num_rollbacks"] == 1
    assert second["extra"] == {}


def test_a_resumed_file_equals_a_straight_one(rows, tmp_path):
    file = tmp_path / "t.jsonl"
    write(Telemetry(file), range(6))  # the last one came behind the checkpoint
    with file.open("a") as lines:
        lines.write('{"kind": "answ')  # cut short by a crash
    write(Telemetry(file, num_answered=5), range(5, 8))
    assert read_rows(file) == rows


def test_another_run_or_file_is_refused(tmp_path):
    file = tmp_path / "t.jsonl"
    write(Telemetry(file), range(2))
    with pytest.raises(ConfigError, match="choose another file"):
        Telemetry(file)
    with pytest.raises(FileNotFoundError, match="no telemetry file"):
        read_rows(tmp_path / "other.jsonl")
    file.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_rows(file)


def test_plots_hold_a_panel_for_everything_told(rows, tmp_path):
    png = plot_telemetry(rows, tmp_path / "plots" / "t.png")
    assert png.read_bytes()[:4] == b"\x89PNG"
    answers = [row for row in rows if row["kind"] == "answer"]
    assert plot_telemetry(answers, tmp_path / "static.png").exists()


class Writer:
    """A stand-in for TensorBoard's writers."""

    def __init__(self, folder):
        self.folder, self.added = folder, []

    def add_scalar(self, tag, value, step):
        self.added.append((tag, value, step))

    def close(self):
        self.added.append("closed")


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    made = []
    module = type(
        "Module", (), {"SummaryWriter": lambda f: made.append(Writer(f)) or made[0]}
    )
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    write(Telemetry(tmp_path / "t.jsonl", tmp_path / "board"), range(3))
    added = made[0].added
    assert ("answer/running_acceptance_length", 2.0, 3) in added
    assert ("update/expert_weights/1", 0.75, 1) in added
    assert ("update/path_length", 2.0, 1) in added
    assert added[-1] == "closed"
    assert not any("domain" in entry[0] for entry in added)


def test_missing_tensorboard_names_the_remedy(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"ospec-jax\[tensorboard\]"):
        tensorboard_writer(tmp_path)


def test_a_real_tensorboard_writer_takes_them(tmp_path):
    pytest.importorskip("tensorboardX")
    write(Telemetry(tmp_path / "t.jsonl", tmp_path / "board"), range(3))
    files = list((tmp_path / "board").glob("events*"))
    assert files
    assert b"expert_weights" in files[0].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "else"}, "no row of telemetry, but 'else'"),
        ({"path_length": None}, "path_length is None"),
        ({"num_answers": "3"}, "num_answers is '3'"),
        ({"extra": [1]}, "extra is .1."),
        ({"extra": {"weights": ["a"]}}, "weights is .'a'."),
        ({"loss": {}}, "loss is {}"),
        ({"stride": "one"}, "stride is 'one'"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, changes, message):
    file = tmp_path / "t.jsonl"
    row = {"kind": "update", "number": 1, "num_answers": 0, "decision": "wait"}
    row |= {"path_length": 0.0, "extra": {}}
    file.write_text(json.dumps(row) + "\n")
    assert read_rows(file) == [row]
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | changes) + "\n")
    with pytest.raises(ConfigError, match=f"t.jsonl, line 2.*{message}"):
        read_rows(file)


def test_lists_of_several_lengths_are_drawn(tmp_path):
    row = {"kind": "update", "number": 1, "num_answers": 0, "decision": "wait"}
    row |= {"path_length": 0.0, "stride": 1, "loss": 1.0}
    rows = [row | {"extra": {"weights": [0.5] * n}} for n in (2, 3)]
    assert plot_telemetry(rows, tmp_path / "t.png").exists()


def test_answers_tell_what_selects_among_drafts(tmp_path, monkeypatch):
    import matplotlib.figure

    titles = []
    axes = matplotlib.axes.Axes
    monkeypatch.setattr(axes, "set", lambda self, title="", **_: titles.append(title))
    file = tmp_path / "t.jsonl"
    writer = Telemetry(file)
    told = {"weights": [0.25, 0.75], "regret": 3.0, "action": 1, "switches": 2}
    stats = DecodingStats(3, 2, 6, 3, [0, 1, 1, 0])
    writer.answer("a", "chat", 5, stats, selection=told)
    writer.answer("b", "chat", 5, stats)
    writer.close()
    first, second = read_rows(file)
    assert first["selection_weights"] == [0.25, 0.75]
    assert first["selection_regret"] == 3.0
    assert "selection_weights" not in second
    plot_telemetry([first, second], tmp_path / "t.png")
    assert {"selection weights", "selection regret"} <= set(titles)
