# SPDX-License-Identifier: Apache-2.0
"""One layer over stacked weights computes what separate layers do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import TreeConfig
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.drafters.self_draft import self_draft
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import scan_target
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft

VOCAB, CAPACITY = 16, 32
TREE = TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12)
PROMPTS = [(1, 2, 3), tuple(np.arange(70) % VOCAB), (5, 4)]


def one_pass(target, taps, rows=2):
    config, numerics = target.config, target.numerics
    run = jax.jit(llama.build(config, numerics, taps))
    cache = llama.init_cache(config, numerics, rows, CAPACITY)
    tokens = jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    starts = jnp.asarray([0, 7])
    positions = starts[:, None] + jnp.arange(4)
    bias = kv.causal_bias(starts, 4, CAPACITY)
    hidden, taps, cache = run(target.params, tokens, positions, bias, cache, starts)
    kept = kv.keep_path(cache, starts, jnp.asarray([[0, 2], [0, 3]]))
    return llama.target_logits(target.params, hidden, numerics), taps, kept


@pytest.mark.crossed
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("changes", [{}, dict(has_qk_norm=True, has_qkv_bias=True)])
def test_logits_taps_and_caches_are_equal(precision, changes):
    target = tiny_target(VOCAB, precision, num_layers=4, **changes)
    logits, taps, cache = one_pass(target, (3, 0, 2))
    found = one_pass(scan_target(target), (3, 0, 2))
    # One rounding of a quantised or bfloat16 activation may fall the other way.
    close = dict(atol=1e-5 if precision == "float32" else 0.05)
    np.testing.assert_allclose(found[0], logits, **close)
    np.testing.assert_allclose(found[1], taps, **close)
    for stacked, each in zip(
        jax.tree.leaves(found[2]), (cache.keys, cache.values), strict=True
    ):
        np.testing.assert_allclose(stacked, np.stack(each), **close)


def test_without_taps():
    target = tiny_target(VOCAB)
    for each in (target, scan_target(target)):
        assert one_pass(each, ())[1].shape == (2, 4, 0)


def answers(target, tree, draft_with, batch_size):
    config = tiny_draft_config(target.config)
    step = StepConfig(target.config, target.numerics, tree, config.taps)
    drafter = draft = None
    if draft_with == "eagle3":
        drafter = build_drafter("eagle3", config, tree, target.numerics)
        draft = tiny_draft(drafter, config)
    elif draft_with == "model":
        how = target.numerics
        drafter = build_drafter("model", target.config, tree, how)
        draft = Draft(target.params)
    elif draft_with == "own layer":
        # The target's first one, where all of them are stacked.
        first = dataclasses.replace(target.config, num_layers=1)
        drafter = self_draft(first, tree, target.numerics)
        draft = Draft({})
    engine = Engine(step, target.params, drafter, recording="features")
    requests = [
        Request(str(i), tuple(map(int, ids)), 20 + i) for i, ids in enumerate(PROMPTS)
    ]
    done = list(engine.serve(requests, lambda: draft, batch_size))
    return [c.token_ids for c in sorted(done, key=lambda c: c.request.id)]


@pytest.fixture(scope="module")
def target():
    return tiny_target(VOCAB)


@pytest.mark.parametrize(
    ("tree", "draft_with", "batch_size"),
    [
        (TreeConfig(num_steps=0), None, 1),
        (TREE, "eagle3", 2),
        (TreeConfig(num_steps=3), "model", 2),
    ],
)
def test_tokens_are_equal(target, tree, draft_with, batch_size):
    expected = answers(target, TreeConfig(num_steps=0), None, 1)
    assert answers(scan_target(target), tree, draft_with, batch_size) == expected


@pytest.mark.bits
@pytest.mark.crossed
@pytest.mark.parametrize(
    ("tree", "draft_with", "batch_size"),
    [
        (TREE, "eagle3", 2),
        (TREE, "eagle3", 3),
        (TreeConfig(num_steps=3), "model", 2),
        (TreeConfig(num_steps=3), "own layer", 2),
    ],
)
def test_tokens_of_one_native_call_are_those_of_a_call_a_layer(
    tree, draft_with, batch_size
):
    """As int8 targets are loaded on a CPU, in batches whose rows come and go."""
    target = tiny_target(VOCAB, "int8", head_dim=16, num_layers=3)
    if not llama.can_stack(target.config, target.numerics, target.params):
        pytest.skip("layers cannot be built here: no C++ compiler, or no CPU")
    expected = answers(target, TreeConfig(num_steps=0), None, 1)
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    assert answers(scan_target(target), tree, draft_with, batch_size) == expected
