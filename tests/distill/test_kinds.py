# SPDX-License-Identifier: Apache-2.0
"""Kinds of prompts that a target writes, held with one that says what is wanted."""

import re

import numpy as np
import pytest

from ospec_jax.data import phrases
from ospec_jax.data.filters import FilterConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.distill.kinds import KINDS, Dropped, Limits, Written, cut_at_sentence

LIMITS = Limits(FilterConfig(), turn=50, answer=60, document=(100, 400))
DOCUMENT = (
    "It rained on Monday. The river rose by two metres in the night, and the people of "
    "three villages had to leave their houses. Nobody was hurt. On Tuesday the bridge "
    "at the old mill gave way under a lorry, and it broke."
)


class Scripted:
    """Answers as a good model would; remembers what was wanted."""

    def __init__(self, **changes):
        self.wanted = []
        self.changes = changes

    def __call__(self, wanted):
        self.wanted.append(wanted)
        number = len(self.wanted)
        if wanted.writer == "user":
            text = f"  How do I mend bridge number {number}?\n"
            return Written(
                self.changes.get("turn", text), "turn_goes_on" not in self.changes
            )

        asked = wanted.turns[-1]["content"]
        if "Write one question" in asked:
            text = self.changes.get("question", f'{wanted.begin} bridge broke?"\nIt is')
        elif "Begin with" in asked:
            text = f"{wanted.begin} a bridge builder."
        elif "Write another request" in asked:
            text = f"How do I paint house number {number}?"
        elif asked == phrases.MORE:
            text = self.changes.get("more", f"Part {number} is about step {number}.")
        elif asked.startswith("Write"):
            text = self.changes.get("document", f"Here it is:\n\n{DOCUMENT}")
        else:
            text = f"Like this, in step {number} or so. 3. With"
            return Written(text, has_ended=False)
        return Written(text, has_ended=True)


def hold(kind, model, seed=0, limits=LIMITS):
    """The turns that a talk of this kind leads to."""
    talk = KINDS[kind](np.random.default_rng(seed), limits)
    written = None
    while True:
        try:
            wanted = talk.send(written)
        except StopIteration as end:
            return end.value
        written = model(wanted)


def roles(turns):
    return [turn["role"] for turn in turns]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_talks_end_with_a_user_and_repeat(kind, seed):
    turns = hold(kind, Scripted(), seed)
    assert turns == hold(kind, Scripted(), seed)
    assert roles(turns)[-1] == "user"
    assert parse_prompt({"messages": list(turns)}, "it").messages == turns
    assert all(turn["content"] == turn["content"].strip() for turn in turns)
    # Places for topics, texts and languages are filled.
    assert not any(c in turn["content"] for turn in turns for c in "{}")


def test_first_turns_are_the_targets_own():
    model = Scripted()
    (turn,) = hold("self-chat", model)
    assert turn == {"role": "user", "content": "How do I mend bridge number 1?"}
    assert model.wanted == [((), "user", 50, "")]


def test_later_turns_are_written_behind_its_answers():
    model = Scripted()
    turns = hold("self-turns", model)
    assert set(roles(turns)[::2]) == {"user"}
    assert roles(turns)[1] == "assistant"
    # What did not end is cut behind its last sentence.
    assert turns[1]["content"] == "Like this, in step 2 or so."
    assert model.wanted[2].turns == turns[:2]
    assert model.wanted[2].writer == "user"


@pytest.mark.parametrize("kind", ["self-summary", "self-extraction", "self-rewrite"])
def test_documents_stand_whole_beside_their_task(kind):
    model = Scripted()
    (turn,) = hold(kind, model)
    assert DOCUMENT in turn["content"]
    assert "Here it is" not in turn["content"]
    assert len(turn["content"]) > len(DOCUMENT) + 10
    assert "How do I mend bridge number 1?" in model.wanted[1].turns[0]["content"]
    assert 100 <= model.wanted[1].max_new_tokens <= 400


def test_translations_go_both_ways():
    texts = [hold("self-translation", Scripted(), i)[0]["content"] for i in range(40)]
    assert any("German" in text for text in texts)
    assert any("English" in text and "English to" not in text for text in texts)
    # Of some only sentences are translated.
    assert any(DOCUMENT in text for text in texts)
    assert any(DOCUMENT not in text for text in texts)


def test_questions_and_continuations_come_from_the_document():
    (turn,) = hold("self-question", Scripted())
    assert re.search(r"\b[A-Z][a-z]+ bridge broke\?", turn["content"])
    assert "It is" not in turn["content"]
    assert "two metres" in turn["content"]
    (turn,) = hold("self-continuation", Scripted())
    assert "It rained" in turn["content"]
    assert "broke" not in turn["content"]


def test_system_turns_come_first():
    both = [hold("self-system", Scripted(), seed) for seed in range(12)]
    assert {tuple(roles(turns)) for turns in both} == {("system", "user")}
    instructions = {turns[0]["content"] for turns in both}
    assert "You are a bridge builder." in instructions
    assert len(instructions) > 2


def test_examples_come_before_the_last_question():
    both = [hold("self-shots", Scripted(), seed) for seed in range(12)]
    in_one = [turns[0]["content"] for turns in both if len(turns) == 1]
    talks = [turns for turns in both if len(turns) > 1]
    assert in_one
    assert talks
    for turns in talks:
        assert len(turns) % 2 == 1
        assert len(turns) >= 5
        assert turns[-1]["content"].startswith("How do I paint house")
    for text in in_one:
        assert text.index("mend bridge number 1") < text.index(
            "Like this, in step 2 or so."
        )
        assert text.rindex("paint house") > text.rindex("Like this")


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("self-chat", {"turn_goes_on": True}, "goes on"),
        ("self-chat", {"turn": "so so so so so so so so so so"}, "repeats itself"),
        ("self-summary", {"document": "\ufffd\ufffd"}, "no text"),
        ("self-summary", {"document": ""}, "too short"),
        ("self-summary", {"document": DOCUMENT[:100]}, "short document"),
        ("self-summary", {"document": f"I'm here to help! {DOCUMENT}"}, "no document"),
        ("self-question", {"question": "It broke."}, "no question"),
    ],
)
def test_what_is_of_no_use_is_dropped(kind, changes, why):
    with pytest.raises(Dropped, match=why):
        hold(kind, Scripted(**changes))


def test_short_documents_are_gone_on_with():
    most = LIMITS._replace(document=(400, 400))
    (turn,) = hold("self-summary", Scripted(), limits=most)
    assert all(f"Part {n} is about" in turn["content"] for n in (3, 4, 5))
    # What goes wrong with a part leaves those before it.
    (turn,) = hold("self-summary", Scripted(more="I'm here to help!"), limits=most)
    assert DOCUMENT in turn["content"]
    assert "here to help" not in turn["content"]
    (turn,) = hold("self-summary", Scripted(), limits=LIMITS._replace(document=(9, 9)))
    assert "Part" not in turn["content"]


def test_texts_are_cut_behind_a_sentence():
    assert cut_at_sentence('He said "Stop!" Then he') == 'He said "Stop!"'
    assert cut_at_sentence("- one\n- two\n- thr") == "- one\n- two"
    assert cut_at_sentence("It costs 3.50 and") == ""


def test_topics_are_tried_again():
    model = Scripted(turn="Hi")
    with pytest.raises(Dropped, match="too short"):
        hold("self-summary", model)
    assert len(model.wanted) == 3
