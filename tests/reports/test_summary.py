# SPDX-License-Identifier: Apache-2.0
"""What a run of learning came to, on answers whose counts are known."""

from pathlib import Path

from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.reports.summary import describe_use, summarize_learning
from ospec_jax.session import Result


def answer(num_accepted):
    stats = DecodingStats(num_spec_tokens=3)
    for _ in range(2):
        stats.add_step(3, num_accepted)
    return Result(
        prompt=parse_prompt({"prompt": "a"}, "a"),
        text="",
        token_ids=[1] * 10,
        finish_reason="length",
        stats=stats,
        log_probs=[],
        seconds=1.0,
        learning_seconds=0.5,
    )


def test_speed_counts_learning_and_acceptance_is_that_of_both_ends():
    told = summarize_learning([answer(n) for n in (1, 1, 2, 2, 2, 2, 3, 3)], 16.0)
    assert "8 answers, 80 tokens in 16.0 s: 5.0 tokens/s" in told
    assert "(25.0% of the time)" in told
    assert "2.00 over the first 2 answers, 4.00 over the last 2" in told


def test_few_answers_have_no_beginning_and_end():
    told = summarize_learning([answer(1), answer(2)], 4.0)
    assert "acceptance length 2.50\n" in told


def test_it_says_how_to_go_on():
    told = describe_use(Path("my-draft"))
    assert "--draft my-draft" in told
    assert "--checkpoint my-draft --resume" in told
    # As it was learned with.
    told = describe_use(Path("my-draft"), "longer:ngram,")
    assert "--draft longer:ngram,my-draft" in told
    assert "--checkpoint my-draft --resume" in told
