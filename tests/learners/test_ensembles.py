# SPDX-License-Identifier: Apache-2.0
"""Ensembles of step sizes find the right one, and cost what they should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratics import Counter, chasing, drifting, points, run, shifting

from ospec_jax.control import weighting
from ospec_jax.learners.base import restarted
from ospec_jax.learners.ensemble import averaged, ensemble, step_grid
from ospec_jax.learners.shared_ensemble import shared_ensemble

STEPS = step_grid(0.1, 3.0, 5)
BEST = 3  # of (0, *STEPS), where points drift: the middle of the grid
FORMS = {"independent": ensemble, "shared": shared_ensemble}
pytestmark = pytest.mark.parametrize("form", FORMS)


def built(form, objective=None, rule=None, **kwargs):
    return FORMS[form](
        objective or chasing(),
        optax.sgd(1.0),
        STEPS,
        rule or weighting.hedge(),
        **kwargs,
    )


def fixed_losses(stream):
    """Mean loss of each step size by itself, the static draft's first."""
    played, steps = np.zeros((1 + len(STEPS), 4)), np.array([0.0, *STEPS])[:, None]
    losses = []
    for batch in stream:
        gaps = played[:, None] - batch
        losses.append(0.5 * (gaps**2).sum(-1).mean(-1))
        played = played - steps * gaps.mean(1)
    return np.mean(losses, axis=0)


def test_an_interior_step_wins_where_it_is_best_in_hindsight(form):
    stream = drifting()
    fixed = fixed_losses(stream)
    assert np.argmin(fixed) == BEST
    losses, infos, *_ = run(built(form), stream)
    weights = infos.extra["expert_weights"]
    assert np.all(np.argmax(weights[100:].mean(0)) == BEST)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    assert losses.mean() < 1.02 * fixed.min()


def test_under_shifts_it_beats_every_fixed_step(form):
    """A long step after a jump, a short one in between."""
    stream = shifting(noise=2.0, batch=4)
    kwargs = {} if form == "independent" else {"num_scored": 4}
    losses, *_ = run(built(form, rule=weighting.hedge(3.0, 0.8), **kwargs), stream)
    assert losses.mean() < 0.995 * fixed_losses(stream).min()


def test_gradients_are_one_for_all_or_one_for_each(form):
    counter = Counter()
    run(built(form, chasing(counter)), drifting(num_rounds=7))
    jax.effects_barrier()
    assert counter.gradients == 7 * (1 if form == "shared" else len(STEPS))


def test_a_draft_that_cannot_be_improved_stays(form):
    """Points around the static draft: whoever moves only follows noise."""
    stream = np.random.default_rng(0).normal(size=(200, 2, 4))
    _, infos, *_ = run(built(form), stream)
    late = infos.extra["expert_weights"][100:].mean(0)
    assert np.argmax(late) == 0
    assert late[0] + late[1] > 0.7
    assert late[-1] < 0.02


def test_the_static_draft_never_moves(form):
    learner = built(form)
    start = {"w": jnp.asarray([1.0, -1.0])}
    state = learner.init(start)
    np.testing.assert_array_equal(state.params["w"], start["w"])
    for value in ([5.0, 5.0], [9.0, -9.0]):
        state, _ = learner.update(state, points([value]), None, None)
    np.testing.assert_array_equal(state.opt_state.anchor["w"], start["w"])
    if form == "shared":
        assert state.opt_state.shifts["w"].shape[0] == len(STEPS)
    elsewhere = {"w": jnp.asarray([3.0, 3.0])}
    again = restarted(learner, state, elsewhere)
    np.testing.assert_array_equal(again.params["w"], elsewhere["w"])
    np.testing.assert_array_equal(again.opt_state.anchor["w"], start["w"])
    assert int(again.num_updates) == 2
    inside = again.opt_state
    experts = inside.experts["w"] if form == "independent" else (
        inside.anchor["w"] + inside.shifts["w"]
    )  # fmt: skip
    np.testing.assert_allclose(experts, np.full((len(STEPS), 2), 3.0))


def test_what_is_played_is_the_weighted_average(form):
    stream = drifting(num_rounds=20)
    _, infos, state, path = run(built(form), stream)
    weights, inside = np.asarray(state.opt_state.weights), state.opt_state
    if form == "shared":
        experts = inside.anchor["w"] + np.pad(inside.shifts["w"], ((1, 0), (0, 0)))
    else:
        experts = np.concatenate([inside.anchor["w"][None], inside.experts["w"]])
    np.testing.assert_allclose(state.params["w"], weights @ experts, rtol=1e-4)
    steps = np.linalg.norm(np.diff(path, axis=0, prepend=0), axis=1)
    assert infos.extra["path_length"][-1] == pytest.approx(steps.sum(), rel=1e-4)
    assert infos.extra["expert_losses"].shape == (20, 1 + len(STEPS))


def test_losses_are_those_before_training(form):
    learner = built(form)
    state = learner.init({"w": jnp.zeros(2)})
    state, info = learner.update(state, points([[2.0, 0.0]]), None, None)
    np.testing.assert_allclose(info.extra["expert_losses"], 2.0)  # all at the start
    state, info = learner.update(state, points([[2.0, 0.0]]), None, None)
    losses = info.extra["expert_losses"]
    assert losses[0] == 2.0
    assert np.all(np.diff(losses) < 0)


def test_tables_of_integers_are_not_averaged(form):
    ids = jnp.asarray([3, 5], jnp.int32)
    anchor = {"w": jnp.zeros(2), "ids": ids}
    experts = {"w": jnp.ones((2, 2)), "ids": jnp.stack([ids + 1, ids + 2])}
    mean = averaged(jnp.asarray([0.5, 0.25, 0.25]), anchor, experts)
    np.testing.assert_array_equal(mean["ids"], ids)
    assert mean["ids"].dtype == jnp.int32
    np.testing.assert_allclose(mean["w"], 0.5)


def test_released_rules_are_what_they_say(form):
    """Softmax of the last round's mean loss; experts begin a round at the average."""
    rule = weighting.last_chunk(temperature=0.5)
    first, second = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 1.0])
    state, weights = rule.observe(weighting.init_meta(2), first, jnp.ones(2) / 2)
    np.testing.assert_allclose(weights, jax.nn.softmax(-first / 0.5), rtol=1e-6)
    state, weights = rule.observe(state, second, weights)
    mean = (first + second) / 2
    np.testing.assert_allclose(weights, jax.nn.softmax(-mean / 0.5), rtol=1e-6)
    _, weights = rule.observe(rule.begin(state), second, weights)
    np.testing.assert_allclose(weights, jax.nn.softmax(-second / 0.5), rtol=1e-6)
    if form == "shared":
        return
    learner = built(form, rule=rule, has_static=False, is_reset=True)
    state = learner.init({"w": jnp.zeros(2)})
    assert state.opt_state.weights[0] == 0
    for _ in range(2):
        state, _ = learner.update(state, points([[1.0, 4.0]]), None, None)
    prior_free = state.opt_state.experts["w"]
    assert np.ptp(prior_free[:, 0]) > 0.1
    begun = learner.begin(state)
    for expert in begun.opt_state.experts["w"]:
        np.testing.assert_array_equal(expert, state.params["w"])


def test_hedge_does_not_mind_the_scale_of_losses(form):
    rng = np.random.default_rng(0)
    losses = rng.uniform(size=(30, 4)) + [0.3, 0.0, 0.2, 0.4]

    def play(scale, offset):
        state, weights = weighting.init_meta(4), jnp.full(4, 0.25)
        for row in losses:
            row = jnp.asarray(scale * row + offset, jnp.float32)
            state, weights = rule.observe(state, row, weights)
        return weights

    rule = weighting.hedge(1.0)
    found = play(1.0, 0.0)
    assert np.argmax(found) == 1
    np.testing.assert_allclose(play(50.0, 7.0), found, rtol=1e-3)
    spread = np.sqrt(np.mean(np.ptp(losses, axis=1) ** 2))
    expected = jax.nn.softmax(jnp.asarray(-losses.sum(0) / spread, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_experts_in_a_ball(form):
    if form == "independent":
        return
    learner = built(form, radius=0.5)
    state = learner.init({"w": jnp.zeros(2)})
    for _ in range(5):
        state, _ = learner.update(state, points([[30.0, 40.0]]), None, None)
    norms = np.linalg.norm(state.opt_state.shifts["w"], axis=-1)
    assert np.all(norms <= 0.5 + 1e-6)
    np.testing.assert_allclose(state.opt_state.shifts["w"][-1], [0.3, 0.4], rtol=1e-5)


@pytest.mark.parametrize("rule", [weighting.hedge(), weighting.last_chunk()])
def test_what_was_trained_on_before_trains_but_is_not_heard(form, rule):
    """A batch of a later epoch: experts move on, what is known of them stays."""
    kwargs = {} if form == "independent" else {"round_length": 2}
    learner = built(form, rule=rule, **kwargs)
    update = jax.jit(learner.update)
    learn = lambda state, is_fresh: update(
        state, points([[2.0, 0.0], [1.0, 1.0]], is_fresh=[is_fresh] * 2), None, None
    )
    state = learner.init({"w": jnp.zeros(2)})
    for _ in range(4):
        state, _ = learn(state, True)
    again = state
    for _ in range(4):
        again, info = learn(again, False)
        for name in ("meta", "weights"):
            old, new = (getattr(x.opt_state, name) for x in (state, again))
            jax.tree.map(np.testing.assert_array_equal, old, new)
        assert info.extra["step_norm"] > 0
    heard, info = learn(again, True)
    assert np.any(heard.opt_state.weights != state.opt_state.weights)
    assert heard.opt_state.meta.count == state.opt_state.meta.count + 1
    assert np.ptp(info.extra["expert_losses"]) > 0
    assert update._cache_size() == 1


def test_rehearsed_windows_of_a_mixed_batch_are_not_heard(form):
    kwargs = {} if form == "independent" else {"num_scored": 2}
    learner = built(form, **kwargs)
    state = learner.init({"w": jnp.zeros(2)})
    state, _ = learner.update(state, points([[2.0, 0.0]] * 2), None, None)
    learn = lambda old: learner.update(
        state, points([[2.0, 0.0], old], is_fresh=[True, False]), None, None
    )  # fmt: skip
    (one, first), (other, second) = learn([1.0, 1.0]), learn([9.0, -9.0])
    for a, b in (
        (one.opt_state.weights, other.opt_state.weights),
        (first.extra["expert_losses"], second.extra["expert_losses"]),
    ):
        np.testing.assert_array_equal(a, b)
    assert np.any(one.params["w"] != other.params["w"])


def test_a_round_waits_for_a_fresh_batch_to_end_with(form):
    """Or where it always ends in a later epoch experts would never be judged."""
    if form == "independent":
        return
    learner = built(form, round_length=4)
    update = jax.jit(lambda state, batch: learner.update(state, batch, None, None))
    state, counts = learner.init({"w": jnp.zeros(2)}), []
    for i in range(16):
        batch = points([[2.0, i % 3]], is_fresh=[i % 4 < 2])  # two epochs of two
        state, _ = update(state, batch)
        counts.append(int(state.opt_state.meta.count))
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
