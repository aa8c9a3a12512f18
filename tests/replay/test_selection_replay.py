# SPDX-License-Identifier: Apache-2.0
"""A pool's recording tells what decoding would have come to, whoever is chosen."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ospec_jax import Session, TreeConfig, load_draft
from ospec_jax.cli import streams as cli
from ospec_jax.config import ConfigError
from ospec_jax.control import selection
from ospec_jax.data.prompts import parse_prompt, write_prompts
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, pool_draft
from ospec_jax.replay.pool_record import (
    PoolAnswer,
    PoolMeta,
    in_order,
    is_pool_recording,
    read_pool,
    record_pool,
)
from ospec_jax.replay.selection import compare, markdown_table, plot, replay, to_row
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [
    parse_prompt(
        {"prompt": f"What is {i} plus {i * 7}, and why?", "domain": d}, f"p-{i}"
    )
    for i, d in enumerate(["sums", "sums", "tables"])
]


def head(target, family, seed=0):
    """A random draft of three quarters of the target's tokens."""
    num_tokens = target.config.vocab_size * 3 // 4
    config = tiny_draft_config(target.config, num_tokens, family)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    meta = Meta.create(target, config, family)
    return LoadedDraft(tiny_draft(drafter, config, seed), meta)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def pool(target):
    members = [head(target, "eagle3"), load_draft("ngram", target)]
    return pool_draft(members, target, ("head", "ngram"))


@pytest.fixture(scope="module")
def recording(target, pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    count = record_pool(target, pool, PROMPTS, folder, num_steps=2, max_new_tokens=24)
    assert count == 3
    return folder


REPLAYED = (
    "fixed:0",
    "fixed:1",
    "normalhedge",
    "ucb",
    "normalhedge:domain",
    "share:opening",
    "share:similar",
    "normalhedge:domain:seldom",
)


@pytest.mark.parametrize("name", REPLAYED)
def test_replays_come_to_what_decoding_does(target, pool, recording, name, monkeypatch):
    # So few that the second answer is not judged.
    monkeypatch.setattr(selection, "SETTLED", 5)
    session = Session(
        target,
        pool,
        tree=TreeConfig(num_steps=2),
        controller=name,
        num_predicted_tokens=0,
    )
    decoded = list(session.generate(PROMPTS, 24))
    meta, answers = read_pool(recording)
    found = replay(meta, answers, name)
    assert found.steps.tolist() == [r.stats.num_drafts for r in decoded]
    assert found.tokens.tolist() == [len(r.token_ids) - 1 for r in decoded]
    if name == "normalhedge":
        weights = session.chooser.state.weights
        np.testing.assert_allclose(found.weights[-1], weights)
        assert found.num_switches == session.chooser.state.num_switches
    if name.endswith("seldom"):
        # Of the first, and of the third, whose domain is another; windows are two long.
        judged = sum(answers[i].num_tokens - 1 - 1 for i in (0, 2))
        assert session.chooser.state.shared.num_windows == judged > 5
    if ":" in name and not name.startswith("fixed"):
        state = session.chooser.state
        assert len(state.keys) == len(dict.fromkeys(state.keys)) == session_keys(name)
        np.testing.assert_allclose(found.weights[-1], state.shared.weights)


def session_keys(name):
    """Domains of the prompts, or their openings."""
    if "domain" in name:
        return len({prompt.domain for prompt in PROMPTS})
    return len(PROMPTS)


def test_requests_are_told_apart_by_what_was_recorded_of_them(recording):
    meta, answers = read_pool(recording)
    assert len({answer.opening for answer in answers}) == len(answers)
    with pytest.raises(ConfigError, match="whose requests are"):
        replay(meta, answers, "normalhedge:scope")
    old = [dataclasses.replace(one, opening="") for one in answers]
    with pytest.raises(ConfigError, match="no recorded answer has"):
        replay(meta, old, "normalhedge:opening")

    assert len({answer.embedding for answer in answers}) == len(answers)
    old = [dataclasses.replace(one, embedding="") for one in answers]
    with pytest.raises(ConfigError, match="of an older version; record the prompts"):
        replay(meta, old, "normalhedge:similar")
    # Nothing else asks for it.
    replay(meta, old, "normalhedge:opening")


def test_domains_that_take_turns_are_served_by_weights_of_their_own():
    meta, answers = made_up()
    turns = [
        one for pair in zip(answers[:20], answers[20:], strict=True) for one in pair
    ]
    steps = lambda name: replay(meta, turns, name).steps.sum()
    assert steps("normalhedge:domain") < 0.9 * steps("normalhedge")
    best_each = compare(meta, turns, [])[-1].steps.sum()
    assert steps("normalhedge:domain") < 1.02 * best_each


def test_a_recording_goes_on_and_is_of_one_kind(target, pool, recording, tmp_path):
    record = lambda prompts, **how: record_pool(
        target,
        pool,
        prompts,
        tmp_path,
        **({"num_steps": 2, "max_new_tokens": 24} | how),
    )
    assert not is_pool_recording(tmp_path)
    assert record(PROMPTS[:2]) == 2
    lines = (tmp_path / "answers.jsonl").read_text()
    # A kill in the middle of a line.
    (tmp_path / "answers.jsonl").write_text(lines[:-20])
    assert record(PROMPTS) == 2
    assert is_pool_recording(tmp_path)
    text = (recording / "answers.jsonl").read_text()
    assert (tmp_path / "answers.jsonl").read_text() == text
    with pytest.raises(ConfigError, match="recorded with num_steps 2, not 3"):
        record(PROMPTS, num_steps=3)
    with pytest.raises(ConfigError, match="use pool:A"):
        record_pool(target, pool.members[0], PROMPTS, tmp_path)
    row = json.loads(text.split("\n")[0]) | {"hits": []}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="line 1 of .* damaged"):
        read_pool(tmp_path)


def made_up(num_answers=40, num_tokens=60, seed=0):
    """Three drafters, of which each is best in one half of the stream, or never."""
    rng = np.random.default_rng(seed)
    answers = []
    for i in range(num_answers):
        rates = [0.8, 0.4, 0.3] if i < num_answers // 2 else [0.3, 0.8, 0.2]
        hits = rng.uniform(size=(num_tokens, 3)) < rates
        runs = [np.cumprod(hits[t : t + 3], axis=0).sum(0) for t in range(num_tokens)]
        domain = "early" if i < num_answers // 2 else "late"
        answers.append(
            PoolAnswer(f"a{i}", domain, str(i), hits.astype(np.int8), np.array(runs))
        )
    return PoolMeta("t", "f", "float32", ("a", "b", "c"), 3, 61), answers


def test_selectors_are_held_against_the_best_in_hindsight(tmp_path):
    meta, answers = made_up()
    found = compare(meta, answers, ["share", "exp3"])
    by_name = {one.name: one for one in found}
    whole = next(one for one in found if one.name.startswith("best fixed in"))
    each = by_name["best fixed for each answer"]
    fixed = [by_name[name] for name in "abc"]
    assert whole.steps.sum() == min(one.steps.sum() for one in fixed)
    least = np.min([one.steps for one in fixed], axis=0)
    assert each.steps.tolist() == least.tolist()
    # Who is best changes: a rule that forgets is ahead of every fixed drafter.
    assert each.steps.sum() < by_name["share"].steps.sum() < whole.steps.sum()
    assert by_name["share"].steps.sum() < by_name["exp3"].steps.sum()

    rows = [to_row(one, whole, answers, meta) for one in found]
    json.dumps(rows)
    assert rows[0]["by_domain"]["early"] > rows[1]["by_domain"]["early"]
    share = next(row for row in rows if row["name"] == "share")
    assert share["regret_steps"] < 0
    assert abs(sum(share["shares"].values()) - 1) < 1e-9
    assert len(markdown_table(rows).split("\n")) == 2 + len(rows)
    assert plot(rows, list(meta.drafters), tmp_path / "regret.png").stat().st_size


def test_time_is_what_is_selected_by_where_costs_differ():
    meta, answers = made_up()
    found = replay(meta, answers[:20], "normalhedge:time", [4.0, 1.0, 1.0])
    assert found.shares[-1].argmax() == 1
    assert replay(meta, answers[:20], "normalhedge:time").shares[-1].argmax() == 0
    with pytest.raises(ConfigError, match="one number above 0 for each"):
        replay(meta, answers, "ucb", [1.0])


def test_a_stream_names_the_order(recording):
    _, answers = read_pool(recording)
    turned = [dataclasses.replace(p, id=f"x{p.id}") for p in PROMPTS[::-1]]
    assert [a.id for a in in_order(answers, turned, recording)] == [
        "xp-2",
        "xp-1",
        "xp-0",
    ]
    with pytest.raises(ConfigError, match="1 prompts of the stream are not"):
        in_order(answers, [parse_prompt({"prompt": "new"}, "n")], recording)


def test_the_command_compares_and_refuses(recording, tmp_path, capsys):
    file = tmp_path / "out.json"
    cli.replay(recording, select="hedge,ucb:request", json_file=file)
    table = capsys.readouterr().out
    assert all(name in table for name in ("head", "ngram", "hedge", "ucb:request"))
    names = [row["name"] for row in json.loads(file.read_text())]
    assert names[:2] == ["head", "ngram"]
    assert names[-2:] == ["hedge", "ucb:request"]
    with pytest.raises(ConfigError, match="without learners"):
        cli.replay(recording, learners="head", select="hedge")
    with pytest.raises(ConfigError, match="cannot read the selection|unknown"):
        cli.replay(recording, select="hegde")
    with pytest.raises(ConfigError, match="use numbers"):
        cli.replay(recording, select="hedge", costs="1,x")
    with pytest.raises(FileNotFoundError, match="holds no recording of a pool"):
        cli.replay(tmp_path, select="hedge")
    with pytest.raises(ConfigError, match="is for recording a pool"):
        cli.record(file, tmp_path, num_speculative_tokens=2)


def test_one_choice_an_answer_misses_what_changes_within():
    """Each drafter is best in one half of every answer."""
    meta, answers = made_up()
    halves = [
        dataclasses.replace(
            early,
            hits=np.concatenate([early.hits, late.hits]),
            accepted=np.concatenate([early.accepted, late.accepted]),
        )
        for early, late in zip(answers[:20], answers[20:], strict=True)
    ]
    found = replay(meta, halves, "share")
    once = replay(meta, halves, "share:once")
    assert set(np.count_nonzero(once.shares, axis=1)) == {1}
    assert once.num_switches <= len(halves) - 1
    assert found.steps.sum() < 0.9 * once.steps.sum()
    # It learns from the same tokens, so it ends with much the same weights.
    np.testing.assert_allclose(found.weights[-1], once.weights[-1], atol=0.05)
    with pytest.raises(ConfigError, match="leave 'once' out"):
        replay(meta, halves, "exp3:once")


def test_the_command_makes_tables_of_mixtures_and_of_sizes(recording, tmp_path, capsys):
    file = tmp_path / "out.json"
    prompts, training = tmp_path / "prompts.jsonl", tmp_path / "training.jsonl"
    write_prompts(prompts, PROMPTS[1:2])
    write_prompts(training, [PROMPTS[0], PROMPTS[2]])
    how = dict(select="share,metasd", json_file=file)

    cli.replay(recording, prompts=prompts, router=training, **how)
    table = capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names[4:] == ["router", "share", "metasd"]

    cli.replay(recording, shuffles=2, **how)
    assert "mixed, shuffled" in capsys.readouterr().out.splitlines()[0]
    assert len(json.loads(file.read_text())[0]["streams"]["sums"]) == 2

    cli.replay(recording, copies="2,4", plot=tmp_path / "sizes.png", **how)
    assert capsys.readouterr().out.splitlines()[0] == "| selector | N = 2 | N = 4 |"
    assert (tmp_path / "sizes.png").stat().st_size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"router": "x"}, "give those as --prompts"),
        ({"copies": "2,x"}, "use numbers of drafters"),
        ({"copies": "1"}, "leaves nothing to select"),
        ({"copies": "2", "router": "x", "prompts": "x"}, "have no --router"),
        ({"shuffles": 2, "costs": "1,2"}, "leave --costs out"),
        ({"shuffles": 2, "plot": "x.png"}, "leave --plot out"),
        ({"shuffles": -1}, "--shuffles"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(recording, flags, message):
    paths = ("router", "prompts", "plot")
    how = {key: Path(value) if key in paths else value for key, value in flags.items()}
    with pytest.raises(ConfigError, match=message):
        cli.replay(recording, select="share", **how)
