# SPDX-License-Identifier: Apache-2.0
"""A table of methods by sets: measured once, and gone on with."""

import dataclasses
import json
import runpy
import signal
from pathlib import Path

import pytest

from ospec_jax import LearnerConfig
from ospec_jax.bench.table import (
    Method,
    PromptSet,
    TableConfig,
    TargetPart,
    measure_table,
    plot_table,
)
from ospec_jax.config import ConfigError
from ospec_jax.reports.progress import Interrupt, Interrupted
from ospec_jax.testing import tiny_target

CONFIG = TableConfig(
    methods={
        "n-grams": Method("ngram", ngrams=True, num_speculative_tokens=2),
        "memory": Method(
            "ngram", LearnerConfig(name="memory"), True, num_speculative_tokens=2
        ),
    },
    sets={"A": PromptSet("a.jsonl", every=2), "B": PromptSet("b.jsonl")},
    parts=(TargetPart("tiny", ("n-grams", "memory"), ("A", "B"), num_prompts=2),),
    max_new_tokens=8,
    left_out={"C": "nobody has it"},
)


@pytest.fixture(name="folder")
def _folder(tmp_path):
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i}, and {i}, and {i}"} for i in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)

    return tmp_path


def load_nothing(name):
    raise AssertionError(f"{name} is loaded again")


def test_a_table_is_measured_once_and_gone_on_with(folder):
    out = folder / "out"
    args = CONFIG, folder, out, Interrupt()
    text = measure_table(*args, lambda name: tiny_target())

    lines = text.splitlines()
    assert "| method | A | B | mean |" in lines
    [memory] = [line for line in lines if line.startswith("| memory |")]
    # Two sets with acceptance lengths, and the mean of their ratios.
    assert memory.count("(") == 2
    assert "Outputs that differ from plain ones: 0." in lines
    assert "- C: nobody has it" in lines
    assert (out / "table.md").read_text() == text

    rows = json.loads((out / "tiny" / "A.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["autoregressive", "n-grams", "memory"]
    assert {row["num_prompts"] for row in rows} == {2}
    assert rows[2]["learner"] == "memory"

    assert measure_table(*args, load_nothing) == text
    [plot] = plot_table(CONFIG, out)
    assert plot == out / "tiny.png"
    assert plot.read_bytes().startswith(b"\x89PNG")

    (out / "tiny" / "B.json").unlink()
    loaded = []
    measure_table(*args, lambda name: loaded.append(name) or tiny_target())
    assert loaded == ["tiny"]
    assert (out / "tiny" / "B.json").is_file()

    longer = dataclasses.replace(CONFIG, max_new_tokens=9)
    with pytest.raises(ConfigError, match=r"max_new_tokens 8, not 9; choose another"):
        measure_table(longer, folder, out, Interrupt(), load_nothing)
    with pytest.raises(ConfigError, match="precision 'auto', not 'int8'; choose"):
        measure_table(*args, load_nothing, precision="int8")


def test_absent_sets_are_left_out_and_named(folder):
    (folder / "a.jsonl").unlink()
    (folder / "b.jsonl").unlink()
    text = measure_table(CONFIG, folder, folder / "out", Interrupt(), load_nothing)
    assert f"- A: a.jsonl is not in {folder}" in text
    assert "|" not in text


def test_a_run_that_a_signal_ends_is_dropped(folder):
    interrupt = Interrupt()
    interrupt.number = signal.SIGTERM
    with pytest.raises(Interrupted):
        measure_table(
            CONFIG, folder, folder / "out", interrupt, lambda name: tiny_target()
        )
    assert not (folder / "out").exists()
    assert plot_table(CONFIG, folder / "out") == []


def table_with(**change):
    part = dataclasses.replace(CONFIG.parts[0], **change)
    return dataclasses.replace(CONFIG, parts=(part,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("other",)), r"methods \['other'\] that the table does not have"),
        (dict(sets=("A", "D")), r"sets \['D'\] that the table does not have"),
        (dict(num_prompts=0), "num_prompts is 0"),
        (dict(target=3), "target"),
    ],
)
def test_parts_that_ask_for_what_there_is_not_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        table_with(**change)


def test_other_targets_are_refused(folder):
    with pytest.raises(ConfigError, match="no target 'huge'; it has"):
        measure_table(
            CONFIG, folder, folder / "out", Interrupt(), load_nothing, ["huge"]
        )


def test_the_paper_s_table_is_one():
    file = Path(__file__).parents[2] / "configs" / "paper_table.py"
    config = runpy.run_path(str(file))["get_config"]()
    assert isinstance(config, TableConfig)
    assert [part.target for part in config.parts][0] == "smollm2-135m"
    learners = {name: method.learner for name, method in config.methods.items()}
    names = {name: learner.name for name, learner in learners.items() if learner}
    assert names["Opt-Hydra"] == "optimistic"
    assert names["Ens-EAGLE-3"] == "ensemble"
