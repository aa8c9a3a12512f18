# SPDX-License-Identifier: Apache-2.0
"""A router sends prompts to their domain's drafter, until they are worded otherwise."""

import sys

import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.data.known import content_hash
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.router import fit_router, reworded, route, routes_of
from ospec_jax.replay.selection import replay

META = PoolMeta("t", "f", "float32", ("sums", "tables", "nobody"), 3, 31)
TEXTS = {
    "sums": "How many apples are left if {} of {} are eaten?",
    "tables": "List the names of singers whose age is above {} or below {}.",
}
BEST = {"sums": 0, "tables": 1}


def prompts_of(numbers):
    return [
        parse_prompt(
            {"prompt": text.format(i, 3 * i + 20), "domain": domain}, f"{domain}-{i}"
        )
        for i in numbers
        for domain, text in TEXTS.items()
    ]


def answers_to(prompts, num_tokens=30, seed=0):
    """Each domain's drafter is right 8 times in 10, others 3 times."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in prompts:
        rates = np.where(np.arange(3) == BEST[prompt.domain], 0.8, 0.3)
        hits = rng.uniform(size=(num_tokens, 3)) < rates
        runs = [np.cumprod(hits[t : t + 3], axis=0).sum(0) for t in range(num_tokens)]
        found.append(
            PoolAnswer(
                prompt.id,
                prompt.domain,
                content_hash(prompt),
                hits.astype(np.int8),
                np.array(runs),
            )
        )
    return found


def test_prompts_of_known_domains_have_their_drafters():
    training, prompts = prompts_of(range(20)), prompts_of(range(20, 30))
    answers = answers_to(prompts, seed=1)
    found = routes_of(META, prompts, answers_to(training), training)
    assert found.right == 1.0
    assert found.drafters == {"sums": "sums", "tables": "tables"}
    # As if each had been told who is best.
    fixed = [replay(META, answers, f"fixed:{i}") for i in range(3)]
    wanted = [fixed[BEST[p.domain]].steps[i] for i, p in enumerate(prompts)]
    selected = found.select(fixed, answers)
    assert selected.steps.tolist() == wanted
    np.testing.assert_allclose(selected.shares.sum(axis=0), (10, 10, 0))
    assert selected.num_switches == len(prompts) - 1


def test_other_words_mislead_it():
    training, prompts = prompts_of(range(20)), prompts_of(range(20, 40))
    changed = reworded(prompts, training)
    assert len({one.text for one in changed}) == len(changed)
    for one, before in zip(changed, prompts, strict=True):
        assert one.text.endswith(before.text)
        assert one.domain == before.domain
        assert content_hash(one) != content_hash(before)
    trained_on = answers_to(training)
    told = routes_of(META, changed, trained_on, training)
    plain = routes_of(META, prompts, trained_on, training)
    assert told.right < 0.8 < plain.right
    wrong = [told.numbers[content_hash(p)] != BEST[p.domain] for p in changed]
    np.testing.assert_allclose(np.mean(wrong), 1 - told.right)


def test_the_same_prompts_give_the_same_router():
    texts = [prompt.text for prompt in prompts_of(range(4))]
    labels = [prompt.domain for prompt in prompts_of(range(4))]
    first, second = fit_router(texts, labels), fit_router(texts, labels)
    chances = [router.predict_proba(texts) for router in (first, second)]
    np.testing.assert_array_equal(*chances)
    # Words that nobody knows say nothing; the constant decides.
    assert len(set(route(first, ["zzz", "", "qqq"]))) == 1
    assert route(first, ["How many apples?", "List the singers."]) == ["sums", "tables"]


def test_what_cannot_be_told_apart_is_refused():
    training = prompts_of(range(4))
    answers = answers_to(training)
    with pytest.raises(ConfigError, match="8 prompts are among those"):
        routes_of(META, training, answers, training)
    with pytest.raises(ConfigError, match="domains apart, and its prompts have 'sums'"):
        fit_router(["a", "b"], ["sums", "sums"])
    with pytest.raises(ConfigError, match="and so are all others"):
        reworded(training, training[:1])


def test_without_its_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'ospec-jax\[router\]'"):
        fit_router(["a", "b"], ["sums", "tables"])
