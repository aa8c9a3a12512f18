# SPDX-License-Identifier: Apache-2.0
"""Conversations, whose later turns need answers to the earlier ones; Spec-Bench's.

Spec-Bench (Xia and others 2024, https://arxiv.org/abs/2401.07851) publishes 480
questions of six tasks as JSON lines with `question_id`, `category` and `turns`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import Prompt, parse_line, read_lines

CONVERSATION = "multi-turn conversation"
TASKS = {
    CONVERSATION: "Multi-turn Conversation",
    "translation": "Translation",
    "summarization": "Summarization",
    "qa": "Question Answering",
    "math_reasoning": "Mathematical Reasoning",
    "rag": "Retrieval-aug. Generation",
}
"""Spec-Bench's tasks in their order, with the headings of the published table."""

_MT_BENCH = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
"""Categories of MT-Bench's questions, which are the conversations."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a user says turn by turn, whatever the answers are.

    Attributes:
      domain: Of all its turns.
      turns: Texts, one or more.
    """

    id: str
    turns: tuple[str, ...]
    domain: str = ""

    def ask(self, answers: Sequence[str]) -> Prompt:
        """The prompt of the turn behind so many answers.

        Args:
          answers: To the turns before it, in order.
        """
        messages = []

        for turn, answer in zip(self.turns, answers, strict=False):
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})

        text = self.turns[len(answers)]
        messages.append({"role": "user", "content": text})
        name = f"{self.id}-turn-{len(answers) + 1}" if answers else self.id

        return Prompt(name, text, tuple(messages), self.domain)


def read_spec_bench(path: str | Path) -> list[Conversation]:
    """Reads Spec-Bench's file of questions; each one's domain is its task.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: The file has another form; names the line.
    """
    path = Path(path).expanduser()
    questions: list[Conversation] = []
    line_of: dict[str, int] = {}

    for number, line in read_lines(path):
        try:
            question = _parse_question(parse_line(line))
            if question.id in line_of:
                raise ConfigError(
                    f"question_id {question.id!r} stands in line {line_of[question.id]}"
                )
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        line_of[question.id] = number
        questions.append(question)

    if not questions:
        raise ConfigError(f"{path} holds no questions")

    return questions


def _parse_question(row) -> Conversation:
    keys = ("question_id", "category", "turns")
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise ConfigError(
            f"a question of Spec-Bench has {', '.join(keys)}; this row lacks "
            f"{', '.join(missing)}; other prompts are read by --prompts"
        )

    turns = row["turns"]
    is_text = lambda turn: isinstance(turn, str) and turn.strip()
    if not isinstance(turns, list) or not turns or not all(map(is_text, turns)):
        raise ConfigError(f"`turns` is {turns!r:.80}; it needs texts, one or more")

    category = row["category"]
    task = CONVERSATION if category in _MT_BENCH else category
    if task not in TASKS:
        known = [*_MT_BENCH, *list(TASKS)[1:]]
        raise ConfigError(f"category {category!r} is none of {', '.join(known)}")

    return Conversation(str(row["question_id"]), tuple(turns), task)


def choose_evenly(
    questions: Sequence[Conversation], num_each: int
) -> list[Conversation]:
    """So many questions of each task, evenly spread over it, in their order.

    Raises:
      ConfigError: A task has fewer.
    """
    chosen = set()

    for task in dict.fromkeys(question.domain for question in questions):
        places = [i for i, q in enumerate(questions) if q.domain == task]
        if len(places) < num_each:
            raise ConfigError(
                f"{task} has {len(places)} questions; {num_each} of each task are asked"
            )
        # Each from the middle of its stretch: MT-Bench has ten of each category in a
        # row, so that eight are one of each.
        ends = [(2 * i + 1) * len(places) // (2 * num_each) for i in range(num_each)]
        chosen |= {places[i] for i in ends}

    return [question for i, question in enumerate(questions) if i in chosen]


def shuffled(items: Sequence, seed: int) -> list:
    """Prompts or conversations in an order that is drawn by seed."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order]
