# SPDX-License-Identifier: Apache-2.0
"""How many nodes are verified within a step: whatever it is, the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import Session, TreeConfig
from ospec_jax.config import ConfigError
from ospec_jax.control.clock import flat_clock
from ospec_jax.control.policy import Policies, PolicyShape, init_layers
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.drafters.growth import Nodes, grow
from ospec_jax.drafters.sizing import (
    all_drafted,
    choose_size,
    first_nodes,
    path_scores,
    taught_size,
)
from ospec_jax.drafters.stopping import below_mass, taught
from ospec_jax.drafters.topology import ancestor_mask
from ospec_jax.loading import load_draft
from ospec_jax.models.cache import init_cache
from ospec_jax.models.layers import Numerics
from ospec_jax.replay.cycles import build_cycles
from ospec_jax.replay.episodes import choices_of
from ospec_jax.replay.record import record
from ospec_jax.replay.trees import TraceShape, grow_trees, open_trace, trace_folder
from ospec_jax.testing import tiny_target
from ospec_jax.types import DraftContext, Roots, SamplingParams

NEW_TOKENS = 20
PROMPTS = [f"Why is {word} so?" for word in ("it", "the sea", "17", "a b c a b c a")]
CHAIN = TreeConfig(num_steps=4, sizes=(1, 2, 4))
TREE = TreeConfig("dynamic", 3, topk=3, num_draft_tokens=9, sizes=(1, 2, 4, 9))


def anything(drafted):
    """A rule that says whatever it likes, beyond the menu, too."""
    return (jnp.sum(drafted.context) * 7 + drafted.depth) % 9 - 2


def answers(target, draft, **given):
    found = Session(target, draft, **given).generate(PROMPTS, NEW_TOKENS)
    return sorted(found, key=lambda result: result.prompt.id)


@pytest.mark.parametrize(
    ("tree", "precision", "batch_size"),
    [
        pytest.param(CHAIN, "float32", 1, marks=pytest.mark.thorough),
        pytest.param(CHAIN, "int8", 4, marks=pytest.mark.thorough),
        (TREE, "float32", 4),
        pytest.param(TREE, "int8", 1, marks=pytest.mark.thorough),
    ],
    ids=["chain", "chain, int8, batch", "tree, batch", "tree, int8"],
)
def test_any_size_gives_plain_output(tree, precision, batch_size):
    """Token for token, and bit for bit in what the target thought of each."""
    target = tiny_target(precision=precision)
    draft = load_draft("self:exit-1", target)
    plain = answers(target, None, has_log_probs=True)
    found = answers(
        target,
        draft,
        tree=tree,
        size_fn=anything,
        batch_size=batch_size,
        has_log_probs=True,
    )
    assert [x.token_ids for x in found] == [x.token_ids for x in plain]
    assert [x.log_probs for x in found] == [x.log_probs for x in plain]
    # Several sizes were met, and drafts were accepted.
    drafted = sum(x.stats.num_draft_tokens for x in found)
    steps = sum(x.stats.num_drafts for x in found)
    assert 1 < drafted / steps < tree.num_nodes - 1
    assert sum(x.stats.num_accepted_tokens for x in found)


def test_what_was_not_drafted_costs_no_rows():
    """A draft that stops early is verified in fewer rows, by the rule that is given."""
    target = tiny_target()
    draft = load_draft("self:exit-1", target)
    seen = []

    def watch(drafted):
        jax.debug.callback(lambda n: seen.append(int(n)), drafted.depth)
        return all_drafted(drafted)

    given = dict(tree=CHAIN, stop_fn=below_mass(0.3), ngrams=False)
    whole = answers(target, draft, **given | {"tree": TreeConfig(num_steps=4)})
    found = answers(target, draft, **given, size_fn=watch)
    assert [x.stats for x in found] == [x.stats for x in whole]
    assert len(set(seen)) > 1


def proposed(tree, seed=0):
    """A tree of a drafter whose tokens follow from its logits alone, for two rows."""
    key = jax.random.key(seed)
    table = jax.random.normal(key, (12, 12)) * 2

    def step(cache, nodes: Nodes):
        return nodes.hidden, table[nodes.tokens], cache

    context = DraftContext(jnp.zeros((2, 4)), table[jnp.array([3, 5])])
    sampling = SamplingParams(jnp.zeros(2), jnp.zeros(2, jnp.int32), jnp.ones(2))
    roots = Roots(
        jnp.array([3, 5]),
        jnp.array([7, 9]),
        jax.random.split(key, 2),
        context,
        sampling,
    )
    cache = init_cache(1, 2, 1, 64, 4, jnp.float32)
    run = lambda roots, cache: grow(step, tree, cache, roots, numerics=Numerics())[0]
    return jax.jit(run)(roots, cache)


def test_the_first_nodes_are_a_smaller_tree():
    """The tree of fewer nodes, grown for itself, has the same tokens and paths."""
    drafted = proposed(TREE)
    scores = np.asarray(path_scores(drafted))
    assert (np.diff(scores[:, 1:], axis=1) <= 0).all()
    np.testing.assert_array_equal(
        drafted.ancestor_mask, ancestor_mask(drafted.parents, 3)
    )
    assert (drafted.parents < np.arange(10)).all()

    for size in TREE.sizes:
        alone = proposed(TreeConfig("dynamic", 3, topk=3, num_draft_tokens=size))
        part = first_nodes(drafted, size + 1)
        for row in range(2):
            assert paths(part, row) == paths(alone, row)


def paths(tree, row):
    """Tokens on the path to each node."""
    mask = np.asarray(tree.ancestor_mask[row])
    tokens = np.asarray(tree.tokens[row])
    depths = np.asarray(tree.depths[row])
    return sorted(
        tuple(tokens[i] for i in np.argsort(depths, kind="stable") if on_path[i])
        for on_path in mask
    )


def size_of(tree, config, size_fn=anything, active=(True, True)):
    args = jnp.array([40, 50]), jnp.asarray(active)
    return int(choose_size(size_fn, tree, config, *args))


def test_drawn_tokens_are_never_left_out():
    least = lambda drafted: jnp.int32(0)
    config = TreeConfig(num_steps=4, sizes=(1, 2, 4), children="sampled")
    assert size_of(proposed(config), config, least) == 2
    # What was not drawn may be.
    stopped = proposed(config)
    is_valid = stopped.is_valid & (np.arange(5) <= np.array([[2], [1]]))
    assert size_of(stopped.replace(is_valid=is_valid), config, least) == 1


def policies(shape, seed=0):
    """Networks that nobody taught, for both."""
    depth = init_layers(jax.random.key(seed), [shape.num_seen("depth"), 8, 2], 3.0)
    widths = [shape.num_seen("size"), 8, len(shape.sizes)]
    return Policies(
        depth, init_layers(jax.random.key(seed + 1), widths, 3.0), 1, 0, shape
    )


@pytest.mark.thorough
def test_a_policy_for_the_size_on_record_is_the_policy_in_decoding(tmp_path):
    """The same steps emit the same tokens, which are those of plain decoding."""
    target = tiny_target()
    draft = load_draft("self:exit-1", target)
    shape = TraceShape(topk=2, depth=4, num_nodes=14)
    rows = [
        parse_prompt({"prompt": text, "id": f"p{i}"}, "")
        for i, text in enumerate(PROMPTS)
    ]
    record(target, rows, tmp_path, (1,), max_new_tokens=NEW_TOKENS)
    grow_trees(target, draft, tmp_path, shape)
    trace = open_trace(trace_folder(tmp_path, shape))
    sizes = (1, 2, 4, 14)
    cycles = build_cycles(trace, flat_clock(2, 4), sizes)
    starts = np.asarray(trace.starts)

    def chosen(seed):
        policy = policies(PolicyShape(2, 4, sizes), seed)
        return policy, choices_of(policy, cycles)

    def differ(found):
        # Of the positions where answers begin, which are met for certain.
        return all(len(set(np.asarray(x)[starts].tolist())) > 1 for x in found[1])

    policy, choices = next(found for found in map(chosen, range(30)) if differ(found))
    tree = TreeConfig("dynamic", 4, topk=2, num_draft_tokens=14, sizes=sizes)
    given = dict(tree=tree, stop_fn=taught(policy), size_fn=taught_size(policy))
    plain = answers(target, None)
    met = set()

    for i, found in enumerate(answers(target, draft, ngrams=False, **given)):
        assert found.token_ids == plain[i].token_ids
        position = int(trace.starts[trace.ids.index(f"p{i}")])
        end = position + len(found.token_ids) - 1
        count = 0
        while position < end:
            depth = int(choices.depth[position])
            size = sizes[int(choices.size[position])]
            position += len(trace.emitted(position, depth, size))
            met.add((depth, size))
            count += 1
        assert found.stats.num_drafts == count
    assert len({depth for depth, _ in met}) > 1
    assert len({size for _, size in met}) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(size_fn=anything), "a tree that has none"),
        (
            dict(
                size_fn=anything,
                tree=TreeConfig(num_steps=2, sizes=(1, 2), children="sampled"),
            ),
            "drawn tokens",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Session(tiny_target(), "self:exit-1", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_steps=3, sizes=(2, 1, 3)), "ascend"),
        (dict(num_steps=3, sizes=(1, 2)), "all 3 nodes"),
        (dict(kind="static", num_steps=1, branching=(2,), sizes=(1, 2)), "only chains"),
    ],
)
def test_menus_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        TreeConfig(**given)
