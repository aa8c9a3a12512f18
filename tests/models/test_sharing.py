# SPDX-License-Identifier: Apache-2.0
"""What is built of the same arguments is built once, until it is forgotten."""

import pytest

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.loading import LoadedDraft
from ospec_jax.models import sharing
from ospec_jax.models.sharing import (
    forget_programs,
    keep_programs,
    own_programs,
    share,
)
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target


def test_the_same_arguments_share_until_they_are_forgotten():
    build = share(lambda *args: object())
    first = build(1, "a")
    assert build(1, "a") is first
    assert build(2, "a") is not first
    assert build([1]) is not build([1])  # a list cannot be told to be the same later
    forget_programs()
    assert build(1, "a") is not first


def test_programs_of_ones_own_leave_the_others_where_they_are():
    build = share(lambda *args: object())
    first = build(1)
    with own_programs():
        own = build(1)
        assert own is not first
        assert build(1) is own
        forget_programs()
        assert build(1) is not own
    assert build(1) is first


def test_who_builds_more_keeps_more(monkeypatch):
    monkeypatch.setattr(sharing, "_NUM_KEPT", sharing._NUM_KEPT)
    monkeypatch.setattr(sharing, "_SHARED", {})
    build = share(lambda *args: object())
    for number, num_left in ((2, 2), (5, 5)):
        keep_programs(number)
        built = [build(i) for i in range(7)]
        # Those of one's latest arguments, from the latest on.
        again = [build(i) is built[i] for i in reversed(range(7 - num_left, 7))]
        assert all(again)
        assert build(0) is not built[0]


@pytest.mark.parametrize(
    "name", ["head", pytest.param("gradient", marks=pytest.mark.thorough)]
)
@pytest.mark.usefixtures("own_programs")
def test_a_second_session_of_the_same_learner_compiles_no_update(name):
    target = tiny_target()
    config = tiny_draft_config(target.config, draft_vocab_size=200)
    draft = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
    loaded = LoadedDraft(draft, Meta.create(target, config))
    settings = {} if name == "head" else {"update_interval": 20, "batch_size": 2}
    updates = []

    for _ in range(2):
        learner = LearnerConfig(name=name, **settings)
        session = Session(target, loaded, learner=learner)
        list(session.generate(["What is this?", "And what is that?"], 40))
        assert session.reports
        parts = session.trainer.update.__self__
        update = parts._learn if name == "head" else parts._learning.update
        updates.append(update)

    first, second = updates
    assert first is second
    assert first._cache_size() == 1
