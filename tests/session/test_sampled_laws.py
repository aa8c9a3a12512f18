# SPDX-License-Identifier: Apache-2.0
"""Sampled answers keep the target's law while the session adapts to earlier ones."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from reference import forward

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.control.base import Action, Chooser
from ospec_jax.control.depth import most_tokens_a_second
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import load_draft
from ospec_jax.testing import tiny_target
from ospec_jax.types import Draft

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

MEMORY = LearnerConfig(name="memory", memory_slots=1024)
PROMPT = "abcabcabcabc"
DYNAMIC = TreeConfig("dynamic", 2, topk=2, num_draft_tokens=4)
LIMIT = 3.3
"""Standard deviations; chance alone leaves them once in 1,000 times."""


def likeliest(target, ids, top_k):
    """The tokens that top-k sampling may choose next, and their probabilities."""
    logits = forward(target.params, target.config, ids)[0][-1]
    tokens = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp(logits[tokens] - logits[tokens[0]])
    return tokens.tolist(), weights / weights.sum()


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def ngram_session(target, learner=MEMORY, draft="ngram"):
    return Session(target, load_draft(draft, target), learner=learner)


def tokens_of(session, prompts, num_tokens, **how):
    found = session.generate(prompts, num_tokens, SamplingConfig(**how), is_raw=True)
    return [result.token_ids for result in found]


@pytest.mark.parametrize(
    "draft",
    # Longer chains are enumerated in `decoding/test_laws.py`.
    ["ngram", pytest.param("longer:ngram,self:exit-1", marks=pytest.mark.thorough)],
)
def test_an_answer_that_memory_drafted_follows_the_target(target, draft):
    """The second of two copies is drafted from what the first one taught."""
    how = {"temperature": 1.0, "top_k": 3}
    ids = encode(parse_prompt({"prompt": PROMPT}, "copy"), target.tokenizer, True)
    first, first_probs = likeliest(target, ids, 3)
    law = {}
    for token, chance in zip(first, first_probs, strict=True):
        second, second_probs = likeliest(target, [*ids, token], 3)
        law |= dict(
            zip(itertools.product([token], second), chance * second_probs, strict=True)
        )

    session = ngram_session(target, draft=draft)
    session.warm_up()
    start = session.state
    traffic = jax.tree.map(np.asarray, start.traffic)
    num_runs, num_accepted = 400, 0
    counts = dict.fromkeys(law, 0)
    for seed in range(num_runs):
        kept = jax.tree.map(jax.numpy.asarray, traffic)
        session._adopt(dataclasses.replace(start, traffic=kept))
        sampling = SamplingConfig(seed=seed, **how)
        *_, copy = session.generate([PROMPT] * 2, 3, sampling, is_raw=True)
        counts[tuple(copy.token_ids[:2])] += 1
        num_accepted += copy.stats.num_accepted_tokens

    assert num_accepted > 10, "the memory drafted too little to show anything"
    for path, chance in law.items():
        deviation = np.sqrt(num_runs * chance * (1 - chance))
        assert abs(counts[path] - num_runs * chance) < LIMIT * max(deviation, 1), path


def uncertain_prompt(target, length, num_sure):
    """A prompt whose answer has some sure tokens, then one of probability near half."""
    rng = np.random.default_rng(length)

    def law(ids):
        logits = forward(target.params, target.config, ids)[0][-1] / 0.6
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    while True:
        ids = rng.integers(0, 16, length).tolist()
        path, chance = [], 1.0
        for _ in range(num_sure):
            probs = law([*ids, *path])
            path.append(int(probs.argmax()))
            chance *= probs.max()
        probs = law([*ids, *path])
        if chance > 0.8 and 0.4 < probs.max() < 0.6:
            return tuple(ids), path, int(probs.argmax()), probs.max()


def test_a_depth_that_a_neighbour_influenced_keeps_the_law():
    """One row runs ahead; how deep the other drafts depends on what it accepted."""
    target = tiny_target(16)
    behind, sure, token, chance = uncertain_prompt(target, 6, 3)
    ahead, sure_ahead, token_ahead, _ = uncertain_prompt(target, 8, 1)
    never = next(t for t in range(16) if t not in sure)
    tree = TreeConfig(num_steps=1)
    plain = Action(TreeConfig(num_steps=0))
    drafter = build_drafter("prediction", None, tree, target.numerics)
    step = StepConfig(target.config, target.numerics, tree, (), kind="sampled")
    engine = Engine(step, target.params, drafter, menu={plain: drafter})
    controller = most_tokens_a_second((plain, engine.action))
    costly = dataclasses.replace(controller.init(2), costs=(1.0, 1.45))

    num_runs, num_seen, num_found = 150, 0, 0
    for seed in range(num_runs):
        sampling = SamplingConfig(0.6, seed=seed)
        predicted = (*sure_ahead, token_ahead)
        other = (never, never, never, token)
        asked = [
            Request("ahead", ahead, 8, sampling, prediction_ids=predicted),
            Request("behind", behind, 5, sampling, prediction_ids=other),
        ]
        chooser = Chooser(controller, costly)
        for done in engine.serve(asked, lambda: Draft({}), 2, chooser=chooser):
            if done.request.id == "behind" and done.token_ids[:3] == sure:
                num_seen += 1
                num_found += done.token_ids[3] == token

    assert num_seen > 90
    deviation = np.sqrt(num_seen * chance * (1 - chance))
    assert abs(num_found - num_seen * chance) < LIMIT * deviation


def test_copies_of_a_prompt_are_answered_independently(target):
    session = ngram_session(target, None)
    copies = tokens_of(session, [PROMPT] * 4, 12, temperature=1.0, seed=3)
    again = tokens_of(session, [PROMPT] * 4, 12, temperature=1.0, seed=3)
    assert len(set(map(tuple, copies + again))) == 8

    anew = tokens_of(
        ngram_session(target, None), [PROMPT] * 4, 12, temperature=1.0, seed=3
    )
    assert anew == copies


def test_a_resumed_session_uses_no_numbers_twice(target, tmp_path):
    whole = tokens_of(ngram_session(target), [PROMPT] * 4, 12, temperature=1.0)

    session = ngram_session(target)
    begun = tokens_of(session, [PROMPT] * 2, 12, temperature=1.0)
    session.save(tmp_path)
    resumed = ngram_session(target)
    resumed.resume(tmp_path)
    rest = tokens_of(resumed, [PROMPT] * 2, 12, temperature=1.0)

    assert begun + rest == whole
    assert resumed.num_admitted == 4


def test_requests_that_were_begun_are_counted_when_a_batch_is_saved(target, tmp_path):
    session = Session(target, load_draft("ngram", target), learner=MEMORY, batch_size=3)
    answers = session.generate([PROMPT] * 5, 8, SamplingConfig(1.0), is_raw=True)
    next(answers)
    session.save(tmp_path)
    resumed = Session(target, load_draft("ngram", target), learner=MEMORY, batch_size=3)
    assert len(resumed.resume(tmp_path)) == 1
    assert resumed.num_admitted == 3


@pytest.mark.parametrize(
    ("draft", "how", "more"),
    [
        ("ngram", {"learner": MEMORY, "batch_size": 2}, {}),
        ("self:exit-1", {"tree": DYNAMIC, "batch_size": 3}, {}),
        ("self:exit-1", {"batch_size": 2}, {"repetition_penalty": 1.2}),
    ],
    ids=["learned", "tree", "penalised"],
)
def test_sampled_answers_are_those_of_plain_decoding(target, draft, how, more):
    """Token by token: a position's numbers are the same, whatever was drafted."""
    prompts = [PROMPT, {"prompt": PROMPT, "seed": 7}, "xyzzy", PROMPT, "xyxyxyxyxy"]
    law = {"temperature": 0.7, "top_p": 0.9, "seed": 5} | more
    # Answers of a batch come in the order in which they end.
    plain = sorted(tokens_of(Session(target), prompts, 24, **law))
    session = Session(target, load_draft(draft, target), **how)
    assert sorted(tokens_of(session, prompts, 24, **law)) == plain
    assert session.stats.num_accepted_tokens > 0


def test_a_seed_of_its_own_repeats_and_teaches(target):
    own = {"prompt": PROMPT, "seed": 7}
    session = ngram_session(target)
    first, other, second = tokens_of(
        session, [own, own | {"choice": 1}, own], 12, temperature=1.0
    )
    assert first == second != other
    # What it was answered does not depend on what is learned from it.
    assert int(session.state.trainer.num_prompts) == 3


def test_a_seed_whose_tokens_depend_on_the_draft_teaches_nothing():
    own = Request("own", (1, 2), sampling=SamplingConfig(1.0), seed=7)
    assert own.can_teach(is_drawn=False)
    assert not own.can_teach(is_drawn=True)
    assert dataclasses.replace(own, seed=None).can_teach(is_drawn=True)
    assert dataclasses.replace(own, sampling=SamplingConfig()).can_teach(is_drawn=True)
    assert not dataclasses.replace(own, is_left_out=True).can_teach(is_drawn=False)
    chain = TreeConfig(num_steps=2, children="sampled")
    assert chain.is_drawn
    assert not dataclasses.replace(chain, num_steps=0).is_drawn
    assert not TreeConfig(num_steps=2).is_drawn


def test_twins_in_a_batch_do_not_set_each_others_depth(target):
    """Where children are drawn: neither by what they accepted, nor by being sure."""
    tree = TreeConfig.auto((0, 1, 2), children="sampled")
    draft = load_draft("self:exit-1", target)
    session = Session(target, draft, tree=tree, batch_size=2)
    session.warm_up()
    # Costs with which drafting pays, whatever the machine has measured.
    costs = dataclasses.replace(session.chooser.state, costs=(1.0, 1.1, 1.2))
    session.chooser.state = before = costs
    own = {"prompt": PROMPT, "seed": 7}
    first, second = tokens_of(session, [own, own], 16, temperature=1.0)
    assert first == second
    assert session.chooser.state == before
    tokens_of(session, [PROMPT], 16, temperature=1.0)
    assert session.chooser.state != before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"seed": 1, "choice": "0"}, "choice is '0'"),
        ({"choice": 1}, "counts answers under a `seed`"),
    ],
)
def test_seeds_that_are_none_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_prompt({"prompt": PROMPT} | values, "row")
