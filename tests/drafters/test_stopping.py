# SPDX-License-Identifier: Apache-2.0
"""Rules that stop a draft within a step: the same in decoding and on record."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax import Session, TreeConfig
from ospec_jax.config import ConfigError
from ospec_jax.control.clock import flat_clock
from ospec_jax.control.policy import (
    CONTINUE,
    STOP,
    Policies,
    PolicyShape,
    init_layers,
    newest_of,
    run_layers,
    see_depth,
)
from ospec_jax.drafters.stopping import (
    Progress,
    above_entropy,
    below_gain,
    below_mass,
    below_probability,
    taught,
    unless_worth_more,
)
from ospec_jax.loading import load_draft
from ospec_jax.replay.cycles import build_cycles, look
from ospec_jax.replay.episodes import choices_of
from ospec_jax.replay.record import record
from ospec_jax.replay.rules import drafted_depth
from ospec_jax.replay.trees import TraceShape, grow_trees, open_trace, trace_folder
from ospec_jax.testing import tiny_target

NEW_TOKENS = 20
PROMPTS = ["Why is it so?", "And what of 17?"]
SHAPE = TraceShape(topk=2, depth=4, num_nodes=14)
TREE = SHAPE.tree(4, 14)
SIZES = (1, 2, 4, 14)
ODDS = tuple(np.linspace(0.1, 0.9, 8))


def marginal(pass_seconds):
    """The marginal rule for passes of the draft that take so long."""
    seconds = [[1.0 + pass_seconds * d] * len(SIZES) for d in range(5)]
    return unless_worth_more(seconds, SIZES, (1.0,) * 4, ODDS)


RULES = {
    "gain": below_gain(0.15),
    "probability": below_probability(0.3),
    "mass": below_mass(0.4),
    "entropy": above_entropy(1.0),
    "marginal": marginal(0.1),
}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return load_draft("self:exit-1", target)


@pytest.fixture(scope="module")
def trace(target, draft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    from ospec_jax.data.prompts import parse_prompt

    rows = [
        parse_prompt({"prompt": text, "id": f"p{i}"}, "")
        for i, text in enumerate(PROMPTS)
    ]
    record(target, rows, folder, (1,), max_new_tokens=NEW_TOKENS)
    grow_trees(target, draft, folder, SHAPE)
    return open_trace(trace_folder(folder, SHAPE))


def answers(target, draft, stop_fn=None, tree=TREE):
    session = Session(target, draft, tree=tree, ngrams=False, stop_fn=stop_fn)
    return list(session.generate(PROMPTS, NEW_TOKENS))


# Three of them compare a number of a path with a threshold.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough)
        if name in ("probability", "mass", "gain")
        else name
        for name in RULES
    ],
)
def test_a_rule_on_record_is_the_rule_in_decoding(target, draft, trace, name):
    """The same steps accept the same numbers of tokens, and plain output comes out."""
    cycles = build_cycles(trace, flat_clock(2, 4), SIZES)
    has_entropies = bool(np.isfinite(trace.entropies).all())
    if name == "entropy" and not has_entropies:
        pytest.skip("this drafter does not tell")

    depth_at = jax.jit(
        lambda position: drafted_depth(
            RULES[name], look(cycles, position), SHAPE.num_nodes
        )
    )
    depths = []
    for i, found in enumerate(answers(target, draft, RULES[name])):
        number = trace.ids.index(f"p{i}")
        position = int(trace.starts[number])
        end = position + trace.lengths[number]
        accepted = []
        emitted = []
        while position < end:
            depths.append(int(depth_at(np.int32(position))))
            emitted += trace.emitted(position, depths[-1], SHAPE.num_nodes)
            accepted.append(len(trace.emitted(position, depths[-1], 14)))
            position += accepted[-1]
        assert found.token_ids[1:] == emitted
        assert found.stats.num_drafts == len(accepted)
    assert len(set(depths)) > 1


@pytest.mark.thorough
def test_a_stale_cost_table_never_changes_output(target, draft):
    plain = answers(target, None, tree=TreeConfig(num_steps=0))
    steps = []
    for pass_seconds in (1e-6, 0.1, 1e6):
        found = answers(target, draft, marginal(pass_seconds))
        assert [x.token_ids for x in found] == [x.token_ids for x in plain]
        steps.append(sum(x.stats.num_drafts for x in found))
    # Where passes of the draft are dear, little is drafted, and more steps are taken.
    assert steps[0] < steps[2]
    assert all(a <= b for a, b in itertools.pairwise(steps))


def policies(seed, shape=PolicyShape(2, 4, SIZES), seen=None):
    """Networks that nobody taught; half of `seen` stops them."""
    widths = [shape.num_seen("depth"), 8, 2]
    first, (kernel, bias) = init_layers(jax.random.key(seed), widths, 1.0)
    if seen is not None:
        said = run_layers((first, (kernel, bias)), seen, "relu")
        bias = bias.at[STOP].set(jnp.median(said[:, CONTINUE] - said[:, STOP]))
    return Policies((first, (kernel, bias)), None, 1, 0, shape)


def test_a_policy_on_record_is_the_policy_in_decoding(target, draft, trace):
    """The same steps emit the same tokens, which are those of plain decoding."""
    cycles = build_cycles(trace, flat_clock(2, 4), SIZES)
    first = newest_of(PolicyShape(2, 4, SIZES), cycles.scores, 1)
    seen = see_depth(first, 1, cycles.contexts)
    policy = policies(3, seen=seen)
    depths = np.asarray(choices_of(policy, cycles).depth)
    plain = answers(target, None, tree=TreeConfig(num_steps=0))
    met = set()
    for i, found in enumerate(answers(target, draft, taught(policy))):
        assert found.token_ids == plain[i].token_ids
        number = trace.ids.index(f"p{i}")
        position = int(trace.starts[number])
        end = position + trace.lengths[number]
        count = 0
        while position < end:
            depth = int(depths[position])
            position += len(trace.emitted(position, depth, SHAPE.num_nodes))
            met.add(depth)
            count += 1
        assert found.stats.num_drafts == count
    assert len(met) > 1


def test_a_policy_may_know_less_deep_trees_or_deeper_ones(target, draft):
    """It stops where it knows no further; greedy output is never its to change."""
    plain = answers(target, None, tree=TreeConfig(num_steps=0))
    for depth in (2, 6):
        rule = taught(policies(1, PolicyShape(2, depth, SIZES)))
        found = answers(target, draft, rule)
        assert [x.token_ids for x in found] == [x.token_ids for x in plain]
    with pytest.raises(ConfigError, match="of width 3, not 2"):
        answers(target, draft, taught(policies(1, PolicyShape(3, 4, SIZES))))


def test_chains_of_suggestions_are_not_weighed():
    progress = Progress(1, jnp.zeros((1, 1)))
    for rule in (RULES["marginal"], taught(policies(0))):
        with pytest.raises(ConfigError, match="all nodes of a tree"):
            rule(progress)


def test_a_static_tree_takes_no_rule(target, draft):
    tree = TreeConfig("static", 2, branching=(2, 2))
    with pytest.raises(ConfigError, match="always has its full depth"):
        answers(target, draft, RULES["mass"], tree)
