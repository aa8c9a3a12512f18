# SPDX-License-Identifier: Apache-2.0
"""Losses: their gradients, their optima, and which positions they count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ospec_jax.config import ConfigError
from ospec_jax.learners.losses import (
    FORWARD_KL,
    LOSSES,
    Loss,
    accepted_lengths,
    feature_loss,
    jsd,
    named_loss,
    reverse_kl,
    unrolled_loss,
)

ROWS, LENGTH, VOCAB, STEPS = 2, 4, 5, 3


def draw(seed=0, share=1.0):
    """The target's probabilities `[b, t, q]`, of which `share` lies inside."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(VOCAB), (ROWS, LENGTH + STEPS - 1))
    logits = [jnp.asarray(rng.normal(size=(ROWS, LENGTH, VOCAB))) for _ in range(STEPS)]
    return jnp.asarray(share * probs, jnp.float32), logits


def everywhere(probs):
    return jnp.ones(probs.shape[:2])


@pytest.mark.parametrize("positions", ["all", "rejected"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_finite_differences(name, positions):
    probs, logits = draw(share=0.8)
    weight = jnp.asarray(np.random.default_rng(1).uniform(0.2, 1, probs.shape[:2]))
    loss = jax.jit(
        lambda *logits: unrolled_loss(
            list(logits), probs, weight, LOSSES[name], 0.7, positions
        )[0]
    )
    check_grads(loss, tuple(logits), order=1, modes="rev", atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_target_itself_is_the_optimum(name):
    probs, _ = draw()
    ideal = [jnp.log(probs[:, j : j + LENGTH]) for j in range(STEPS)]
    loss = jax.jit(
        lambda logits: unrolled_loss(
            logits, probs, everywhere(probs), LOSSES[name], decay=1.0
        )[0]
    )
    best = float(loss(ideal))
    entropy = -(probs * jnp.log(probs)).sum(-1)
    rows = jnp.stack([entropy[:, j : j + LENGTH] for j in range(STEPS)])
    share = {"forward_kl": 1.0, "jsd": 0.9}.get(name, 0.0)
    assert best == pytest.approx(share * float(rows.mean()), abs=1e-5)
    rng = np.random.default_rng(2)
    for size in (0.01, 0.3, 3.0):
        other = [x + size * rng.normal(size=x.shape) for x in ideal]
        assert float(loss(other)) > best
    if "kl" in name or name == "jsd":  # the others have a kink there
        for gradient in jax.grad(loss)(ideal):
            np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_reverse_kl_is_the_formula_and_bears_impossible_tokens():
    probs = jnp.asarray([[[0.7, 0.3, 0.0]]])
    logits = jnp.log(jnp.asarray([[[0.5, 0.4, 0.1]]]))
    q = np.array([0.5, 0.4, 0.1])
    p = np.array([0.7, 0.3, 1e-12])
    expected = float(np.sum(q * np.log(q / p)))
    assert float(reverse_kl(probs, logits)[0, 0]) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(lambda x: reverse_kl(probs, x).sum())(logits)
    assert np.all(np.isfinite(gradient))


def test_jsd_is_a_mean_of_both_directions():
    probs, logits = draw()
    probs = probs[:, :LENGTH]
    forward, reverse = FORWARD_KL.at_position(probs, logits[0]), reverse_kl(
        probs, logits[0]
    )  # fmt: skip
    default, half = named_loss("jsd"), named_loss("jsd", forward_share=0.5)
    np.testing.assert_allclose(
        default.at_position(probs, logits[0]), 0.9 * forward + 0.1 * reverse, rtol=1e-5
    )
    np.testing.assert_allclose(
        half.at_position(probs, logits[0]), (forward + reverse) / 2, rtol=1e-5
    )
    assert isinstance(default, Loss)
    np.testing.assert_allclose(
        jsd(probs, logits[0], 1.0), forward, rtol=1e-6
    )  # fmt: skip


def test_acceptance_length_is_the_expected_number_of_accepted_tokens():
    probs, logits = draw(share=0.9)
    loss, info = unrolled_loss(
        logits, probs, everywhere(probs), LOSSES["acceptance_length"], decay=1.0
    )
    q = [np.asarray(jax.nn.softmax(x)) for x in logits]
    p = np.asarray(probs)
    chances = [
        np.minimum(p[:, j : j + LENGTH], q[j]).sum(-1) for j in range(STEPS)
    ]  # fmt: skip
    expected = np.cumprod(chances, axis=0).sum(0).mean()
    assert STEPS * (1 - float(loss)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        info.acceptance, [c.mean() for c in chances], rtol=1e-5
    )  # fmt: skip


def test_a_path_through_an_unverified_row_is_none():
    probs, logits = draw()
    weight = everywhere(probs).at[:, 2].set(0.0)
    run = lambda probs: unrolled_loss(
        logits, probs, weight, LOSSES["acceptance_length"]
    )  # fmt: skip
    loss, info = run(probs)
    other, _ = run(probs.at[:, 2].set(0.3))
    assert float(loss) == float(other)
    # Rows 0, 1 and 3 begin paths; of depth 2 only row 3's avoids row 2.
    counts = [3 * ROWS, 2 * ROWS, 1 * ROWS]
    expected = sum(0.8**j * count for j, count in enumerate(counts))
    assert float(info.weight) == pytest.approx(expected, rel=1e-5)


def test_rejected_positions_are_where_a_chain_first_fails():
    probs, _ = draw()
    best = np.asarray(probs.argmax(-1))
    is_right = np.random.default_rng(3).uniform(size=(STEPS, ROWS, LENGTH)) < 0.6
    logits = []
    for j in range(STEPS):
        wanted = best[:, j : j + LENGTH]
        chosen = np.where(is_right[j], wanted, (wanted + 1) % VOCAB)
        logits.append(jnp.asarray(5.0 * np.eye(VOCAB)[chosen]))
    # Half of each distribution elsewhere would leave "the target's best" open.
    sharp = jnp.asarray(np.eye(VOCAB)[best] * 0.6 + 0.08, jnp.float32)
    loss, info = unrolled_loss(
        logits, sharp, everywhere(sharp), decay=0.5, positions="rejected"
    )  # fmt: skip
    total, scale, weight = 0.0, 0.0, 0.0
    before = np.ones((ROWS, LENGTH), bool)
    for j in range(STEPS):
        fails = before & ~is_right[j]
        before &= is_right[j]
        values = FORWARD_KL.at_position(sharp[:, j : j + LENGTH], logits[j])
        total += 0.5**j * float(np.asarray(values)[fails].mean() if fails.any() else 0)
        weight += 0.5**j * fails.sum()
        scale += 0.5**j
    assert float(loss) == pytest.approx(total / scale, rel=1e-5)
    assert float(info.weight) == pytest.approx(weight, rel=1e-5)
    np.testing.assert_allclose(info.agreement, is_right.mean((1, 2)), rtol=1e-5)


def test_a_draft_that_is_right_everywhere_gives_no_signal():
    probs, _ = draw()
    sharp = jnp.asarray(np.eye(VOCAB)[np.asarray(probs.argmax(-1))] * 0.9 + 0.02)
    sharp = sharp.astype(jnp.float32)
    ideal = [jnp.log(sharp[:, j : j + LENGTH]) for j in range(STEPS)]
    _, info = unrolled_loss(
        ideal, sharp, everywhere(sharp), positions="rejected"
    )  # fmt: skip
    assert float(info.weight) == 0.0


def test_unknown_losses_are_refused():
    with pytest.raises(ConfigError, match="unknown loss 'kl'; one of forward_kl"):
        named_loss("kl")


def test_fresh_windows_are_scored_as_if_they_were_alone():
    probs, logits = draw()
    weight = jnp.asarray(np.random.default_rng(1).uniform(0.2, 1, probs.shape[:2]))
    is_fresh = jnp.array([False, True])
    _, both = unrolled_loss(logits, probs, weight, is_fresh=is_fresh)
    _, alone = unrolled_loss([x[1:] for x in logits], probs[1:], weight[1:])
    assert float(both.fresh_loss) == pytest.approx(float(alone.loss), rel=1e-5)
    assert float(both.fresh_weight) == pytest.approx(float(alone.weight), rel=1e-5)
    assert float(alone.fresh_weight) == float(alone.weight)


def test_the_loss_of_states_is_square_below_one_and_linear_beyond():
    features = [jnp.array([[[0.4, 3.0], [0.0, 0.0]]]), jnp.array([[[0.5, 0.5]] * 2])]
    hidden = jnp.zeros((1, 3, 2))
    weight = jnp.array([[1.0, 1.0, 0.0]])
    first = ((0.5 * 0.4**2 + 2.5) / 2 + 0.0) / 2
    second = 0.5 * 0.5**2  # its last row, of no weight, is left out
    found = feature_loss(features, hidden, weight, decay=0.5)
    assert float(found) == pytest.approx((first + 0.5 * second) / 1.5, rel=1e-6)


def test_accepted_lengths_are_those_of_greedy_verification():
    """By a loop over starts: agreed until the first slip, or the first unknown row."""
    probs, logits = draw(seed=3)
    # Where the draft copies the target it agrees; elsewhere it may by chance.
    rows = [slice(depth, depth + LENGTH) for depth in range(STEPS)]
    logits[0] = logits[0].at[0].set(jnp.log(probs[0, rows[0]]))
    logits[1] = logits[1].at[0, :2].set(jnp.log(probs[0, 1:3]))
    weight = np.ones(probs.shape[:2], np.float32)
    weight[0, 2] = weight[1, 0] = 0

    expected = np.zeros(ROWS)
    for row in range(ROWS):
        for start in range(LENGTH):
            for depth in range(STEPS):
                best = np.argmax(probs[row, start + depth])
                is_right = np.argmax(logits[depth][row, start]) == best
                if not (is_right and weight[row, start + depth]):
                    break
                expected[row] += 1

    assert expected[0] > expected[1]
    expected /= weight[:, :LENGTH].sum(axis=1)
    found = accepted_lengths(logits, probs, jnp.asarray(weight))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    nothing = accepted_lengths(logits, probs, jnp.zeros_like(weight))
    np.testing.assert_array_equal(nothing, 0)
