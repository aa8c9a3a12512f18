# SPDX-License-Identifier: Apache-2.0
"""Answers as lines: what a resumed run keeps, from where, and what it refuses."""

import json

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.reports.answers import AnswerLog, check_unused, read_answers


def row(i, text="text\u2028"):
    return {"id": f"q{i}", "text": text}


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return file


def test_each_line_is_there_before_the_next(tmp_path):
    files = [tmp_path / "deep" / "a.jsonl", None, tmp_path / "b.jsonl"]
    log = AnswerLog(files)
    for i in range(3):
        log.add(row(i))
        expected = [row(j) for j in range(i + 1)]
        assert log.rows == read_answers(files[0]) == read_answers(files[2]) == expected
    log.close()


def test_a_resumed_log_merges_what_is_counted_and_drops_the_rest(tmp_path):
    first = write(tmp_path / "a.jsonl", [row(0), row(2), row(3, "uncounted")])
    second = write(tmp_path / "b.jsonl", [row(1), row(0, "another")])
    log = AnswerLog([first, second, first], answered=["q0", "q1", "q2"])
    log.add(row(3))
    log.close()
    expected = [row(i) for i in range(4)]
    assert log.rows == read_answers(first) == read_answers(second) == expected


def test_lines_that_are_only_read_are_cut_as_well(tmp_path):
    older = write(tmp_path / "older.jsonl", [row(0), row(9)])
    listed = tmp_path / "result.json"
    listed.write_text(json.dumps([row(1), "no answer"]))
    log = AnswerLog([], ["q0", "q1"], older, listed)
    assert log.rows == [row(0), row(1)]
    assert read_answers(older) == [row(0)]


@pytest.mark.parametrize("content", ["{", '{"id": "q1"}', "3"])
def test_a_file_of_something_else_is_overwritten_not_read(tmp_path, content):
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.warns(UserWarning, match="1 of 1 earlier answers were not kept"):
        assert AnswerLog([], ["q1"], json_file=file).rows == []


def test_a_line_cut_short_is_dropped_others_are_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [row(0)])
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"id": "q1"}')
    with pytest.warns(UserWarning, match="was cut short"):
        assert read_answers(file) == [row(0)]
    for content in ("{\n", "[]\n", '{"text": ""}\n'):
        file.write_text(content)
        with pytest.raises(ConfigError, match="line 1: no answer"):
            read_answers(file)


def test_answers_of_another_run_are_not_begun_over(tmp_path):
    file = tmp_path / "a.jsonl"
    check_unused(None)
    check_unused(file)
    file.touch()
    check_unused(file)
    write(file, [row(0)])
    with pytest.raises(ConfigError, match="choose another file, or resume"):
        check_unused(file)


def test_answers_of_one_name_are_kept_in_their_order(tmp_path):
    twice = [row(0, "first"), row(1), row(0, "second")]
    file = write(tmp_path / "a.jsonl", [*twice, row(0, "uncounted")])
    AnswerLog([file], answered=["q0", "q1", "q0"]).close()
    assert read_answers(file) == twice
