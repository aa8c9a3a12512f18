# SPDX-License-Identifier: Apache-2.0
"""The script for a device's first hour: its parts, what is resumed, what is a fault."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "first_hour.py"))
Part, Settings = TOOL["Part"], TOOL["Settings"]

ROW = {
    "mode": "static",
    "tokens_per_second": 12.0,
    "speedup": 1.5,
    "mean_acceptance_length": 2.0,
    "num_mismatched_outputs": 3,
    "num_tie_flips": 3,
}


def test_parts_are_commands_that_there_are(tmp_path):
    """Flags are those of the command line; what they do is for a device to say."""
    parts = TOOL["parts_of"](Settings(out=tmp_path))
    benches = [p.command[3:] for p in parts.values() if "bench" in p.command]
    assert len(benches) >= 10
    page = (ROOT / "docs" / "cli.md").read_text()
    for command in benches:
        flags = [word for word in command if word.startswith("--")]
        assert all(f"`{flag}`" in page for flag in flags), flags
    # Questions are headings, and so are told apart.
    assert len({part.question for part in parts.values()}) == len(parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('said {before\n[{"a": [2]}]\n', [{"a": [2]}]),
    ],
)
def test_json_is_found_behind_what_else_is_said(text, expected):
    assert TOOL["_last_json"](text) == expected


def test_what_is_no_json_is_said():
    with pytest.raises(ValueError, match="no JSON at the end of 'nothing'"):
        TOOL["_last_json"]("nothing")


def test_outputs_may_differ_at_ties_alone():
    assert TOOL["_mismatches"]([ROW]) == []
    wrong = ROW | {"num_mismatched_outputs": 5}
    assert TOOL["_mismatches"]([wrong]) == [
        "2 outputs of static are wrong: no tie explains it"
    ]
    assert "| static | 12.0 | 1.50 | 2.00 | 1.33 | 3 | 3 |" in TOOL["_table_of"]([ROW])


@pytest.mark.parametrize(("peak", "num_faults"), [(None, 0), (1500, 0), (2000, 1)])
def test_memory_is_held_against_the_compilers(peak, num_faults):
    found = {"argument_bytes": 900, "temporary_bytes": 100, "peak_bytes_in_use": peak}
    assert len(TOOL["_memory_faults"](found)) == num_faults


def part(code, **changes):
    return Part("What?", ("-c", code), **changes)


def test_a_part_is_kept_unless_it_failed(tmp_path):
    run = TOOL["run"]
    good = run(part("print('[1]')"), tmp_path / "good.json", 60)
    assert good["found"] == [1]
    assert json.loads((tmp_path / "good.json").read_text()) == good
    failed = [
        run(part("raise SystemExit('no device')"), tmp_path / "bad.json", 60),
        run(part("print('?')"), tmp_path / "odd.json", 60),
        run(part("import time; time.sleep(60)"), tmp_path / "slow.json", 0.5),
    ]
    for one, message in zip(
        failed, ("exit status 1: no device", "could not be read", "more than 0 s"),
        strict=True,
    ):  # fmt: skip
        assert message in one["failed"]
    kept = {path.name for path in tmp_path.glob("*.json")}
    assert kept == {"good.json"}


def test_the_report_has_faults_first(tmp_path):
    parts = {
        "one": part("", faults=lambda found: ["one is wrong"]),
        "two": Part("And?", ()),
        "three": Part("Then?", ()),
    }
    results = {"one": {"found": 1, "seconds": 2.0}, "two": {"failed": "it broke"}}
    text = TOOL["report"](parts, results)
    assert "2 of 3 parts were run." in text
    assert text.index("- one: one is wrong") < text.index("- two: it broke")
    assert text.index("- two: it broke") < text.index("## What?")
    assert "Nothing was found to be wrong." in TOOL["report"](parts, {})


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    counted = "import pathlib; p = pathlib.Path(r'{}'); p.open('a').write('x')"
    mark = tmp_path / "mark"
    parts = {
        "counted": part(counted.format(mark) + "; print('[1]')"),
        "broken": part("raise SystemExit(3)"),
    }
    main = TOOL["main"]
    monkeypatch.setitem(main.__globals__, "parts_of", lambda settings: parts)
    settings = Settings(out=tmp_path / "out")
    assert main(settings) == 1
    assert main(settings) == 1
    assert mark.read_text() == "x"
    assert "1 faults" in capsys.readouterr().out
    assert "- broken: exit status 3" in (tmp_path / "out" / "report.md").read_text()
    assert main(Settings(out=tmp_path / "out", only=("counted",))) == 0
    assert main(Settings(out=tmp_path / "out", only=("nothing",))) == 2
    assert "there is no part 'nothing'; there are: counted" in capsys.readouterr().out
