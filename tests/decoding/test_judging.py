# SPDX-License-Identifier: Apache-2.0
"""Drafters are judged by what they would have drafted, whoever drafted."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import SamplingConfig, Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.control.base import Controller
from ospec_jax.decoding.batch import Batch
from ospec_jax.decoding.judging import judge
from ospec_jax.decoding.request import Request
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, pool_draft
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft, Retraced, SamplingParams, Suggested

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(2)]


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
def members(target):
    fallback = dict(mix="fallback", suggestions="suffix")
    small = tiny_target(seed=1, num_layers=1)
    drawn = Draft(small.params)
    return [
        head(target, "eagle3"),
        load_draft("ngram", target),
        head(target, "hydra"),
        head(target, "exit"),
        dataclasses.replace(head(target, "eagle1", seed=1), **fallback),
        LoadedDraft(drawn, Meta.create(target, None, "model"), model=small),
        head(target, "dflash"),
        head(target, "peagle"),
    ]


def listening(number, found):
    """One member always drafts; what is said about all of them is kept."""

    def rule(actions):
        [action] = [a for a in actions if a.drafter == number]

        def observe(state, action, outcome):
            found.append(outcome)
            return state

        return Controller(
            actions=(action,),
            init=lambda num_rows: None,
            choose=lambda state, rows: action,
            observe=observe,
            is_judging=True,
        )

    return rule


def judged_by(number, target, members, tree, ngrams, temperature, prompts=PROMPTS):
    found = []
    session = Session(
        target,
        pool_draft(members, target),
        tree=tree,
        ngrams=ngrams,
        num_predicted_tokens=0,
        controller=listening(number, found),
    )
    how = SamplingConfig(temperature, top_k=4 if temperature else 0)
    results = list(session.generate(prompts, 30, how))
    return found, results, session


@pytest.mark.crossed
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    # Judged in one way are heads with a cache of their own, whose layers differ, those
    # that draft in one pass, and those that read the target's cache or have a model. Of
    # the heads the fifth has n-grams in its place, too.
    "number",
    [
        pytest.param(number, marks=[pytest.mark.thorough] * (number in (0, 2, 3, 7)))
        for number in range(8)
    ],
)
def test_who_drafts_is_judged_as_it_was_accepted(target, members, number, temperature):
    """A chain of one: the first emitted token was drafted, or was not."""
    chain = TreeConfig(num_steps=1)
    # Chosen in either place of a pair.
    pair = [members[number], members[1 if number == 0 else 0]][:: 1 - 2 * (number % 2)]
    place = number % 2
    args = place, target, pair, chain
    found, results, session = judged_by(*args, number % 3 == 0, temperature)
    num_judged = 0
    for outcome in found:
        if outcome.num_accepted:
            first = outcome.windows.couplings[0, 0]
            assert first[place] == outcome.num_accepted[0]
            [[expected]] = outcome.expected
            assert expected == outcome.windows.chances[0, 0, place]
            num_judged += 1
    assert num_judged > 5
    # All but each answer's first token, which the pass over the prompt chose.
    count = sum(len(result.token_ids) for result in results) - len(results)
    assert sum(outcome.windows.num_windows for outcome in found) == count
    num_ended = sum(len(result.token_ids) > 1 for result in results)
    assert sum(outcome.num_ended for outcome in found) == num_ended

    if temperature:
        return

    # To be judged changes nothing of what is drafted.
    how = dict(tree=chain, ngrams=number % 3 == 0, num_predicted_tokens=0)
    alone = Session(target, members[number], **how)
    expected = [result.token_ids for result in alone.generate(PROMPTS, 30)]
    assert [result.token_ids for result in results] == expected
    # A pool remembers n-grams of all lengths that any of its members does.
    if members[number].suggestions != "suffix":
        accepted = session.stats.num_accepted_tokens
        assert accepted == alone.stats.num_accepted_tokens


def test_evidence_does_not_depend_on_who_drafts(target, members):
    tree = TreeConfig(num_steps=3)
    windows = []
    for number in (0, 1):
        found, *_ = judged_by(number, target, members[:3], tree, True, 0.0, PROMPTS[1:])
        windows.append([o.windows for o in found if o.windows.num_windows])
    first, second = (np.concatenate([w.chances for w in ws]) for ws in windows)
    assert len(first) == 30 - 1 - 2
    np.testing.assert_array_equal(first, second)
    assert 0 < first.mean() < 1


@pytest.mark.thorough
def test_each_row_has_windows_of_its_own(target, members):
    """Neighbours do not change them, nor a prediction that is verified as it goes."""
    args = dict(tree=TreeConfig(num_steps=2), num_predicted_tokens=6)
    by_size = []
    for batch_size in (1, 2):
        found = []
        session = Session(
            target,
            pool_draft(members[:3], target),
            batch_size=batch_size,
            controller=listening(0, found),
            **args,
        )
        answers = list(session.generate(PROMPTS, 20, predictions=["so so so"] * 2))
        assert len(answers) == 2
        chances = np.concatenate([o.windows.chances for o in found if o.windows])
        by_size.append(sorted(map(tuple, chances.reshape(len(chances), -1))))
    assert by_size[0] == by_size[1]


def one_of(logits, token_ids=None, suggested=None):
    logits = None if logits is None else jnp.log(jnp.asarray(logits))[None, None]
    return Retraced(suggested, logits, token_ids)


def judged(one, tree, probs):
    """By each token that may be emitted, `[v]`."""
    probs = jnp.asarray(probs)[None, None]
    params = SamplingParams(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.ones(1))
    of_token = jax.jit(lambda token: judge(one, tree, token, probs, params))
    found = [
        of_token(np.full((1, 1), token, np.int32)) for token in range(probs.shape[-1])
    ]
    return (np.array([getattr(f, n)[0, 0] for f in found]) for n in Judgements)


Judgements = ("chances", "couplings")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_are_accepted_as_an_enumeration_says(count):
    p = np.array([0.4, 0.3, 0.2, 0.1])
    q = np.array([0.1, 0.0, 0.65, 0.25])
    left, reach, emitted = p, 1.0, np.zeros(4)
    for _ in range(count):
        accepted = np.zeros(4)
        for token in range(4):
            if q[token]:
                accepted[token] = q[token] * min(1, left[token] / q[token])
        emitted += reach * accepted
        reach *= 1 - accepted.sum()
        left = np.maximum(left - q, 0)
        left /= left.sum()

    tree = TreeConfig("static", 1, branching=(count,), children="sampled")
    # The draft knows three of the tokens.
    one = one_of(q[[0, 2, 3]], jnp.array([0, 2, 3]))
    chances, couplings = judged(one, tree, p)
    np.testing.assert_allclose(chances[:, 0], 1 - reach, rtol=1e-5)
    np.testing.assert_allclose(couplings[:, 0], emitted / p, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((p * couplings[:, 0]).sum(), chances[0, 0], rtol=1e-5)


def test_most_probable_children_are_accepted_with_their_mass():
    p = [0.4, 0.3, 0.2, 0.1]
    tree = TreeConfig("static", 2, branching=(2, 1))
    chances, couplings = judged(one_of([0.1, 0.2, 0.6, 0.1]), tree, p)
    np.testing.assert_allclose(chances, [[0.5, 0.2]] * 4, rtol=1e-6)
    assert couplings.tolist() == [[0, 0], [1, 0], [1, 1], [0, 0]]

    # A suggestion takes the last child's place if it is likelier than that.
    told = Suggested(jnp.array([[0]]), jnp.log(jnp.array([[0.3]])))
    chances, couplings = judged(one_of([0.1, 0.2, 0.6, 0.1], None, told), tree, p)
    np.testing.assert_allclose(chances, [[0.6, 0.2]] * 4, rtol=1e-6)
    assert couplings[:, 0].tolist() == [1, 0, 1, 0]

    nothing = Suggested(jnp.array([[0]]), jnp.array([[-jnp.inf]]))
    chain = TreeConfig(num_steps=1)
    chances, couplings = judged(one_of(None, None, nothing), chain, p)
    assert not chances.any()
    assert not couplings.any()
    chances, couplings = judged(one_of(None, None, told), chain, p)
    np.testing.assert_allclose(chances, 0.4)
    assert couplings[:, 0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool: dict(draft=pool.members[0]), "judges drafters needs several"),
        (lambda pool: dict(tree=TreeConfig("static", 1, parents=(-1, 0, 0))), "listed"),
        (
            lambda pool: dict(
                tree=TreeConfig(num_steps=1, children="without_replacement"),
                ngrams=False,
            ),
            "depend on what was drawn",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(target, members, change, message):
    pool = pool_draft([members[0], members[2]], target)
    args = dict(draft=pool, controller=listening(0, [])) | change(pool)
    with pytest.raises(ConfigError, match=message):
        Session(target, **args)


def test_drafters_that_would_have_to_draft_are_refused(target, members):
    pool = pool_draft([members[0], load_draft("self:exit-1", target)], target)
    with pytest.raises(ConfigError, match="choose by ucb"):
        Session(target, pool, controller=listening(0, []))
    pool = pool_draft(members[:2], target)
    lazy = dataclasses.replace(pool.pool, extends="chosen")
    with pytest.raises(ConfigError, match="extends is 'chosen'"):
        Session(
            target,
            dataclasses.replace(pool, pool=lazy),
            controller=listening(0, []),
        )


def taking_turns(found, num_members, steps):
    """Another member drafts every so many steps."""

    @dataclasses.dataclass(frozen=True)
    class Count:
        chosen: int = 0

    def rule(actions):
        by_number = [action for action in actions if action.drafter >= 0]
        assert len(by_number) == num_members
        chosen = []

        def choose(state, rows):
            chosen.append(by_number[len(chosen) // steps % num_members])
            return chosen[-1]

        def observe(state, action, outcome):
            found.append((action.drafter, outcome))
            return state

        return Controller(
            actions=tuple(by_number),
            init=lambda num_rows: Count(),
            choose=choose,
            observe=observe,
            is_judging=True,
        )

    return rule


# Most probable children that wait are judged in the next test, too.
@pytest.mark.parametrize(
    ("children", "temperature", "penalty"),
    [
        pytest.param(
            *case, marks=[pytest.mark.thorough] if case != ("sampled", 1.0, 0.0) else []
        )
        for case in itertools.product(("topk", "sampled"), (0.0, 1.0), (0.0, 1.5))
    ],
)
def test_waiting_tokens_are_judged_as_new_ones_are(
    target, members, temperature, children, penalty
):
    """Together or one step at a time, evidence is the same, and so is who is asked."""
    tree = TreeConfig(num_steps=2, children=children)
    # Drafts that differ in their caches, in their n-grams and in the taps they read.
    # `fallback:`, which is one of them, mixes most probable children alone.
    numbers = (0, 2, 4) if children == "topk" else (2, 3)
    pool = pool_draft([members[i] for i in numbers], target)
    how = SamplingConfig(
        temperature,
        top_k=4 if temperature else 0,
        frequency_penalty=penalty,
        presence_penalty=penalty,
        # Without its stop token an answer is long enough to say something.
        logit_bias=((2, -100.0),) if penalty else (),
    )
    by_wait = {}
    for judge_every in (1, 3):
        found = []
        session = Session(
            target,
            pool,
            tree=tree,
            ngrams=children == "topk",
            controller=taking_turns(found, len(numbers), steps=5),
            judge_every=judge_every,
        )
        answers = list(session.generate(PROMPTS, 40, how))
        by_wait[judge_every] = found, [answer.token_ids for answer in answers]

    at_once, tokens = by_wait.pop(1)
    assert sum(outcome.windows.num_windows for _, outcome in at_once) > 20
    for found, also in by_wait.values():
        assert also == tokens
        assert len(found) == len(at_once)
        for (number, one), (expected, other) in zip(found, at_once, strict=True):
            assert number == expected
            assert one.num_accepted == other.num_accepted
            assert one.num_ended == other.num_ended
            np.testing.assert_allclose(one.expected, other.expected, atol=1e-5)
            for mine, theirs in zip(one.windows, other.windows, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_rows_that_come_and_go_are_judged_by_their_own_tokens(target, members):
    """Beside others, and later, they have the windows that they would have alone."""
    prompts = [*PROMPTS, "So?", "It is what it is, and then"]
    by_wait = []
    for judge_every, batch_size in ((1, 1), (6, 2)):
        found = []
        session = Session(
            target,
            pool_draft(members[:3], target),
            tree=TreeConfig(num_steps=2),
            num_predicted_tokens=6,
            batch_size=batch_size,
            controller=listening(0, found),
            judge_every=judge_every,
        )
        answers = list(session.generate(prompts, 20, predictions=["so so so"] * 4))
        assert len(answers) == 4
        chances = np.concatenate([o.windows.chances for o in found if o.windows])
        by_wait.append(sorted(map(tuple, chances.reshape(len(chances), -1).round(5))))
    assert by_wait[0] == by_wait[1]
    assert len(by_wait[0]) > 30


def resting(found, drafter, rests):
    """As `listening`, and some requests are read by the one that drafts alone."""

    def rule(actions):
        heard = listening(drafter, found)(actions)
        return heard._replace(rests=lambda state, context, ordinal: rests(ordinal))

    return rule


@pytest.mark.parametrize("batch_size", [1, 2])
def test_who_rests_drafts_as_alone_and_says_nothing_of_others(
    target, members, batch_size
):
    """Beside them those that are judged have the windows that they have anyway."""
    prompts = [*PROMPTS, "So?", "It is what it is, and then"]
    accepted = []
    windows = []
    tokens = []
    for rests in (lambda ordinal: False, lambda ordinal: ordinal % 2 == 0):
        found = []
        session = Session(
            target,
            pool_draft(members[:3], target),
            tree=TreeConfig(num_steps=2),
            num_predicted_tokens=0,
            batch_size=batch_size,
            controller=resting(found, 0, rests),
            judge_every=6,
        )
        answers = {one.prompt.id: one for one in session.generate(prompts, 20)}
        tokens.append({name: one.token_ids for name, one in answers.items()})
        accepted.append(session.stats.num_accepted_tokens)
        chances = np.concatenate([o.windows.chances for o in found if o.windows])
        rows = chances.reshape(len(chances), -1).round(5)
        windows.append(collections.Counter(map(tuple, rows)))

    assert tokens[0] == tokens[1]
    # To be read by all changes nothing of what one of them drafts.
    assert accepted[0] == accepted[1] > 0
    assert windows[1] < windows[0]
    assert windows[1].total() > 10


def test_steps_of_rows_that_rest_count_for_nothing_that_waits(target, members):
    """Else more would wait than there is room for, and be judged by others' tokens."""
    session = Session(
        target,
        pool_draft(members[:3], target),
        tree=TreeConfig(num_steps=2),
        batch_size=2,
        controller=listening(0, []),
        judge_every=6,
    )
    engine = session.engine
    [action] = [a for a in engine.actions if a.drafter == 0]
    one = Request("one", (1, 5, 3, 2), 20)
    capacity = engine.capacity_for([one])
    rests = lambda row, ordinal: 0 if ordinal == 0 else None
    batch = Batch(engine, 2, capacity, rests=rests)
    batch.admit(one, session.served_draft)
    batch.dispatch(session.served_draft, action)
    batch.admit(dataclasses.replace(one, id="two"), session.served_draft, ordinal=1)
    batch.dispatch(session.served_draft, action)
    assert batch._num_unjudged == 3
    # The first step is read, which emitted less than it might have.
    list(batch.collect(2))
    assert batch._num_unjudged == 3


def test_members_wait_until_they_are_judged(target, members):
    """Between two judgings only the one that drafts runs."""
    session = Session(
        target,
        pool_draft([members[0], members[2], members[5]], target),
        tree=TreeConfig(num_steps=2),
        ngrams=False,
        controller=listening(1, []),
        judge_every=4,
    )
    engine = session.engine
    [action] = [a for a in engine.actions if a.drafter == 1]
    request = Request("one", (1, 5, 3, 2), 20)
    state = engine.start(session.draft, request, 1, 256)

    def caches():
        leaves = [jax.tree.leaves(item) for item in state.draft_cache.items]
        return [np.concatenate([np.ravel(x) for x in own]) for own in leaves]

    before = caches()
    state, output = engine.step(action, "greedy", session.draft, state)
    has_changed = [(a != b).any() for a, b in zip(before, caches(), strict=True)]
    assert has_changed == [False, True, False]
    assert state.unjudged.count.tolist() == output.num_emitted.tolist()

    state, _ = engine.judge("greedy", session.draft, state)
    has_changed = [(a != b).any() for a, b in zip(before, caches(), strict=True)]
    assert has_changed == [True, True, True]
    assert state.unjudged.count.tolist() == [0]

    # A row of which nothing waits stands where it stood.
    contexts = jax.tree.map(np.asarray, state.draft_context)
    state, _ = engine.judge("greedy", session.draft, state)
    jax.tree.map(np.testing.assert_array_equal, state.draft_context, contexts)


def test_an_answer_comes_with_what_it_taught(target, members):
    """Also while another row goes on, and the host reads a step late."""
    found = []
    session = Session(
        target,
        pool_draft([members[0], members[2]], target),
        tree=TreeConfig(num_steps=2),
        batch_size=2,
        ngrams=False,
        num_predicted_tokens=0,
        controller=listening(0, found),
        judge_every=50,
    )
    asked = [Request(str(i), (1, 5, 3, i), 8 + 20 * (i % 2)) for i in range(4)]
    served = session.engine.serve(
        asked, lambda: session.draft, 2, chooser=session.chooser
    )
    for count, _ in enumerate(served, 1):
        assert sum(outcome.num_ended for outcome in found) >= count
    assert count == len(asked)
