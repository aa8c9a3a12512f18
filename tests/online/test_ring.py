# SPDX-License-Identifier: Apache-2.0
"""The ring holds the newest windows, and knows what was verified."""

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.online.ring import (
    add_window,
    draw,
    init_ring,
    newest,
    window_starts,
)
from ospec_jax.types import Feedback

CAPACITY, SIZE = 4, 9


def feedback(num_tokens=20, seed=0):
    rng = np.random.default_rng(seed)
    floats = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float16)
    return Feedback(
        tokens=jnp.asarray(100 * seed + np.arange(num_tokens)[None], jnp.int32),
        taps=floats(1, num_tokens, 6),
        hidden=floats(1, num_tokens, 3),
        logsumexp=jnp.ones((1, num_tokens)),
    )


def test_window_starts_cover_an_answer_once():
    starts = window_starts(num_prompt=10, num_recorded=80, num_context=64, window=32)
    assert starts == [8 - 64, 40 - 64, 72 - 64]


def test_window_copies_positions_and_weighs_verified_ones():
    ring = init_ring(CAPACITY, SIZE, 6, 3)
    source = feedback()
    ring = add_window(ring, source, jnp.int32(-2), 4, 6)
    window = jax.tree.map(lambda x: x[0], ring.segments)
    np.testing.assert_array_equal(window.feedback.tokens[2:], np.arange(7))
    np.testing.assert_array_equal(window.feedback.taps[2:], source.taps[0, :7])
    # Positions -2 .. 6: the prompt's last token (3) to the last recorded one (5).
    np.testing.assert_array_equal(window.weight, [0, 0, 0, 0, 0, 1, 1, 1, 0])


def test_newest_windows_come_first_and_stale_ones_weigh_nothing():
    ring = init_ring(CAPACITY, SIZE, 6, 3)
    for seed in range(6):
        ring = add_window(ring, feedback(seed=seed), jnp.int32(0), 1, 20)
    batch = newest(ring, 3, num_fresh=2)
    np.testing.assert_array_equal(batch.feedback.tokens[:, 0], [500, 400, 300])
    np.testing.assert_array_equal(batch.weight.sum(axis=1) > 0, [True, True, False])


def test_empty_ring_weighs_nothing():
    ring = init_ring(CAPACITY, SIZE, 6, 3)
    assert float(newest(ring, 3, num_fresh=3).weight.sum()) == 0.0
    drawn = draw(ring, jax.random.key(0), 3)
    assert float(drawn.weight.sum()) == 0.0


def test_windows_behind_newer_ones_are_reached():
    ring = init_ring(CAPACITY, SIZE, 6, 3)
    for seed in range(6):
        ring = add_window(ring, feedback(seed=seed), jnp.int32(0), 1, 20)
    batch = newest(ring, 3, num_fresh=6, num_newer=2)
    np.testing.assert_array_equal(batch.feedback.tokens[:2, 0], [300, 200])
    # The ring holds four: nothing is trained on twice.
    np.testing.assert_array_equal(batch.weight.sum(axis=1) > 0, [True, True, False])


def test_old_windows_are_drawn_from_behind_the_fresh_ones():
    ring = init_ring(CAPACITY, SIZE, 6, 3)
    for seed in range(6):
        ring = add_window(ring, feedback(seed=seed), jnp.int32(0), 1, 20)
    drawn = draw(ring, jax.random.key(0), 64, num_fresh=2)
    assert set(drawn.feedback.tokens[:, 0].tolist()) == {200, 300}
    for num_fresh in (4, 9):  # as many as the ring holds, or more
        drawn = draw(ring, jax.random.key(0), 3, num_fresh)
        assert float(drawn.weight.sum()) == 0.0
