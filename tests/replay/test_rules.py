# SPDX-License-Identifier: Apache-2.0
"""Cycles on a made-up trace: what choices come to, and rules against brute force."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.control.base import fixed as fixed_controller
from ospec_jax.control.clock import Clock, flat_clock
from ospec_jax.drafters.stopping import (
    above_entropy,
    below_gain,
    below_mass,
    below_probability,
)
from ospec_jax.replay import cycles as env
from ospec_jax.replay import rules
from ospec_jax.replay.cycles import Choice, build_cycles
from ospec_jax.replay.trees import Trace, TraceMeta, TraceShape

SHAPE = TraceShape(topk=2, depth=3, num_nodes=6)
MENU = (1, 2, 4, 6)
CLOCK = Clock(
    topk=2,
    drafting=(0.0, 0.3, 0.7, 1.2),
    rows=(1, 2, 4, 8),
    verifying=(1.0, 1.2, 1.3, 2.5),
    context=10,
    per_context=0.01,
    per_row_context=0.002,
)


def made_up_trace(lengths=(9, 1, 14), seed=0):
    """Random trees whose nodes are right about as often as they say."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    p = SHAPE.num_places
    parents = np.full((n, p), -1, np.int32)
    scores = np.zeros((n, p), np.float32)
    is_right = np.zeros((n, p), bool)
    for i in range(n):
        sure = rng.uniform(0.2, 0.95)
        frontier = [-1]
        for depth in range(1, SHAPE.depth + 1):
            first = SHAPE.first_place(depth)
            for j, parent in enumerate(np.repeat(frontier, 2)):
                q = sure if j % 2 == 0 else (1 - sure) * rng.uniform(0.5, 1)
                above = 0.0 if parent < 0 else scores[i, parent]
                parents[i, first + j] = parent
                scores[i, first + j] = above + np.log(q)
            for parent in frontier:
                if parent < 0 or is_right[i, parent]:
                    child = first + 2 * frontier.index(parent)
                    draw = rng.uniform()
                    is_right[i, child] = draw < sure
                    is_right[i, child + 1] = sure <= draw < sure + 0.3 * (1 - sure)
            level = scores[i, first : SHAPE.first_place(depth + 1)]
            frontier = list(first + np.argsort(-level, kind="stable")[:2])
    remaining = np.concatenate([np.arange(x, 0, -1) for x in lengths])
    # What would lie behind an answer's end is never right.
    is_right &= SHAPE.depths <= remaining[:, None]
    meta = TraceMeta("t", "f", "float32", "eagle3", "d", 2, 3, 6)

    return Trace(
        meta,
        tokens=np.zeros((n, p), np.int32),
        parents=parents,
        scores=scores,
        is_right=is_right,
        entropies=rng.uniform(0, 3, (n, 3, 2)).astype(np.float32),
        contexts=np.concatenate([5 + np.arange(x) for x in lengths]),
        followers=np.arange(n, dtype=np.int32),
        ids=tuple("abcdefgh"[: len(lengths)]),
        domains=("",) * len(lengths),
        lengths=tuple(lengths),
    )


@pytest.fixture(scope="module")
def trace():
    return made_up_trace()


@pytest.fixture(scope="module")
def cycles(trace):
    return build_cycles(trace, CLOCK, MENU)


CHOICES = [Choice(d, s) for d in range(4) for s in range(len(MENU))]


@pytest.fixture(scope="module")
def outcomes(cycles):
    """Results of all choices at all positions, on the host."""
    at = jax.vmap(functools.partial(env.verify, cycles), in_axes=(0, None))
    depth, size = (jnp.asarray(x) for x in zip(*CHOICES, strict=True))
    run = jax.jit(jax.vmap(at, in_axes=(None, 0)))
    found = run(jnp.arange(cycles.num_positions), Choice(depth, size))
    return {
        choice: env.Result(*(np.asarray(field)[i] for field in found))
        for i, choice in enumerate(CHOICES)
    }


def test_the_environment_says_what_the_trace_says(trace, cycles, outcomes):
    for choice, result in outcomes.items():
        size = MENU[choice.size]
        nodes = min(size, SHAPE.first_place(choice.depth + 1))
        rows = 1 + (nodes if choice.depth else 0)
        seconds = CLOCK.seconds(choice.depth, rows, trace.contexts)
        np.testing.assert_allclose(result.seconds, seconds, rtol=1e-6)
        for i in range(cycles.num_positions):
            emitted = trace.emitted(i, choice.depth, size)
            assert result.num_emitted[i] == len(emitted)
            assert result.is_last[i] == (len(emitted) == trace.remaining[i])


def test_a_rule_walks_along_all_answers(trace, cycles, outcomes):
    grid = rules.score_grid(cycles)
    for choice in (Choice(2, 1), Choice(0, 0), Choice(3, 3)):
        score = rules.run_rule(cycles, rules.fixed(*choice))
        position = count = 0
        seconds = 0.0
        while position < len(trace.followers):
            seconds += float(outcomes[choice].seconds[position])
            position += int(outcomes[choice].num_emitted[position])
            count += 1
        assert score.num_cycles == count
        np.testing.assert_allclose(
            score.tokens_per_second, len(trace.followers) / seconds, rtol=1e-5
        )
        assert score.depth == choice.depth
        np.testing.assert_allclose(
            grid[choice.depth, choice.size], score.tokens_per_second, rtol=1e-5
        )


def test_many_cycles_at_once(cycles):
    """Under vmap and scan; an answer's end begins another one."""

    @jax.jit
    def walk(key):
        place, _ = env.reset(cycles, key)

        def body(place, choice):
            place, seen, result = env.step(cycles, place, choice)
            return place, (place.position, result, seen.context)

        depths = jnp.arange(60) % 4
        return jax.lax.scan(body, place, Choice(depths, depths))[1]

    positions, results, contexts = jax.vmap(walk)(
        jax.random.split(jax.random.key(0), 8)
    )
    assert positions.shape == (8, 60)
    starts = np.asarray(cycles.starts)
    is_last = np.asarray(results.is_last)
    assert is_last.any()
    assert not is_last.all()
    assert np.isin(np.asarray(positions)[is_last], starts).all()
    before = np.asarray(positions)[:, :-1]
    moved = np.asarray(positions)[:, 1:] - before
    goes_on = ~is_last[:, 1:]
    emitted = np.asarray(results.num_emitted)[:, 1:]
    np.testing.assert_array_equal(moved[goes_on], emitted[goes_on])
    np.testing.assert_array_equal(contexts, np.asarray(cycles.contexts)[positions])
    np.testing.assert_allclose(results.reward, results.num_emitted / results.seconds)


def shortest(outcomes, position, end):
    """Least seconds to an answer's end, by trying everything."""

    @functools.cache
    def seconds(i):
        if i >= end:
            return 0.0
        found = []
        for result in outcomes.values():
            rest = seconds(i + int(result.num_emitted[i]))
            found.append(float(result.seconds[i]) + rest)
        return min(found)

    return seconds(position)


def test_the_oracle_is_the_least_time_there_is(trace, cycles, outcomes):
    starts = trace.starts
    total = sum(
        shortest(outcomes, int(start), int(start) + length)
        for start, length in zip(starts, trace.lengths, strict=True)
    )
    score = rules.run_oracle(cycles)
    np.testing.assert_allclose(
        score.tokens_per_second, len(trace.followers) / total, rtol=1e-5
    )


def test_nothing_beats_the_oracle():
    trace = made_up_trace((150,) * 4, seed=3)
    cycles = build_cycles(trace, CLOCK, MENU)
    found, settings = rules.compare(cycles, cycles, SHAPE.topk)
    speeds = {score.name: score.tokens_per_second for score in found}
    assert max(speeds, key=lambda name: speeds[name]) == "oracle"
    assert speeds["best fixed"] == pytest.approx(rules.score_grid(cycles).max())
    assert speeds["oracle, cycle by cycle"] > speeds["best fixed"]
    # Trees that are right as often as they say are where the marginal rule is at home.
    assert speeds["marginal"] > speeds["best fixed"] * 1.03
    assert len(speeds) == 12
    table = rules.markdown_table(found, settings)
    assert table.count("\n") == 13
    assert "| oracle |" in table


@pytest.mark.parametrize(
    "stop_fn",
    [below_gain(0.4), below_probability(0.4), below_mass(0.5), above_entropy(1.2)],
    ids=["gain", "probability", "mass", "entropy"],
)
def test_depth_rules_stop_where_they_say(trace, cycles, stop_fn):
    """Worked out anew from the trees, node by node."""
    depths = drafted(cycles, stop_fn)
    for i, depth in enumerate(depths):
        wanted = SHAPE.depth
        for d in range(SHAPE.depth - 1, 0, -1):
            first, last = SHAPE.first_place(d), SHAPE.first_place(d + 1)
            newest = np.sort(np.exp(trace.scores[i, first:last]))[::-1][:2]
            tops = [
                np.sort(np.exp(trace.scores[i, : SHAPE.first_place(x)]))[::-1][:4].sum()
                for x in (d, d + 1)
            ]
            gain = tops[1] - tops[0] if d > 1 else np.inf
            stops = {
                "below_gain": gain < 0.4,
                "below_probability": newest[0] < 0.4,
                "below_mass": newest.sum() < 0.5,
                "above_entropy": np.sqrt(trace.entropies[i, d - 1, 0]) > 1.2,
            }[stop_fn.__qualname__.split(".")[0]]
            wanted = d if stops else wanted
        assert depth == wanted
    assert len(set(depths)) > 1


def test_a_bandit_takes_the_rule_of_most_reward(trace, cycles):
    """UCB1, worked out anew: one arm stops at once, the other one never."""
    arms = [below_probability(1.1), below_probability(1e-9)]
    depth_of = [1, SHAPE.depth]
    counts = np.zeros(2)
    rewards = np.zeros(2)
    taken = np.zeros(SHAPE.depth + 1, int)
    position = 0

    while position < cycles.num_positions:
        arm = int(np.argmin(counts))
        if counts.all():
            bonus = np.sqrt(2 * np.log(counts.sum()) / counts)
            arm = int(np.argmax(rewards / counts + bonus))
        depth = depth_of[arm]
        result = env.verify(cycles, position, Choice(jnp.int32(depth), jnp.int32(2)))
        accepted = int(result.num_accepted)
        taken[depth] += 1
        position += int(result.num_emitted)
        if not result.is_last:
            counts[arm] += 1
            rewards[arm] += (accepted / SHAPE.depth + accepted / depth) / 2

    score = rules.run_rule(cycles, rules.tap_out(arms, 2, MENU[2]))
    assert np.sum(score.choices, axis=1).tolist() == taken.tolist()
    assert min(taken[1], taken[3]) > 1


def drafted(cycles, stop_fn):
    """How deep a rule drafts at each position."""
    at = lambda i: rules.drafted_depth(stop_fn, env.look(cycles, i), 4)
    return np.asarray(jax.jit(jax.vmap(at))(jnp.arange(cycles.num_positions))).tolist()


def test_choices_do_not_look_ahead(cycles):
    """What lies deeper than a rule drafts never changes its choice."""
    rule = rules.marginal_rule(SHAPE.depth)
    known = rule.init()

    @jax.jit
    @jax.vmap
    def both(i):
        seen = env.look(cycles, i)
        choice = rule.choose(known, seen)
        is_hidden = jnp.arange(SHAPE.depth)[:, None] >= jnp.maximum(choice.depth, 1)
        blind = seen._replace(
            best=jnp.where(is_hidden, -0.1, seen.best),
            frontier=jnp.where(is_hidden, -0.1, seen.frontier),
            entropies=jnp.where(is_hidden, 9.0, seen.entropies),
        )
        return choice, rule.choose(known, blind)

    choice, again = both(jnp.arange(cycles.num_positions))
    jax.tree.map(np.testing.assert_array_equal, choice, again)
    assert len(set(choice.depth.tolist())) > 1


def test_a_controller_hears_of_steps_one_late(cycles):
    heard = []
    chosen = []

    def build(actions):
        inner = fixed_controller(actions)

        def choose(state, rows):
            chosen.append(rows[0].num_remaining)
            return inner.choose(state, rows)

        def observe(state, action, outcome):
            heard.append((len(chosen), outcome.num_accepted))
            return state

        return inner._replace(choose=choose, observe=observe)

    score = rules.run_controller(cycles, build, [0, 1, 2, 3], SHAPE.topk, "fixed")
    same = rules.run_rule(cycles, rules.fixed(3, 3))
    assert dataclasses.replace(score, name="") == dataclasses.replace(
        same, name="", tokens_per_second=score.tokens_per_second
    )
    assert score.tokens_per_second == pytest.approx(same.tokens_per_second)
    # Three answers' last steps are not told of; the first is heard of at the second.
    assert len(heard) == len(chosen) - 3
    assert heard[0][0] == 2


def test_a_clock_of_other_trees_is_refused(trace):
    for clock in (flat_clock(3, 3), flat_clock(2, 2)):
        with pytest.raises(ConfigError, match="the clock knows"):
            build_cycles(trace, clock)


def test_another_clock_chooses_otherwise(trace, cycles):
    """On a flat clock rows cost nothing, so that more of them are verified."""
    flat = build_cycles(trace, flat_clock(2, 3), MENU)
    rows = [
        rules.run_rule(c, rules.marginal_rule(SHAPE.depth)).rows for c in (cycles, flat)
    ]
    assert rows[1] > rows[0] + 0.5


def test_sizes_beyond_a_trace_are_left_out(trace):
    sizes = np.asarray(build_cycles(trace, CLOCK, (1, 3, 50), num_nodes=5).sizes)
    assert list(sizes) == [1, 3, 5]
    assert list(itertools.pairwise(sizes)) == [(1, 3), (3, 5)]


def test_scores_count_what_was_chosen():
    """By depth and size; means and shares follow from the counts."""
    cycles = build_cycles(made_up_trace(), CLOCK, MENU)
    for score in (
        rules.run_rule(cycles, rules.marginal_rule(SHAPE.depth)),
        rules.run_oracle(cycles),
        rules.run_rule(cycles, rules.fixed(2, 1)),
    ):
        assert np.sum(score.choices) == score.num_cycles
        assert score.depths @ np.arange(4) == pytest.approx(score.depth)
        assert score.depths.sum() == pytest.approx(score.sizes.sum()) == 1.0
    assert score.choices[2][1] == score.num_cycles


def test_calibration_is_taken_along():
    """To the same answers again it helps, if only by what it need not learn anew."""
    cycles = build_cycles(made_up_trace((40, 30), seed=3), CLOCK, MENU)
    wrong = dataclasses.replace(cycles, is_right=jnp.zeros_like(cycles.is_right))
    anew, moved, stuck = rules.run_shift(wrong, cycles)
    # Where nothing was ever right nothing is drafted, until it is learned anew.
    assert anew.acceptance_length > stuck.acceptance_length == 1.0
    assert anew.tokens_per_second >= moved.tokens_per_second
