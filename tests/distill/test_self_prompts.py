# SPDX-License-Identifier: Apache-2.0
"""A target writes prompts: the same ones, however it is batched or interrupted."""

import dataclasses
import json
import signal

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data import phrases
from ospec_jax.data.filters import FilterConfig
from ospec_jax.data.prompts import read_prompts
from ospec_jax.distill import self_prompts
from ospec_jax.distill.kinds import KINDS
from ospec_jax.distill.self_config import DEFAULT_KINDS, SelfPromptConfig, config_file
from ospec_jax.distill.self_prompts import (
    ahead_file,
    describe_report,
    write_self_prompts,
)
from ospec_jax.distill.talking import Writer
from ospec_jax.reports.progress import Interrupted
from ospec_jax.testing import tiny_target

ANYTHING = FilterConfig(
    min_chars=1, script="", min_letter_share=0.0, max_odd_share=1.0,
    max_repeated_share=1.0, min_packed_share=0.0, max_overlap=1.0,
)  # fmt: skip
CONFIG = SelfPromptConfig(
    seed=5,
    kinds=(("self-chat", 1.0), ("self-turns", 2.0), ("self-summary", 1.0)),
    max_turn_tokens=40,
    max_answer_tokens=30,
    min_document_tokens=20,
    max_document_tokens=30,
    min_document_chars=1,
    filters=ANYTHING,
)
COUNT = 12


def terse_target(**changes):
    """A target that ends its turns soon, as random ones hardly do: with any capital."""
    target = tiny_target(**changes)
    capitals = target.tokenizer.convert_tokens_to_ids([*"ABCDEFGHIJKLMNOPQRST"])
    return dataclasses.replace(target, end_ids=tuple(capitals))


@pytest.fixture(scope="module")
def target():
    return terse_target()


@pytest.fixture(scope="module")
def whole(target, tmp_path_factory):
    """A file that was written in one go."""
    file = tmp_path_factory.mktemp("whole") / "prompts.jsonl"
    report = write_self_prompts(target, file, COUNT, CONFIG, batch_size=4)
    return file, report


def copy_start(whole, folder, num_bytes):
    """A file as a run leaves it that was killed so early."""
    file = folder / "prompts.jsonl"
    file.write_bytes(whole.read_bytes()[:num_bytes])
    config_file(file).write_bytes(config_file(whole).read_bytes())
    return file


def test_prompts_are_an_ordinary_file(whole):
    file, report = whole
    prompts = read_prompts(file)
    assert prompts == report.prompts
    assert len(prompts) == COUNT
    assert {p.domain for p in prompts} == {name for name, _ in CONFIG.kinds}
    for prompt in prompts:
        roles = [turn["role"] for turn in prompt.messages]
        assert roles[-1] == "user"
        assert (len(roles) > 1) == (prompt.domain == "self-turns")
        # Documents begin as they were begun.
        begins = [begin in prompt.text for _, begin in phrases.DOCUMENTS]
        assert any(begins) or prompt.domain != "self-summary"


def test_reports_count_what_was_dropped(whole):
    _, report = whole
    assert report.kept.total() == COUNT
    assert sum(n for (_, why), n in report.dropped.items() if why == "goes on") > 0
    assert report.num_tokens > COUNT
    assert describe_report(report)


def test_neither_batch_nor_count_changes_a_prompt(target, whole, tmp_path):
    file = tmp_path / "prompts.jsonl"
    write_self_prompts(target, file, 5, CONFIG, batch_size=1)
    lines = whole[0].read_text().splitlines(keepends=True)
    assert file.read_text() == "".join(lines[:5])
    write_self_prompts(target, file, COUNT, CONFIG, batch_size=3)
    assert file.read_text() == whole[0].read_text()


@pytest.mark.crossed
@pytest.mark.parametrize("num_rows", [0, 1, 7, COUNT - 1, COUNT])
@pytest.mark.parametrize("num_over", [0, 9])
def test_a_killed_run_goes_on(target, whole, tmp_path, num_rows, num_over):
    lines = whole[0].read_bytes().splitlines(keepends=True)
    size = sum(map(len, lines[:num_rows])) + num_over
    file = copy_start(whole[0], tmp_path, size)
    is_cut = num_over and num_rows < COUNT

    def go_on():
        return write_self_prompts(target, file, COUNT, CONFIG, batch_size=4)

    if is_cut:
        with pytest.warns(UserWarning, match="cut short"):
            report = go_on()
    else:
        report = go_on()
    assert file.read_bytes() == whole[0].read_bytes()
    assert report.prompts == whole[1].prompts
    assert report.kept.total() == COUNT - num_rows


def test_ctrl_c_keeps_what_is_written(target, whole, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    hear = Writer._hear

    def hears_and_interrupts(writer, completion):
        hear(writer, completion)
        running = [talking.number for talking in writer._talks.values()]
        if any(number > min(running) for number in writer._results):
            signal.raise_signal(signal.SIGINT)
            monkeypatch.undo()

    monkeypatch.setattr(Writer, "_hear", hears_and_interrupts)
    with pytest.raises(Interrupted):
        write_self_prompts(target, file, COUNT, CONFIG, batch_size=4)
    kept = read_prompts(file) if file.read_text() else []
    assert len(kept) < COUNT
    last = max((self_prompts._number(prompt) for prompt in kept), default=-1)
    rows = map(json.loads, ahead_file(file).read_text().splitlines())
    waiting = {int(row["id"]) for row in rows} - {*range(last + 1)}

    begun = []
    begin = Writer._begin
    monkeypatch.setattr(
        Writer,
        "_begin",
        lambda writer, number: (begun.append(number), begin(writer, number)),
    )
    write_self_prompts(target, file, COUNT, CONFIG, batch_size=4)
    assert file.read_text() == whole[0].read_text()
    # What was over already, and waited for earlier ones, is not written again.
    assert waiting
    assert waiting.isdisjoint(begun)


def test_what_waits_may_be_cut_or_lost(target, whole, tmp_path):
    file = copy_start(whole[0], tmp_path, 0)
    content = ahead_file(whole[0]).read_bytes()
    assert len(content) > 1000
    ahead_file(file).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="cut short"):
        write_self_prompts(target, file, COUNT, CONFIG, batch_size=4)
    assert file.read_bytes() == whole[0].read_bytes()
    ahead_file(file).write_text('{"id": "a"}\n')
    with pytest.raises(ConfigError, match="delete it, and they are written again"):
        write_self_prompts(target, file, COUNT, CONFIG, batch_size=4)


def test_another_seed_gives_other_prompts(target, whole, tmp_path):
    file = tmp_path / "prompts.jsonl"
    config = dataclasses.replace(CONFIG, seed=6)
    report = write_self_prompts(target, file, 4, config, batch_size=4)
    pairs = zip(report.prompts, whole[1].prompts, strict=False)
    assert all(one.messages != other.messages for one, other in pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "was written with seed 5, not 7"),
        ({"top_p": 0.9}, "was written with top_p 0.95, not 0.9"),
        ({"filters": FilterConfig()}, "was written with filters"),
    ],
)
def test_files_of_other_recipes_are_refused(target, whole, tmp_path, change, message):
    file = copy_start(whole[0], tmp_path, 10_000)
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match=message):
        write_self_prompts(target, file, COUNT, config)


def test_files_of_other_targets_and_origins_are_refused(whole, tmp_path):
    file = copy_start(whole[0], tmp_path, 10_000)
    with pytest.raises(ConfigError, match="fingerprint 'tiny-0', not 'tiny-1'"):
        write_self_prompts(terse_target(seed=1), file, COUNT, CONFIG)
    config_file(file).unlink()
    with pytest.raises(ConfigError, match="choose another file"):
        write_self_prompts(terse_target(), file, COUNT, CONFIG)


def test_patience_may_change(target, whole, tmp_path):
    file = copy_start(whole[0], tmp_path, 100_000)
    config = dataclasses.replace(CONFIG, patience=99)
    assert write_self_prompts(target, file, COUNT, config).num_tokens == 0


def test_it_is_given_up_when_nothing_is_kept(target, tmp_path):
    filters = dataclasses.replace(ANYTHING, min_chars=200)
    kinds = (("self-chat", 1.0),)
    config = dataclasses.replace(
        CONFIG, kinds=kinds, filters=filters, patience=5, max_turn_tokens=300
    )
    with pytest.raises(ConfigError, match=r"last 5 prompts .*: too short \(5\)"):
        write_self_prompts(target, tmp_path / "none.jsonl", 4, config, batch_size=4)


def test_models_without_a_template_are_refused(tmp_path):
    target = terse_target()
    target.tokenizer.chat_template = None
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(ConfigError, match="no chat template"):
        write_self_prompts(target, file, COUNT, CONFIG)
    assert not list(tmp_path.iterdir())


def test_templates_without_system_turns_write_the_other_kinds(tmp_path):
    target = terse_target()
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}"
    template = refuses + "{% endif %}" + target.tokenizer.chat_template
    target.tokenizer.chat_template = template
    kinds = (("self-system", 3.0), ("self-chat", 1.0))
    config = dataclasses.replace(CONFIG, kinds=kinds)
    file = tmp_path / "prompts.jsonl"
    with pytest.warns(UserWarning, match="no prompts of self-system: .*: none"):
        report = write_self_prompts(target, file, 2, config, batch_size=4)
    assert {prompt.domain for prompt in report.prompts} == {"self-chat"}
    kinds = json.loads(config_file(file).read_text())["kinds"]
    assert kinds == [["self-chat", 1.0]]


def test_texts_beyond_the_context_are_dropped(tmp_path):
    target = terse_target(max_position=256)
    config = dataclasses.replace(
        CONFIG, kinds=(("self-turns", 1.0),), max_answer_tokens=250, patience=12
    )
    with pytest.raises(ConfigError, match="beyond the context"):
        write_self_prompts(target, tmp_path / "it.jsonl", 9, config, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": (("self-chatter", 1.0),)}, "unknown kind .* 'self-chatter'; use"),
        ({"kinds": (("self-chat", -1.0),)}, "weight of self-chat is -1"),
        ({"kinds": (("self-chat", 0.0),)}, "no kind of prompts has a weight"),
        ({"max_turn_tokens": 0}, "max_turn_tokens is 0"),
        ({"min_document_tokens": 50}, "documents of 50 to 30 tokens"),
        ({"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_all_kinds_are_written_by_default():
    assert {name for name, _ in DEFAULT_KINDS} == set(KINDS)
