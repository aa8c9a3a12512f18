# SPDX-License-Identifier: Apache-2.0
"""Penalties and biases: as plain decoding has them, whatever is drafted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import forward, random_params

from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.decoding.adjusting import (
    adjust,
    as_extras,
    count_between,
    count_emitted,
    count_on_paths,
)
from ospec_jax.decoding.engine import KINDS, Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.ngram import init_memory, with_ngrams
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.models.layers import Numerics
from ospec_jax.testing import (
    tiny_draft,
    tiny_draft_config,
    tiny_model_config,
    tiny_target,
)
from ospec_jax.types import DraftTree

# The others compare numbers within a tolerance, or programs with each other.
looks_at_bits = pytest.mark.bits

VOCAB = 16
PLAIN = TreeConfig(num_steps=0)
TREES = {
    "chain": TreeConfig(num_steps=2),
    "dynamic": TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12),
    "drawn": TreeConfig("static", 2, branching=(3, 2), children="without_replacement"),
    "block": TreeConfig(num_steps=3, children="sampled", verification="block"),
    "traversal": TreeConfig(
        "static", 2, branching=(2, 2), children="sampled", verification="traversal"
    ),
}
NGRAMS = ("chain", "dynamic")
# How rows are adjusted does not depend on the rule that verifies them, whose laws, of
# adjusted targets, too, are held by `test_laws.py`.
NAMES = [
    pytest.param(name, marks=pytest.mark.thorough)
    if name in ("block", "traversal")
    else name
    for name in TREES
]
PROMPTS = [(1, 2, 3), tuple(np.arange(70) % VOCAB), (5, 4), (9, 9, 9, 1, 0, 2)]
LENGTHS = (40, 23, 57, 31)
SETTINGS = [
    SamplingConfig(frequency_penalty=0.37, presence_penalty=0.21),
    SamplingConfig(repetition_penalty=1.7, logit_bias=((0, -100.0), (7, 1.3))),
    SamplingConfig(),
    SamplingConfig(presence_penalty=-0.7, frequency_penalty=1.1),
]
HOT = [dataclasses.replace(one, temperature=0.9, min_p=0.05) for one in SETTINGS]


@functools.cache
def open_target(precision):
    return tiny_target(VOCAB, precision, num_layers=2)


# Adjusting does not look at how logits were computed.
@pytest.fixture(
    scope="module",
    params=["float32", pytest.param("int8", marks=pytest.mark.thorough)],
)
def target(request):
    return open_target(request.param)


def engine_for(target, tree, ngrams=False):
    config = tiny_draft_config(target.config)
    drafter = draft = None
    if tree.num_steps:
        drafter = build_drafter("eagle3", config, tree, target.numerics)
        draft = tiny_draft(drafter, config)
    if ngrams:
        drafter = with_ngrams(drafter, tree)
        draft = draft.replace(memory=init_memory(64))
    step = StepConfig(target.config, target.numerics, tree, config.taps)
    return Engine(step, target.params, drafter), draft


@functools.cache
def shared_engine(precision, name):
    """For tests that count no programs: what one of them compiled serves the others."""
    tree = PLAIN if name == "plain" else TREES[name]
    return engine_for(open_target(precision), tree, ngrams=name in NGRAMS)


def engine_of(target, name):
    return shared_engine(target.numerics.precision, name)


def requests(settings, **changes):
    return [
        Request(str(i), prompt, length, how, **changes)
        for i, (prompt, length, how) in enumerate(
            zip(PROMPTS, LENGTHS, settings, strict=True)
        )
    ]


def answers(engine, draft, asked, batch_size=1):
    done = engine.serve(asked, lambda: draft, batch_size)
    return sorted(done, key=lambda completion: completion.request.id)


def tokens(completions):
    return [c.token_ids for c in completions]


@pytest.fixture(scope="module")
def plain(target):
    return tokens(answers(*engine_of(target, "plain"), requests(SETTINGS)))


@pytest.fixture(scope="module")
def unadjusted(target):
    neutral = [SamplingConfig()] * len(PROMPTS)
    return tokens(answers(*engine_of(target, "plain"), requests(neutral)))


def adjusted(logits, how, prompt_ids, answer):
    """One place's logits in numpy, each operation rounded to float32."""
    logits = np.asarray(logits, np.float32).copy()
    for token, bias in how.logit_bias:
        logits[token] += np.float32(bias)
    for token in set(prompt_ids) | set(answer):
        penalty = np.float32(how.repetition_penalty)
        value = logits[token]
        # By the reciprocal, as vLLM does it.
        logits[token] = value * (1 / penalty if value > 0 else penalty)
    for token in set(answer):
        times = np.float32(answer.count(token))
        logits[token] -= np.float32(how.frequency_penalty) * times
        logits[token] -= np.float32(how.presence_penalty)
    return logits


def one_tree(parents, drafted):
    parents = np.asarray(parents, np.int32)
    mask = topology.static_ancestor_mask(parents.tolist())
    row = lambda x, dtype: jnp.asarray(np.asarray(x)[None], dtype)
    return DraftTree(
        tokens=row(drafted, jnp.int32),
        parents=row(parents, jnp.int32),
        depths=row(topology.static_depths(parents.tolist()), jnp.int32),
        is_valid=row(np.ones(len(parents)), bool),
        log_probs=row(np.zeros(len(parents)), jnp.float32),
        ancestor_mask=row(mask, bool),
    )


@looks_at_bits
@pytest.mark.parametrize("vocab_size", [16, 1000])
@pytest.mark.parametrize(
    "parents", [[-1], [-1, 0, 1, 2], [-1, 0, 0, 1, 1, 2]], ids=["root", "chain", "tree"]
)
def test_every_node_has_the_bits_of_plain_decoding(parents, vocab_size):
    """Each operation is rounded by itself, whatever the shape of the pass is."""
    rng = np.random.default_rng(len(parents))
    how = SamplingConfig(
        presence_penalty=0.3,
        frequency_penalty=0.7,
        repetition_penalty=1.1,
        logit_bias=((2, 0.1), (5, -3.3)),
    )
    prompt_ids = (1, 2, 3, 3)
    answer = [4, 4, 4, 7, 2]
    drafted = [answer[-1], 4, 4, 9, 9, 4][: len(parents)]
    extras = jax.tree.map(jnp.asarray, as_extras(how, prompt_ids, True, vocab_size))
    extras = count_emitted(extras, jnp.asarray([[*answer, 8]]), jnp.asarray([5]))
    logits = rng.normal(size=(1, len(parents), vocab_size)).astype(np.float32) * 5
    tree = one_tree(parents, drafted)

    @jax.jit
    def run(logits, extras, tree):
        return adjust(logits, extras, count_on_paths(extras, tree))

    found = np.asarray(run(logits, extras, tree))[0]
    for node in range(len(parents)):
        path = []
        at = node
        while at > 0:
            path.insert(0, drafted[at])
            at = parents[at]
        expected = adjusted(logits[0, node], how, prompt_ids, [*answer, *path])
        np.testing.assert_array_equal(found[node], expected)


@looks_at_bits
def test_who_asks_for_nothing_keeps_the_bits():
    extras = jax.tree.map(jnp.asarray, as_extras(SamplingConfig(), (1, 2), True, 50))
    extras = count_emitted(extras, jnp.asarray([[3, 3]]), jnp.asarray([2]))
    logits = np.random.default_rng(0).normal(size=(1, 3, 50)).astype(np.float32)
    found = jax.jit(adjust)(logits, extras, jnp.ones((1, 3, 50), jnp.int32))
    np.testing.assert_array_equal(found, logits)


def test_the_counts_of_before_are_found_again():
    extras = jax.tree.map(jnp.asarray, as_extras(SamplingConfig(), (), True, 6))
    newest = jnp.asarray([[2, 4, 2, 5]])
    extras = count_emitted(extras, jnp.asarray([[1, 2]]), jnp.asarray([2]))
    after = count_emitted(extras, newest, jnp.asarray([3]))
    found = count_between(after, newest, jnp.asarray([3]))
    expected = [[0, 1, 1, 0, 0, 0], [0, 1, 2, 0, 0, 0], [0, 1, 2, 0, 1, 0]]
    assert found[0, :3].tolist() == expected
    assert after.counts[0].tolist() == [0, 1, 3, 0, 1, 0]


@looks_at_bits
def test_plain_decoding_equals_a_numpy_loop():
    config = tiny_model_config(VOCAB)
    params = random_params(config, gain=2.5)
    engine = Engine(StepConfig(config, Numerics(), PLAIN), params)
    asked = [dataclasses.replace(r, max_new_tokens=16) for r in requests(SETTINGS)]
    for request, done in zip(asked, answers(engine, None, asked), strict=True):
        found = []
        for _ in range(16):
            ids = [*request.prompt_ids, *found]
            logits = forward(params, config, ids)[0][-1]
            how = request.sampling
            found.append(
                int(np.argmax(adjusted(logits, how, request.prompt_ids, found)))
            )
        assert done.token_ids == found


@looks_at_bits
def test_adjustments_change_what_is_answered(plain, unadjusted):
    """Else the tests of this file would show nothing."""
    for number, (mine, other) in enumerate(zip(plain, unadjusted, strict=True)):
        assert (mine == other) == (SETTINGS[number] == SamplingConfig())
    assert 0 in unadjusted[1]
    assert 0 not in plain[1]
    # What repeats is what penalties are against.
    assert len(set(plain[0])) > len(set(unadjusted[0]))


@looks_at_bits
@pytest.mark.crossed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [4, 1])
def test_greedy_answers_are_plain_decodings(target, plain, name, batch_size):
    """Rows of all settings beside each other, and each of them alone."""
    engine, draft = engine_of(target, name)
    done = answers(engine, draft, requests(SETTINGS), batch_size)
    assert tokens(done) == plain
    assert sum(c.stats.num_accepted_tokens for c in done) > 0


# The greedy answers above are of the same programs. Nodes of a chain, and of a tree
# that is chosen, are adjusted as those of a tree that is drawn are.
@pytest.mark.bits(others_suffice=True)
@pytest.mark.crossed
@pytest.mark.parametrize("target", ["float32"], indirect=True)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough)
        if name in ("chain", "block", "traversal", "dynamic")
        else name
        for name in TREES
    ],
)
def test_sampled_answers_depend_on_no_neighbour(target, plain, unadjusted, name):
    engine, draft = engine_of(target, name)
    alone = tokens(answers(engine, draft, requests(HOT)))
    assert tokens(answers(engine, draft, requests(HOT), 4)) == alone

    # A row that asks for nothing has the same numbers beside one that asks for all.
    mild = SamplingConfig(0.8, top_p=0.9)
    mixed = [HOT[0], mild, SETTINGS[1], SamplingConfig()]
    neutral = [mild, mild, SamplingConfig(), SamplingConfig()]
    found = tokens(answers(engine, draft, requests(mixed), 4))
    without = tokens(answers(engine, draft, requests(neutral), 4))
    assert found[1] == without[1]
    assert found[3] == without[3] == unadjusted[3]
    assert found[0] != without[0]


@pytest.mark.usefixtures("own_programs")
@pytest.mark.parametrize("target", ["float32"], indirect=True)
def test_who_asks_for_nothing_keeps_its_programs(target, unadjusted):
    """Also in a batch in which others have asked for more."""
    engine, draft = engine_for(target, TREES["chain"])
    mild = SamplingConfig(1.0)
    size = lambda kind: engine.compiled(engine.action, kind)._cache_size()
    plain_ones = requests([SamplingConfig()] * 4)
    answers(engine, draft, plain_ones, 2)
    answers(engine, draft, requests([mild] * 4), 2)
    insert = engine._rows.insert
    before = insert._cache_size()
    assert [size(kind) for kind in KINDS] == [1, 1, 0]

    # The batch begins with a row that needs a full step, and goes on without one.
    short = dataclasses.replace(requests(SETTINGS)[0], max_new_tokens=3)
    done = answers(engine, draft, [short, *plain_ones[1:]], 2)
    assert tokens(done)[1:] == unadjusted[1:]
    done = answers(engine, draft, [short, *requests([mild] * 4)[1:]], 2)
    assert [size(kind) for kind in KINDS] == [1, 1, 1]
    # The extras of a row and of a batch are one more program.
    assert insert._cache_size() == before + 1
    assert engine.compiled_prefill("greedy")._cache_size() == 1


@pytest.mark.parametrize("target", ["float32"], indirect=True)
def test_a_row_forgets_what_its_last_request_asked_for(target, unadjusted):
    engine, draft = engine_of(target, "chain")
    asked = requests([SamplingConfig()] * 4)
    biased = SamplingConfig(logit_bias=((5, 100.0),))
    # One row runs the biased requests, the other one first a biased and then others.
    mixed = [
        Request("8", (1, 2), 150, biased),
        Request("9", (1, 2), 2, biased),
        *asked,
    ]
    done = answers(engine, draft, mixed, 2)
    assert tokens(done)[:4] == unadjusted
    assert tokens(done)[4:] == [[5] * 150, [5] * 2]


@pytest.mark.parametrize("target", ["float32"], indirect=True)
def test_tokens_that_the_model_does_not_have_are_refused(target):
    engine, draft = engine_for(target, TREES["chain"])
    wrong = SamplingConfig(logit_bias=((VOCAB, 1.0),))
    with pytest.raises(ConfigError, match=r"token ids \[16\].*below 16"):
        answers(engine, draft, [Request("0", (1,), 3, wrong)])


def reported(name, asked, batch_size=1, has_log_probs=False):
    engine, draft = shared_engine("float32", name)
    if has_log_probs:
        config = dataclasses.replace(engine.config, has_log_probs=True)
        engine = Engine(config, open_target("float32").params, engine.drafter)
    return answers(engine, draft, asked, batch_size)


@pytest.mark.parametrize(
    "name", [pytest.param("chain", marks=pytest.mark.thorough), "dynamic"]
)
def test_alternatives_are_the_targets_most_probable_tokens(name):
    """Before any adjustment, at a temperature and without one."""
    target = open_target("float32")
    settings = [SETTINGS[0], HOT[1], SETTINGS[2], HOT[3]]
    asked = [
        dataclasses.replace(request, num_log_probs=number)
        for request, number in zip(requests(settings), (5, VOCAB, None, 0), strict=True)
    ]
    alone = reported(name, asked)
    done = reported(name, asked, 4)
    for request, one, again in zip(asked, done, alone, strict=True):
        assert one.token_ids == again.token_ids
        number = request.num_log_probs
        count = 0 if number is None else len(one.token_ids)
        assert len(one.log_probs) == len(one.alternatives) == count
        if number is None:
            continue

        ids = [*request.prompt_ids, *one.token_ids]
        logits = forward(target.params, target.config, ids)[0]
        logits = logits[len(request.prompt_ids) - 1 : -1]
        total = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = logits - total
        chosen = np.take_along_axis(expected, np.array(one.token_ids)[:, None], 1)
        np.testing.assert_allclose(one.log_probs, chosen[:, 0], atol=1e-4)
        np.testing.assert_allclose(one.log_probs, again.log_probs, atol=1e-5)
        ordered = np.argsort(-expected, axis=-1)[:, :number]
        for place, found in enumerate(one.alternatives):
            assert [token for token, _ in found] == ordered[place].tolist()
            values = [value for _, value in found]
            np.testing.assert_allclose(
                values, expected[place, ordered[place]], atol=1e-4
            )


def test_a_session_that_reports_to_all_reports_to_all_beside_one_that_asks():
    asked = requests([SamplingConfig()] * 4)
    asked[1] = dataclasses.replace(asked[1], num_log_probs=2)
    done = reported("chain", asked, 2, has_log_probs=True)
    for number, one in enumerate(done):
        assert len(one.log_probs) == len(one.token_ids)
        assert len(one.alternatives) == (number == 1) * len(one.token_ids)

    done = reported("chain", asked, 2)
    assert [bool(one.log_probs) for one in done] == [False, True, False, False]


def test_a_stream_has_the_alternatives_of_its_tokens():
    engine, draft = shared_engine("float32", "chain")
    asked = [Request("0", (1, 2, 3), 30, num_log_probs=3)]
    heard = []
    serve = engine.serve(
        asked, lambda: draft, on_tokens=lambda _, emitted: heard.append(emitted)
    )
    (done,) = serve
    assert sum((e.alternatives for e in heard), []) == done.alternatives
    assert sum((e.log_probs for e in heard), []) == done.log_probs
    assert {len(one) for one in done.alternatives} == {3}


@pytest.mark.parametrize("number", [-1, 21, 1.5, True])
def test_other_numbers_of_alternatives_are_refused(number):
    with pytest.raises(ConfigError, match="num_log_probs is"):
        Request("0", (1,), num_log_probs=number)


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        pytest.param("dynamic", marks=pytest.mark.thorough),
        pytest.param("traversal", marks=pytest.mark.thorough),
    ],
)
def test_a_row_that_does_not_speculate_takes_one_token_a_step(name):
    engine, draft = shared_engine("float32", name)
    plain_engine, _ = shared_engine("float32", "plain")
    slow = [1, 2]
    asked = [
        dataclasses.replace(request, can_speculate=number not in slow)
        for number, request in enumerate(requests(SETTINGS))
    ]
    done = answers(engine, draft, asked, 4)
    assert tokens(done) == tokens(answers(plain_engine, None, requests(SETTINGS)))
    accepted = 0
    for number, one in enumerate(done):
        assert (one.stats.num_draft_tokens == 0) == (number in slow)
        accepted += one.stats.num_accepted_tokens
        if number in slow:
            assert one.stats.num_accepted_tokens == 0
            assert one.stats.num_drafts == LENGTHS[number] - 1
    assert accepted > 0

    # A row without drafts has plain decoding's draws.
    hot = dataclasses.replace(asked[1], sampling=HOT[0])
    (found,) = answers(engine, draft, [hot])
    (expected,) = answers(
        plain_engine, None, [dataclasses.replace(hot, can_speculate=True)]
    )
    assert found.token_ids == expected.token_ids


def test_feedback_is_what_the_target_says_unadjusted():
    """What is learned from an answer does not depend on how its tokens were chosen."""
    target = tiny_target(VOCAB)
    config = tiny_draft_config(target.config)
    drafter = build_drafter("eagle3", config, TREES["chain"], target.numerics)
    step = StepConfig(target.config, target.numerics, TREES["chain"], config.taps)
    engine = Engine(step, target.params, drafter, recording="features")
    draft = tiny_draft(drafter, config)
    for request in requests(SETTINGS)[:2]:
        (done,) = engine.serve([request], lambda: draft)
        ids = [*request.prompt_ids, *done.token_ids][:-1]
        feedback = jax.tree.map(
            lambda x, n=len(ids): np.asarray(x[0, :n]), done.feedback
        )
        logits, taps = forward(target.params, target.config, ids, config.taps)
        assert feedback.tokens.tolist() == ids
        np.testing.assert_allclose(feedback.taps, taps, rtol=2e-3, atol=2e-3)
        known = slice(len(request.prompt_ids) - 1, None)
        total = np.log(np.exp(logits).sum(axis=-1))
        np.testing.assert_allclose(feedback.logsumexp[known], total[known], atol=1e-3)
        head = np.asarray(target.params["lm_head_kernel"])
        np.testing.assert_allclose(feedback.hidden @ head.T, logits, atol=0.1)


def next_law(target, how, prompt_ids, answer):
    """The law of one token in numpy: adjust, scale, cut, normalise."""
    ids = [*prompt_ids, *answer]
    logits = forward(target.params, target.config, ids)[0][-1]
    logits = adjusted(logits, how, prompt_ids, answer).astype(float)
    weights = np.exp((logits - logits.max()) / how.temperature)
    weights[weights < how.min_p] = 0
    weights[weights < np.sort(weights)[-how.top_k]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    "name", ["drawn", pytest.param("traversal", marks=pytest.mark.thorough)]
)
def test_draws_follow_the_law_that_was_asked_for(name):
    """Answers of one prompt, each drafted, beside greedy neighbours."""
    target = open_target("float32")
    how = SamplingConfig(
        temperature=1.1,
        top_k=3,
        min_p=0.05,
        frequency_penalty=0.8,
        repetition_penalty=1.2,
        logit_bias=((4, 1.0),),
    )
    prompt_ids = (5, 4)
    law = {}
    for first, chance in enumerate(next_law(target, how, prompt_ids, [])):
        if not chance:
            continue
        for second, other in enumerate(next_law(target, how, prompt_ids, [first])):
            for third, last in enumerate(
                next_law(target, how, prompt_ids, [first, second]) if other else []
            ):
                law[first, second, third] = chance * other * last

    engine, draft = shared_engine("float32", name)
    num_runs = 800
    asked = [Request(str(i), prompt_ids, 4, how) for i in range(num_runs)]
    asked[7::50] = [Request("other", (1, 2, 3), 4)] * len(asked[7::50])
    counts = dict.fromkeys(law, 0)
    num_seen = 0
    num_accepted = 0
    for done in engine.serve(asked, lambda: draft, 50):
        if done.request.id != "other":
            counts[tuple(done.token_ids[:3])] += 1
            num_seen += 1
            num_accepted += done.stats.num_accepted_tokens

    assert num_accepted > 50
    statistic = 0.0
    num_kinds = 0
    for path, chance in law.items():
        if chance * num_seen > 5:
            statistic += (counts[path] - num_seen * chance) ** 2 / (num_seen * chance)
            num_kinds += 1
    assert num_kinds > 8
    # Of chi-squared: mean and five standard deviations.
    assert statistic < num_kinds + 5 * np.sqrt(2 * num_kinds)
