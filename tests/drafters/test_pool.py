# SPDX-License-Identifier: Apache-2.0
"""A pool drafts what its chosen member would, exactly, whoever is chosen when."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from drafted import head, in_turns
from reference import forward

from ospec_jax import LearnerConfig, SamplingConfig, Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError
from ospec_jax.decoding.request import Request
from ospec_jax.drafters.pool import PoolConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import mixed_draft, new_draft, pool_draft
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"What is {i} plus {i * 7}, and why is {'it ' * i}so?" for i in range(4)]
LIMIT = 3.3
"""Standard deviations; chance alone leaves them once in 1,000 times."""


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=4)


@pytest.fixture(scope="module")
def plain(target):
    return answers(Session(target))


@pytest.fixture(scope="module")
def members(target):
    """Drafters of several shapes, which read different states of the target."""
    return [
        head(target, "eagle3"),
        load_draft("ngram", target),
        head(target, "hydra"),
        head(target, "eagle3", seed=1),
        mixed_draft("fallback", "suffix,self:exit-2", target),
    ]


def always(number):
    """The deepest action of one member."""

    def rule(actions):
        action = [a for a in actions if a.drafter == number][-1]
        return in_turns((action,))

    return rule


def answers(session, sampling=SamplingConfig()):
    found = session.generate(PROMPTS, 30, sampling)
    return [r.token_ids for r in sorted(found, key=lambda r: r.prompt.id)]


def extending(draft, extends):
    return dataclasses.replace(
        draft, pool=dataclasses.replace(draft.pool, extends=extends)
    )


@pytest.mark.parametrize(
    ("extends", "ngrams", "batch_size"),
    [
        pytest.param("all", True, 1, marks=pytest.mark.thorough),
        ("all", False, 3),
        ("chosen", True, 1),
        pytest.param("chosen", False, 3, marks=pytest.mark.thorough),
    ],
)
def test_whoever_is_chosen_greedy_output_is_plain_decodings(
    target, members, plain, extends, ngrams, batch_size
):
    session = Session(
        target,
        extending(pool_draft(members, target), extends),
        ngrams=ngrams,
        batch_size=batch_size,
        controller=in_turns,
    )
    assert answers(session) == plain
    assert session.stats.num_accepted_tokens > 0
    assert {a.drafter for a in session.chooser.controller.actions} == set(range(5))


# The first and the fourth one are of one family: they share all but their weights.
# Chains of one of the others' are compared so by `decoding/test_judging.py`.
@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(i, marks=pytest.mark.thorough) for i in range(3)),
        3,
        4,
    ],
)
def test_the_chosen_one_drafts_what_it_drafts_alone(target, members, number):
    """In any place, from its own part of the target's states, with its own cache."""
    how = dict(ngrams=False, num_predicted_tokens=0)
    alone = Session(target, members[number], **how)
    expected = answers(alone)

    pooled = Session(
        target, pool_draft(members, target), **how, controller=always(number)
    )
    assert answers(pooled) == expected
    assert pooled.stats.num_drafts == alone.stats.num_drafts
    assert pooled.stats.num_draft_tokens == alone.stats.num_draft_tokens
    assert pooled.stats.num_accepted_tokens == alone.stats.num_accepted_tokens


@pytest.fixture(scope="module")
def small_target():
    """Of so few tokens that random drafts are right at times."""
    return tiny_target(16)


def serve(session, requests, batch_size=1):
    serving = session.engine.serve(
        requests, lambda: session.served_draft, batch_size, chooser=session.chooser
    )
    return list(serving)


def test_one_that_did_not_run_over_tokens_misses_them(small_target):
    """What `chosen` saves, the others' caches lack; prompts they all have seen."""
    experts = [head(small_target, "eagle3", seed) for seed in (0, 1)]
    ids = np.random.default_rng(0).integers(3, 16, (12, 6)).tolist()
    asked = [Request("it", tuple(some), 60, SamplingConfig()) for some in ids]

    def accepted(extends):
        draft = extending(pool_draft(experts, small_target), extends)
        session = Session(small_target, draft, ngrams=False, controller=in_turns)
        return [done.stats.num_accepted_tokens for done in serve(session, asked)]

    assert accepted("chosen") != accepted("all")


def test_by_default_the_first_one_drafts(target, members):
    alone = Session(target, members[0])
    pooled = Session(target, pool_draft(members, target))
    assert answers(pooled) == answers(alone)
    assert pooled.stats == alone.stats

    deep = TreeConfig.auto((0, 2))
    pooled = Session(target, pool_draft(members, target), tree=deep)
    assert {a.drafter for a in pooled.chooser.controller.actions} == {0}
    assert len(pooled.chooser.controller.actions) == 2


@pytest.mark.usefixtures("own_programs")
def test_equal_experts_share_their_programs(target):
    def programs(num_experts):
        experts = [head(target, "eagle3", seed) for seed in range(num_experts)]
        session = Session(target, pool_draft(experts, target), controller=in_turns)
        answers(session)
        actions = session.engine.actions
        steps = {session.engine.compiled(action, "greedy") for action in actions}
        assert len({a.drafter for a in actions if a.drafter >= 0}) == num_experts
        return sum(step._cache_size() for step in steps)

    assert programs(3) == programs(2) > 0


# Of most probable children no probabilities are read that a pool could mix up.
@pytest.mark.thorough
@pytest.mark.parametrize("children", ["topk", "sampled"])
def test_sampled_answers_follow_the_targets_law(small_target, children):
    """Of drafts that are both bad, in different ways."""
    target = small_target
    # Hot, so that no path is rare: rare ones are counted by a law of longer tails.
    sampling = SamplingConfig(temperature=3.0, top_k=3)
    ids = (1, 3, 5, 9, 9, 3, 4)

    def likeliest(ids):
        logits = forward(target.params, target.config, ids)[0][-1]
        tokens = np.argsort(-logits, kind="stable")[:3]
        weights = np.exp((logits[tokens] - logits[tokens[0]]) / 3.0)
        return tokens.tolist(), weights / weights.sum()

    bad = [head(target, "eagle3", seed=7), head(target, "hydra", seed=8)]
    session = Session(
        target,
        pool_draft(bad, target),
        tree=TreeConfig(num_steps=2, children=children),
        ngrams=False,
        controller=in_turns,
    )
    law = {}
    for token, chance in zip(*likeliest(ids), strict=True):
        if token in session.engine.stop_ids:
            law[(token,)] = chance
            continue
        following, chances = likeliest([*ids, token])
        paths = itertools.product([token], following)
        law |= dict(zip(paths, chance * chances, strict=True))

    num_runs = 200
    num_accepted = 0
    counts = dict.fromkeys(law, 0)
    for done in serve(session, [Request("it", ids, 3, sampling)] * num_runs, 20):
        counts[tuple(done.token_ids[:2])] += 1
        num_accepted += done.stats.num_accepted_tokens

    assert num_accepted > 10
    for path, chance in law.items():
        deviation = np.sqrt(num_runs * chance * (1 - chance))
        assert abs(counts[path] - num_runs * chance) < LIMIT * max(deviation, 1), path


def test_a_resumed_pool_remembers_ngrams_and_keeps_its_drafts(
    target, members, tmp_path
):
    def session():
        draft = pool_draft(members[:3], target)
        learner = LearnerConfig(name="memory", memory_slots=1024)
        return Session(target, draft, learner=learner, controller=always(1))

    straight = session()
    expected = [r.token_ids for r in straight.generate(PROMPTS * 2, 30)]
    first = session()
    found = [r.token_ids for r in first.generate(PROMPTS, 30)]
    first.save(tmp_path)

    second = session()
    second.resume(tmp_path)
    found += [r.token_ids for r in second.generate(PROMPTS, 30)]
    assert found == expected
    assert second.stats.num_accepted_tokens > first.stats.num_accepted_tokens
    same = jax.tree.map(np.array_equal, second.served_draft, straight.served_draft)
    assert all(jax.tree.leaves(same))
    with pytest.raises(CheckpointError, match="pass --draft pool:eagle3[+]ngram"):
        load_draft(tmp_path, target)


def test_members_are_named_as_drafts_are(target):
    draft = load_draft("pool:ngram+fallback:suffix,self:exit-1+self:exit-2", target)
    assert [member.family.name for member in draft.members] == ["ngram", "self", "self"]
    assert draft.members[1].mix == "fallback"
    assert draft.memory_orders == draft.members[1].memory_orders
    assert draft.meta.card["model"].startswith("ngram+fallback:")


def test_what_cannot_stand_side_by_side_is_refused(target, members):
    two = pool_draft(members[:2], target)
    with pytest.raises(ConfigError, match="a pool of 1 drafts leaves nothing"):
        load_draft("pool:ngram", target)
    with pytest.raises(ConfigError, match="cannot be a member of another"):
        pool_draft([two, members[0]], target)
    with pytest.raises(ConfigError, match="use 'fallback' there"):
        load_draft("pool:ngram+mixed:ngram,self:exit-1", target)
    with pytest.raises(ConfigError, match="put the mixture into it"):
        load_draft("fallback:ngram,pool:ngram+self:exit-1", target)
    with pytest.raises(ConfigError, match="a pool has members; name them"):
        new_draft(two.family, target)
    with pytest.raises(ConfigError, match="extends is 'some'"):
        dataclasses.replace(two.pool, extends="some")
    with pytest.raises(ConfigError, match="not from PoolConfig"):
        build_drafter("eagle3", two.pool, TreeConfig(num_steps=1))
    meshed = dataclasses.replace(target, mesh=jax.make_mesh((1,), ("tensor",)))
    with pytest.raises(ConfigError, match="cannot be split over devices"):
        pool_draft(members, meshed)
    with pytest.raises(ConfigError, match="'pool' has none"):
        Session(target, two, learner=lambda objective: None)


def test_a_pool_drafts_as_deep_as_its_shallowest_member(target, members):
    config: PoolConfig = pool_draft(members, target).pool
    assert build_drafter("pool", config, TreeConfig(num_steps=5))
    deepest = members[2].family.max_depth(members[2].architecture)
    with pytest.raises(ConfigError):
        build_drafter("pool", config, TreeConfig(num_steps=deepest + 1))
    session = Session(
        target, pool_draft(members, target), tree=TreeConfig.auto((0, 1, deepest + 1))
    )
    assert session.tree.depths == (0, 1)
