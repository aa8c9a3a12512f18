# SPDX-License-Identifier: Apache-2.0
"""Spec-Bench's questions, and what turns of a conversation ask."""

import json

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.conversations import (
    TASKS,
    Conversation,
    choose_evenly,
    read_spec_bench,
    shuffled,
)
from ospec_jax.data.prompts import read_prompts


def question(number, category, *turns):
    return {"question_id": number, "category": category, "turns": list(turns) or ["Q"]}


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_categories_of_mt_bench_are_one_task(tmp_path):
    rows = [
        question(81, "writing", "Write.", "Again."),
        question(121, "coding", "Code.", "Again."),
        question(161, "translation", "Übersetze."),
        question(481, "rag", "Look up."),
    ]
    asked = read_spec_bench(written(tmp_path / "q.jsonl", rows))
    assert asked[0] == Conversation("81", ("Write.", "Again."), list(TASKS)[0])
    domains = [one.domain for one in asked]
    assert domains == [*["multi-turn conversation"] * 2, "translation", "rag"]


def test_each_turn_holds_the_answers_before_it():
    conversation = Conversation("81", ("One?", "Two?"), "chat")
    first = conversation.ask([])
    assert first.messages == ({"role": "user", "content": "One?"},)
    assert (first.id, first.text, first.domain) == ("81", "One?", "chat")
    second = conversation.ask(["Yes."])
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in second.messages] == ["One?", "Yes.", "Two?"]
    assert (second.id, second.text) == ("81-turn-2", "Two?")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi"}, "lacks question_id, category, turns; .* by --prompts"),
        (["Hi"], "lacks question_id"),
        (question(1, "poetry"), "category 'poetry' is none of writing"),
        (question(1, "qa") | {"turns": "Hi"}, "`turns` is 'Hi'"),
        (question(1, "qa") | {"turns": []}, "one or more"),
        (question(1, "qa", "Hi", " "), "it needs texts"),
        (question(0, "qa"), "question_id '0' stands in line 1"),
    ],
)
def test_files_of_another_form_are_refused_with_their_line(tmp_path, row, message):
    file = written(tmp_path / "q.jsonl", [question(0, "qa"), row])
    with pytest.raises(ConfigError, match=f"line 2: .*{message}"):
        read_spec_bench(file)


def test_an_empty_file_holds_no_questions(tmp_path):
    with pytest.raises(ConfigError, match="holds no questions"):
        read_spec_bench(written(tmp_path / "q.jsonl", []))


def test_questions_read_as_prompts_are_told_where_they_belong(tmp_path):
    file = written(tmp_path / "q.jsonl", [question(0, "qa")])
    with pytest.raises(ConfigError, match="line 1: .* bench --spec-bench` asks them"):
        read_prompts(file)


def test_each_task_gives_as_many_questions_evenly_spread():
    chat = [Conversation(f"c{i}", ("Q",), "chat") for i in range(10)]
    rag = [Conversation(f"r{i}", ("Q",), "rag") for i in range(4)]
    names = lambda number: [one.id for one in choose_evenly([*chat, *rag], number)]
    assert names(1) == ["c5", "r2"]
    assert names(2) == ["c2", "c7", "r1", "r3"]
    assert names(4) == ["c1", "c3", "c6", "c8", "r0", "r1", "r2", "r3"]
    with pytest.raises(ConfigError, match="rag has 4 questions; 5 of each"):
        names(5)


def test_an_order_is_drawn_by_its_seed():
    items = list(range(20))
    assert sorted(shuffled(items, 1)) == items
    assert shuffled(items, 1) == shuffled(items, 1)
    assert items != shuffled(items, 1) != shuffled(items, 2)
