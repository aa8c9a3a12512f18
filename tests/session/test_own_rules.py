# SPDX-License-Identifier: Apache-2.0
"""Update rules that users write: the skeleton in the docs, as it stands there."""

import functools
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ospec_jax import ConfigError, LearnerConfig, Session
from ospec_jax.config import TreeConfig
from ospec_jax.control.base import fixed
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.replay.results import settings_of
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

SKELETON = Path(__file__).parents[2] / "docs" / "skeletons" / "learner.py"
sign_sgd = runpy.run_path(str(SKELETON))["sign_sgd"]
WHEN = {"update_interval": 30, "batch_size": 2, "window": 32, "ring_capacity": 8}
PROMPTS = [f"What is {i} plus {i * 7}?" for i in range(4)]

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))


def answers(session, prompts):
    return [r.token_ids for r in session.generate(prompts, 40)]


def open_session(target, draft, rule):
    learner = LearnerConfig(rule=rule, **WHEN)
    return Session(target, draft, learner=learner, ngrams=False)


def test_the_skeleton_learns_serves_exactly_and_resumes(target, draft, tmp_path):
    rule = functools.partial(sign_sgd, step=3e-3)
    session = open_session(target, draft, rule)
    plain = answers(Session(target), PROMPTS)
    assert answers(session, PROMPTS * 6) == plain * 6
    losses = [float(report.info.loss) for report in session.reports]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1
    assert session.version == len(losses)

    session.save(tmp_path)
    resumed = open_session(target, draft, rule)
    assert len(resumed.resume(tmp_path)) == 24
    for one in (session, resumed):
        assert answers(one, PROMPTS) == plain
    left, right = (
        jax.tree.leaves((s.state.trainer, s.draft.params)) for s in (session, resumed)
    )
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)

    with pytest.raises(CheckpointError) as refused:
        open_session(target, draft, sign_sgd).resume(tmp_path)
    assert "give Session(learner=...) the same rule" in str(refused.value)
    assert "sign_sgd(step=0.003)" in str(refused.value)
    with pytest.raises(CheckpointError, match="not with a built-in one"):
        Session(target, draft, learner=LearnerConfig(**WHEN)).resume(tmp_path)


def test_a_checkpoint_of_a_learner_by_name_is_no_rules(target, draft, tmp_path):
    session = Session(target, draft, learner="memory")
    answers(session, PROMPTS[:1])
    session.save(tmp_path)
    with pytest.raises(CheckpointError, match="resume with the learner 'memory'"):
        open_session(target, draft, sign_sgd).resume(tmp_path)


def test_rules_and_names_are_learners(target, draft):
    alone = Session(target, draft, learner=sign_sgd)
    assert alone.learner.rule is sign_sgd
    assert alone.learner.name == "sign_sgd"
    assert Session(target, draft, learner="head").learner.name == "head"
    stored = settings_of("sign_sgd", alone.learner, "tiny", 3, "", "")["config"]
    assert stored["rule"].endswith(":sign_sgd")
    assert "rule" not in LearnerConfig().to_json()


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (3e-4, "learner is 0.0003; use a LearnerConfig(...), the name"),
        (LearnerConfig, "use a LearnerConfig(...)"),
        ("adam", "unknown learner 'adam'"),
        (lambda objective: objective.loss, "it must return a `learners.base.Learner`"),
    ],
)
def test_what_is_no_learner_is_refused(target, draft, learner, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Session(target, draft, learner=learner)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("init", "`init` of the rule .* returned dict; return a LearnerState"),
        (
            "update",
            r"`update` .* returned LearnerState; return \(LearnerState, Learner",
        ),
    ],
)
def test_a_rule_that_returns_something_else_is_refused(target, draft, part, message):
    def rule(objective):
        good = sign_sgd(objective)
        parts = {
            "init": lambda params: params,
            "update": lambda *given: good.update(*given)[0],
        }
        return good._replace(**{part: parts[part]})

    with pytest.raises(ConfigError, match=message):
        answers(open_session(target, draft, rule), PROMPTS)


def test_rules_train_parameters(target):
    with pytest.raises(ConfigError, match="'ngram' has none; give a trained draft"):
        Session(target, load_draft("ngram", target), learner=sign_sgd)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "sign_sgd"}, "rule is 'sign_sgd'; use a function"),
        ({"rule": sign_sgd, "name": "head"}, "both the learner 'head' and the rule"),
        ({"rule": sign_sgd, "optimizer": "adam"}, "does not read optimizer"),
    ],
)
def test_settings_that_a_rule_would_not_read_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LearnerConfig(**settings)


@pytest.mark.parametrize(
    ("children", "seed", "temperature"),
    [
        ("sampled", 7, 1.0),
        ("topk", 7, 1.0),
        ("sampled", 7, 0.0),
        ("sampled", None, 1.0),
    ],
)
def test_numbers_that_come_again_teach_no_controller(children, seed, temperature):
    """Where children are drawn: else answers depend on nothing that was heard."""
    heard = []

    def listening(actions):
        def observe(state, action, outcome):
            heard.append(outcome)
            return state

        return fixed(actions)._replace(observe=observe)

    tree = TreeConfig(num_steps=1, children=children)
    session = Session(tiny_target(), "self:exit-1", tree=tree, controller=listening)
    row = {"prompt": "one, two, one, two", "seed": seed}
    list(session.generate([row], 12, temperature=temperature))
    # A greedy answer uses no random numbers, whatever its seed.
    comes_again = seed is not None and temperature > 0
    assert bool(heard) == (children == "topk" or not comes_again)
