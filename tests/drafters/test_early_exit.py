# SPDX-License-Identifier: Apache-2.0
"""A trained head behind the target's first layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.layers import Numerics
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config
from ospec_jax.types import Feedback, Roots, SamplingParams

VOCAB, LENGTH, STEPS = 16, 12, 4


@pytest.fixture(
    scope="module", params=[{}, {"has_qkv_bias": True, "has_qk_norm": True}]
)
def model(request):
    return tiny_model_config(VOCAB, **request.param)


@pytest.mark.crossed
@pytest.mark.parametrize("draft_vocab_size", [12, 0])
@pytest.mark.parametrize("is_scanned", [False, True])
def test_training_sees_what_is_drafted(model, draft_vocab_size, is_scanned):
    """Drafted behind the target's cache, trained on its recorded states."""
    numerics = Numerics(is_scanned=is_scanned, is_row_invariant=not is_scanned)
    config = tiny_draft_config(model, draft_vocab_size, "exit")
    config = dataclasses.replace(
        config, has_qkv_bias=model.has_qkv_bias, has_qk_norm=model.has_qk_norm
    )
    drafter = build_drafter("exit", config, TreeConfig(num_steps=STEPS), numerics)
    draft = tiny_draft(drafter, config)
    params = random_params(model)
    params = llama.stack_layers(params) if is_scanned else params
    run = llama.build(model, numerics, config.taps)
    start = jnp.zeros((1,), jnp.int32)

    @jax.jit
    def states(tokens, cache):
        count = tokens.shape[1]
        bias = kv.causal_bias(start, count, cache.capacity)
        return run(params, tokens, jnp.arange(count)[None], bias, cache, start)

    rng = np.random.default_rng(0)
    known = jnp.asarray(rng.integers(0, VOCAB, (1, LENGTH)), jnp.int32)
    cache = kv.init_cache(
        model.num_layers, 1, model.num_kv_heads, 32, model.head_dim, jnp.float32,
        is_scanned,
    )  # fmt: skip
    _, _, filled = states(known[:, :-1], cache)
    shared = shared_tables(params).replace(params=params, cache=filled)
    zero = jnp.zeros((1,))
    roots = Roots(
        token=known[:, -1],
        position=start + LENGTH - 1,
        keys=jax.random.split(jax.random.key(0), 1),
        context=drafter.init_context(1),
        sampling=SamplingParams(zero, zero.astype(jnp.int32), zero + 1),
    )
    tree, _ = jax.jit(drafter.propose)(draft, shared, (), roots)
    tokens = jnp.concatenate([known, tree.tokens[:, 1:-1]], axis=1)
    hidden, taps, _ = states(tokens, cache)
    feedback = Feedback(tokens, taps, hidden, jnp.zeros(tokens.shape))
    num_context = LENGTH - 2  # the last pair is the one before the root
    unroll = jax.jit(drafter.unroll, static_argnames=("num_context", "num_steps"))
    logits = unroll(
        draft.params, draft.token_ids, shared, feedback, start,
        num_context=num_context, num_steps=STEPS,
    )  # fmt: skip
    assert [x.shape[:2] for x in logits] == [(1, 1)] * STEPS
    for depth, of_depth in enumerate(logits):
        log_probs = jax.nn.log_softmax(of_depth[0, 0])
        best = int(jnp.argmax(log_probs))
        token = best if draft.token_ids is None else int(draft.token_ids[best])
        assert token == int(tree.tokens[0, depth + 1])
        np.testing.assert_allclose(
            log_probs[best], tree.log_probs[0, depth + 1], atol=1e-4
        )
    if draft_vocab_size:  # the last layer may be learned alone, from these
        read = drafter.head_inputs(draft.params, tree.states[0, :STEPS])
        again = read @ draft.params["lm_head"]["kernel"].T
        np.testing.assert_allclose(again[0], logits[0][0, 0], atol=1e-4)
        np.testing.assert_allclose(again[-1], logits[-1][0, 0], atol=1e-4)


def test_an_exit_lies_behind_a_layer(model):
    config = tiny_draft_config(model, family="exit")
    for taps in ((0,), (1, 2)):
        with pytest.raises(ConfigError, match="behind one layer or more"):
            dataclasses.replace(config, taps=taps)
