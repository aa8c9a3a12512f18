# SPDX-License-Identifier: Apache-2.0
"""Drafts against each other, by domain, on a tiny target."""

import dataclasses

import pytest

from ospec_jax import load_draft
from ospec_jax.bench.drafts import domain_rows, drafts_table, parse_contender
from ospec_jax.bench.harness import run_bench
from ospec_jax.bench.runs import BenchConfig, Contender
from ospec_jax.cli.notation import parse_tree
from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.stats import repeated_share
from ospec_jax.testing import tiny_target

ROWS = [("one", "a"), ("two", "b"), ("three", "a"), ("four", "")]
PROMPTS = [
    parse_prompt({"prompt": text, "domain": domain}, text) for text, domain in ROWS
]
PLAIN = BenchConfig(modes=("autoregressive",), max_new_tokens=24)


@pytest.fixture(scope="module")
def run():
    target = tiny_target()
    chain = TreeConfig(num_steps=3)
    contenders = {
        name: Contender(load_draft(name, target), chain) for name in ("ngram", "suffix")
    }
    return run_bench(target, None, PROMPTS, PLAIN, contenders=contenders)


def test_rows_are_of_their_domains_prompts(run):
    rows = domain_rows(run)
    assert [row["domain"] for row in rows[::3]] == ["a", "b", "unnamed", "all"]
    assert [row["num_prompts"] for row in rows[::3]] == [2, 1, 1, 4]
    for mode in ("autoregressive", "ngram", "suffix"):
        *parts, whole = (row for row in rows if row["mode"] == mode)
        assert sum(row["num_tokens"] for row in parts) == whole["num_tokens"]
        assert whole["num_tokens"] == sum(run.modes[mode].turn_tokens)
        stats = run.modes[mode].stats
        assert whole["mean_acceptance_length"] == stats.mean_acceptance_length
        assert whole["num_mismatched_outputs"] == 0
        first = [run.modes[mode].results[i].stats for i in (0, 2)]
        length = (first[0] + first[1]).mean_acceptance_length
        assert parts[0]["mean_acceptance_length"] == length
    plain = rows[0]
    assert (plain["speedup"], plain["step_cost"]) == (1, 1)
    assert plain["paired_speedup_quartiles"] == [1, 1, 1]


def test_costs_are_in_plain_steps(run):
    row = next(row for row in domain_rows(run) if row["mode"] == "ngram")
    plain = run.pass_seconds["autoregressive"].step
    assert row["step_cost"] == run.pass_seconds["ngram"].step / plain
    rest = row["step_cost"] - row["draft_cost"]
    assert rest == pytest.approx(run.verify_seconds["ngram"] / plain)
    assert run.verify_seconds["ngram"] == run.verify_seconds["suffix"]


def test_the_fastest_of_each_domain_stands_out(run):
    rows = domain_rows(run)
    for row in rows:
        row["speedup"] = 2.0 if (row["mode"], row["domain"]) == ("ngram", "b") else 1.5
    table = drafts_table(rows).splitlines()
    assert table[0] == "| draft | draft cost | step cost | a | b | unnamed | all |"
    assert [line.split(" |")[0] for line in table[2:6]] == [
        "| ngram", "| suffix", "| plain, tokens/s", "| plain, repeated tokens",
    ]  # fmt: skip
    assert table[2].count("**2.00**") == 1
    assert "**" not in table[3].split("|")[5]
    assert table[-2].endswith("plain ones: 0.")


def test_loops_are_told_beside_n_grams(run):
    rows = domain_rows(run)
    answers = [r.token_ids for r in run.modes["ngram"].results]
    whole = next(r for r in rows if (r["mode"], r["domain"]) == ("ngram", "all"))
    assert whole["repeated_token_share"] == repeated_share(answers)
    for row in rows:
        row["repeated_token_share"] = 0.25 if row["domain"] == "a" else 0.5
    line = next(x for x in drafts_table(rows).splitlines() if "repeated" in x)
    assert line == "| plain, repeated tokens | - | - | 25% | 50% | 50% | 50% |"


def parse(text="chain", children="topk", verification="token"):
    return parse_tree(text, 3, children, verification=verification)


def test_contenders_have_a_tree_of_their_own():
    chain = TreeConfig(num_steps=3)
    assert parse_contender("mixed:ngram,shipped", parse) == (
        "mixed:ngram,shipped", chain,
    )  # fmt: skip
    name, tree = parse_contender("shipped:hydra@static:3,2,1", parse)
    assert (name, tree.branching) == ("shipped:hydra", (3, 2, 1))
    _, tree = parse_contender("shipped@chain@sampled@block", parse)
    assert tree == dataclasses.replace(chain, children="sampled", verification="block")
    _, tree = parse_contender("shipped@static:2,2@hub", parse)
    assert (tree.children, tree.verification) == ("hub", "token")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none", "names no draft"),
        ("@chain", "names no draft"),
        ("shipped@", "cannot read the draft 'shipped@'"),
        ("shipped@chain@drawn", "'drawn' in .* is none of topk, sampled"),
        ("shipped@chain@sampled@path", "'path' in .* is none of token, block"),
        ("shipped@chain@sampled@block@3", "cannot read the draft"),
    ],
)
def test_contenders_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_contender(text, parse)


@pytest.mark.parametrize(
    ("children", "num_mismatched", "said"),
    [("topk", 0, "plain ones: 0."), ("sampled", None, "plain ones: not compared.")],
)
def test_sampled_answers_are_compared_unless_children_are_drawn(
    children, num_mismatched, said
):
    """Then they follow the same law, but are other draws."""
    target = tiny_target()
    config = dataclasses.replace(PLAIN, sampling=SamplingConfig(0.7))
    text = f"self:exit-1@chain@{children}"
    draft = load_draft("self:exit-1", target)
    contenders = {text: Contender(draft, parse_contender(text, parse)[1])}
    run = run_bench(target, None, PROMPTS[:2], config, contenders=contenders)
    rows = [row for row in domain_rows(run) if row["domain"] == "all"]
    assert 1 < rows[1]["mean_acceptance_length"] < 4
    assert rows[1]["num_mismatched_outputs"] == num_mismatched
    assert rows[1]["num_tie_flips"] is None
    assert said in drafts_table(domain_rows(run))


def test_batches_cannot_be_told_apart(run):
    run.config = BenchConfig(modes=("autoregressive",), batch_size=2)
    with pytest.raises(ConfigError, match="prompt by prompt"):
        domain_rows(run)


def test_an_early_end_leaves_nothing_to_compare(run):
    run = dataclasses.replace(run, config=PLAIN, prompts=[])
    with pytest.raises(ConfigError, match="nothing to compare"):
        domain_rows(run)
