# SPDX-License-Identifier: Apache-2.0
"""The tokens that a draft can propose, and how it is given more of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.distill.vocabulary import frequent_tokens, widen
from ospec_jax.drafters.base import dequantized
from ospec_jax.drafters.registry import FAMILIES, build_drafter
from ospec_jax.loading import LoadedDraft, new_draft
from ospec_jax.models.llama import head_table
from ospec_jax.replay.store import FeedbackStore, Recording, write_shard
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft

PROMPTS = ([5, 5, 5, 7], [9])
ANSWERS = ([3, 3, 4], [4, 4, 2, 200])


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=2)


@pytest.fixture
def store(tmp_path):
    recordings = []
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = np.array(prompt + answer, np.int32)
        arrays = {
            "tokens": ids,
            "taps": np.zeros((len(ids), 4), np.float16),
            "hidden": np.zeros((len(ids), 4), np.float16),
            "logsumexp": np.zeros(len(ids), np.float32),
        }
        recordings.append(Recording(str(i), "a", len(prompt), arrays))
    write_shard(tmp_path, 0, recordings)
    return FeedbackStore(tmp_path)


def loaded(target, size=12, family="eagle3"):
    config = tiny_draft_config(target.config, size, family)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config, family))


@pytest.mark.parametrize(
    ("count", "kept", "expected"),
    [
        (2, None, [3, 4]),
        # 2 and 200 come as often: the lower id wins.
        (3, None, [2, 3, 4]),
        # Behind all answers' tokens, the prompts', then those that never came.
        (6, None, [2, 3, 4, 5, 7, 200]),
        (8, None, [0, 2, 3, 4, 5, 7, 9, 200]),
        (3, [100, 150], [4, 100, 150]),
    ],
)
def test_frequent_tokens(store, count, kept, expected):
    found = frequent_tokens(store, 259, count, kept and np.array(kept))
    assert found.tolist() == expected


@pytest.mark.parametrize("family", ["eagle3", "hydra", "dflash", "peagle"])
def test_old_tokens_keep_their_rows_and_new_ones_are_the_most_frequent(
    target, store, family
):
    draft = loaded(target, family=family)
    wider = widen(draft, target, store, 16)
    old_ids = draft.draft.token_ids
    ids = wider.draft.token_ids
    assert wider.architecture.draft_vocab_size == len(ids) == 16
    assert np.all(np.diff(ids) > 0)
    assert set(ids.tolist()) >= {*old_ids.tolist()}
    wanted = [i for i in (3, 4, 2, 200, 5, 7, 9) if i not in old_ids.tolist()]
    assert set(ids.tolist()) >= set(wanted[:4])

    row_of = lambda d: dict(
        zip(
            d.token_ids.tolist(), np.asarray(d.params["lm_head"]["kernel"]), strict=True
        )
    )
    before = row_of(draft.draft)
    after = row_of(wider.draft)
    for token, row in before.items():
        np.testing.assert_array_equal(after[token], row)
    tables = ("lm_head", "bigram_out")
    others = lambda d: {k: v for k, v in d.params.items() if k not in tables}
    assert others(wider.draft) == others(draft.draft)
    if family == "dflash":  # of a new token nobody knows what it follows
        bias = np.asarray(wider.draft.params["bigram_out"]["kernel"])
        is_old = np.isin(ids, old_ids)
        known = draft.draft.params["bigram_out"]["kernel"]
        np.testing.assert_array_equal(bias[is_old], known)
        assert np.any(bias[is_old])
        assert not np.any(bias[~is_old])


def test_new_rows_are_mapped_as_the_old_ones_were(target, store):
    draft = loaded(target, 100)
    table = np.asarray(dequantized(head_table(target.params)))
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0]
    params = draft.draft.params | {
        "lm_head": {"kernel": jnp.asarray(table[draft.draft.token_ids] @ turn)}
    }
    turned = dataclasses.replace(draft, draft=Draft(params, draft.draft.token_ids))
    wider = widen(turned, target, store, 120)
    expected = table[wider.draft.token_ids] @ turn
    found = wider.draft.params["lm_head"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_as_many_tokens_as_before_change_nothing(target, store):
    draft = loaded(target)
    assert widen(draft, target, store, 12) is draft


@pytest.mark.parametrize(
    ("size", "message"),
    [(11, "of 11 tokens .* has 12 and its target 259"), (260, "260")],
)
def test_other_sizes_are_refused(target, store, size, message):
    with pytest.raises(ConfigError, match=message):
        widen(loaded(target), target, store, size)


def test_drafts_of_all_tokens_are_refused(target, store):
    for draft in (loaded(target, 0), new_draft(FAMILIES["ngram"], target)):
        with pytest.raises(ConfigError, match="no vocabulary of its own"):
            widen(draft, target, store, 200)
