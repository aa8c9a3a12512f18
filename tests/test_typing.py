# SPDX-License-Identifier: Apache-2.0
"""How what holds arrays is shown: by shapes and sizes, in a few lines."""

import dataclasses
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

import ospec_jax
from ospec_jax import Session, load_draft
from ospec_jax.config import TreeConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.typing import short_repr, size_of, struct


@struct
class Pair:
    left: jax.Array
    right: dict
    many: tuple = ()


def test_arrays_are_shown_by_their_shapes():
    pair = Pair(np.zeros((2, 3), np.int8), {"a": np.zeros(5)}, tuple(range(20)))
    assert repr(pair) == (
        "Pair(left=int8[2,3], right={1 entries, 5 numbers}, "
        "many=(0, 1, 2, 3, 4, 5, 6, 7, ... 20 in all))"
    )


def test_sizes_are_in_words():
    assert size_of({"a": np.zeros(1200)}) == "1,200 numbers"
    assert size_of([np.zeros((1000, 1500))]) == "1.5 million numbers"


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def test_what_users_hold_is_shown_in_a_few_lines(target):
    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    params = tiny_draft(drafter, config)
    draft = LoadedDraft(params, Meta.create(target, config))
    session = Session(target, draft, learner="gradient")
    [result] = session.generate("Hi", 100)
    shown = [target, draft, params, session, session.state, session.served_draft]

    for one in [*shown, result, session.memory, load_draft("ngram", target)]:
        assert len(repr(one)) < 4000, type(one)
    for one in shown[:2]:
        assert len(repr(one)) < 200

    assert repr(target).startswith("Target('tiny-259-0', float32, ")
    assert repr(draft).startswith("LoadedDraft('eagle3' for 'tiny-259-0', ")
    assert "learner='gradient'" in repr(session)
    assert result.precision == "float32"


def test_every_record_of_arrays_is_shown_by_shapes():
    """A new one that shows its numbers would print megabytes."""
    names = [m.name for m in pkgutil.walk_packages(ospec_jax.__path__, "ospec_jax.")]
    modules = [importlib.import_module(n) for n in names if "__main__" not in n]
    records = {
        found
        for module in modules
        for _, found in inspect.getmembers(module, inspect.isclass)
        if dataclasses.is_dataclass(found) and hasattr(found, "_flax_dataclass")
    }
    assert len(records) > 30
    assert [r for r in records if r.__repr__ is not short_repr] == []
