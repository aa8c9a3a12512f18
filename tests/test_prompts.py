# SPDX-License-Identifier: Apache-2.0
"""Prompt files: what is read, what is refused and where."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts, encode, read_prompts
from ospec_jax.testing import byte_tokenizer


def test_prompts_and_messages_are_read(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "Hi", "domain": "chat"}\n\n'
        '{"id": "x", "messages": [{"role": "system", "content": "Be brief."},'
        ' {"role": "user", "content": "Ho"}]}\n'
    )
    first, second = read_prompts(file)
    assert (first.id, first.text, first.domain) == ("p-1", "Hi", "chat")
    assert (second.id, second.text, len(second.messages)) == ("x", "Ho", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2"),
        ('{"question": "a"}', "needs `prompt`"),
        ('{"messages": [{"role": "user"}]}', "needs turns"),
        ('{"prompt": "  "}', "line 1: the prompt is empty"),
        ("[1]", "line 1"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "line 2: id '1'"),
        ("\n", "holds no prompts"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_prompts(file)


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one\u2028still one\u0085"}\n', "utf-8")
    assert len(read_prompts(file)) == 1


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_prompts("nowhere.jsonl")


def test_chat_template_is_applied_unless_raw(tmp_path):
    tokenizer = byte_tokenizer()
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hi"}')
    prompt = read_prompts(file)[0]
    text = tokenizer.decode(encode(prompt, tokenizer))
    assert text.startswith("<|im_start|>user\nHi<|im_end|>")
    assert tokenizer.decode(encode(prompt, tokenizer, is_raw=True)) == "Hi"


def five_grams(text):
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_demo_prompts_are_no_variants_of_one_template():
    prompts = [p for domain in DEMO_DOMAINS for p in demo_prompts(domain)]
    for domain in DEMO_DOMAINS:
        assert sum(p.domain == domain for p in prompts) >= 20
    grams = [five_grams(p.text) for p in prompts]
    for i, left in enumerate(grams):
        for right in grams[:i]:
            assert len(left & right) < 0.3 * min(len(left), len(right))
