# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what they refuse is told, and none of them takes for ever."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode
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
