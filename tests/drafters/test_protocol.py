# SPDX-License-Identifier: Apache-2.0
"""The laws of `drafters.base`, for every family that the registry knows."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ospec_jax.config import (
    DraftConfig,
    ModelConfig,
    SamplingConfig,
    TreeConfig,
)
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import (
    StepConfig,
    build_prefill,
    empty_state,
    shared_tables,
)
from ospec_jax.drafters.base import as_reader
from ospec_jax.drafters.combine import MIXES, mixed_tree
from ospec_jax.drafters.ngram import init_memory
from ospec_jax.drafters.pool import Member, Members, PoolConfig
from ospec_jax.drafters.prediction import prediction_hints
from ospec_jax.drafters.registry import FAMILIES, build_alone, build_drafter
from ospec_jax.models.cache import KVCache
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft, Roots

VOCAB = 16
CHAIN = TreeConfig(num_steps=3)
PROMPTS = [(1, 2, 3), tuple(np.arange(70) % VOCAB), (5, 4), (9, 9, 9, 1, 0, 2)]
LENGTHS = (40, 23, 57, 31)
NEURAL = [name for name, family in FAMILIES.items() if family.config is not None]


@pytest.fixture(scope="module")
def target():
    return open_target()


@functools.cache
def architecture(name, target_config):
    """What a random draft of a family is built from, and its own parameters."""
    family = FAMILIES[name]
    if family.config is None:
        return None, Draft({})
    if family.config is ModelConfig:
        # The target itself: for these families that is a draft that is always right.
        return target_config, Draft(tiny_target(VOCAB, num_layers=2).params)
    if issubclass(family.config, DraftConfig):
        config = tiny_draft_config(target_config, 12, name)
        drafter = build_drafter(name, config, TreeConfig(num_steps=1))
        return config, tiny_draft(drafter, config)

    parts = {name: architecture(name, target_config) for name in ("hydra", "eagle3")}
    members = tuple(Member(FAMILIES[name], parts[name][0]) for name in parts)
    drafts = tuple(draft for _, draft in parts.values())
    return PoolConfig(members), Draft(Members(drafts))


# Whose caches `test_trained.py` compares with fresh ones, by variant, or
# `decoding/test_exactness.py` finds to be always right, or which are as those of
# `suffix`; and whose greedy output `decoding/test_exactness.py` compares, by tree.
HELD_CACHES = (
    "eagle1",
    "eagle3",
    "hydra",
    "dflash",
    "peagle",
    "model",
    "self",
    "ngram",
)
HELD_OUTPUT = ("eagle1", "dflash", "peagle", "exit", "ngram", "suffix", "self", "model")


def families_but(held):
    return [
        pytest.param(name, marks=pytest.mark.thorough) if name in held else name
        for name in FAMILIES
    ]


@functools.cache
def open_target():
    return tiny_target(VOCAB, num_layers=2)


@functools.cache
def shared(name):
    """For whoever asks for nothing else: what one test compiled serves the next."""
    return built(open_target(), name)


def built(target, name, tree=CHAIN, **how):
    """A drafter of the family, and an engine that drafts with it."""
    config, draft = architecture(name, target.config)
    drafter = build_drafter(name, config, tree, target.numerics, **how)
    taps = getattr(config, "taps", ())
    step = StepConfig(target.config, target.numerics, tree, taps)
    memory = init_memory(64, FAMILIES[name].memory_orders)
    draft = draft.replace(memory=memory)
    return drafter, draft, Engine(step, target.params, drafter)


def requests():
    pairs = zip(PROMPTS, LENGTHS, strict=True)
    predictions = [(1, 0, 2) * 8] * len(PROMPTS)
    return [
        Request(str(i), ids, count, SamplingConfig(), prediction_ids=predictions[i])
        for i, (ids, count) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def plain(target):
    step = StepConfig(target.config, target.numerics, TreeConfig(num_steps=0))
    done = Engine(step, target.params).serve(requests(), lambda: None)
    return [c.token_ids for c in sorted(done, key=lambda c: c.request.id)]


@pytest.mark.parametrize("name", families_but(HELD_CACHES))
def test_what_is_drafted_does_not_depend_on_how_it_came_there(target, name):
    """After steps that rejected drafts, as after one pass over the same tokens."""
    drafter, draft, engine = shared(name)
    request = requests()[0]
    state, output = engine.prefill(draft, request, 256)
    emitted = [int(output.tokens[0, 0])]
    counts = set()

    for _ in range(6):
        state, output = engine.step(engine.action, "greedy", draft, state)
        count = int(output.num_emitted[0])
        counts.add(count)
        emitted += output.tokens[0, :count].tolist()

    # The newest token is the root; the prefill emits one of its own behind the others.
    known = Request(
        "it",
        (*request.prompt_ids, *emitted[:-1]),
        8,
        request.sampling,
        prediction_ids=request.prediction_ids,
    )
    fresh, output = engine.prefill(draft, known, 256)
    assert int(output.tokens[0, 0]) == emitted[-1]

    @jax.jit
    def propose(state):
        shared = shared_tables(target.params)
        if drafter.reads_target:
            shared = shared.replace(params=target.params, cache=state.cache)
        context = state.draft_context
        if drafter.predict is not None:
            logits = drafter.predict(draft, shared, context.hidden)
            context = context.replace(logits=logits)
        roots = Roots(
            state.last_token, state.lengths, state.request_keys, context, state.sampling
        )
        # Where an expected answer stands, the host knows; here only its drafts count.
        hints = prediction_hints(fresh.prediction) if name == "prediction" else None
        return drafter.propose(draft, shared, state.draft_cache, roots, hints)[0]

    ours, expected = propose(state), propose(fresh)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.is_valid, expected.is_valid)
    np.testing.assert_allclose(ours.log_probs, expected.log_probs, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_state_has_the_shapes_that_it_announces(name):
    """The engine makes room by `init_cache` and `init_context`."""
    drafter, draft, engine = shared(name)
    state, _ = engine.prefill(draft, requests()[0], 256)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    is_cache = lambda node: isinstance(node, KVCache)
    announced = jax.eval_shape(lambda: drafter.init_cache(1, 256))
    assert jax.tree.structure(announced) == jax.tree.structure(state.draft_cache)
    assert jax.tree.leaves(shapes(announced), is_leaf=is_cache) == jax.tree.leaves(
        shapes(state.draft_cache), is_leaf=is_cache
    )
    announced = jax.eval_shape(lambda: drafter.init_context(1))
    assert shapes(announced) == shapes(state.draft_context)


def by_chance(progress):
    """Stops by a hash of what was drafted: as wild as a rule can be."""
    best = progress.log_probs.max(axis=-1)
    return jax.numpy.sin(best * 1e4) > 0.2


@pytest.mark.parametrize("name", families_but(HELD_OUTPUT))
def test_greedy_output_is_plain_decodings_at_any_depth(target, plain, name):
    """Whatever stops it. Those of `test_exactness` draft trees, and in int8, too."""
    if name in NEURAL:
        _, draft, engine = built(target, name, CHAIN, stop_fn=by_chance)
    else:
        _, draft, engine = shared(name)
    done = list(engine.serve(requests(), lambda: draft, 3))
    found = [c.token_ids for c in sorted(done, key=lambda c: c.request.id)]
    assert found == plain
    if name in NEURAL:
        drafted = sum(c.stats.num_draft_tokens for c in done)
        steps = sum(c.stats.num_drafts for c in done)
        assert steps < drafted < CHAIN.num_steps * steps, "it stops, but not always"


TREES = {
    "chain": TreeConfig(num_steps=5),
    "drawn": TreeConfig(num_steps=2, children="sampled"),
    "dynamic": TreeConfig("dynamic", 3, 2, 6),
    "longer": mixed_tree("longer", TreeConfig(num_steps=2)),
    "mixed": mixed_tree("mixed", TreeConfig(num_steps=2)),
}


def drafted_by(name):
    """The trees that a family drafts: suggestions are chains, and never drawn."""
    family = FAMILIES[name]
    refused = {"drawn"} if family.ngrams == "always" else set()
    refused |= {"dynamic"} if family.config is None else set()
    return [kind for kind in TREES if kind not in refused]


def families_by_tree():
    """All pairs, of which `make test` runs another tree for each family."""
    for number, name in enumerate(FAMILIES):
        kinds = drafted_by(name)
        for kind in kinds:
            is_run = kind == kinds[number % len(kinds)]
            marks = () if is_run else pytest.mark.thorough
            yield pytest.param(name, kind, marks=marks)


@pytest.mark.parametrize(("name", "kind"), families_by_tree())
def test_a_prompt_is_run_over_alike_whatever_is_drafted_behind_it(target, name, kind):
    """So engines of any tree share that program: it is the one of their own tree."""
    tree = TREES[kind]
    family = FAMILIES[name]
    mix = kind if kind in MIXES else ""
    config, draft = architecture(name, target.config)
    is_lent = tree.children == "topk" and family.ngrams != "never"
    shared = build_drafter(name, config, tree, target.numerics, is_lent, mix=mix)
    own = build_alone(family, config, tree, target.numerics, is_lent, None, mix, None)
    draft = draft.replace(memory=init_memory(64, family.memory_orders))
    step = StepConfig(target.config, target.numerics, tree, getattr(config, "taps", ()))
    state = empty_state(step, own, 1, 32)
    tokens = np.zeros((1, 8), np.int32)
    one = np.ones(1, np.int32)

    def traced(drafter, step):
        run = build_prefill(step, drafter)
        args = target.params, draft, state, tokens, one, one, one[0], one
        return str(jax.make_jaxpr(run)(*args))

    no_tree = dataclasses.replace(step, tree=TreeConfig(num_steps=0))
    assert traced(as_reader(shared), no_tree) == traced(own, step)


def test_engines_of_other_trees_share_what_runs_over_prompts():
    target = open_target()
    config, _ = architecture("eagle3", target.config)

    def opened(tree):
        drafter = build_drafter("eagle3", config, tree, target.numerics)
        step = StepConfig(target.config, target.numerics, tree, config.taps)
        return Engine(step, target.params, drafter)

    deep, wide = opened(TREES["chain"]), opened(TREES["dynamic"])
    assert deep.compiled_prefill("greedy") is wide.compiled_prefill("greedy")
    assert deep.compiled_prefill("greedy") is not wide.compiled_prefill("sampled")
    steps = [engine.compiled(engine.action, "greedy") for engine in (deep, wide)]
    assert steps[0] is not steps[1]
