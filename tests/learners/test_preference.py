# SPDX-License-Identifier: Apache-2.0
"""The rule of preferences by token, against its formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import ConfigError, LearnerConfig
from ospec_jax.learners.preference import preference_learner
from ospec_jax.learners.projection import HeadSamples

WIDTH, VOCAB = 12, 9


def samples_of(inputs, labels, choices, is_real=None):
    is_real = jnp.ones(len(labels), bool) if is_real is None else is_real
    none = jnp.zeros((len(labels), 0))
    labels = jnp.asarray(labels)
    return HeadSamples(inputs, none, labels, is_real, choices=jnp.asarray(choices))


def drawn(seed, num_samples):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(0.3 * rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(num_samples, WIDTH)), jnp.float32)
    return kernel, inputs


def started(kernel, **settings):
    learner = preference_learner(**settings)
    state = learner.init(kernel).replace(reference=jnp.copy(kernel))
    return jax.jit(learner.update), state


def test_the_step_is_the_losses_gradient():
    """Along the input, where nothing is preconditioned; by beta and the curvature."""
    kernel, inputs = drawn(0, 1)
    beta, rate = 0.7, 0.9
    update, state = started(
        kernel, rate=rate, beta=beta, rejected_weight=1.0, damping=1e6, patience=1e9
    )
    moved = 0.2 * jnp.asarray(np.random.default_rng(1).normal(size=kernel.shape))
    state = state.replace(kernel=kernel + moved)
    x, reference, now = (
        np.asarray(a, float) for a in (inputs[0], kernel, kernel + moved)
    )

    def loss(matrix):
        gap = lambda rows: (rows[4] - rows[2]) @ x
        return np.logaddexp(0.0, -beta * (gap(matrix) - gap(reference)))

    expected = np.zeros(kernel.shape)
    for place in np.ndindex(*kernel.shape):
        nudge = np.zeros(kernel.shape)
        nudge[place] = 1e-5
        expected[place] = (loss(now + nudge) - loss(now - nudge)) / 2e-5
    expected *= -2 * rate / (beta * x @ x)

    after, rows, info = update(state, samples_of(inputs, [4], [2]))
    np.testing.assert_allclose(after.kernel - state.kernel, expected, atol=1e-5)
    assert sorted(rows.tolist()) == [2, 4]
    np.testing.assert_allclose(info.loss, loss(now), rtol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_a_fresh_pair_moves_by_a_nat_and_later_ones_by_less(weight):
    kernel, inputs = drawn(2, 1)
    update, state = started(kernel, rejected_weight=weight, patience=1e9)
    samples = samples_of(inputs, [4], [2])
    margins, expected = [0.0], [0.0]
    for _ in range(4):
        state, _, _ = update(state, samples)
        grown = np.asarray((state.kernel - kernel) @ inputs[0])
        np.testing.assert_allclose(weight * grown[4], -grown[2], rtol=1e-4)
        assert not np.any(grown[[0, 1, 3, 5, 6, 7, 8]])
        margins.append(grown[4] - grown[2])
        step = 2 / (1 + np.exp(expected[-1]))
        expected.append(expected[-1] + (1 + weight) * step)
    np.testing.assert_allclose(margins, expected, rtol=1e-4)
    assert expected[1] == 1 + weight


def test_a_pair_beyond_the_cap_moves_nothing():
    kernel, inputs = drawn(3, 1)
    update, state = started(kernel, margin_cap=0.5)
    samples = samples_of(inputs, [4], [2])
    once, _, _ = update(state, samples)
    twice, _, info = update(once, samples)
    assert np.any(once.kernel != kernel)
    np.testing.assert_array_equal(twice.kernel, once.kernel)
    assert float(info.step_norm) == 0.0


def test_only_pairs_inside_the_vocabulary_move_anything():
    """Not a draft that was right, a foreign token, one unknown, or what is not real."""
    kernel, inputs = drawn(4, 5)
    update, state = started(kernel)
    is_real = jnp.asarray([True, True, True, True, False])
    labels, choices = [3, -1, 5, 6, 7], [3, 1, -1, 8, 0]
    after, _, info = update(state, samples_of(inputs, labels, choices, is_real))
    changed = np.flatnonzero(np.any(np.asarray(after.kernel != kernel), axis=1))
    assert changed.tolist() == [6, 8]
    assert int(info.num_samples) == 4
    assert float(info.agreement) == pytest.approx(0.25)
    np.testing.assert_allclose(info.loss, np.log(2), rtol=1e-5)


def test_pairs_of_one_token_add_up_and_shorten_its_later_steps():
    kernel, inputs = drawn(5, 3)
    update, state = started(kernel, rejected_weight=0.5, patience=4.0)
    labels, choices = [1, 1, 5], [2, 6, 1]
    after, _, info = update(state, samples_of(inputs, labels, choices))
    moved = np.asarray(after.kernel - kernel)
    np.testing.assert_allclose(info.step_norm, np.linalg.norm(moved), rtol=1e-4)
    # Three pairs name token 1, twice as the target's, with an error of 1 each.
    np.testing.assert_allclose(
        np.asarray(after.energy)[[1, 2, 6, 5]], [2.25, 0.25, 0.25, 1.0]
    )
    lone, _, _ = update(state, samples_of(inputs[:1], [1], [2]))
    worn, _, _ = update(after.replace(kernel=kernel), samples_of(inputs[:1], [1], [2]))
    lengths = [
        np.linalg.norm(np.asarray(x.kernel - kernel), axis=1) for x in (lone, worn)
    ]
    ratio = 0.5 * np.sqrt(1 + 0.999 * 2.25 / 4) / np.sqrt(1 + 0.999 * 0.25 / 4)
    assert lengths[1][2] / lengths[1][1] == pytest.approx(ratio, rel=1e-3)
    assert lengths[0][2] / lengths[0][1] == pytest.approx(0.5, rel=1e-4)


def test_without_a_reference_all_pairs_are_fresh():
    kernel, inputs = drawn(6, 1)
    learner = preference_learner(patience=1e9, margin_cap=0.1)
    update, state = jax.jit(learner.update), learner.init(kernel)
    for count in range(1, 4):
        state, _, _ = update(state, samples_of(inputs, [4], [2]))
        grown = np.asarray((state.kernel - kernel) @ inputs[0])
        assert grown[4] == pytest.approx(count, rel=1e-4)


def test_an_update_that_is_not_finite_is_none():
    kernel, inputs = drawn(7, 3)
    update, state = started(kernel)
    samples = samples_of(inputs, [1, 2, 3], [4, 5, 6])
    state, _, info = update(state, samples)
    assert info.num_refused == 0
    for value in (np.nan, np.inf):
        bad = samples.replace(inputs=inputs.at[1, 3].set(value))
        after, _, info = update(state, bad)
        assert (int(info.num_refused), float(info.step_norm)) == (1, 0.0)
        jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; use above 0"),
        ({"rejected_weight": 1.5}, "rejected_weight is 1.5; use 0 to 1"),
        ({"margin_cap": -1.0}, "margin_cap is -1.0; use above 0"),
        ({"reference_answers": -1}, "reference_answers is -1; use 0 or more"),
        ({"softmax_every": -2}, "softmax_every is -2; use 0 or more"),
        ({"loss": "jsd"}, "'preference' does not read loss"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        LearnerConfig("preference", **setting)
