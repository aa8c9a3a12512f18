# SPDX-License-Identifier: Apache-2.0
"""An administrator says when what was learned is served; until then nothing changes."""

import jax
import numpy as np
import pytest
from drafted import random_head
from test_service import PROMPTS, Heard, ask_of

from ospec_jax import LearnerConfig, Session, TreeConfig
from ospec_jax.config import ConfigError
from ospec_jax.serving import service as service_module
from ospec_jax.serving.metrics import Metrics
from ospec_jax.serving.service import Service
from ospec_jax.serving.settings import ServiceConfig
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings(
    "ignore:the mean acceptance length", "ignore:.*without past traffic"
)

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    results = Session(target, batch_size=3).generate(PROMPTS, NEW_TOKENS)
    return {r.prompt.text: r.text for r in results}


def session_of(target, draft):
    learner = LearnerConfig("head")
    return Session(
        target,
        draft,
        learner=learner,
        tree=TreeConfig(num_steps=2),
        num_predicted_tokens=0,
        promote="manual",
    )


@pytest.fixture
def place(target, draft, tmp_path, monkeypatch):
    """A service by hand, and its session; it compiles for greedy answers alone."""
    monkeypatch.setattr(service_module, "KINDS", ("greedy",))
    session = session_of(target, draft)
    service = Service(session, ServiceConfig("tiny", 240, checkpoint=tmp_path))
    service.start()
    service.wait_until_ready()
    yield service, session
    service.stop()
    assert not service.is_alive


def answer(service, prompts):
    """Answers in order; they have been learned from when this returns."""
    texts = [Heard(service, ask_of(text)).texts()[0] for text in prompts]
    service.call(lambda: None)
    return texts


def served(service, session):
    """Bits of the served draft."""
    return service.call(lambda: jax.device_get(session.served_draft.params))


def is_same(one, other):
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return all(np.array_equal(own, their) for own, their in pairs)


def waiting(service):
    return service.status()["draft"]["waiting"]


def test_an_administrator_serves_what_waits_and_goes_back(place, plain, tmp_path):
    service, session = place
    compiled = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
    start = served(service, session)
    assert waiting(service) == {"num_updates": 0, "agreement": None}
    with pytest.raises(ConfigError, match="nothing waits"):
        service.administer("promote")

    texts = answer(service, PROMPTS[:4])
    assert is_same(served(service, session), start)
    status = service.status()
    assert status["draft"]["version"] == service.version == 0
    assert status["draft"]["waiting"]["num_updates"] == 4
    assert 0 <= status["draft"]["waiting"]["agreement"] <= 1
    assert status["learning"]["num_updates"] == 4
    # What was accepted is of one version all the time.
    assert status["draft"]["num_steps_since_swap"] == status["totals"]["num_drafts"]
    metrics = Metrics("tiny", 240, service.status).render().decode()
    assert "ospec_draft_updates_waiting 4.0" in metrics

    assert service.administer("promote") == {"promoted_updates": 4, "version": 4}
    promoted = served(service, session)
    assert not is_same(promoted, start)
    assert service.status()["draft"]["kept_versions"] == [0, 4]
    texts += answer(service, PROMPTS[4:8])
    assert is_same(served(service, session), promoted)
    assert waiting(service)["num_updates"] == 4
    assert texts == [plain[text] for text in PROMPTS[:8]]

    # A promotion has nobody wait for a program.
    service.administer("promote")
    assert compiled() == 0
    assert service.administer("rollback") == {"restored": 4, "version": 9}
    assert is_same(served(service, session), promoted)
    assert waiting(service)["num_updates"] == 0
    assert answer(service, PROMPTS[8:10]) == [plain[text] for text in PROMPTS[8:10]]
    assert is_same(served(service, session), promoted)
    assert waiting(service)["num_updates"] == 2


def test_a_restarted_server_serves_the_same_and_what_waits_waits_on(
    place, target, draft, tmp_path
):
    service, session = place
    answer(service, PROMPTS[:2])
    service.administer("promote")
    answer(service, PROMPTS[2:4])
    before = served(service, session)
    service.stop()

    session = session_of(target, draft)
    session.resume(tmp_path)
    again = Service(session, ServiceConfig("tiny", 240, checkpoint=tmp_path))
    again.start()
    try:
        again.wait_until_ready()
        assert is_same(served(again, session), before)
        assert version_and_waiting(again) == (2, 2)
        answer(again, PROMPTS[4:5])
        assert again.administer("promote") == {"promoted_updates": 3, "version": 5}
        # Nobody was answered since, and it is saved all the same.
        promoted = served(again, session)
    finally:
        again.stop()

    session = session_of(target, draft)
    session.resume(tmp_path)
    assert is_same(jax.device_get(session.served_draft.params), promoted)
    assert (session.version, session.num_waiting) == (5, 0)


def version_and_waiting(service):
    return service.version, service.call(lambda: waiting(service)["num_updates"])


def test_pins_failures_and_what_is_forgotten(place, plain, monkeypatch):
    service, session = place
    start = served(service, session)
    answer(service, PROMPTS[:2])
    service.administer("pin")
    with pytest.raises(ConfigError, match="is pinned; unpin it before"):
        service.administer("promote")
    answer(service, PROMPTS[2:3])
    assert waiting(service)["num_updates"] == 2
    service.administer("unpin")

    # What waits has learned from all of it, and stays.
    assert "those that wait" in service.administer("forget")["stays"]
    assert waiting(service)["num_updates"] == 2
    service.administer("promote")
    assert not is_same(served(service, session), start)
    answer(service, PROMPTS[3:4])
    service.administer("forget", is_draft_too=True)
    assert is_same(served(service, session), start)
    assert waiting(service)["num_updates"] == 0

    # What is served is not the newest version that was kept.
    answer(service, PROMPTS[5:6])
    service.administer("promote")
    service.administer("rollback", version=0)

    # An update that fails may have used up what waits, never what is served.
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session, "_learn_from", fail)
    assert answer(service, PROMPTS[4:5]) == [plain[PROMPTS[4]]]
    assert service.status()["learning"]["paused_for"] == "failed"
    assert is_same(served(service, session), start)
    assert waiting(service)["num_updates"] == 0
