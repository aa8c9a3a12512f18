# SPDX-License-Identifier: Apache-2.0
"""Differences between drafts: exact up to their rank, and bound to their base."""

import dataclasses

import jax
import numpy as np
import pytest

from ospec_jax import load_draft
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import restore, shipped_drafts
from ospec_jax.storage import checkpoint, low_rank
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft

RANK = 4


@pytest.fixture(scope="module")
def target():
    return tiny_target()


# Differences are taken matrix by matrix, whatever family these are of.
@pytest.fixture(
    scope="module",
    params=[
        "eagle3",
        pytest.param("hydra", marks=pytest.mark.thorough),
        "dflash",
        pytest.param("peagle", marks=pytest.mark.thorough),
    ],
)
def made(request, target):
    """A draft, its record, and parameters that differ from its own by rank 4."""
    config = tiny_draft_config(target.config, 40, request.param)
    drafter = build_drafter(request.param, config, TreeConfig(num_steps=1))
    draft, rng = tiny_draft(drafter, config), np.random.default_rng(0)

    def change(leaf):
        if leaf.ndim == 1:
            return leaf + rng.normal(size=leaf.shape).astype(np.float32)
        left, right = (rng.normal(size=(n, RANK)) for n in leaf.shape)
        return leaf + (left @ right.T).astype(np.float32)

    return draft, Meta.create(target, config, request.param), jax.tree.map(
        change, draft.params
    )  # fmt: skip


def assert_close(left, right, **tolerance):
    close = lambda a, b: np.testing.assert_allclose(a, b, **tolerance)
    jax.tree.map(close, left, right)


def test_a_difference_is_exact_up_to_its_rank(made):
    draft, _, other = made
    whole = lambda rank: low_rank.add(
        draft.params, low_rank.subtract(other, draft.params, rank)
    )
    assert_close(whole(RANK), other, atol=1e-4)
    distance = lambda rank: sum(
        float(np.linalg.norm(np.subtract(a, b)))
        for a, b in zip(*map(jax.tree.leaves, (whole(rank), other)), strict=True)
    )
    assert distance(1) > distance(2) > distance(3) > 100 * distance(RANK)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    empty = low_rank.empty(draft.params, RANK)
    assert shapes(empty) == shapes(low_rank.subtract(other, draft.params, RANK))
    assert_close(low_rank.add(draft.params, empty), draft.params, atol=0)


def save_pair(made, tmp_path, storage="float32"):
    """A base, and another draft as its difference to that."""
    draft, meta, other = made
    base, expert = tmp_path / "base", tmp_path / "expert"
    checkpoint.save(base, 0, meta, draft)
    known = low_rank.fingerprint(restore(base).draft)
    meta = dataclasses.replace(
        meta, base=str(base), base_hash=known, rank=RANK, storage=storage
    )
    params = low_rank.subtract(other, draft.params, RANK)
    checkpoint.save(expert, 0, meta, Draft(params))
    return base, expert


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [pytest.param("float32", 1e-4, marks=pytest.mark.thorough), ("int8", 0.3)],
)
def test_an_expert_loads_as_a_draft(made, target, tmp_path, storage, tolerance):
    _, expert = save_pair(made, tmp_path, storage)
    loaded = load_draft(expert, target)
    assert_close(loaded.draft.params, made[2], atol=tolerance)
    np.testing.assert_array_equal(loaded.draft.token_ids, made[0].token_ids)
    assert (loaded.meta.base, loaded.meta.rank) == ("", 0)  # it stands alone now


def test_a_base_that_changed_or_is_gone_is_named(made, target, tmp_path):
    base, expert = save_pair(made, tmp_path)
    draft, meta, other = made
    checkpoint.save(base, 1, meta, draft.replace(params=other))
    with pytest.raises(CheckpointError, match=r"only its difference to .*base.* hash"):
        load_draft(expert, target)
    with pytest.raises(CheckpointError, match="made for tiny-259-0 with"):
        load_draft(expert, tiny_target(hidden_size=48, head_dim=12))


def test_fingerprints_tell_parameters_and_vocabularies_apart(made):
    draft, _, other = made
    changed = (
        draft.replace(params=other),
        draft.replace(token_ids=draft.token_ids + 1),
        draft.replace(params={"x": draft.params}),
    )
    known = {low_rank.fingerprint(d) for d in (draft, *changed)}
    assert len(known) == 4
    assert low_rank.fingerprint(draft) in known


def test_shipped_drafts_are_named(target):
    assert "eagle3" in shipped_drafts()
    assert restore("shipped").step == restore("shipped:eagle3").step
    with pytest.raises(ConfigError, match=r"'shipped:x' is shipped; .*shipped:eagle3"):
        load_draft("shipped:x", target)
    for name in shipped_drafts():
        with pytest.raises(CheckpointError, match="use a draft of this target"):
            load_draft(f"shipped:{name}", target)


def test_shipped_heads_see_what_they_were_trained_on():
    """Windows of 64 behind 128; alike, so that in a pool they share their step."""
    found = [restore(f"shipped:{name}").meta for name in shipped_drafts()]
    heads = [meta.draft for meta in found if meta.family == "eagle3"]
    assert heads
    assert {head.sliding_window for head in heads if head is not None} == {192}


def test_differences_that_go_round_in_circles_are_refused(made, tmp_path):
    draft, meta, other = made
    change = Draft(low_rank.subtract(other, draft.params, RANK))
    for name, base in (("a", "b"), ("b", "a"), ("own", "own")):
        base = str(tmp_path / base)
        whole = dataclasses.replace(meta, base=base, base_hash="0" * 16, rank=RANK)
        checkpoint.save(tmp_path / name, 0, whole, change)
    for name in ("a", "own"):
        with pytest.raises(CheckpointError, match="is itself, or a difference to it"):
            restore(tmp_path / name)
