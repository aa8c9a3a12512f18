# SPDX-License-Identifier: Apache-2.0
"""Learning slows down where it does not pay, and wakes up after shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import ConfigError, LearnerConfig, Session
from ospec_jax.config import TreeConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.online import pace
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

FIRST, COST, INTERVAL = 4, 2.0, 100
ONCE = "What is 0 plus 0, and why?"


def span(state, gain, noise=0.0, seed=0):
    """Rounds up to the next verdict; `gain` a round, on two tokens a pass."""
    rng = np.random.default_rng(seed)
    while True:
        state = state.replace(
            num_tokens=state.num_tokens + INTERVAL * int(state.stride)
        )
        if pace.is_compared(state):
            noises = noise * rng.normal(size=4)
            newest = 1.0 + gain * int(state.num_rounds) + noises
            state = pace.record_gain(state, newest, np.ones(4), np.ones(4))
        state = pace.record_update(state, 1)
        if pace.is_over(state):
            return pace.end_span(state).replace(snapshot="newest")


def strides(gain, noise=0.0, count=6):
    state, found = pace.start("first", FIRST, COST), []
    for i in range(count):
        state = span(state, gain, noise, seed=i)
        found.append(int(state.stride))
        assert state.snapshot == "newest"
        assert int(state.span) == FIRST * 2 ** (i + 1)
    return found


def test_what_gains_nothing_slows_down_to_a_limit():
    assert strides(0.0) == strides(-0.1) == [2, 4, 8, 16, 16, 16]


def test_what_pays_goes_on_at_full_pace():
    assert strides(0.02) == [1] * 6
    # Two rounds are compared, after two and after three others: 2.5 gains, less some
    # for their difference, of 2 tokens a pass, for 400 tokens; four updates cost 8.
    assert strides(0.015, count=1) == [2]


def test_noise_is_no_gain():
    assert strides(0.0, noise=0.5)[-1] >= 8


def test_a_gain_brings_learning_back_step_by_step():
    state = pace.start("", FIRST, COST).replace(stride=jnp.int32(8))
    found = []
    for _ in range(4):
        state = span(state, 0.05)
        found.append(int(state.stride))
    assert found == [4, 2, 1, 1]


def test_without_evidence_the_pace_stays():
    state = pace.start("", FIRST, COST).replace(stride=jnp.int32(4))
    state = pace.record_gain(state, np.ones(4), np.zeros(4), np.zeros(4))
    for _ in range(FIRST):
        state = pace.record_update(state, 1)
    assert pace.is_over(state)
    assert int(pace.end_span(state).stride) == 4


def serve(state, rates, num_drafted=40):
    """Answers of these acceptance rates; how many until drift is found, and state."""
    for i, rate in enumerate(rates):
        state = pace.record_answer(state, 64, num_drafted, round(rate * num_drafted))
        if pace.is_drift(state):
            return i, state
    return None, state


def calm(count, seed=0):
    return 0.5 + 0.1 * np.random.default_rng(seed).normal(size=count)


def test_a_drop_in_acceptance_is_drift_and_noise_is_not():
    found, state = serve(pace.start(None, FIRST, COST), calm(300))
    assert found is None
    assert float(state.mean) == pytest.approx(0.5, abs=0.05)
    assert float(state.variance) == pytest.approx(0.01, rel=0.6)
    found, _ = serve(state, calm(20, seed=1) - 0.25)
    assert found is not None
    assert 2 <= found <= 6
    assert serve(state, calm(50, seed=2) + 0.25)[0] is None
    assert int(state.num_tokens) == 300 * 64


def test_a_regime_is_known_before_it_can_end():
    assert serve(pace.start(None, FIRST, COST), [0.9] * 4 + [0.0] * 3)[0] is None


def test_answers_without_drafts_say_nothing():
    _, state = serve(pace.start(None, FIRST, COST), calm(20))
    silent = pace.record_answer(state, 64, 0, 0)
    assert int(silent.num_tokens) == int(state.num_tokens) + 64
    again = silent.replace(num_tokens=state.num_tokens)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_paces_are_refused():
    with pytest.raises(ConfigError, match="pace is 'slow'; use always or pays"):
        LearnerConfig(pace="slow")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    config = tiny_draft_config(target.config, target.config.vocab_size)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))


@pytest.mark.parametrize("own", [{"update_interval": 256}, {"update_every_prompts": 4}])
def test_learning_has_a_price_before_it_is_measured(target, draft, own):
    learner = LearnerConfig(name="gradient", pace="pays", budget=0.2, **own)
    session = Session(target, draft, learner=learner)
    assert float(session.state.trainer.pace.cost) == pytest.approx(256 / 4)


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
# A learner of the last layer alone, as `head` is.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gradient", marks=pytest.mark.thorough),
        "head",
        pytest.param("preference", marks=pytest.mark.thorough),
    ],
)
def test_a_session_slows_down_resumes_bitwise_and_wakes(target, draft, tmp_path, name):
    """Learning that costs most of the time, from one prompt; then others come."""
    own = {
        "gradient": {
            "update_interval": 20,
            "learning_rate": 1e-2,
            "batch_size": 2,
            "window": 32,
            "ring_capacity": 8,
        },
        "head": {},
        "preference": {},
    }
    learner = LearnerConfig(
        name=name, pace="pays", budget=0.4, num_steps=2, **own[name]
    )
    open_session = lambda: Session(target, draft, learner=learner, ngrams=False)
    answer = lambda session, prompts: [
        r.token_ids for r in session.generate(prompts, 24)
    ]
    new = [f"Who comes after {i % 6}" for i in range(12)]
    expected = answer(Session(target), [ONCE, *new])
    assert all(len(token_ids) == 24 for token_ids in expected)  # occasions to learn

    session = open_session()
    answer(session, [ONCE] * 32)
    state = session.state.trainer
    assert int(state.pace.stride) > 1
    num_updates = len(session.reports)
    assert num_updates < 32
    assert session.reports[0].stride == 1
    assert session.reports[-1].stride > 1

    session.save(tmp_path)
    resumed = open_session()
    resumed.resume(tmp_path)
    for one in (session, resumed):
        assert answer(one, new) == expected[1:]
    for a, b in zip(
        jax.tree.leaves((session.state.trainer, session.draft.params)),
        jax.tree.leaves((resumed.state.trainer, resumed.draft.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    again = session.state.trainer.pace
    assert int(again.num_tokens) < int(state.pace.num_tokens)  # of another regime
    assert 1 in [report.stride for report in session.reports[num_updates:]]
