# SPDX-License-Identifier: Apache-2.0
"""Prompts are known by what they ask, not by what they are called."""

import warnings

import pytest

from ospec_jax.data.known import content_hash, find_known
from ospec_jax.data.prompts import Prompt, parse_prompt


def prompts(**texts: str) -> list[Prompt]:
    return [parse_prompt({"prompt": text}, name) for name, text in texts.items()]


def known_as(rows: list[Prompt]) -> tuple[list[str], list[str]]:
    return [row.id for row in rows], [content_hash(row) for row in rows]


BEFORE = prompts(a1="one", a2="two", a3="three")


def test_a_line_in_front_changes_names_and_nothing_else():
    now = prompts(a1="zero", a2="one", a3="two", a4="three")
    found = find_known(now, *known_as(BEFORE))
    assert [row.text for row in found.new] == ["zero"]
    assert found.new[0].id.startswith("a1-")
    assert [row.id for row in found.prompts[1:]] == ["a1", "a2", "a3"]
    with pytest.warns(UserWarning, match="3 prompts are there under other names.*1 pr"):
        found.warn("here")


def test_another_file_of_the_same_name_is_new():
    now = prompts(a1="four", a2="five")
    found = find_known(now, *known_as(BEFORE))
    assert [row.text for row in found.new] == ["four", "five"]
    assert not {row.id for row in found.new} & {row.id for row in BEFORE}


def test_a_renamed_file_is_known():
    now = prompts(b1="one", b2="two", b3="three", b4="four")
    found = find_known(now, *known_as(BEFORE))
    assert [row.id for row in found.new] == ["b4"]


def test_what_agrees_is_no_cause_for_words():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_known(BEFORE, *known_as(BEFORE[:2])).warn("here")


def test_each_answer_makes_one_of_several_copies_known():
    now = prompts(a1="same", a2="same", a3="same")
    assert [row.id for row in find_known(now, *known_as(now[1:2])).new] == ["a1", "a3"]


def test_older_versions_knew_names_alone():
    found = find_known(BEFORE, ["a2", "other"], ["", ""])
    assert [row.id for row in found.new] == ["a1", "a3"]
    assert not found.moved
    assert not found.renamed


def test_turns_seeds_and_choices_are_content_and_predictions_are_not():
    rows = [
        {"prompt": "one"},
        {"messages": [{"role": "system", "content": "one"}]},
        {"prompt": "one", "seed": 1},
        {"prompt": "one", "seed": 1, "choice": 1},
    ]
    hashes = {content_hash(parse_prompt(row, "q")) for row in rows}
    assert len(hashes) == len(rows)
    predicted = parse_prompt({"prompt": "one", "prediction": "1"}, "other")
    assert content_hash(predicted) == content_hash(parse_prompt(rows[0], "q"))
