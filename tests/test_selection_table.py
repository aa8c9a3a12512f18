# SPDX-License-Identifier: Apache-2.0
"""One command records a pool and writes the tables of its selections."""

import json
import runpy
from pathlib import Path

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.control.selectors import build_selector, is_selector
from ospec_jax.data.prompts import parse_prompt, read_prompts, write_prompts
from ospec_jax.replay.pool_record import record_pool
from ospec_jax.replay.selection import chosen_once

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "selection_table.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Test and training prompts of two domains, and a recording of them all."""
    folder = tmp_path_factory.mktemp("tables")
    texts = {"sums": "What is {} plus 7?", "tables": "List singers above {}."}
    for name, numbers in (("test", range(2)), ("train", range(2, 4))):
        rows = [
            parse_prompt({"prompt": text.format(i), "domain": domain}, f"{domain}-{i}")
            for domain, text in texts.items()
            for i in numbers
        ]
        write_prompts(folder / f"{name}.jsonl", rows)
    return folder


def test_the_tables_are_written(files, monkeypatch, capsys):
    from ospec_jax import load_draft
    from ospec_jax.loading import pool_draft
    from ospec_jax.testing import tiny_target

    target = tiny_target()
    members = [load_draft(name, target) for name in ("ngram", "suffix")]
    pool = pool_draft(members, target, ("ngram", "suffix"))
    asked = []

    def record(prompts, out, **how):
        asked.append(how["draft"])
        record_pool(target, pool, read_prompts(prompts), out, max_new_tokens=16)

    monkeypatch.setitem(TOOL["main"].__globals__, "record", record)
    out = files / "out"
    given = [str(files / "rec"), "--prompts", str(files / "test.jsonl")]
    given += ["--train", str(files / "train.jsonl"), "--out", str(out)]
    given += ["--select", "ucb,share,normalhedge:domain", "--shuffles", "2"]
    TOOL["main"]([*given, "--draft", "pool:ngram+suffix", "--sizes", "2,3"])
    assert asked == ["pool:ngram+suffix"]

    for kind in ("mixtures", "reworded"):
        text = (out / f"{kind}.md").read_text()
        assert text.startswith("4 of 12 recorded answers, K = 3, 2 orders.")
        rows = json.loads((out / f"{kind}.json").read_text())
        names = [row["name"] for row in rows]
        assert names[-4:] == ["router", "ucb", "share", "normalhedge:domain"]
    assert "N = 3" in (out / "sizes.md").read_text()
    assert (out / "sizes.png").stat().st_size
    assert str(out / "sizes.md") in capsys.readouterr().out

    # Without a draft the recording is taken as it is, or as experts' that are made up.
    TOOL["main"]([*given, "--sizes", "2", "--made-up", "0.3"])
    row = json.loads((out / "mixtures.json").read_text())[0]
    assert row["name"] == "made up, at home in sums"
    assert len(asked) == 1
    given[2] = str(files / "train.jsonl")
    with pytest.raises(ConfigError, match="that the router is trained on"):
        TOOL["main"]([*given, "--sizes", "2"])


def test_its_rules_are_rules():
    from ospec_jax import TreeConfig
    from ospec_jax.control.base import Action

    tree = TreeConfig(num_steps=3)
    for name in TOOL["RULES"]:
        rule, _ = chosen_once(name)
        assert is_selector(rule)
        build_selector(rule, (Action(tree, 0), Action(tree, 1)))
