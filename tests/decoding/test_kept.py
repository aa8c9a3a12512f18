# SPDX-License-Identifier: Apache-2.0
"""Which rows are kept, who finds them, and how much of a prompt they save."""

from typing import Any

import jax.numpy as jnp
import pytest

from ospec_jax.decoding.kept import KeptRows, RowCaches, start_behind
from ospec_jax.drafters.pool import Members
from ospec_jax.types import Draft

SLOT_BYTES = 4


def copy_of(capacity):
    cache: Any = jnp.zeros(capacity)
    return RowCaches(cache, (), None)


def never(capacity):
    pytest.fail(f"copied to {capacity} slots")


def rows(max_slots=64):
    return KeptRows(max_slots * SLOT_BYTES, (8, 16))


def add(kept, ids, scope=0, draft_number=0):
    kept.add(scope, ids, draft_number, copy_of)


def length_of(kept, ids, scope=0):
    found = kept.find(scope, ids)
    return 0 if found is None else found.num_tokens


def test_the_row_with_most_of_a_prompt_is_found():
    kept = rows()
    add(kept, [1, 2, 3])
    add(kept, [1, 2, 4, 5, 6])
    # The last common token is run again: who drafts from it must know the next one.
    assert length_of(kept, [1, 2, 4, 5, 6, 7]) == 4
    assert length_of(kept, [1, 2, 4, 5, 6]) == 4
    assert length_of(kept, [1, 2, 4, 9]) == 2
    assert length_of(kept, [1, 2, 3, 9]) == 2
    assert length_of(kept, [1, 9]) == 0
    assert length_of(kept, [9, 1, 2, 3]) == 0


def test_a_scope_finds_its_own_rows_alone():
    kept = rows()
    add(kept, [1, 2, 3, 4], scope=1)
    add(kept, [1, 2, 5], scope=2)
    assert length_of(kept, [1, 2, 3, 4, 5], scope=1) == 3
    assert length_of(kept, [1, 2, 3, 4, 5], scope=2) == 1
    assert length_of(kept, [1, 2, 3, 4, 5]) == 0

    kept.forget(1)
    assert length_of(kept, [1, 2, 3, 4, 5], scope=1) == 0
    assert length_of(kept, [1, 2, 5, 5], scope=2) == 2
    kept.forget()
    assert len(kept) == 0
    # Nor is a row kept that had begun before.
    kept.add(2, [1, 2, 5], 0, never)
    add(kept, [1, 2, 5], scope=2, draft_number=kept.draft_number(None))
    assert len(kept) == 1


def test_who_was_run_over_by_one_is_good_for_that_one():
    """In a pool: what the others of its members miss would be judged as theirs."""
    kept = rows()
    kept.add(0, [1, 2, 3, 4], 0, copy_of, only=1)
    lengths = [
        0 if found is None else found.num_tokens
        for found in (kept.find(0, [1, 2, 3, 4, 5], only) for only in (None, 0, 1))
    ]
    assert lengths == [0, 0, 3]

    # A turn that all have run over is good for each, and does not take another's place.
    kept.add(0, [1, 2, 3, 4, 5, 6], 0, copy_of)
    assert len(kept) == 2
    for only in (None, 0, 1):
        found = kept.find(0, [1, 2, 3, 4, 5, 6, 7], only)
        assert found is not None
        assert found.num_tokens == 5


def test_who_was_not_used_for_longest_goes():
    kept = rows(max_slots=24)
    for first in (1, 2, 3):
        add(kept, [first, 5, 6, 7])
    found = kept.find(0, [1, 5, 6, 7, 8])
    assert found is not None
    kept.use(found)
    # Looking alone is no use.
    assert length_of(kept, [2, 5, 6, 7, 8]) == 3
    add(kept, [4, *range(9)])
    # Beside a larger one there is room for one of three.
    assert [length_of(kept, [first, 5, 6, 7, 8]) for first in (1, 2, 3)] == [3, 0, 0]
    assert kept.num_bytes == 24 * SLOT_BYTES


def test_what_is_too_large_is_not_kept():
    kept = rows(max_slots=8)
    add(kept, [1, *range(12)])
    assert len(kept) == 0
    # Nor is it copied again.
    kept.add(0, [2, *range(12)], 0, never)
    kept.add(0, range(40), 0, never)
    KeptRows(0, (8,)).add(0, [1, 2], 0, never)
    add(kept, [1, 2, 3])
    assert len(kept) == 1


def test_a_turn_takes_the_place_of_the_one_before():
    kept = rows()
    add(kept, [1, 2, 3])
    add(kept, [1, 2, 3, 4, 5])
    assert len(kept) == 1
    # What is there already is not copied.
    kept.add(0, [1, 2, 3, 4], 0, never)
    assert length_of(kept, [1, 2, 3, 4, 5, 6]) == 4
    # Two answers to one prompt are two rows.
    add(kept, [1, 2, 9])
    assert len(kept) == 2


def draft_of(layer, head, memory=None):
    return Draft({"layer": {"kernel": layer}, "lm_head": {"kernel": head}}, memory)


def test_rows_are_good_for_the_parameters_that_wrote_them():
    kept = rows()
    layer, other, head = jnp.zeros(2), jnp.zeros(2), jnp.zeros(3)
    number = kept.draft_number(draft_of(layer, head))
    add(kept, [1, 2, 3, 4], draft_number=number)
    # A draft's projection writes nothing into its cache.
    assert kept.draft_number(draft_of(layer, jnp.ones(3))) == number
    assert len(kept) == 1

    changed = kept.draft_number(draft_of(other, head))
    assert changed != number
    assert len(kept) == 0
    # Nor is a row kept that began with the draft of before.
    add(kept, [1, 2, 3, 4], draft_number=number)
    assert len(kept) == 0
    add(kept, [1, 2, 3, 4], draft_number=changed)
    assert len(kept) == 1
    kept.draft_number(Draft(Members((draft_of(layer, head),))))
    assert len(kept) == 0


@pytest.mark.parametrize(
    ("num_kept", "num_prompt", "capacity", "start"),
    [
        (0, 100, 256, 0),
        # Of 100 tokens in chunks of 64 two are run, from 30 on still two.
        (30, 100, 256, 0),
        (36, 100, 256, 36),
        (99, 100, 256, 99),
        # The padded chunk must end where the cache does.
        (192, 200, 256, 192),
        (193, 200, 256, 192),
        (60, 64, 64, 0),
    ],
)
def test_a_start_saves_a_chunk_and_fits(num_kept, num_prompt, capacity, start):
    assert start_behind(num_kept, num_prompt, capacity, 64) == start
