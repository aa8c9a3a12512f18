# SPDX-License-Identifier: Apache-2.0
"""Prompt files: what is read, what is refused and where."""

import io

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import (
    DEMO_DOMAINS,
    add_predictions,
    demo_prompts,
    encode_prediction,
    parse_prompt,
    read_prediction,
    read_prompts,
)
from ospec_jax.data.templates import encode
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
        ("What is it?", "line 1: .* each line is a row of JSON.*generate --prompt"),
        ('{"prompt": "a\\ud800b"}', r"line 1: it has '.ud800', half of a surrogate"),
        ('{"id": "\\udfff", "prompt": "a"}', "half of a surrogate"),
        ("[" * 100_000, "line 1: maximum recursion depth"),
        (
            '{"prompt": "a", "prediction": 3}',
            "prediction is a int; it must be the text",
        ),
        ('{"prompt": "a", "prediction": " "}', "line 1: the prediction is empty"),
        (
            '{"prompt": "a", "prediction": "b", "prediction_confidence": 2}',
            "prediction_confidence is 2; it lies in",
        ),
        ('{"messages": [{"role": "user"}]}', "needs turns"),
        ('{"messages": [{"role": "user", "content": null}]}', "text as `content`"),
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


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"prompt": "Grüße"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_prompts(file)


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one\u2028still one\u0085"}\n', "utf-8")
    assert len(read_prompts(file)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}',
        b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n',
        b'\n\n{"prompt": "a"}\n   \n{"prompt": "b"}',
    ],
    ids=["mark of the encoding", "carriage returns", "blank lines"],
)
def test_files_of_all_editors_are_read(tmp_path, content):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    assert [prompt.text for prompt in read_prompts(file)] == ["a", "b"]


def test_standard_input_is_read(monkeypatch):
    content = io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n'))
    monkeypatch.setattr("sys.stdin", content)
    (prompt,) = read_prompts("-")
    assert (prompt.id, prompt.text) == ("stdin-1", "a")


def test_keys_that_are_not_read_are_named(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = (
        '{"prompt": "a", "predicton": "b"}\n{"prompt": "b", "meta": 1, "predicton": 2}'
    )
    file.write_text(rows)
    with pytest.warns(
        UserWarning, match=r"'predicton' \(2\), 'meta' \(1\).*prediction"
    ):
        assert len(read_prompts(file)) == 2


def test_what_data_sets_carry_along_is_no_reason_to_warn(tmp_path, caplog):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "reference": "b", "meta": {}}')
    with caplog.at_level("INFO", "ospec_jax"):
        assert len(read_prompts(file)) == 1
    assert "'reference' (1)" in caplog.text


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


def test_predictions_are_read_and_end_with_the_end():
    tokenizer = byte_tokenizer()
    row = {"prompt": "Hi", "prediction": "Hello", "prediction_confidence": 0.9}
    prompt = parse_prompt(row, "p")
    assert prompt.prediction_confidence == 0.9
    ids = encode_prediction(prompt, tokenizer)
    assert tokenizer.decode(ids[:-1]) == "Hello"
    assert ids[-1] == tokenizer.eos_token_id
    assert encode_prediction(parse_prompt({"prompt": "Hi"}, "p"), tokenizer) == ()


def test_predictions_are_added_to_their_prompts():
    prompts = [parse_prompt({"prompt": text}, text) for text in "abc"]
    added = add_predictions(prompts, ["x", None, b"y".decode()])
    assert [p.prediction for p in added] == ["x", "", "y"]
    for wrong in (["x"], "xyz", []):
        with pytest.raises(ConfigError, match="3 prompts need as many predictions"):
            add_predictions(prompts, wrong)
    with pytest.raises(ConfigError, match="prediction is a int"):
        add_predictions(prompts, [3, None, None])


def test_prediction_files_must_be_text(tmp_path):
    file = tmp_path / "draft.txt"
    with pytest.raises(FileNotFoundError, match="no prediction file"):
        read_prediction(file)
    file.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 0xef at 2"):
        read_prediction(file)
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="prediction is empty"):
        read_prediction(file)
    file.write_text("naïve", "utf-8")
    assert read_prediction(file) == "naïve"
