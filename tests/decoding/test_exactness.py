# SPDX-License-Identifier: Apache-2.0
"""Whatever is drafted, greedy output is plain decoding's, and batches do not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.cli.notation import parse_tree
from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.control.base import (
    SUGGESTIONS,
    Action,
    Chooser,
    fixed,
    follow_predictions,
)
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.combine import MIXES, mixed_tree
from ospec_jax.drafters.ngram import init_memory, with_ngrams
from ospec_jax.drafters.registry import FAMILIES, build_drafter
from ospec_jax.drafters.self_draft import in_four_bits
from ospec_jax.models.quantization import cast_params
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft

pytestmark = pytest.mark.bits
# What is verified, and in which shapes, is what others of this file verify.
others_suffice = pytest.mark.bits(others_suffice=True)

VOCAB = 16
TREES = {
    "chain-3": TreeConfig(num_steps=3),
    "chain-5": TreeConfig(num_steps=5),
    "chain-shy": TreeConfig(num_steps=3, min_path_probability=0.2),
    "chain-sampled": TreeConfig(num_steps=2, children="sampled"),
    "static-drawn": TreeConfig(
        "static", 2, branching=(3, 2), children="without_replacement"
    ),
    "dynamic": TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12),
    "opt": parse_tree("opt:6,0.1", 4),
    "sequoia": parse_tree("sequoia:7,0.5,0.2,0.1", 3),
}
NGRAM_TREES = {
    "chain": TreeConfig(num_steps=3),
    "static": TreeConfig("static", 2, branching=(3, 2)),
    "dynamic": TREES["dynamic"],
}
# A dynamic tree is more than a static one.
NGRAMS_IN_FEWER = [
    "chain",
    pytest.param("static", marks=pytest.mark.thorough),
    "dynamic",
]
PROMPTS = [(1, 2, 3), tuple(np.arange(70) % VOCAB), (5, 4), (9, 9, 9, 1, 0, 2)]
LENGTHS = (40, 23, 57, 31)


# Rows alone, and rows beside each other: each takes a program of its own, and both give
# plain decoding's tokens. The first case is the one that is compiled as for users.
batch_sizes = pytest.mark.parametrize("batch_size", [3, 1])

# What does not look at how products are computed needs one precision in `make test`.
any_precision = pytest.mark.parametrize(
    "target",
    ["float32", pytest.param("int8", marks=pytest.mark.thorough)],
    indirect=True,
)


@functools.cache
def open_target(precision):
    return tiny_target(VOCAB, precision, num_layers=2)


@pytest.fixture(scope="module", params=["float32", "int8"])
def target(request):
    return open_target(request.param)


def engine_for(
    target, tree, draft_vocab_size=12, stop_ids=(), ngrams=False, family="eagle3",
    **changes,
):  # fmt: skip
    """An engine with a random draft; small vocabularies make it lucky at times."""
    config = tiny_draft_config(target.config, draft_vocab_size, family, **changes)
    drafter = None
    if tree.num_steps:
        drafter = build_drafter(family, config, tree, target.numerics)
    draft = tiny_draft(drafter, config) if drafter else None
    if drafter and ngrams:
        drafter = with_ngrams(drafter, tree)
        draft = draft.replace(memory=init_memory(64))
    step = StepConfig(target.config, target.numerics, tree, config.taps, stop_ids)
    return Engine(step, target.params, drafter), draft


@functools.cache
def shared_engine(name, ngrams=False):
    """For tests that count no programs: what one of them compiled serves the others."""
    tree = NGRAM_TREES[name] if ngrams else TREES[name]
    return engine_for(open_target("float32"), tree, ngrams=ngrams)


def requests(sampling=None):
    kinds = sampling or [SamplingConfig()] * len(PROMPTS)
    return [
        Request(str(i), ids, count, kind)
        for i, (ids, count, kind) in enumerate(
            zip(PROMPTS, LENGTHS, kinds, strict=True)
        )
    ]


def answers(engine, draft, batch_size=1, sampling=None, chooser=None):
    done = engine.serve(requests(sampling), lambda: draft, batch_size, chooser=chooser)
    return sorted(done, key=lambda completion: completion.request.id)


def tokens(completions):
    return [c.token_ids for c in completions]


@pytest.fixture(scope="module")
def plain(target):
    return tokens(answers(*engine_for(target, TreeConfig(num_steps=0))))


@pytest.mark.crossed
@pytest.mark.parametrize("draft_vocab_size", [12, 0])
@pytest.mark.parametrize(
    "name",
    [
        # The nodes of one are listed, as those of `opt` are. Another one stands below,
        # where it drafts behind a window and where its draws depend on a seed. A longer
        # chain has more of the same steps.
        pytest.param(name, marks=pytest.mark.thorough)
        if name in ("sequoia", "static-drawn", "chain-5")
        else name
        for name in TREES
    ],
)
@batch_sizes
@pytest.mark.usefixtures("own_programs")
def test_greedy_equals_plain_decoding(
    target, plain, name, draft_vocab_size, batch_size
):
    engine, draft = engine_for(target, TREES[name], draft_vocab_size)
    done = answers(engine, draft, batch_size)
    assert tokens(done) == plain
    assert sum(c.stats.num_accepted_tokens for c in done) > 0
    # One executable for single requests, and one for the batch of each capacity.
    assert engine.compiled(engine.action, "greedy")._cache_size() == 1


@pytest.mark.crossed
@pytest.mark.parametrize("family", ["eagle1", "hydra", "exit", "dflash", "peagle"])
@pytest.mark.parametrize(
    "name",
    # How what is drawn depends on a seed alone is held below, for eagle3.
    [
        "chain-3",
        "dynamic",
        pytest.param("chain-sampled", marks=pytest.mark.thorough),
    ],
)
@batch_sizes
def test_every_trained_family_drafts_exactly(target, plain, name, family, batch_size):
    engine, draft = engine_for(target, TREES[name], family=family)
    done = answers(engine, draft, batch_size)
    assert tokens(done) == plain
    assert sum(c.stats.num_accepted_tokens for c in done) > 0
    if TREES[name].children != "topk":
        seeded = lambda seed: [SamplingConfig(0.9, 0, 0.95, seed)] * len(PROMPTS)
        alone = tokens(answers(engine, draft, 1, seeded(1)))
        assert tokens(answers(engine, draft, 3, seeded(1))) == alone
        assert tokens(answers(engine, draft, 1, seeded(2))) != alone


@others_suffice
@pytest.mark.crossed
@pytest.mark.parametrize(
    "family",
    ["eagle3", "hydra", "dflash", pytest.param("peagle", marks=pytest.mark.thorough)],
)
@pytest.mark.parametrize("name", ["chain-3", "dynamic", "static-drawn"])
def test_a_sliding_window_drafts_exactly(target, plain, name, family):
    """Rows of a batch, too, whose windows begin at other slots than each other's."""
    engine, draft = engine_for(target, TREES[name], family=family, sliding_window=7)
    alone = answers(engine, draft, 1)
    together = answers(engine, draft, 3)
    assert tokens(alone) == tokens(together) == plain
    drafted = lambda done: [c.stats for c in done]
    assert drafted(alone) == drafted(together)
    assert sum(c.stats.num_accepted_tokens for c in alone) > 0


@pytest.mark.crossed
@pytest.mark.parametrize("name", NGRAMS_IN_FEWER)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_equals_plain_decoding_with_ngrams(target, plain, name, batch_size):
    if target.numerics.precision == "float32":
        engine, draft = shared_engine(name, ngrams=True)
    else:
        engine, draft = engine_for(target, NGRAM_TREES[name], ngrams=True)
    alone, _ = engine_for(target, NGRAM_TREES[name])
    done = answers(engine, draft, batch_size)
    assert tokens(done) == plain
    accepted = lambda completions: sum(c.stats.num_accepted_tokens for c in completions)
    # Sixteen tokens repeat all the time: the suggestions must have been of use.
    assert accepted(done) > 1.2 * accepted(answers(alone, draft))


@others_suffice
@pytest.mark.crossed
@batch_sizes
@pytest.mark.parametrize("family", ["ngram", "suffix"])
@pytest.mark.usefixtures("own_programs")
def test_ngrams_alone_draft_exactly(target, plain, family, batch_size):
    tree, longer = NGRAM_TREES["chain"], TreeConfig(num_steps=7)
    drafter = build_drafter(family, None, tree)
    config = StepConfig(target.config, target.numerics, tree)
    draft = Draft(params={}, memory=init_memory(64, FAMILIES[family].memory_orders))
    long = Action(longer, SUGGESTIONS)
    menu = {long: build_drafter(family, None, tree, predicted=longer)}
    engine = Engine(config, target.params, drafter, menu=menu)
    done = answers(engine, draft, batch_size, chooser=following(engine, long))
    assert tokens(done) == plain
    if batch_size == 1:  # sixteen tokens repeat for long
        is_long = engine.compiled(long, "greedy")._cache_size() > 0
        assert is_long == (family == "suffix")
    stats = sum((c.stats for c in done), DecodingStats(num_spec_tokens=7))
    assert stats.num_accepted_tokens > 0
    # Where nothing matched, nothing was drafted.
    assert stats.num_draft_tokens < 3 * stats.num_drafts


def following(engine, long):
    """Takes the longer step where suggestions are sure to be right."""
    controller = follow_predictions(fixed((engine.action,)), long)
    return Chooser.start(controller, 1)


def predictions_of(plain, kind):
    """Expected answers that are right, edited, or have nothing to do with it."""
    if kind == "right":
        return plain
    if kind == "wrong":
        return [ids[::-1] for ids in plain]
    if kind == "some":
        return [plain[0], [], plain[2], []]
    return [[3, *ids[:7], 1, 2, *ids[7:12], *ids[15:]] for ids in plain]


@any_precision
@others_suffice
@pytest.mark.crossed
@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("prediction", ("right", "edited", "some", "wrong")),
        pytest.param("ngram", ("edited",), marks=pytest.mark.thorough),
        # A trained draft's answers are verified from `cli/test_cli.py`, too.
        pytest.param("eagle3", ("edited", "wrong"), marks=pytest.mark.thorough),
    ],
    ids=["prediction", "ngram", "eagle3"],
)
# Steps of other lengths, for rows alone, too, are those of the test above.
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.thorough), 3])
@pytest.mark.usefixtures("own_programs")
def test_predicted_answers_are_verified_exactly(
    target, plain, family, kinds, batch_size
):
    """All kinds of answers to one engine, whose programs take most of the time."""
    tree, longer = TreeConfig(num_steps=2), TreeConfig(num_steps=6)
    config = tiny_draft_config(target.config) if family == "eagle3" else None
    build = functools.partial(
        build_drafter, family, config, tree, target.numerics, has_ngrams=True
    )
    drafter = build()
    draft = tiny_draft(drafter, config) if config else Draft(params={})
    draft = draft.replace(memory=init_memory(64))
    taps = config.taps if config else ()
    step = StepConfig(target.config, target.numerics, tree, taps)
    long = Action(longer, SUGGESTIONS)
    menu = {long: build(predicted=longer)}
    engine = Engine(step, target.params, drafter, menu=menu)
    lengths = {}
    for kind in kinds:
        asked = [
            dataclasses.replace(request, prediction_ids=tuple(ids))
            for request, ids in zip(
                requests(), predictions_of(plain, kind), strict=True
            )
        ]
        chooser = following(engine, long)
        done = engine.serve(asked, lambda: draft, batch_size, chooser=chooser)
        done = sorted(done, key=lambda completion: completion.request.id)
        assert tokens(done) == plain
        stats = sum((c.stats for c in done), DecodingStats(num_spec_tokens=6))
        lengths[kind] = stats.mean_acceptance_length
        if kind == "right":
            # It comes first: nothing but right predictions is followed so far.
            assert engine.compiled(long, "greedy")._cache_size() > 0
    assert lengths.get("right", 5) > 4
    assert lengths["edited"] > 2


@others_suffice
@pytest.mark.crossed
@pytest.mark.parametrize("mix", MIXES)
@batch_sizes
def test_two_drafters_draft_exactly(target, plain, mix, batch_size):
    tree = mixed_tree(mix, TreeConfig(num_steps=3))
    config = tiny_draft_config(target.config)
    drafter = build_drafter("eagle3", config, tree, target.numerics, True, mix=mix)
    draft = tiny_draft(drafter, config).replace(memory=init_memory(64))
    step = StepConfig(target.config, target.numerics, tree, config.taps)
    engine = Engine(step, target.params, drafter)
    done = answers(engine, draft, batch_size)
    assert tokens(done) == plain
    alone = answers(*engine_for(target, TreeConfig(num_steps=3)))
    accepted = lambda completions: sum(c.stats.num_accepted_tokens for c in completions)
    assert accepted(done) > 1.2 * accepted(alone)
    # Sixteen tokens repeat for longer than any draft.
    longest = max(c.stats.acceptance_histogram[4:] for c in done)
    assert (sum(longest) > 0) == (mix == "longer")


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("part", "name"), [("int4", "chain"), ("int4", "dynamic"), ("exit", "chain")]
)
@batch_sizes
def test_a_target_drafts_for_itself_exactly(target, plain, part, name, batch_size):
    config, params = target.config, {}
    if part == "exit":
        config = dataclasses.replace(config, num_layers=1)
    else:
        params = in_four_bits(target.params)
    tree = NGRAM_TREES[name]
    drafter = build_drafter("self", config, tree, target.numerics)
    step = StepConfig(target.config, target.numerics, tree)
    engine = Engine(step, target.params, drafter)
    done = answers(engine, Draft(params), batch_size)
    assert tokens(done) == plain
    if part == "int4":
        stats = sum((c.stats for c in done), DecodingStats(num_spec_tokens=3))
        assert stats.draft_acceptance_rate > 0.1


@any_precision
@others_suffice
def test_all_layers_with_the_targets_weights_are_always_right(target, plain):
    """What is read of the target's cache is right, or a draft would be wrong."""
    tree = TreeConfig(num_steps=3)
    drafter = build_drafter("self", target.config, tree, target.numerics)
    step = StepConfig(target.config, target.numerics, tree)
    done = answers(Engine(step, target.params, drafter), Draft({}))
    assert tokens(done) == plain
    for completion in done:
        stats = completion.stats
        assert stats.num_accepted_tokens >= 3 * (stats.num_drafts - 1)


@others_suffice
@any_precision
def test_predictions_among_drawn_children_are_refused(target):
    engine, draft = engine_for(target, TREES["chain-sampled"])
    request = dataclasses.replace(requests()[0], prediction_ids=(1, 2))
    with pytest.raises(ConfigError, match="exact only among children='topk'"):
        next(engine.serve([request], lambda: draft))


@any_precision
@others_suffice
@pytest.mark.crossed
# A chain is drafted by a model that is the target itself in the next test.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("chain", marks=pytest.mark.thorough),
        pytest.param("static", marks=pytest.mark.thorough),
        "dynamic",
    ],
)
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.thorough), 3])
def test_a_small_model_drafts_exactly(target, plain, name, batch_size):
    tree, small = NGRAM_TREES[name], tiny_target(VOCAB, seed=1, num_layers=1)
    precision = target.numerics.precision
    drafter = build_drafter(
        "model", small.config, tree, target.numerics, has_ngrams=False
    )
    config = StepConfig(target.config, target.numerics, tree)
    draft = Draft(cast_params(small.params, precision))
    engine = Engine(config, target.params, drafter)
    assert tokens(answers(engine, draft, batch_size)) == plain


@others_suffice
@pytest.mark.crossed
@pytest.mark.parametrize("children", ["topk", "sampled"])
def test_a_model_that_drafts_for_itself_is_always_right(target, plain, children):
    """Any slip of its cache or positions would show in what it drafts."""
    tree = TreeConfig(num_steps=3, children=children)
    drafter = build_drafter("model", target.config, tree, target.numerics)
    config = StepConfig(target.config, target.numerics, tree)
    engine = Engine(config, target.params, drafter)
    kinds = [SamplingConfig(1.0, seed=3)] * 4 if children == "sampled" else None
    done = answers(engine, Draft(target.params), 1, kinds)
    if children == "topk":
        assert tokens(done) == plain
    for completion in done:
        # All but the steps that the limit cut short accept every token.
        stats = completion.stats
        assert stats.num_accepted_tokens >= 3 * (stats.num_drafts - 1)


@others_suffice
@pytest.mark.parametrize("target", ["float32"], indirect=True)
def test_sampled_tokens_with_ngrams_depend_on_the_seed_alone(target):
    engine, draft = shared_engine("chain", ngrams=True)
    hot = [SamplingConfig(0.9, 0, 0.95, 1)] * len(PROMPTS)
    alone = answers(engine, draft, 1, hot)
    assert tokens(answers(engine, draft, 3, hot)) == tokens(alone)


@others_suffice
@any_precision
def test_stop_tokens_inside_an_accepted_run(target, plain):
    """The stop token is chosen so that it stands where drafts were accepted."""
    stop = plain[2][20]
    cut = lambda ids: ids[: ids.index(stop) + 1] if stop in ids else ids
    engine, draft = engine_for(target, TREES["dynamic"], stop_ids=(stop,))
    for batch_size in (1, 3):
        done = answers(engine, draft, batch_size)
        assert tokens(done) == [cut(ids) for ids in plain]
        for completion in done:
            reason = "stop" if stop in completion.token_ids else "length"
            assert completion.finish_reason == reason


@pytest.mark.crossed
@pytest.mark.parametrize("target", ["float32"], indirect=True)
@pytest.mark.parametrize("name", ["chain-sampled", "static-drawn"])
def test_sampled_tokens_depend_on_the_seed_alone(target, name):
    engine, draft = shared_engine(name)
    seeded = lambda seed: [SamplingConfig(0.9, 0, 0.95, seed)] * len(PROMPTS)
    alone = tokens(answers(engine, draft, 1, seeded(1)))
    assert tokens(answers(engine, draft, 3, seeded(1))) == alone
    assert tokens(answers(engine, draft, 1, seeded(2))) != alone


@others_suffice
@pytest.mark.parametrize("target", ["float32"], indirect=True)
def test_greedy_and_sampled_rows_share_a_batch(target, plain):
    engine, draft = shared_engine("chain-sampled")
    hot = SamplingConfig(1.0, seed=3)
    mixed = [SamplingConfig(), hot, SamplingConfig(), hot]
    done = tokens(answers(engine, draft, 3, mixed))
    assert [done[0], done[2]] == [plain[0], plain[2]]
    alone = tokens(answers(engine, draft, 1, mixed))
    assert [done[1], done[3]] == [alone[1], alone[3]]


@pytest.mark.quick  # nothing is computed of them
@any_precision
def test_finished_rows_stay_as_they_are(target):
    engine, draft = engine_for(target, TREES["chain-3"])
    request = Request("0", PROMPTS[0], 3)
    state, _ = engine.prefill(draft, request, 256)
    step = engine.compiled(engine.action, "greedy")
    for _ in range(4):
        state, _ = step(target.params, draft, state)
    assert bool(state.is_finished[0])
    lengths, last = int(state.lengths[0]), int(state.last_token[0])
    keys = np.asarray(state.cache.keys[0][..., :lengths])
    state, output = step(target.params, draft, state)
    assert int(output.num_emitted[0]) == int(output.num_accepted[0]) == 0
    assert (int(state.lengths[0]), int(state.last_token[0])) == (lengths, last)
    np.testing.assert_array_equal(state.cache.keys[0][..., :lengths], keys)


@any_precision
@others_suffice
def test_corrupt_draft_is_harmless(target, plain):
    engine, draft = engine_for(target, TREES["chain-3"])
    broken = jax.tree.map(lambda x: x * jnp.nan, draft.params)
    assert tokens(answers(engine, draft.replace(params=broken))) == plain


@pytest.mark.quick  # they are compared within a tolerance
@any_precision
def test_log_probs_are_the_targets(target):
    engine, draft = engine_for(target, TREES["dynamic"])
    config = dataclasses.replace(engine.config, has_log_probs=True)
    drafted = Engine(config, target.params, engine.drafter)
    config = dataclasses.replace(config, tree=TreeConfig(num_steps=0))
    alone = Engine(config, target.params)
    for a, b in zip(answers(drafted, draft), answers(alone, None), strict=True):
        assert len(a.log_probs) == len(a.token_ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


@others_suffice
@any_precision
def test_trees_that_fit_no_cache_are_refused(target):
    tree = TreeConfig("static", 2, branching=(30, 20))
    with pytest.raises(ConfigError, match="a tree of 631 nodes does not fit: 512"):
        engine_for(target, tree)


@others_suffice
@any_precision
def test_tree_without_drafter_is_refused(target):
    config = StepConfig(target.config, target.numerics, TREES["chain-3"])
    with pytest.raises(ConfigError, match="needs a drafter"):
        Engine(config, target.params)
