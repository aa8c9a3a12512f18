# SPDX-License-Identifier: Apache-2.0
"""Benchmarks by domain, by prompt length, and as Spec-Bench publishes them."""

import dataclasses
import json

import pytest
from rich.console import Console

from ospec_jax import load_draft
from ospec_jax.bench.harness import run_bench
from ospec_jax.bench.part_tables import (
    markdown_part_tables,
    part_tables,
    terminal_part_tables,
)
from ospec_jax.bench.parts import add_speedups, length_bucket
from ospec_jax.bench.peers import Peer
from ospec_jax.bench.report import markdown_report, plot_modes, terminal_report
from ospec_jax.bench.rows import to_rows
from ospec_jax.bench.runs import UNPADDED, BenchConfig
from ospec_jax.data.conversations import Conversation
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.testing import tiny_target

MODES = ("autoregressive", UNPADDED, "ngrams")
CONFIG = BenchConfig(modes=MODES, max_new_tokens=6)
PROMPTS = [
    parse_prompt({"prompt": text, "domain": domain}, f"q{i}")
    for i, (text, domain) in enumerate(
        [("one", "b"), ("two" * 60, "a"), ("three", "b"), ("four", "")]
    )
]
ADDED = ("num_prompts", "num_tokens")


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return load_draft("ngram", target)


@pytest.fixture(scope="module")
def measured(target, draft):
    return run_bench(target, draft, PROMPTS, CONFIG, peers=[Peer("other", answer)])


def answer(prompt_ids, max_new_tokens, stop_ids):
    return 4


@pytest.fixture
def run(measured):
    """With times that are known: plain takes 1 s a turn, others shares of that."""
    shares = {"autoregressive": 1.0, UNPADDED: 0.8, "ngrams": 0.5, "other": 2.0}
    takers = measured.modes | measured.peers
    for name, taker in takers.items():
        taker.turn_seconds[:] = [shares[name]] * len(taker.turn_seconds)
        taker.turn_tokens[:] = [6] * len(taker.turn_tokens)
        if name == "ngrams":
            taker.turn_seconds[1] = 0.25
    return measured


def test_buckets_hold_their_ends():
    lengths = (1, 128, 129, 512, 513, 1024, 1025, 2048, 2049)
    assert [length_bucket(n) for n in lengths] == [
        "1-128",
        "1-128",
        "129-512",
        "129-512",
        "513-1024",
        "513-1024",
        "1025-2048",
        "1025-2048",
        "over 2048",
    ]


def test_parts_sum_to_the_whole(run):
    rows = to_rows(run)
    assert [row["mode"] for row in rows] == [*MODES, "other"]
    for row in rows:
        labels = [part["domain"] for part in row["by_domain"]]
        assert labels == ["b", "a", "unnamed"]
        labels = [part["prompt_length"] for part in row["by_prompt_length"]]
        assert labels == ["1-128", "129-512"]
        for parts in (row["by_domain"], row["by_prompt_length"]):
            for key in ADDED:
                assert sum(part[key] for part in parts) == row[key], key
        assert "spec_bench" not in row


def test_parts_have_the_figures_of_their_prompts(run):
    *_, ngrams, other = to_rows(run)
    b, a, _ = ngrams["by_domain"]
    results = run.modes["ngrams"].results
    stats = results[0].stats + results[2].stats
    assert b["mean_acceptance_length"] == stats.mean_acceptance_length
    tokens = len(results[0].token_ids) + len(results[2].token_ids)
    assert b["tokens_per_second_with_learning"] == pytest.approx(tokens)
    assert a["paired_speedup_quartiles"] == pytest.approx([4.0] * 3)
    assert b["paired_speedup_quartiles"] == pytest.approx([2.0] * 3)
    # All modes made as many tokens, so that only the times count.
    assert (b["speedup"], a["speedup"]) == (pytest.approx(2), pytest.approx(4))
    assert b["speedup_over_fastest_plain"] == pytest.approx(1.6)
    part = other["by_domain"][0]
    assert part["mean_acceptance_length"] is None
    assert part["num_tokens"] == 12


def test_the_time_of_learning_counts(run):
    mode = run.modes["ngrams"]
    results = list(mode.results)
    mode.results[1] = dataclasses.replace(results[1], learning_seconds=0.05)
    part = to_rows(run)[2]["by_domain"][1]
    mode.results[:] = results
    ratio = part["tokens_per_second"] / part["tokens_per_second_with_learning"]
    assert ratio == pytest.approx(0.25 / 0.2)
    assert part["speedup"] == pytest.approx(4)


def test_batches_hide_the_time_of_mixed_parts(target, draft):
    modes = ("autoregressive", "ngrams")
    config = dataclasses.replace(CONFIG, modes=modes, batch_size=2)
    domains = "a", "a", "a", "b", "c"
    prompts = [
        dataclasses.replace(PROMPTS[0], id=f"q{i}", domain=domain)
        for i, domain in enumerate(domains)
    ]
    run = run_bench(target, draft, prompts, config)
    row = to_rows(run)[1]
    a, b, c = row["by_domain"]
    assert [part["num_prompts"] for part in (a, b, c)] == [3, 1, 1]
    assert sum(part["num_tokens"] for part in (a, b, c)) == row["num_tokens"]
    for part in (a, b):
        assert part["tokens_per_second"] is None
        assert part["speedup"] is None
        assert part["paired_speedup_quartiles"] is None
        assert part["mean_acceptance_length"] >= 1
    assert c["speedup"] > 0  # the last batch is its own
    (table,) = part_tables(to_rows(run))
    assert str(table.cells["ngrams"][0]).startswith("- (")


def test_tables_are_the_same_of_rows_read_back(run, tmp_path):
    rows = to_rows(run)
    again = json.loads(json.dumps(rows))
    assert again == rows
    assert markdown_report(again) == markdown_report(rows)
    by_domain, by_length = part_tables(again)
    assert by_domain.unit == "speed-up over the fastest plain"
    assert list(by_domain.cells) == [UNPADDED, "ngrams", "other"]
    assert by_domain.sizes == [2, 1, 1]
    assert by_length.labels == ["1-128", "129-512"]
    text = markdown_part_tables(again)
    assert "| domain | prompts | plain | unpadded | ngrams | other |" in text
    # Plain makes 6 tokens in 1 s; other decoders have no acceptance length.
    line = next(x for x in text.splitlines() if x.startswith("| a |"))
    assert line.startswith("| a | 1 | 6.0 | 1.00 (1.00) | 3.20 (")
    assert line.endswith(" |")
    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_report(again, "title", 80))
    printed = capture.get()
    assert "By prompt tokens" in printed
    assert max(map(len, printed.splitlines())) <= 80
    alone = [row | {"by_domain": [], "by_prompt_length": []} for row in rows]
    small = plot_modes(alone, tmp_path / "alone.png").stat().st_size
    assert plot_modes(again, tmp_path / "parts.png").stat().st_size > 1.5 * small


def test_one_domain_needs_no_table(run):
    rows = to_rows(run)
    for row in rows:
        del row["by_domain"][1:]
        del row["by_prompt_length"][1:]
    assert part_tables(rows) == []
    assert markdown_part_tables(rows) == ""


def test_without_plain_decoding_the_cells_are_speeds(run):
    rows = [row for row in to_rows(run) if row["mode"] == "ngrams"]
    for row in rows:
        row["by_domain"] = add_speedups([p | {"mode": "x"} for p in row["by_domain"]])
    table = part_tables(rows)[0]
    assert table.unit == "tokens/s"
    assert table.plain is None
    assert table.title == "By domain: tokens/s (acceptance length)"
    assert table.cells["ngrams"][1].value == pytest.approx(24)


def test_old_speedups_do_not_stay():
    row = {"tokens_per_second": 5.0, "tokens_per_second_with_learning": 5.0}
    plain, other = {"mode": "autoregressive"} | row, {"mode": UNPADDED} | row
    both = add_speedups([plain, other])
    assert both[0]["speedup_over_fastest_plain"] == 1
    (alone,) = add_speedups(both[:1])
    assert alone == plain | {"speedup": 1.0}


def test_spec_bench_is_told_as_it_is_published(target, draft):
    items = [
        Conversation("0", ("rag?",), "rag"),
        Conversation("1", ("One?", "Two?"), "multi-turn conversation"),
        Conversation("2", ("Three?",), "multi-turn conversation"),
    ]
    config = dataclasses.replace(CONFIG, modes=("autoregressive", "ngrams"))
    run = run_bench(target, draft, items, config)
    plain, ngrams = run.modes.values()
    for mode in (plain, ngrams):
        mode.turn_tokens[:] = [6, 6, 6, 6]
    plain.turn_seconds[:] = [2.0, 1.0, 1.0, 2.0]
    ngrams.turn_seconds[:] = [2.0, 0.5, 0.25, 1.0]

    rows = to_rows(run)
    assert plain.results[0].prompt.domain == "rag"  # asked in the order that was given
    tasks = rows[1]["spec_bench"]["by_task"]
    assert list(tasks) == ["multi-turn conversation", "rag", "overall"]
    chat = tasks["multi-turn conversation"]
    # A question's turns count together, then questions alike: 12 tokens in 0.75 s and
    # 6 in 1 s, against 12 in 2 s and 6 in 2 s.
    assert chat["tokens_per_second"] == pytest.approx((16 + 6) / 2)
    assert chat["speedup"] == pytest.approx((16 + 6) / (6 + 3))
    assert chat["num_questions"] == 2
    assert tasks["overall"]["speedup"] == pytest.approx((16 + 6 + 3) / (6 + 3 + 3))
    assert tasks["rag"]["speedup"] == 1
    length = ngrams.stats.mean_acceptance_length
    assert tasks["overall"]["mean_accepted_tokens"] == length
    text = markdown_part_tables(rows).splitlines()
    begin = text.index("Spec-Bench, 3 questions, speed-up over autoregressive")
    assert text[begin + 2] == (
        "| Models | Multi-turn Conversation | Retrieval-aug. Generation | "
        "#Mean Accepted Tokens | Overall |"
    )
    assert text[begin + 4] == "| autoregressive | 1.00x | 1.00x | 1.00 | 1.00x |"
    assert text[begin + 5] == f"| ngrams | 2.44x | 1.00x | {length:.2f} | 2.08x |"
    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_part_tables(rows, 80))
    assert "#Mean Accepted Tokens" in capture.get()
