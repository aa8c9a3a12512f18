# SPDX-License-Identifier: Apache-2.0
"""Learners by name: what cannot be is refused, and defaults are the learners' own."""

import dataclasses
import re

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.learners.config import LearnerConfig, build_learner
from ospec_jax.learners.registry import LEARNER_NAMES

SGD = ("momentum", "optimistic")
"""Rules that were published with it."""


def unroll(*_):
    raise AssertionError("nothing is trained here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "unknown learner 'adam'; use one of gradient, momentum"),
        ({"loss": "kl"}, "unknown loss 'kl'"),
        ({"optimizer": "addam"}, "optax has no optimizer 'addam'"),
        ({"name": "momentum", "optimizer": "adam"}, "SGD with momentum, not 'adam'"),
        ({"name": "ensemble", "optimizer": "dog"}, "'dog' finds its own step size"),
        ({"name": "shared_ensemble", "expert_pull": 0.0}, "would lie on one line"),
        ({"name": "shared_ensemble", "reset_experts": True}, "use the learner `ens"),
        ({"name": "ensemble", "num_experts": 1}, "num_experts is 1; use 2"),
        ({"name": "ensemble", "meta": "exp3"}, "meta is 'exp3'; use hedge or last"),
        ({"num_experts": 3}, "the learner 'gradient' does not read num_experts"),
        ({"positions": "wrong"}, "positions is 'wrong'; use all or rejected"),
        ({"token_share": 0.0}, "token_share is 0.0; use above 0, and at most 1"),
        ({"name": "shared_ensemble", "num_scored": 5}, "num_scored 5 exceeds batch"),
        ({"update_every_prompts": -1}, "update_every_prompts is -1; use 0 (off)"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_learner(LearnerConfig(**changes), unroll)


def test_experts_may_be_judged_on_a_whole_batch():
    config = LearnerConfig(name="shared_ensemble", num_scored=4, batch_size=4)
    assert build_learner(config, unroll)


@pytest.mark.parametrize("name", SGD)
def test_a_rate_says_whose_it_is_where_the_rule_was_published_with_sgd(name):
    cause = (
        f"'{name}' was published with 'sgd' at a rate of 0.1, and learning_rate 0.001"
    )
    with pytest.raises(ConfigError, match=cause) as refused:
        LearnerConfig(name=name, learning_rate=1e-3)
    assert "set optimizer 'sgd' (--optimizer sgd)" in str(refused.value)
    # Momentum is a rule of SGD alone.
    assert ("--optimizer adam" in str(refused.value)) == (name == "optimistic")

    published = LearnerConfig(name=name)
    stated = LearnerConfig(name=name, optimizer="sgd", learning_rate=1e-3)
    assert dataclasses.replace(published, learning_rate=1e-3) == stated
    assert dataclasses.replace(stated, num_epochs=2).learning_rate == 1e-3
    if name == "optimistic":
        adam = LearnerConfig(name=name, optimizer="adam", learning_rate=1e-3)
        assert adam.optimizer == "adam"


def test_defaults_are_the_learners_own():
    others = ("head", "preference", "memory", "auto")
    steps = [name for name in LEARNER_NAMES if name not in others]
    found = {name: LearnerConfig(name=name) for name in steps}
    rates = {name: (c.optimizer, c.learning_rate) for name, c in found.items()}
    assert rates["gradient"] == rates["ensemble"] == ("adam", 3e-4)
    assert rates["optimistic"] == rates["momentum"] == ("sgd", 0.1)
    assert rates["osd"] == ("adam", 1e-4)
    assert LearnerConfig(name="osd", learning_rate=0.5).learning_rate == 0.5
    assert found["osd"].update_every_prompts == 1
    assert found["ensemble"].meta_discount == 1.0
