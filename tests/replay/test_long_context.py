# SPDX-License-Identifier: Apache-2.0
"""`tools/long_context.py`: what it asks, scores and writes."""

import json
import runpy
from pathlib import Path

import pytest

from ospec_jax import Session, TreeConfig
from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, with_sliding_window
from ospec_jax.replay.record import record
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "long_context.py"))
ANSWER = {"role": "assistant", "content": "It is so."}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def question(i):
    return parse_prompt({"prompt": f"Why is {i} so?", "id": f"q{i}"}, "")


def test_as_many_solved_questions_as_are_needed(target):
    solved = [[*question(i).messages, ANSWER] for i in range(5)]
    alone = len(encode(question(9), target.tokenizer))
    sizes = []
    for length in (0, 1, 100, 200):
        asked = TOOL["behind"](question(9), solved, length, target.tokenizer)
        assert asked.messages[-1] == question(9).messages[-1]
        assert len(asked.messages) % 2 == 1
        sizes.append(len(encode(asked, target.tokenizer)) - alone)
    each = sizes[1]
    assert sizes == [0, each, -(-100 // each) * each, -(-200 // each) * each]
    with pytest.raises(ConfigError, match="5 solved questions are too few for 9000"):
        TOOL["behind"](question(9), solved, 9000, target.tokenizer)


def test_it_counts_what_decoding_accepts(target, tmp_path):
    """Of a draft with a window, behind a text that is longer than that."""
    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    draft = LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))
    prompts = [question(i) for i in range(3)]
    record(target, prompts, tmp_path, config.taps, max_new_tokens=24, batch_size=3)
    for window in (0, 9):
        seeing = with_sliding_window(draft, window)
        found = TOOL["scored"](target, seeing, tmp_path, 3)
        session = Session(
            target, seeing, tree=TreeConfig(num_steps=3), ngrams=False, learner=None
        )
        results = list(session.generate(prompts, 24))
        stats = results[0].stats + results[1].stats + results[2].stats
        assert len(found) == stats.num_drafts
        length = TOOL["acceptance_length"](found)
        assert length == pytest.approx(stats.mean_acceptance_length)


def test_positions_and_tables(tmp_path):
    step = TOOL["Step"]
    found = [step(0, 1), step(2, 3), step(9, 0)]
    assert TOOL["acceptance_length"](found) == pytest.approx(7 / 3)
    assert TOOL["by_position"](found, 4, 12) == [3.0, None, 1.0]
    rows = [
        {
            "draft": "shipped",
            "window": window,
            "by_preamble": {"0": 2.0, "300": 1.5},
            "by_position": {"0": 3.0, "4": None},
        }
        for window in (0, 128)
    ]
    TOOL["write"](rows, tmp_path)
    assert json.loads((tmp_path / "long_context.json").read_text()) == rows
    text = (tmp_path / "long_context.md").read_text()
    assert "| shipped | all | 2.00 | 1.50 |" in text
    assert "| shipped | 128 | 3.00 | - |" in text
    assert (tmp_path / "long_context.png").stat().st_size > 10_000
