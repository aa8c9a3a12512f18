# SPDX-License-Identifier: Apache-2.0
"""Who proposed each token: node by node of a tree, and token by token of an answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import SamplingConfig, Session, load_draft
from ospec_jax.config import TreeConfig
from ospec_jax.control.base import SUGGESTIONS
from ospec_jax.decoding.request import Request
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.drafters.growth import grow
from ospec_jax.drafters.hints import either
from ospec_jax.drafters.ngram import remember
from ospec_jax.drafters.sources import DRAFT, NGRAMS, PREDICTION, TARGET, names_of
from ospec_jax.loading import LoadedDraft, pool_draft
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import Numerics
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import DraftContext, Roots, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

VOCAB = 16
CHAIN = TreeConfig(num_steps=3)
STATIC = TreeConfig("static", 3, branching=(3, 2, 1))
WHOLE = TreeConfig("dynamic", 3, topk=3, num_draft_tokens=21)
DYNAMIC = TreeConfig("dynamic", 3, topk=3, num_draft_tokens=9)
SIZES = TreeConfig("dynamic", 3, topk=3, num_draft_tokens=9, sizes=(3, 9))
TREES = {"chain": CHAIN, "static": STATIC, "dynamic": DYNAMIC, "sizes": SIZES}
SUGGESTED = ("ngrams",)
NUM_TOKENS = 48
PROMPT = (3, 5, 9, 4)


# Node by node.


def drafted(tree, logits, rate, root):
    """Trees by a table of logits; half of a token is suggested to follow it."""
    rows = len(root)

    def step(cache, nodes):
        return nodes.hidden, logits[nodes.tokens], cache

    def suggest(recent, depth):
        token = recent[..., -1] // 2
        return token, jnp.full(token.shape, rate), jnp.full_like(token, NGRAMS)

    fill = lambda value: jnp.full((rows,), value)
    roots = Roots(
        token=root,
        position=fill(0),
        keys=jax.random.split(jax.random.key(0), rows),
        context=DraftContext(hidden=jnp.zeros((rows, 1)), logits=logits[root]),
        sampling=SamplingParams(fill(0.0), fill(0), fill(1.0)),
    )
    cache = kv.init_cache(1, rows, 1, 1, 1, jnp.float32)
    hints = Hints(root[:, None], suggest)
    grown, _ = grow(step, tree, cache, roots, hints=hints, numerics=Numerics())
    return grown


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_a_suggestion_is_no_child_that_the_draft_had_by_itself(tree, rate):
    logits = 3 * np.random.default_rng(0).normal(size=(VOCAB, VOCAB))
    root = jnp.arange(8, dtype=jnp.int32)
    log_rate = np.log(rate) if rate else -np.inf
    args = tree, jnp.asarray(logits), log_rate, root
    grown = jax.jit(drafted, static_argnums=0)(*args)
    tokens, parents = np.asarray(grown.tokens), np.asarray(grown.parents)
    depths = np.asarray(grown.depths)
    most = np.argsort(-logits, axis=1)
    found = []

    for row in range(8):
        assert int(grown.sources[row, 0]) == TARGET
        for node in range(1, tree.num_nodes):
            above = tokens[row, parents[row, node]]
            # As many children as any node of the level has are considered.
            count = tree.topk
            if tree.kind == "static":
                count = tree.branching[depths[row, node] - 1]
            is_own = tokens[row, node] in most[above, :count]
            assert is_own or tokens[row, node] == above // 2
            assert int(grown.sources[row, node]) == (DRAFT if is_own else NGRAMS)
            found.append(is_own)

    assert all(found) == (rate == 0)
    assert any(found)


@pytest.mark.parametrize("rates", [(0.3, 0.6), (0.6, 0.3), (0.5, 0.5)])
def test_of_two_that_suggest_the_likelier_one_is_named(rates):
    def hints(token, rate, source):
        fill = lambda value: jnp.full((1, 1), value)
        recent = jnp.zeros((1, 4), jnp.int32)
        return Hints(recent, lambda *_: (fill(token), fill(rate), fill(source)))

    both = either(hints(7, rates[0], NGRAMS), hints(8, rates[1], PREDICTION))
    token, rate, source = both.suggest(both.recent[:, None], 0)
    is_first = rates[0] >= rates[1]
    assert int(token[0, 0]) == (7 if is_first else 8)
    assert float(rate[0, 0]) == pytest.approx(max(rates))
    assert int(source[0, 0]) == (NGRAMS if is_first else PREDICTION)


def test_names_are_those_of_the_accepted_tokens_that_are_kept():
    numbers = [NGRAMS, DRAFT, NGRAMS]
    assert names_of(numbers, 2, 3) == ["ngrams", "draft", "target"]
    assert names_of(numbers, 0, 1) == ["target"]
    assert names_of(numbers, 3, 2) == ["ngrams", "draft"]
    assert names_of(None, 2, 3) == ["draft", "draft", "target"]
    assert names_of(None, 0, 0) == []


# Token by token.


@pytest.fixture(scope="module", name="target")
def _target():
    return tiny_target(64)


def head(target, token_ids=None):
    """A random EAGLE-3 head; or one that takes some tokens alone, all alike."""
    count = target.config.vocab_size if token_ids is None else len(token_ids)
    config = tiny_draft_config(target.config, count)
    draft = tiny_draft(eagle3(config, CHAIN), config)
    if token_ids is not None:
        kernel = jnp.zeros_like(draft.params["lm_head"]["kernel"])
        params = draft.params | {"lm_head": {"kernel": kernel}}
        draft = draft.replace(params=params, token_ids=jnp.asarray(token_ids))

    return LoadedDraft(draft, Meta.create(target, config))


def request(prompt=PROMPT, number=0, **asked):
    return Request(str(number), tuple(prompt), NUM_TOKENS, **asked)


def told(session, *asked, draft=None):
    """Answers, with what is told of each of their passes."""
    passes = {one.id: [] for one in asked}
    done = session.engine.serve(
        list(asked),
        lambda: draft or session.served_draft,
        session.batch_size,
        on_tokens=lambda one, emitted: passes[one.id].append(emitted),
        chooser=session.chooser,
    )
    by_id = {completion.request.id: completion for completion in done}

    return [(by_id[one.id], passes[one.id]) for one in asked]


def sources_of(passes):
    return [source for one in passes for source in one.sources]


@pytest.fixture(scope="module", name="answer")
def _answer(target):
    ((done, _),) = told(Session(target), request())
    return done.token_ids


@pytest.fixture(scope="module", name="wrong")
def _wrong(target, answer):
    """A head that is never right, and never surer of a token than one in eight."""
    return head(target, sorted(set(range(3, 64)) - set(answer))[:8])


def longest_match(known, path):
    """What followed the latest occurrence of the longest suffix, four tokens at most.

    Args:
      known: Tokens of the request; those that were drafted are in `path` alone.
    """
    for length in range(min(4, len(path)), 0, -1):
        for end in range(len(known) - 1, length - 1, -1):
            if known[end - length : end] == path[-length:]:
                return known[end]

    return None


@pytest.mark.parametrize(
    "name",
    # Beside a draft n-grams are those of a tree of three at a time, too.
    ["ngram", pytest.param("chain", marks=pytest.mark.thorough), "static", "whole"],
)
def test_ngrams_are_told_exactly_where_they_hit(target, answer, wrong, name):
    draft = load_draft("ngram", target) if name == "ngram" else wrong
    tree = {"static": STATIC, "whole": WHOLE}.get(name, CHAIN)
    session = Session(target, draft, tree=tree, num_predicted_tokens=0)
    ((done, passes),) = told(session, request())
    assert done.token_ids == answer
    whole = [*PROMPT, *answer]
    known = [*PROMPT, *passes[0].token_ids]
    assert passes[0].sources == ["target"]

    for one in passes[1:]:
        path = list(known)
        for token in whole[len(known) :][: tree.num_steps]:
            if longest_match(known, path) != token:
                break
            path.append(token)
        num_hits = len(path) - len(known)
        expected = [*["ngrams"] * num_hits, "target"]
        # The last pass is cut at the limit.
        assert one.sources == expected[: len(whole) - len(known)]
        known += one.token_ids

    num_accepted = sources_of(passes).count("ngrams")
    assert num_accepted == done.stats.num_accepted_tokens > 0


def test_what_an_earlier_request_taught_is_told_from_its_own(target, answer):
    """What did not follow its own tokens before, the request has from another one."""
    session = Session(target, load_draft("ngram", target), num_predicted_tokens=0)
    whole = [*PROMPT, *answer]
    text = jnp.zeros(64, jnp.int32).at[: len(whole)].set(jnp.asarray(whole))
    draft = session.served_draft
    memory = jax.jit(remember)(draft.memory, text, len(PROMPT), len(whole))
    ((done, passes),) = told(session, request(), draft=draft.replace(memory=memory))
    assert done.token_ids == answer
    known = list(PROMPT)

    for one in passes:
        path = list(known)
        for token, source in zip(one.token_ids, one.sources, strict=True):
            if source != "target":
                is_own = longest_match(known, path) == token
                assert source == "memory" or is_own
            path.append(token)
        known += one.token_ids

    found = sources_of(passes)
    assert set(found) == {"target", "ngrams", "memory"}


def test_a_prediction_is_told_where_it_comes_true(target, answer, wrong):
    session = Session(target, wrong, tree=CHAIN, ngrams=False)
    other = next(token for token in range(3, 64) if token not in answer)
    predicted = [*answer[:20], other, *answer[21:]]
    asked = request(prediction_ids=tuple(predicted), prediction_confidence=0.9)
    ((done, passes),) = told(session, asked)
    assert done.token_ids == answer
    # Long steps follow it, and shorter ones where it was lost.
    assert {one.drafter for one in passes} == {None, SUGGESTIONS, 0}
    found = sources_of(passes)
    assert set(found) == {"prediction", "target"}
    assert found[20] == "target"
    assert found.count("prediction") == done.stats.num_accepted_tokens > 24


LENT = ("draft", *SUGGESTED)
CASES = {
    "chain": ("head", CHAIN, LENT),
    "static": ("head", STATIC, LENT),
    "dynamic": ("head", DYNAMIC, LENT),
    "sizes": ("head", SIZES, LENT),
    "sampled": ("head", TreeConfig(num_steps=3, children="sampled"), ("draft",)),
    "ngram": ("ngram", CHAIN, SUGGESTED),
    "suffix": ("suffix", CHAIN, SUGGESTED),
    "exit": ("self:exit-1", CHAIN, LENT),
    "fallback": ("fallback:ngram,self:exit-1", CHAIN, LENT),
    "mixed": ("mixed:ngram,self:exit-1", CHAIN, LENT),
    "longer": ("longer:ngram,self:exit-1", CHAIN, LENT),
}


# Each way of drafting once, and each way to verify with a chain, with trees and with
# n-grams. What mixes two drafters has either, one that falls back included; a tree of
# several sizes is chosen as one of a single size is, and drawn as a static one is, of
# which the tests above tell each token's source.
DRAWN = ("static", "sizes", "sampled", "suffix", "fallback")
LEFT_OUT = ("dynamic", "ngram", "exit", "static", "fallback")


@pytest.mark.parametrize(
    ("case", "temperature"),
    [
        pytest.param(
            case,
            temperature,
            marks=[pytest.mark.thorough]
            * (case in LEFT_OUT or (case in DRAWN) != (temperature > 0)),
        )
        for case in CASES
        for temperature in (0.0, 1.0)
    ],
)
def test_sums_are_those_of_the_stats(target, answer, case, temperature):
    """Two rows, one of them with a prediction, if it may have one."""
    name, tree, expected = CASES[case]
    expected = {*expected, "prediction"}
    draft = head(target) if name == "head" else load_draft(name, target)
    session = Session(target, draft, tree=tree, batch_size=2)
    sampling = SamplingConfig(temperature=temperature)
    predicted = tuple(answer[:24]) if tree.children == "topk" else ()
    asked = [
        request(sampling=sampling, prediction_ids=predicted),
        request((7, 8), 1, sampling=sampling),
    ]
    seen = set()

    for done, passes in told(session, *asked):
        found = sources_of(passes)
        num_accepted = sum(source != "target" for source in found)
        assert num_accepted == done.stats.num_accepted_tokens
        assert len(found) == len(done.token_ids)
        for one in passes:
            assert one.is_drafted == sorted(one.is_drafted, reverse=True)
            assert one.is_drafted == [source != "target" for source in one.sources]
        seen |= set(found) - {"target"}

    assert seen or case == "sampled"
    assert seen <= expected


def test_without_suggestions_all_is_the_draft_s(target):
    session = Session(target, head(target), tree=STATIC, ngrams=False)
    ((done, passes),) = told(session, request())
    found = sources_of(passes)
    assert set(found) == {"draft", "target"}
    assert found.count("draft") == done.stats.num_accepted_tokens


@pytest.mark.parametrize("number", [0, 1])
def test_a_pool_says_which_member_drafted(target, number):
    pool = pool_draft([head(target), load_draft("ngram", target)], target)
    session = Session(target, pool, tree=CHAIN, controller=f"fixed:{number}")
    ((_, passes),) = told(session, request())
    assert {one.drafter for one in passes} == {None, number}
    expected = {"target", "ngrams"} | ({"draft"} if number == 0 else set())
    assert set(sources_of(passes)) <= expected


def test_plain_steps_are_the_target_s(target):
    session = Session(target, head(target), num_speculative_tokens=0)
    ((_, passes),) = told(session, request())
    assert set(sources_of(passes)) == {"target"}
