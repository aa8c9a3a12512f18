# SPDX-License-Identifier: Apache-2.0
"""n-grams: what is found, what is remembered, and how rates are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.drafters.hints import hinted_chain
from ospec_jax.drafters.ngram import (
    ORDERS,
    SUFFIX_ORDERS,
    init_memory,
    match_context,
    match_memory,
    remember,
    suggest,
    with_ngrams,
)
from ospec_jax.drafters.sources import MEMORY, NGRAMS
from ospec_jax.testing import tiny_draft_config, tiny_model_config
from ospec_jax.types import Roots

learn = jax.jit(remember)
MAX_MATCH = init_memory(1).max_match


def padded(tokens, size=64):
    return jnp.asarray(list(tokens) + [0] * (size - len(tokens)), jnp.int32)


def after(*context):
    """Recent tokens of one path of one row."""
    filled = [-1] * (MAX_MATCH - len(context)) + list(context)
    return jnp.asarray(filled, jnp.int32)[None, None]


def found_by_search(history, recent):
    """The longest match's latest follower, by trying them all."""
    best = (0, -1)
    for i in range(1, len(history)):
        length = 0
        while (
            length < min(i, len(recent))
            and history[i - 1 - length] == recent[len(recent) - 1 - length]
        ):
            length += 1
        best = max(best, (length, i))
    return (history[best[1]], best[0] - 1) if best[0] else None


def test_context_match_equals_a_search():
    rng = np.random.default_rng(0)
    num_found = 0
    for _ in range(60):
        history = rng.integers(0, 5, 40)
        known = int(rng.integers(1, 41))
        drafted = rng.integers(0, 5, int(rng.integers(0, 4)))
        recent = np.concatenate([history[:known], drafted])[-MAX_MATCH:]
        recent = np.concatenate([[-1] * (MAX_MATCH - len(recent)), recent])
        token, level = match_context(
            jnp.asarray(history[None], jnp.int32), jnp.full((1, 1), known),
            jnp.asarray(recent[None, None], jnp.int32),
        )  # fmt: skip
        expected = found_by_search(history[:known].tolist(), recent.tolist())
        if expected is None:
            assert int(level[0, 0]) == -1
        else:
            assert (int(token[0, 0]), int(level[0, 0])) == expected
            num_found += 1
    assert num_found > 40


def test_paths_and_rows_are_matched_apart():
    history = jnp.asarray([[1, 2, 3, 1, 2, 4], [7, 8, 9, 7, 8, 9]], jnp.int32)
    recent = jnp.stack([after(1, 2)[0, 0], after(7, 8)[0, 0]])[None].repeat(2, 0)
    token, level = match_context(history, jnp.full((2, 2), 6), recent)
    np.testing.assert_array_equal(level >= 0, [[True, False], [False, True]])
    assert (int(token[0, 0]), int(token[1, 1])) == (4, 9)


def test_memory_keeps_what_mostly_followed():
    memory = init_memory(1024)
    for follower in (3, 4, 4, 4, 3):
        memory = learn(memory, padded([9, 1, 2, follower]), 0, 4)
    token, level = match_memory(memory, after(9, 1, 2))
    assert int(token[0, 0]) == 4
    higher, _ = match_memory(memory, after(5, 1, 2))  # known to the lower order only
    assert int(higher[0, 0]) == 4
    assert int(level[0, 0]) > int(match_memory(memory, after(5, 1, 2))[1][0, 0])
    assert int(match_memory(memory, after(2, 1))[1][0, 0]) == -1


def test_memory_ignores_junk_and_short_contexts():
    memory = learn(init_memory(256), padded([1, 2, 3]), 0, 3)
    assert np.sum(np.asarray(memory.counts) > 0, axis=1).tolist() == [1, 0]
    assert int(match_memory(memory, after(3, 0))[1][0, 0]) == -1


def test_a_full_memory_forgets_and_stays_bounded():
    memory, rng = init_memory(8), np.random.default_rng(0)
    for _ in range(6):
        tokens = rng.integers(0, 50, 60)
        memory = learn(memory, padded(tokens), 0, 60)
    assert memory.tokens.shape == (2, 8)
    assert np.all(np.asarray(memory.counts) >= 0)
    assert np.all(np.asarray(memory.counts) <= 8)
    memory = learn(memory, padded([1, 2, 3] * 20), 0, 60)
    token, _ = match_memory(memory, after(1, 2))
    assert int(token[0, 0]) == 3


def test_rates_are_learned_from_answers_only():
    """A cyclic answer makes long matches right, a random one makes them rare."""
    cycle = padded([1, 2, 3, 4, 5, 6] * 10)
    start = init_memory(16)
    unscored = learn(start, cycle, 60, 60)  # all prompt
    np.testing.assert_array_equal(unscored.trials, start.trials)
    scored = learn(start, cycle, 20, 60)
    longest = MAX_MATCH - 1
    assert int(scored.trials[longest] - start.trials[longest]) == 39
    assert int(scored.hits[longest] - start.hits[longest]) == 39
    misleading = padded([1, 2, 3, 4, 9, 1, 2, 3, 4, 8, 1, 2, 3, 4, 7])
    wrong = learn(start, misleading, 8, 15)
    rate = lambda memory: float(memory.hits[longest] / memory.trials[longest])
    assert rate(wrong) < rate(start) < rate(scored)


def test_the_likelier_source_is_believed():
    memory = init_memory(1024)
    for _ in range(8):
        memory = learn(memory, padded([5, 1, 2, 30]), 0, 4)
    history = jnp.asarray([[2, 40, 0, 0]], jnp.int32)  # one token matches: a weak hint
    args = history, jnp.full((1, 1), 2)
    token, log_rate, source = suggest(memory, *args, after(5, 1, 2))
    assert int(token[0, 0]) == 30
    assert int(source[0, 0]) == MEMORY
    rates = memory.hits / memory.trials
    np.testing.assert_allclose(log_rate[0, 0], jnp.log(rates[-1]), rtol=1e-6)
    _, log_rate, _ = suggest(memory, *args, after(6, 7))
    assert float(log_rate[0, 0]) == -np.inf
    token, _, source = suggest(memory, *args, after(6, 2))
    assert int(token[0, 0]) == 40
    assert int(source[0, 0]) == NGRAMS


@pytest.mark.parametrize(("lowest", "num_nodes"), [(0.0, 4), (0.3, 3), (0.6, 2)])
def test_chains_end_at_improbable_paths(lowest, num_nodes):
    """Each suggestion has a rate of one half; the fourth token has none."""
    drafter = hinted_chain(TreeConfig(num_steps=4, min_path_probability=lowest))
    rate = lambda recent: jnp.where(recent[..., -1] < 4, jnp.log(0.5), -jnp.inf)
    suggest_next = lambda recent, _: (recent[..., -1] + 1, rate(recent), None)
    hints = Hints(after(1)[0], suggest_next)
    root = jnp.ones(1, jnp.int32)
    roots = Roots(root, root, None, None, None)
    tree, _ = drafter.propose(None, None, (), roots, hints)
    assert int(tree.is_valid.sum()) == num_nodes
    np.testing.assert_array_equal(tree.tokens[0, :num_nodes], 1 + np.arange(num_nodes))


def test_drawn_children_are_refused():
    tree = TreeConfig(num_steps=3, children="sampled")
    drafter = eagle3(tiny_draft_config(tiny_model_config(16)), tree)
    with pytest.raises(ConfigError, match="exact only for children='topk'"):
        with_ngrams(drafter, tree)


def test_longer_ngrams_tell_more_contexts_apart():
    """The same three tokens mean different things after different beginnings."""
    texts = [[i, 50, 51, 52, 53, 60 + i] for i in (1, 2, 3)]
    short, long = init_memory(4096), init_memory(4096, SUFFIX_ORDERS)
    for text in texts * 4:
        short, long = learn(short, padded(text), 0, 6), learn(long, padded(text), 0, 6)
    found = {}
    for name, memory in (("short", short), ("long", long)):
        contexts = [[-1] * (memory.max_match - 5) + text[:-1] for text in texts]
        recent = jnp.asarray(contexts, jnp.int32)[None]
        found[name] = jax.jit(match_memory)(memory, recent)[0][0].tolist()
    assert found["long"] == [61, 62, 63]
    assert len(set(found["short"])) == 1


def test_the_memory_is_judged_where_the_context_does_not_say_the_same():
    memory = init_memory(4096)
    known = [1, 2, 3, 4, 5, 6, 7, 8]
    memory = learn(memory, padded(known), 0, len(known))
    first = memory.max_match
    booked = lambda now: np.asarray(now.trials - memory.trials)[first:].sum()

    # Of a prompt that says the same the memory is not needed: 4 behind 1, 2, 3 again.
    same = learn(memory, padded([1, 2, 3, 4, 9, 1, 2, 3, 4]), 7, 9)
    assert booked(same) == 0
    # Another continuation in the prompt, or none: it is asked, and right or wrong.
    other = learn(memory, padded([1, 2, 3, 5, 9, 1, 2, 3, 4]), 7, 9)
    alone = learn(memory, padded([20, 21, 22, 23, 24, 1, 2, 3, 4]), 7, 9)
    for now in (other, alone):
        assert booked(now) == 1
        hits = np.asarray(now.hits - memory.hits)[first:].sum()
        assert hits == pytest.approx(1)


def test_rates_have_a_prior_for_every_kind_of_match():
    for orders in (ORDERS, SUFFIX_ORDERS):
        memory = init_memory(4, orders)
        assert memory.hits.shape == (memory.max_match + 8 * len(orders),)
        rates = np.asarray(memory.hits / memory.trials)
        assert np.all((rates > 0.1) & (rates < 1))
