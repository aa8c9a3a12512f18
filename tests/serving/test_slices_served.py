# SPDX-License-Identifier: Apache-2.0
"""A server learns in slices: between two of them others are answered."""

import queue

import jax
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.serving import service as service_module
from ospec_jax.serving.asks import Ask, ChoiceEnd, Ended, Failed
from ospec_jax.serving.service import Service
from ospec_jax.serving.settings import ServiceConfig
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

WINDOWS = LearnerConfig(
    "gradient", update_interval=8, batch_size=2, window=32, num_steps=2,
    optimizer="sgd", learning_rate=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture
def open_service(target, monkeypatch):
    """Makes services that note what they do, and end with the test."""
    # All are asked greedily: they compile for nothing else.
    monkeypatch.setattr(service_module, "KINDS", ("greedy",))
    opened = []

    def start(learner=WINDOWS, folder=None, **given):
        session = Session(
            target,
            random_head(target),
            learner=learner,
            tree=TreeConfig(num_steps=2),
            batch_size=2,
            num_predicted_tokens=0,
            **given,
        )
        config = ServiceConfig("tiny", 240, checkpoint=folder)
        service = Service(session, config)
        done = []
        go_on, turn = session.go_on, service._turn

        def noting(name, function):
            def run():
                done.append(name)
                return function()

            return run

        session.go_on = noting("slice", go_on)
        service._turn = noting("turn", turn)
        service.start()
        service.wait_until_ready()
        opened.append(service)
        return service, session, done

    yield start
    for service in opened:
        service.stop()


def ask(service, text, count=60, **values):
    events = queue.SimpleQueue()
    asked = Ask(parse_prompt({"prompt": text}, "a"), max_new_tokens=count, **values)
    service.submit(service.prepare(asked), events.put)
    return events


def end_of(events):
    while not isinstance(event := events.get(timeout=60), Ended | Failed):
        if isinstance(event, ChoiceEnd):
            found = event
    assert isinstance(event, Ended), event
    return found


def host(tree):
    return jax.tree.map(np.array, tree)


def test_who_is_answered_waits_for_one_slice_at_a_time(open_service):
    service, _, done = open_service()
    long = ask(service, "Add 1 to 1.", 150)
    # So many short ones beside it that they are learned from before it ends.
    while "slice" not in done:
        end_of(ask(service, "Name a colour.", 6))
    end_of(long)
    end_of(ask(service, "Add 1 to 1.", 90))
    service.call(lambda: None)
    text = "".join("s" if name == "slice" else "t" for name in done)
    assert "tst" in text, text
    assert service.version > 0
    assert service.status()["totals"]["num_compiles_after_warm_up"] == 0


@pytest.mark.parametrize("action", ["pause", "pin", "checkpoint"])
def test_what_is_under_way_is_finished_first(open_service, action, tmp_path):
    service, session, done = open_service(folder=tmp_path)
    end_of(ask(service, "Add 1 to 1.", 100))
    service.administer(action)
    assert not session.is_updating
    assert session.version == len(session.reports) == service.version == 1
    assert "slice" in done


def test_rollback_and_forgetting_leave_nothing_half_done(open_service):
    service, session, _ = open_service()
    first = host(session.draft.params)
    end_of(ask(service, "Add 1 to 1.", 100))
    service.administer("rollback")
    assert not session.is_updating
    for x, y in zip(
        jax.tree.leaves(first), jax.tree.leaves(session.draft.params), strict=True
    ):
        np.testing.assert_array_equal(x, np.asarray(y))
    end_of(ask(service, "Add 1 to 1.", 100))
    service.administer("forget")
    assert not session.is_updating
    assert session.version == service.version


def test_a_server_that_stops_finishes_and_saves(open_service, target, tmp_path):
    service, session, done = open_service(folder=tmp_path)
    end_of(ask(service, "Add 1 to 1.", 100))
    service.stop()
    assert not session.is_updating
    assert session.version == 1
    other = Session(target, random_head(target), learner=WINDOWS, batch_size=2)
    with pytest.warns(UserWarning, match="without past traffic"):
        other.resume(tmp_path)
    assert other.version == 1
    for x, y in zip(
        jax.tree.leaves(session.draft.params),
        jax.tree.leaves(other.draft.params),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_slice_that_fails_pauses_learning_and_serving_goes_on(open_service):
    service, session, _ = open_service()
    first = host(session.draft.params)

    def fail():
        session.drop_update()
        raise MemoryError("no room")

    session.go_on = fail
    before = end_of(ask(service, "Add 1 to 1.", 100))
    service.call(lambda: None)
    assert service.status()["learning"]["paused_for"] == "failed"
    again = end_of(ask(service, "Add 1 to 1.", 100))
    assert again.finish_reason == before.finish_reason
    for x, y in zip(
        jax.tree.leaves(first), jax.tree.leaves(session.draft.params), strict=True
    ):
        np.testing.assert_array_equal(x, np.asarray(y))


def test_exercises_are_learned_from_in_slices_too(open_service):
    service, session, done = open_service(learn_idle=2)
    for text in ("Add 1 to 1.", "What is rain?"):
        end_of(ask(service, text, 100))
    service.call(lambda: None)
    assert "slice" in done
    assert not session.is_updating
