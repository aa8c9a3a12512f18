# SPDX-License-Identifier: Apache-2.0
"""Kinds of prompts that a target writes itself: each is a talk with it.

A talk is a generator: it yields what it wants written, is sent the text, and returns
the turns of a prompt. So many talks can be held at once, each waiting for its own row
of a batch. Turns of users are written by the target as in Magpie (arXiv 2406.08464):
it continues its own chat template behind the opening of a user's turn.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ospec_jax.data import phrases
from ospec_jax.data.filters import FilterConfig, find_fault

Turns = tuple[dict, ...]

SYSTEM_KIND = "self-system"
"""The kind that not every template can show."""
_TOPIC_CHARS = 300
_TOPIC_TRIES = 3
_MAX_DOCUMENT_CHARS = 12_000
_MAX_MORE_PARTS = 3
_CHARS_A_TOKEN = 4
"""About, in English; other languages have fewer."""
_CHATTER = re.compile(phrases.CHATTER, re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^\W\d_])[.!?][\"')\]*`]*(?=\s|$)|\n")
"""Behind a digit a full stop may be that of a list."""


class Wanted(NamedTuple):
    """Something for the target to write behind some turns.

    Attributes:
      writer: Whose turn it writes.
      begin: How the turn begins: it is gone on with, and part of what is written.
    """

    turns: Turns
    writer: Literal["user", "assistant"]
    max_new_tokens: int
    begin: str = ""


class Written(NamedTuple):
    """What it wrote.

    Attributes:
      has_ended: It ended the turn by itself.
    """

    text: str
    has_ended: bool


class Dropped(Exception):
    """A talk led to nothing worth keeping; the message says why in two words."""


class Limits(NamedTuple):
    """Of what is written in a talk.

    Attributes:
      filters: Of users' turns; documents may be longer.
      turn: Tokens of a user's turn.
      answer: Tokens of an answer that is quoted in a prompt.
      document: The least and the most tokens of a document.
      min_document_chars: Of a document; what is shorter is hardly one.
    """

    filters: FilterConfig
    turn: int
    answer: int
    document: tuple[int, int]
    min_document_chars: int = 200


Talk = Generator[Wanted, Written, Turns]
"""Returns the turns of a prompt, the last one a user's; raises `Dropped`."""
Part = Generator[Wanted, Written, str]


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _user(content: str) -> Turns:
    return (_turn("user", content.strip()),)


def _user_turn(limits: Limits, turns: Turns = ()) -> Part:
    """A user's turn of the target's own."""
    written = yield Wanted(turns, "user", limits.turn)
    if not written.has_ended:
        raise Dropped("goes on")

    return _checked(written.text.strip(), limits.filters)


def _answer(
    limits: Limits, turns: Turns, max_new_tokens: int = 0, begin: str = ""
) -> Part:
    """The target's answer; one that is too long ends with its last sentence."""
    limit = max_new_tokens or limits.answer
    written = yield Wanted(turns, "assistant", limit, begin)
    text = written.text.rpartition("</think>")[2]
    if not written.has_ended:
        text = cut_at_sentence(text)

    return _checked(text.strip(), _for_documents(limits.filters))


def _for_documents(filters: FilterConfig) -> FilterConfig:
    return dataclasses.replace(filters, min_chars=1, max_chars=_MAX_DOCUMENT_CHARS)


def _checked(text: str, filters: FilterConfig) -> str:
    fault = find_fault(text, filters)
    if fault:
        raise Dropped(fault)

    return text


def cut_at_sentence(text: str) -> str:
    """A text without its last sentence, which was not ended.

    >>> cut_at_sentence("It rains. The sun")
    'It rains.'
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _topic(limits: Limits) -> Part:
    """Something to write about: what a user might have asked."""
    for number in range(_TOPIC_TRIES):
        try:
            text = yield from _user_turn(limits)
            return text[:_TOPIC_CHARS]
        except Dropped:
            if number == _TOPIC_TRIES - 1:
                raise

    raise AssertionError("the last try returns or raises")


def _document(rng: np.random.Generator, limits: Limits, form: str = "") -> Part:
    """A text on a topic of the target's own, of any length up to the limit.

    Args:
      form: What is asked for; one of many by default.
    """
    number = int(rng.integers(len(phrases.DOCUMENTS)))
    begin = ""
    if not form:
        form, begin = phrases.DOCUMENTS[number]
    least, most = limits.document
    # As many short ones as long ones on a scale of ratios.
    size = int(np.exp(rng.uniform(np.log(least), np.log(most))))
    topic = yield from _topic(limits)
    turns = _user(phrases.SUBJECT.format(form=form, topic=topic))
    text = yield from _passages(limits, turns, size, begin)

    for _ in range(_MAX_MORE_PARTS):
        if len(text) >= _CHARS_A_TOKEN * size / 2:
            break
        # Small models are soon done with a subject.
        more = (_turn("assistant", text), _turn("user", phrases.MORE))
        try:
            part = yield from _passages(limits, (*turns, *more), size)
        except Dropped:
            break
        text = f"{text}\n\n{part}"

    if len(text) < limits.min_document_chars:
        raise Dropped("short document")

    # Parts may say the same.
    return _checked(text, _for_documents(limits.filters))


def _passages(limits: Limits, turns: Turns, size: int, begin: str = "") -> Part:
    """A part of a document."""
    text = yield from _answer(limits, turns, size, begin)
    if _CHATTER.search(text):
        raise Dropped("no document")

    return without_announcement(text)


def without_announcement(text: str) -> str:
    """A document without a line in front that only says what comes.

    >>> without_announcement("Sure! Here is the article:\\n\\nIt rains.")
    'It rains.'
    """
    first, _, rest = text.partition("\n")
    is_announced = first.rstrip().endswith(":") and len(first) < 160
    return rest.strip() if is_announced and rest.strip() else text


def _with_task(rng: np.random.Generator, task: str, text: str) -> Turns:
    layout = _choose(rng, phrases.LAYOUTS)
    return _user(layout.format(task=task, text=text))


def _task_on_document(tasks: Sequence[str]) -> Callable[..., Talk]:
    """Prompts with a document, and one of these tasks on it."""

    def talk(rng: np.random.Generator, limits: Limits) -> Talk:
        text = yield from _document(rng, limits)
        return _with_task(rng, _choose(rng, tasks), text)

    return talk


def chat(rng: np.random.Generator, limits: Limits) -> Talk:
    """A first turn, as the target's users write."""
    text = yield from _user_turn(limits)
    return _user(text)


def several_turns(rng: np.random.Generator, limits: Limits) -> Talk:
    """A conversation of two or three turns of users, and answers between them."""
    turns: Turns = ()
    for _ in range(int(rng.integers(1, 3))):
        text = yield from _user_turn(limits, turns)
        turns = (*turns, *_user(text))
        answer = yield from _answer(limits, turns)
        turns = (*turns, _turn("assistant", answer))

    text = yield from _user_turn(limits, turns)
    return (*turns, *_user(text))


def translation(rng: np.random.Generator, limits: Limits) -> Talk:
    """A text, or sentences of one, to translate from English or into it."""
    language = _choose(rng, phrases.LANGUAGES)
    source = "English"
    form = ""
    # A text in the other language is only as good as the target knows it.
    if rng.random() < 0.2:
        form = phrases.FOREIGN_DOCUMENT.format(language=language)
        language, source = source, language

    text = yield from _document(rng, limits, form)
    if rng.random() < 0.6:
        text = _passage(rng, text)

    task = _choose(rng, phrases.TRANSLATIONS)
    return _with_task(rng, task.format(language=language, source=source), text)


def _passage(rng: np.random.Generator, text: str) -> str:
    """One to three sentences out of a text."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = [text[a:b].strip() for a, b in itertools.pairwise(ends)]
    parts = [part for part in parts if len(part) > 20]
    if not parts:
        return text

    first = int(rng.integers(len(parts)))
    return " ".join(parts[first : first + int(rng.integers(1, 4))])


def question(rng: np.random.Generator, limits: Limits) -> Talk:
    """A document, perhaps as numbered passages, and the target's question about it."""
    text = yield from _document(rng, limits)
    ask = _user(phrases.ASK_QUESTION.format(text=text))
    begin = _choose(rng, phrases.QUESTION_WORDS)
    asked = yield from _answer(limits, ask, limits.turn, begin)
    asked, mark, _ = asked.partition("?")
    if not mark or "\n" in asked:
        raise Dropped("no question")

    if rng.random() < 0.3:
        parts = [part for part in text.split("\n\n") if part.strip()]
        named = (f"Passage {i}: {part}" for i, part in enumerate(parts, 1))
        text = "\n\n".join(named)

    layout = _choose(rng, phrases.QUESTION_LAYOUTS)
    return _user(layout.format(task=f"{asked}?", text=text))


def continuation(rng: np.random.Generator, limits: Limits) -> Talk:
    """The first part of a document, to be gone on with."""
    text = yield from _document(rng, limits)
    words = text.split(" ")
    kept = max(1, int(len(words) * rng.uniform(0.3, 0.8)))
    part = " ".join(words[:kept])

    return _with_task(rng, _choose(rng, phrases.CONTINUATIONS), part)


def with_system_turn(rng: np.random.Generator, limits: Limits) -> Talk:
    """A turn behind instructions, of a list or of the target's own."""
    instructions = _choose(rng, phrases.SYSTEMS)
    if rng.random() < 0.5:
        topic = yield from _topic(limits)
        ask = _user(phrases.ASK_SYSTEM.format(topic=topic))
        instructions = yield from _answer(limits, ask, begin="You are")

    turns = (_turn("system", instructions),)
    text = yield from _user_turn(limits, turns)
    return (*turns, *_user(text))


def with_examples(rng: np.random.Generator, limits: Limits) -> Talk:
    """Questions of a kind with answers, and a last one that has none yet.

    In one turn of a user's, or as a conversation.
    """
    first = yield from _user_turn(limits)
    questions = [first]
    answers = []
    ask = _user(phrases.ASK_SIMILAR.format(topic=first))
    for _ in range(int(rng.integers(2, 6))):
        answer = yield from _answer(limits, _user(questions[-1]))
        answers.append(answer)
        similar = yield from _answer(limits, ask, limits.turn)
        questions.append(without_announcement(similar).strip('"'))

    shots = list(zip(questions, answers, strict=False))
    last = questions[-1]
    if rng.random() < 0.3:
        pairs = (
            (_turn("user", asked), _turn("assistant", said)) for asked, said in shots
        )
        return (*itertools.chain.from_iterable(pairs), *_user(last))

    number = int(rng.integers(len(phrases.SHOT_LAYOUTS)))
    shot, end = phrases.SHOT_LAYOUTS[number]
    texts = [shot.format(question=asked, answer=said) for asked, said in shots]
    return _user("".join(texts) + end.format(question=last))


KINDS: Mapping[str, Callable[[np.random.Generator, Limits], Talk]] = {
    "self-chat": chat,
    "self-turns": several_turns,
    "self-summary": _task_on_document(phrases.SUMMARIES),
    "self-translation": translation,
    "self-extraction": _task_on_document(phrases.EXTRACTIONS),
    "self-question": question,
    "self-rewrite": _task_on_document(phrases.REWRITES),
    "self-continuation": continuation,
    SYSTEM_KIND: with_system_turn,
    "self-shots": with_examples,
}
"""Talks by the domain of the prompts that they lead to."""
