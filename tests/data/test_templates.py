# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what they refuse is told, and none of them takes for ever."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode, encode_opening
from ospec_jax.testing import byte_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
]


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation(turns=TURNS):
    return parse_prompt({"id": "row-7", "messages": turns}, "it")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if messages[0].role == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}",
            "'row-7'.* refuses it: System role not supported; change its turns",
        ),
        ("{{ messages[5].content }}", "has no element 5"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{% for", "unexpected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_a_template_says_is_told(template, message):
    with pytest.raises(ConfigError, match=message):
        encode(conversation(), with_template(template))


_MANY = "{% for i in range(90000) %}{% for j in range(90000) %}{{ i }}{% endfor %}"
_DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (_MANY + "{% endfor %}", "it has run .* lines, and goes on"),
        (
            "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40,
            "it makes a text of over",
        ),
        (
            _DOUBLE + "{% set y = ns.x ~ ns.x %}{% set ns.x = y %}{% endfor %}",
            "it makes a text of over",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
    ids=["loops", "doubling", "doubling in a loop", "recursion", "range"],
)
def test_no_template_takes_for_ever(template, message):
    with pytest.raises(ConfigError, match=message):
        encode(conversation(), with_template(template))


def test_long_conversations_are_within_the_limits():
    turns = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200}
        for i in range(401)
    ]
    assert len(encode(conversation(turns), byte_tokenizer())) > 400_000


@pytest.mark.parametrize("is_raw", [False, True])
def test_turns_need_a_template(is_raw):
    tokenizer = byte_tokenizer() if is_raw else with_template(None)
    with pytest.raises(ConfigError, match="'row-7' has 2 turns, but"):
        encode(conversation(), tokenizer, is_raw)
    alone = conversation(TURNS[1:])
    assert encode(alone, tokenizer, is_raw) == tuple(tokenizer.encode("Hi"))


_BEGIN = "<|im_start|>user\n"
_PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)
_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (_PLAIN, _BEGIN),
        (_SYSTEM + _PLAIN, f"<|im_start|>system\nBe kind.<|im_end|>\n{_BEGIN}"),
        # A prompt for the answer that is always there, and a text that is trimmed.
        (_PLAIN.replace("content", "content | trim") + "<|im_start|>bot\n", _BEGIN),
        # The first token of a turn has the space in front of it.
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[INST]"),
    ],
)
def test_openings_end_where_a_user_begins(template, opening):
    tokenizer = with_template(template)
    ids = encode_opening((), tokenizer)
    assert tokenizer.decode(ids) == opening
    # Special tokens are one each, as in a prompt that is answered.
    assert ids == tuple(tokenizer.encode(opening, add_special_tokens=False))


def test_openings_stand_behind_earlier_turns():
    tokenizer = with_template(_SYSTEM + _PLAIN)
    turns = (*TURNS, {"role": "assistant", "content": "Hello"})
    text = tokenizer.decode(encode_opening(turns, tokenizer))
    said = "system\nBe brief.", "user\nHi", "assistant\nHello"
    begun = [f"<|im_start|>{turn}<|im_end|>\n" for turn in said]
    assert text == "".join(begun) + _BEGIN


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template, .* use a model that was tuned to chat"),
        ("hello", "shows a user's turn 0 times"),
        (_PLAIN + _PLAIN, "shows a user's turn 2 times"),
        ("{{ raise_exception('no') }}", "refuses it: no"),
    ],
)
def test_templates_without_an_opening_are_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        encode_opening((), with_template(template))
