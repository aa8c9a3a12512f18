# SPDX-License-Identifier: Apache-2.0
"""What a drafting model learns from steps that were rejected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ospec_jax.config import ConfigError
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.reasoning.lookahead import Cycle, LossyAnswer
from ospec_jax.reasoning.preferences import (
    PreferenceConfig,
    PreferencePair,
    collect_pairs,
    preference_learner,
    preference_loss,
)
from ospec_jax.reasoning.verifiers import Judgement
from ospec_jax.testing import tiny_target

PAIRS = [
    PreferencePair((1, 40, 41, 42), (50, 51, 52), (60, 61)),
    PreferencePair(tuple(range(30, 60)), (70, 71), (80, 81, 82, 83)),
]
CONFIG = PreferenceConfig(num_layers=2, rank=4, learning_rate=3e-3, num_epochs=8)


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=3)


@pytest.fixture(scope="module")
def learned(target):
    learner = preference_learner(target, CONFIG)
    state, info = learner.update(learner.init(), PAIRS)
    return learner, state, info


def answer_of(*cycles):
    return LossyAnswer(
        (), cycles, False, "stop", 0, 0, 0, DecodingStats(), DecodingStats()
    )


def test_pairs_stand_behind_all_that_was_accepted():
    yes = Judgement(True)
    no = Judgement(False)
    kept = Cycle((1,), ((2, 3), (4,)), ((2, 3), (5,), (6,)), (yes, no), 1)
    whole = Cycle((1,), ((2,),), ((2,), (3,)), (yes,), 1)
    equal = Cycle((1,), ((2,),), ((2,), (3,)), (no,), 0)
    unjudged = Cycle((1,), ((2,),), ((9,), (3,)), (Judgement(False, False),), 0)
    answers = answer_of(whole, kept), answer_of(equal, unjudged)
    pairs = [pair for answer in answers for pair in collect_pairs(answer)]
    assert pairs == [PreferencePair((1, 2, 3), chosen=(5,), rejected=(4,))]


def test_the_loss_is_dpos():
    log_probs = np.array([-3.0, -2.0, -1.0, -4.0, -9.0, -9.0])
    references = np.array([-3.5, -2.5, -2.0, -2.0, 0.0, 0.0])
    # By hand: gains 0.5 and 0.5, 1 and -2; the last pair is padding.
    margins = np.array([0.0, 3.0])
    expected = np.mean(np.log1p(np.exp(-0.1 * margins)))
    found = preference_loss(log_probs, references, jnp.array([1.0, 1.0, 0.0]), 0.1)
    np.testing.assert_allclose(found, (expected, 1.5), rtol=1e-6)


def test_the_first_gradient_is_half_of_beta_on_both_steps(target):
    log_probs = jnp.array([-3.0, -2.0])
    grad = jax.grad(lambda x: preference_loss(x, log_probs, jnp.ones(1), 0.1)[0])
    np.testing.assert_allclose(grad(log_probs), [-0.05, 0.05], rtol=1e-6)


def log_probs_of(target, params, prefix, step):
    """Of a step behind a prefix, by an independent forward pass in float64."""
    ids = [*prefix, *step]
    logits = reference.forward(params, target.config, ids)[0]
    logits = logits[len(prefix) - 1 : -1]
    rows = np.arange(len(step))
    return np.sum(logits[rows, step] - np.log(np.sum(np.exp(logits), axis=1)))


def test_chosen_steps_become_likelier_than_rejected_ones(target, learned):
    learner, state, info = learned
    served = learner.serve(state)
    margins = []
    for prefix, chosen, rejected in PAIRS:
        of = lambda params, step, prefix=prefix: log_probs_of(
            target, params, prefix, step
        )
        after = of(served, chosen) - of(served, rejected)
        before = of(target.params, chosen) - of(target.params, rejected)
        margins.append(after - before)
    assert min(margins) > 0
    assert info.num_pairs == len(PAIRS)
    # Each epoch's loss is that of the model before it.
    assert info.first_loss == pytest.approx(np.log(2), rel=1e-5)
    assert info.last_loss < info.first_loss
    assert 0 < info.margin < np.mean(margins)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_has_learned_nothing_is_the_model_itself(precision):
    target = tiny_target(precision=precision)
    learner = preference_learner(target, CONFIG)
    state, info = learner.update(learner.init(), [])
    assert info.num_pairs == 0
    served = learner.serve(state)
    same = jax.tree.map(np.array_equal, served, target.params)
    assert jax.tree.structure(served) == jax.tree.structure(target.params)
    assert all(jax.tree.leaves(same))


def test_only_the_last_layers_change(target, learned):
    learner, state, _ = learned
    served = learner.serve(state)
    changed = {
        name
        for name, value in served.items()
        if not all(
            jax.tree.leaves(jax.tree.map(np.array_equal, value, target.params[name]))
        )
    }
    assert changed == {"layers_1", "layers_2"}


def test_fine_tuning_on_the_targets_steps_knows_no_rejected_ones(target):
    config = dataclasses.replace(CONFIG, loss="sft")
    learner = preference_learner(target, config)
    others = [pair._replace(rejected=(99, 98)) for pair in PAIRS]
    states = [learner.update(learner.init(), pairs)[0] for pairs in (PAIRS, others)]
    same = jax.tree.map(np.array_equal, states[0].deltas, states[1].deltas)
    assert all(jax.tree.leaves(same))


def test_a_step_too_large_leaves_the_state_as_it_was(target):
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    learner = preference_learner(target, config)
    state = learner.init()
    after, info = learner.update(state, PAIRS)
    assert not info.is_finite
    assert after is state


@pytest.mark.parametrize(
    "settings", [{"loss": "ppo"}, {"reference": "none"}, {"beta": 0}, {"rank": 0}]
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PreferenceConfig(**settings)
