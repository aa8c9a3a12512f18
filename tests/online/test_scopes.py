# SPDX-License-Identifier: Apache-2.0
"""Scopes have few numbers, bounded room, and nothing of one another's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.drafters.ngram import forget, init_memory, match_memory, remember
from ospec_jax.online import ring as rings
from ospec_jax.online.scopes import (
    MAX_SCOPES,
    NOBODY,
    Scope,
    Scopes,
    as_mask,
    make_owner,
    nobody,
)
from ospec_jax.types import Feedback

learn = jax.jit(remember)
add_window = jax.jit(rings.add_window)


def enrolled(*names):
    scopes = Scopes()
    for name in names:
        scopes = scopes.enroll(name).scopes
    return scopes


def padded(tokens, size=64):
    return jnp.asarray(list(tokens) + [0] * (size - len(tokens)), jnp.int32)


def after(*context, rows=1):
    recent = [-1] * (4 - len(context)) + list(context)
    return jnp.asarray(recent, jnp.int32)[None, None].repeat(rows, 0)


def test_names_get_numbers_and_keep_them():
    scopes = Scopes()
    numbers = {}
    for name in ("ada", "ada/x", "bob", "ada", "", "bob"):
        scopes, number, dropped = scopes.enroll(name)
        assert dropped is None
        assert numbers.setdefault(name, number) == number

    assert numbers[""] == NOBODY
    assert len(set(numbers.values())) == 4
    assert [one.name for one in scopes.known] == ["ada/x", "ada", "bob"]
    assert Scopes.from_json(scopes.to_json()) == scopes
    assert [one.name for one in scopes.within("ada")] == ["ada/x", "ada"]
    assert [one.name for one in scopes.within("ada/x")] == ["ada/x"]
    assert scopes.within("a") == ()


@pytest.mark.parametrize(
    "values", [7, [["a", 1]], [["a", 0, False]], [["a", 1, False], ["b", 1, False]]]
)
def test_what_no_checkpoint_says_of_scopes_is_refused(values):
    with pytest.raises(ConfigError, match="scopes"):
        Scopes.from_json(values)


def test_endless_tenants_push_out_their_own_and_no_busy_ones():
    scopes = enrolled("ada", "bob")
    for i in range(3 * MAX_SCOPES):
        scopes, number, dropped = scopes.enroll(f"bob/{i}", busy={2})
        assert 0 < number <= MAX_SCOPES
        assert dropped is None or dropped.name.startswith("bob/")

    assert len(scopes.known) == MAX_SCOPES
    assert scopes.find("ada").number == 1
    # Rows of his are decoded under this number: nobody else may get it.
    assert scopes.find("bob").number == 2
    # Somebody new is no flood, and takes the place of whom nobody missed for longest.
    scopes, number, dropped = scopes.enroll("eve", busy={1, 2})
    assert dropped.name.startswith("bob/")
    assert number == dropped.number
    assert scopes.find(dropped.name) is None


def test_a_number_that_is_free_but_busy_is_passed_over():
    scopes = enrolled("ada")
    scopes = scopes.without(scopes.within("ada"))
    assert scopes.enroll("bob", busy={1}).number == 2
    assert scopes.enroll("bob").number == 1


def test_room_is_shared_by_keys_and_within_each_by_its_tenants():
    shares = lambda scopes, name: (
        float(scopes.owner_of(scopes.find(name).number).share),
        float(scopes.owner_of(scopes.find(name).number).kin_share),
    )
    assert shares(enrolled("ada"), "ada") == (1, 1)
    assert shares(enrolled("ada", "bob"), "bob") == (0.5, 0.5)
    many = enrolled("ada", *(f"bob/{i}" for i in range(20)))
    assert shares(many, "ada") == (0.5, 0.5)
    assert shares(many, "bob/3") == (0.125, 0.5)
    kin = many.owner_of(many.find("bob/3").number).is_kin
    assert np.sum(kin) == 20
    # Nobody in particular is what there is without keys, with all the room.
    for left, right in zip(
        jax.tree.leaves(Scopes().owner_of(NOBODY)),
        jax.tree.leaves(nobody()),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_who_has_taught_is_known():
    scopes = enrolled("ada", "bob").having_taught(2)
    assert scopes.known == (Scope("ada", 1, False), Scope("bob", 2, True))


def test_each_row_finds_its_own_scope_alone():
    memory = init_memory(1024)
    for number, follower in ((1, 30), (2, 40)):
        owner = make_owner(number, {number})
        memory = learn(memory, padded([9, 1, 2, follower]), 0, 4, owner)

    scopes = jnp.asarray([0, 1, 2, 3], jnp.int32)
    token, level = match_memory(memory, after(9, 1, 2, rows=4), scopes)
    assert (level[:, 0] >= 0).tolist() == [False, True, True, False]
    assert token[1:3, 0].tolist() == [30, 40]
    memory = forget(memory, as_mask([1]))
    _, level = match_memory(memory, after(9, 1, 2, rows=4), scopes)
    assert (level[:, 0] >= 0).tolist() == [False, False, True, False]
    # Nothing of it is left for whoever gets the number, or reads the arrays.
    assert set(np.unique(memory.owners)) == {0, 2}
    assert np.count_nonzero(memory.fingerprints) == np.sum(memory.owners == 2)


def test_hashes_that_are_equal_by_chance_are_no_match():
    memory = learn(init_memory(64), padded([9, 1, 2, 30]), 0, 4, make_owner(1, {1}))
    # As if an n-gram of the second scope had the same hash.
    forged = memory.replace(owners=jnp.where(memory.owners == 1, 2, 0))
    scopes = jnp.ones(1, jnp.int32)
    assert int(match_memory(memory, after(9, 1, 2), scopes)[1][0, 0]) >= 0
    assert int(match_memory(forged, after(9, 1, 2), scopes)[1][0, 0]) == -1


def test_a_flood_of_ngrams_stays_within_its_share():
    rng = np.random.default_rng(0)
    texts = [padded(rng.integers(0, 10_000, 60)) for _ in range(40)]
    held_by = lambda memory, number: np.sum(
        (memory.owners == number) & (memory.counts > 0), axis=1
    )
    memory = init_memory(128)
    for text in texts[:10]:
        memory = learn(memory, text, 0, 60, make_owner(1, {1}))
    before = held_by(memory, 1)
    assert (before > 110).all()

    # Two tenants of one key, each with a quarter, and both with a half of the room.
    for text, number in zip(texts[10:], itertools.cycle([2, 3])):
        memory = learn(memory, text, 0, 60, make_owner(number, {2, 3}, 0.375, 0.5))
    assert (held_by(memory, 2) <= 48).all()
    assert (held_by(memory, 2) + held_by(memory, 3) == 64).all()
    assert (held_by(memory, 1) >= 64 - (128 - before)).all()

    # Without shares the flood takes nearly everything.
    for text in texts[10:]:
        memory = learn(memory, text, 0, 60, make_owner(2, {2}))
    assert (held_by(memory, 1) < 16).all()


def feedback(seed):
    values = jnp.full((1, 20, 2), seed, jnp.float16)
    tokens = jnp.full((1, 20), seed, jnp.int32)
    return Feedback(tokens, values, values, jnp.ones((1, 20)))


def ring_of(*windows):
    """A ring of eight windows, to which some were added: their tokens and owners."""
    ring = rings.init_ring(8, 4, 2, 2)
    for seed, owner in windows:
        ring = add_window(ring, feedback(seed), 0, 1, 20, owner)
    return ring


def held(ring):
    """Tokens of the windows that weigh anything, the newest first."""
    found = rings.newest(ring, 8, num_fresh=100)
    return found.feedback.tokens[found.weight.sum(axis=1) > 0, 0].tolist()


def test_a_flood_of_windows_replaces_its_own():
    ada, bob = make_owner(1, {1}, 0.5, 0.5), make_owner(2, {2}, 0.5, 0.5)
    few = [(seed, ada) for seed in range(1, 5)]
    flood = [(seed, bob) for seed in range(11, 31)]
    assert held(ring_of(*few, *flood)) == [30, 29, 28, 27, 4, 3, 2, 1]
    # Who was alone had it all, and gives way to the next.
    many = [(seed, make_owner(1, {1})) for seed in range(1, 10)]
    ring = ring_of(*many, *flood[:2])
    assert held(ring) == [12, 11, 9, 8, 7, 6, 5, 4]
    ring = add_window(ring, feedback(10), 0, 1, 20, ada)
    assert held(ring) == [10, 12, 11, 9, 8, 7, 6, 5]
    # Without shares the flood is all there is.
    free = make_owner(2, {2})
    assert 4 not in held(ring_of(*few, *[(seed, free) for seed, _ in flood]))


def test_fresh_windows_are_told_by_their_numbers_when_some_were_replaced():
    ada, bob = make_owner(1, {1}, 0.5, 0.5), make_owner(2, {2}, 0.5, 0.5)
    old = [(seed, ada) for seed in range(1, 5)]
    ring = ring_of(*old, *[(seed, bob) for seed in range(11, 17)])
    # Six came, and the first two of them were replaced by the last.
    assert rings.num_fresh_held(ring, 6) == 4
    fresh = rings.newest(ring, 8, num_fresh=6)
    assert np.sum(fresh.weight.sum(axis=1) > 0) == 4
    drawn = rings.draw(ring, jax.random.key(0), 64, num_fresh=6)
    assert set(drawn.feedback.tokens[:, 0].tolist()) == {1, 2, 3, 4}


def test_windows_of_one_scope_are_forgotten():
    ada, bob = make_owner(1, {1}), make_owner(2, {2})
    ring = ring_of((1, ada), (2, bob), (3, ada))
    ring = rings.forget(ring, as_mask([1]))
    assert held(ring) == [2]
    assert set(np.unique(ring.segments.feedback.tokens)) == {0, 2}
    assert set(np.unique(ring.owners)) == {0, 2}


def test_a_ring_that_was_written_in_turn_gets_its_numbers_back():
    for count in (0, 3, 8, 21):
        ring = ring_of(*[(seed, nobody()) for seed in range(count)])
        found = rings.numbers_in_turn(ring.num_added, ring.capacity)
        np.testing.assert_array_equal(found, ring.numbers)
