# SPDX-License-Identifier: Apache-2.0
"""What `make test` leaves out of tests that are marked `crossed`."""

import itertools
from types import SimpleNamespace

import pytest
from conftest import _is_beyond_cover


def case(mode, tree, size, target):
    """A test's case: two parameters that go together, one alone, one of a fixture."""
    params = {"tree": tree, "size": size, "mode": mode, "target": target}
    together = ("tree, size", "mode")
    return SimpleNamespace(
        callspec=SimpleNamespace(params=params),
        iter_markers=lambda name: [
            pytest.mark.parametrize(n, []).mark for n in together
        ],
    )


def test_every_value_is_seen_and_pairs_that_go_together_are_one_value():
    axes = ("ab", [("chain", 3), ("static", 3), ("static", 5)], ("int8", "float32"))
    found = [(m, *pair, t) for m, pair, t in itertools.product(*axes)]
    is_beyond = _is_beyond_cover([case(*values) for values in found])
    kept = [v for v, beyond in zip(found, is_beyond, strict=True) if not beyond]
    assert {v[0] for v in kept} == {"a", "b"}
    assert {v[1:3] for v in kept} == set(axes[1])
    assert {v[3] for v in kept} == {"int8", "float32"}
    # No fewer would do, and it is far from all.
    assert len(kept) == 3
