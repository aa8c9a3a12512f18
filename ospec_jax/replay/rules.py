# SPDX-License-Identifier: Apache-2.0
"""Rules for how much to draft, held against each other on a trace.

A rule chooses a depth and a size for each cycle, from what a decoder would know: the
draft's own numbers up to the depth in question, and what earlier cycles came to. The
oracle alone knows more. Depth rules are those of `drafters.stopping`, the same
functions that stop a draft while it grows; depths that earlier outcomes decide are the
controllers of `control`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ospec_jax.config import TreeConfig
from ospec_jax.control import marginal
from ospec_jax.control.base import Action, Controller, Outcome, Row
from ospec_jax.control.depth import most_tokens_a_second
from ospec_jax.drafters.stopping import (
    Progress,
    StopFn,
    above_entropy,
    below_gain,
    below_mass,
    below_probability,
)
from ospec_jax.replay.cycles import (
    Choice,
    Cycles,
    Result,
    Seen,
    costs_at,
    look,
    verified_mass,
    verify,
)
from ospec_jax.typing import struct

_REMEMBERED = 200.0
"""Steps after which what a rule has learned weighs 1 / e of what it did, as in
`control.depth`."""


class Rule(NamedTuple):
    """Chooses how much to draft and to verify, cycle by cycle.

    Attributes:
      name: For tables.
      choose: `(state, Seen) -> Choice`.
      init: `() -> state`; most rules have none.
      observe: `(state, Seen, Choice, Result, mass [k]) -> state`: what came of a
        choice, and the path probabilities of the nodes that were verified, summed by
        depth.
    """

    name: str
    choose: Callable[[Any, Seen], Choice]
    init: Callable[[], Any] = lambda: None
    observe: Callable[..., Any] = lambda state, seen, choice, result, mass: state


@dataclasses.dataclass(frozen=True)
class Score:
    """What a rule did on a trace.

    Attributes:
      tokens_per_second: By the clock.
      acceptance_length: Tokens a cycle.
      depth: Mean depth that was drafted.
      rows: Mean rows that were verified, the root included.
      num_cycles: Passes of the target.
      choices: Cycles by depth, from 0 on, and within it by size.
    """

    name: str
    tokens_per_second: float
    acceptance_length: float
    depth: float
    rows: float
    num_cycles: int
    choices: tuple[tuple[int, ...], ...] = ()

    @property
    def depths(self) -> np.ndarray:
        """Share of the cycles that drafted so deep, `[k + 1]`, from 0 on."""
        return np.sum(self.choices, axis=1) / self.num_cycles

    @property
    def sizes(self) -> np.ndarray:
        """Share of the cycles that verified so many nodes, `[s + 1]`; none, first."""
        table = np.asarray(self.choices)
        drafted = np.sum(table[1:], axis=0)
        return np.concatenate([[np.sum(table[0])], drafted]) / self.num_cycles


class _Sums(NamedTuple):
    position: Int[Array, ""]
    state: Any
    seconds: Array
    choices: Int[Array, "d s"]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run(cycles: Cycles, choose: Callable, init: Callable, observe: Callable) -> _Sums:
    def body(sums: _Sums) -> _Sums:
        seen = look(cycles, sums.position)
        choice = choose(sums.state, seen)
        result = verify(cycles, sums.position, choice)
        mass = verified_mass(cycles, sums.position, choice)
        return _Sums(
            # Answers lie one behind the other: where one ends the next begins.
            position=sums.position + result.num_emitted,
            state=observe(sums.state, seen, choice, result, mass),
            seconds=sums.seconds + result.seconds,
            choices=sums.choices.at[choice.depth, choice.size].add(1),
        )

    nothing = jnp.zeros(cycles.rows.shape, jnp.int32)
    first = _Sums(jnp.int32(0), init(), jnp.float32(0), nothing)
    is_going = lambda sums: sums.position < cycles.num_positions

    return jax.lax.while_loop(is_going, body, first)


def run_rule(cycles: Cycles, rule: Rule) -> Score:
    """Replays all answers of a trace, one after the other, with what a rule chooses."""
    sums = jax.device_get(_run(cycles, rule.choose, rule.init, rule.observe))
    return score_of(rule.name, cycles, sums.seconds, sums.choices)


def score_of(name: str, cycles: Cycles, seconds, choices) -> Score:
    """A score of cycles that were counted by depth and size, `[k + 1, s]`."""
    count = int(np.sum(choices))
    depths = np.arange(len(choices))[:, None]
    return Score(
        name=name,
        tokens_per_second=cycles.num_positions / float(seconds),
        acceptance_length=cycles.num_positions / count,
        depth=float(np.sum(choices * depths)) / count,
        rows=float(np.sum(choices * np.asarray(cycles.rows))) / count,
        num_cycles=count,
        choices=tuple(tuple(row) for row in np.asarray(choices).tolist()),
    )


def run_shift(before: Cycles, after: Cycles) -> list[Score]:
    """The marginal rule on answers of one kind, by where its calibration comes from.

    Returns:
      Scores on `after`: begun anew there; calibrated on `before` and learning on; and
      calibrated on `before` for good.
    """
    rule = marginal_rule(after.depth)
    known = _run(before, rule.choose, rule.init, rule.observe).state
    moved = rule._replace(init=lambda: known)
    stay = lambda state, seen, choice, result, mass: state

    return [
        run_rule(after, rule._replace(name="begun anew")),
        run_rule(after, moved._replace(name="moved, learning on")),
        run_rule(after, moved._replace(name="moved, as it was", observe=stay)),
    ]


def fixed(depth: int, size: int, name: str = "") -> Rule:
    """The same depth and size always.

    Args:
      size: Number into the menu.
    """
    choice = Choice(jnp.int32(depth), jnp.int32(size))
    return Rule(name or f"fixed {depth}, {size}", lambda state, seen: choice)


def score_grid(cycles: Cycles) -> np.ndarray:
    """Tokens a second of every fixed depth and size, `[k + 1, s]`, by one program."""
    num_depths = cycles.depth + 1
    num_sizes = len(cycles.sizes)
    run = jax.jit(jax.vmap(lambda choice: _seconds_of(cycles, choice)))
    depth, size = np.divmod(np.arange(num_depths * num_sizes), num_sizes)
    seconds = run(Choice(jnp.asarray(depth), jnp.asarray(size)))

    return (cycles.num_positions / np.asarray(seconds)).reshape(num_depths, num_sizes)


def _seconds_of(cycles: Cycles, choice: Choice) -> Array:
    def body(carry):
        position, seconds = carry
        result = verify(cycles, position, choice)
        return position + result.num_emitted, seconds + result.seconds

    is_going = lambda carry: carry[0] < cycles.num_positions
    return jax.lax.while_loop(is_going, body, (jnp.int32(0), jnp.float32(0)))[1]


class _Recorded(Progress):
    """A tree that grows on record: its entropies were computed, its logits were not."""

    found: Any = None

    @property
    def entropies(self):
        return self.found


def drafted_depth(stop_fn: StopFn, seen: Seen, num_kept: int) -> Int[Array, ""]:
    """How deep a depth rule of `drafters.stopping` would have let a tree grow."""
    most = len(seen.best)
    depth = jnp.int32(most)

    # From the deepest on, so that the first depth at which it stops stands in the end.
    for d in range(most - 1, 0, -1):
        progress = _Recorded(
            depth=d,
            log_probs=seen.frontier[None, d - 1],
            scores=seen.best[None, d - 1],
            scores_before=seen.best[None, d - 2] if d > 1 else None,
            num_kept=num_kept,
            node_depths=seen.depths[d - 1],
        )
        progress.found = seen.entropies[None, d - 1]
        depth = jnp.where(jnp.all(stop_fn(progress)), d, depth)

    return depth


def stopping(name: str, stop_fn: StopFn, size: int, num_kept: int) -> Rule:
    """Drafts until a depth rule stops, and verifies the same number of nodes always.

    Args:
      size: Number into the menu.
      num_kept: That many nodes.
    """

    def choose(state, seen: Seen) -> Choice:
        return Choice(drafted_depth(stop_fn, seen, num_kept), jnp.int32(size))

    return Rule(name, choose)


@struct
class _Tried:
    """What came of each arm of a bandit: `[r]` times taken, and rewards."""

    counts: Float[Array, " r"]
    rewards: Float[Array, " r"]


def tap_out(stop_fns: Sequence[StopFn], size: int, num_kept: int) -> Rule:
    """A bandit over depth rules that need no training (TapOut, arXiv 2511.02017).

    Each draft is one round of UCB1, whose reward is half the accepted share of the
    deepest draft, half that of this one. The paper's formula was not at hand; this is
    what its abstract says, with equal halves.

    Args:
      stop_fns: The arms.
      size: Number into the menu.
      num_kept: That many nodes.
    """

    def init() -> _Tried:
        nothing = jnp.zeros(len(stop_fns))
        return _Tried(nothing, nothing)

    def arm_of(tried: _Tried) -> Array:
        counts = jnp.maximum(tried.counts, 1.0)
        spread = jnp.log(jnp.maximum(jnp.sum(tried.counts), 1.0))
        bounds = tried.rewards / counts + jnp.sqrt(2 * spread / counts)
        return jnp.argmax(jnp.where(tried.counts == 0, jnp.inf, bounds))

    def choose(tried: _Tried, seen: Seen) -> Choice:
        depths = [drafted_depth(rule, seen, num_kept) for rule in stop_fns]
        return Choice(jnp.stack(depths)[arm_of(tried)], jnp.int32(size))

    def observe(tried: _Tried, seen: Seen, choice: Choice, result: Result, mass):
        accepted = result.num_accepted.astype(float)
        reward = (accepted / len(seen.best) + accepted / choice.depth) / 2
        taken = jnp.arange(len(stop_fns)) == arm_of(tried)
        booked = _Tried(tried.counts + taken, tried.rewards + taken * reward)
        # What an answer's end cuts off was not seen.
        return jax.tree.map(
            lambda old, new: jnp.where(result.is_last, old, new), tried, booked
        )

    return Rule("bandit of these (TapOut)", choose, init, observe)


def marginal_rule(
    depth: int,
    has_sizes: bool = True,
    size: int = 0,
    is_calibrated: bool = True,
    remembered: float = _REMEMBERED,
    name: str = "",
) -> Rule:
    """BASTION's marginal rule for depth and size; see `control.marginal`.

    Args:
      depth: Of the trace's trees.
      has_sizes: Choose the size, too; else it is always `size`, a number into the menu.
      is_calibrated: Correct path probabilities by what verification said of earlier
        ones; else they count as they are.
      remembered: Steps after which evidence weighs 1 / e of what it did.
    """
    kept = float(np.exp(-1.0 / remembered))

    def choose(known: marginal.Calibration, seen: Seen) -> Choice:
        factor = marginal.factors(known)
        if not is_calibrated:
            factor = jnp.ones_like(factor)
        odds = marginal.odds_below(known)
        below = odds[marginal.grades(marginal.sureness(seen.frontier[:, 0]))]
        costs = seen.costs
        if not has_sizes:
            costs = marginal.Costs(
                costs.seconds[:, size, None], costs.sizes[size, None]
            )
        most = len(seen.best)
        drafted = jnp.int32(most)

        for d in range(most - 1, 0, -1):
            level = slice(d - 1, d)
            goes_on = marginal.is_worth_more(
                costs,
                d,
                seen.best[level],
                seen.depths[level],
                seen.frontier[level],
                below[level],
                factor,
            )
            drafted = jnp.where(goes_on, drafted, d)

        level = drafted - 1
        emitted = marginal.promised(seen.best[level], seen.depths[level], factor)
        chosen, _ = marginal.best_size(costs, drafted, emitted)
        is_drafting = marginal.is_worth_drafting(costs, known)
        drafted = jnp.where(is_drafting, drafted, 0)

        return Choice(drafted, chosen if has_sizes else jnp.int32(size))

    def observe(known, seen: Seen, choice: Choice, result: Result, mass):
        sure = marginal.sureness(seen.frontier[:, 0])
        booked = marginal.learn(
            known, result.num_accepted[None], mass[None], sure[None], choice.depth, kept
        )
        # What an answer's end cuts off was not seen.
        return jax.tree.map(
            lambda old, new: jnp.where(result.is_last, old, new), known, booked
        )

    default = "marginal" if has_sizes else "marginal depth"
    return Rule(name or default, choose, lambda: marginal.begin(depth), observe)


def run_controller(
    cycles: Cycles,
    build: Callable[[tuple[Action, ...]], Controller],
    sizes: Sequence[int],
    topk: int,
    name: str,
) -> Score:
    """Replays what a controller of `control` would have chosen, step by step.

    As in decoding it is one step behind: a step's outcome is told after the next one
    was chosen, and that of an answer's last step is not.

    Args:
      build: The controller of some actions.
      sizes: For each depth from 0 on, the size to verify, by number.
    """
    actions = []
    for depth, size in enumerate(sizes):
        count = int(cycles.rows[depth, size]) - 1
        actions.append(
            Action(
                TreeConfig("dynamic", depth, topk, count)
                if depth
                else TreeConfig(num_steps=0)
            )
        )

    controller = build(tuple(actions))
    state = controller.init(1)
    middle = jnp.asarray(round(float(np.mean(cycles.contexts))))
    seconds = np.asarray(costs_at(cycles, middle).seconds)
    if controller.set_costs is not None:
        known = [actions.index(action) for action in controller.actions]
        state = controller.set_costs(state, [seconds[d, sizes[d]] for d in known])

    table = tables_of(cycles)
    waiting = None
    position = 0
    spent = 0.0
    choices = np.zeros(cycles.rows.shape, int)

    while position < cycles.num_positions:
        row = Row(False, int(cycles.contexts[position]), int(table.left[position]))
        action = controller.choose(state, (row,))
        if waiting is not None:
            state = controller.observe(state, *waiting)
        depth = actions.index(action)
        size = sizes[depth]
        accepted = int(table.accepted[position, depth, size])
        left = int(table.left[position])
        is_last = accepted + 1 >= left
        waiting = None if is_last else (action, Outcome((accepted,)))
        spent += float(table.seconds[position, depth, size])
        choices[depth, size] += 1
        position += min(accepted + 1, left)

    return score_of(name, cycles, spent, choices)


class Tables(NamedTuple):
    """All choices at all positions, on the host: `[n, k + 1, s]`, and `[n]` left."""

    accepted: np.ndarray
    seconds: np.ndarray
    left: np.ndarray


def tables_of(cycles: Cycles) -> Tables:
    below = jnp.cumsum(cycles.is_right, axis=-1)[..., cycles.sizes - 1]
    plain = jnp.zeros_like(below[:, :1])
    accepted = jnp.concatenate([plain, below], axis=1)
    seconds = jax.vmap(lambda context: costs_at(cycles, context).seconds)(
        cycles.contexts
    )
    found = jax.device_get((accepted, seconds, cycles.remaining))

    return Tables(*map(np.asarray, found))


def run_oracle(cycles: Cycles) -> Score:
    """The least time in which the trace's answers can be given: the ceiling.

    It knows what the target will say, and how each choice moves the next ones: by
    dynamic programming from each answer's end, not cycle by cycle.
    """
    table = tables_of(cycles)
    num = cycles.num_positions
    # What is left from each position on; answers end where the next one begins.
    least = np.zeros(num + 1)
    chosen = np.zeros(num, int)
    emitted = np.minimum(table.accepted + 1, table.left[:, None, None])

    for i in range(num - 1, -1, -1):
        total = table.seconds[i] + least[i + emitted[i]]
        chosen[i] = int(np.argmin(total))
        least[i] = total.flat[chosen[i]]

    return _walk("oracle", cycles, table, emitted, chosen)


def run_greedy_oracle(cycles: Cycles) -> Score:
    """The choice of most tokens a second at each cycle alone, LTD's reward."""
    table = tables_of(cycles)
    emitted = np.minimum(table.accepted + 1, table.left[:, None, None])
    rates = emitted / table.seconds
    chosen = np.argmax(rates.reshape(len(rates), -1), axis=1)

    return _walk("oracle, cycle by cycle", cycles, table, emitted, chosen)


def run_choices(cycles: Cycles, choice: Choice, name: str) -> Score:
    """Replays choices that were made for every position, `[n]`."""
    table = tables_of(cycles)
    emitted = np.minimum(table.accepted + 1, table.left[:, None, None])
    num_sizes = cycles.rows.shape[1]
    chosen = np.asarray(choice.depth) * num_sizes + np.asarray(choice.size)

    return _walk(name, cycles, table, emitted, chosen)


def _walk(name: str, cycles: Cycles, table: Tables, emitted, chosen) -> Score:
    """Follows choices, by number over depths and sizes, from position to position."""
    choices = np.zeros(cycles.rows.shape, int)
    position = 0
    spent = 0.0

    while position < cycles.num_positions:
        depth, size = np.unravel_index(chosen[position], choices.shape)
        spent += float(table.seconds[position, depth, size])
        choices[depth, size] += 1
        position += int(emitted[position, depth, size])

    return score_of(name, cycles, spent, choices)


_THRESHOLDS: dict[str, tuple[Callable[[float], StopFn], tuple[float, ...]]] = {
    "gain (OPT-Tree)": (below_gain, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
    "probability": (below_probability, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    "mass (DDD)": (below_mass, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    "entropy (SVIP)": (above_entropy, (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8)),
}
"""Depth rules and the thresholds that are tried on training answers."""


def compare(
    training: Cycles, held_out: Cycles, topk: int, more: Sequence[Score] = ()
) -> tuple[list[Score], dict[str, str]]:
    """All rules on held-out answers; what they have to be told is set on others.

    Args:
      more: Scores of what was taught elsewhere, for the same list.

    Returns:
      Scores, and for each rule with settings what was chosen on the training answers.
    """
    settings: dict[str, str] = {}
    grid = score_grid(training)
    depth, size = map(int, np.unravel_index(np.argmax(grid), grid.shape))
    sizes = np.asarray(training.sizes)
    settings["best fixed"] = f"depth {depth}, {sizes[size]} nodes"
    found = [
        run_rule(held_out, fixed(0, 0, "plain")),
        run_rule(held_out, fixed(depth, size, "best fixed")),
    ]

    # Of each depth its best size: what a controller of depths alone would be given.
    of_depth = [int(np.argmax(row)) for row in grid]
    found.append(run_controller(held_out, most_tokens_a_second, of_depth, topk, "auto"))
    settings["auto"] = f"nodes by depth {[int(sizes[s]) for s in of_depth[1:]]}"

    has_entropies = bool(np.isfinite(np.asarray(training.entropies)).all())
    arms = []
    for name, (build, thresholds) in _THRESHOLDS.items():
        if build is above_entropy and not has_entropies:
            continue
        # Whoever needs no training has the threshold in the middle.
        arms.append(build(thresholds[len(thresholds) // 2]))
        threshold, of_rule = _best_threshold(training, build, thresholds)
        settings[name] = f"{threshold}, {sizes[of_rule]} nodes"
        rule = stopping(name, build(threshold), of_rule, int(sizes[of_rule]))
        found.append(run_rule(held_out, rule))

    bandit = tap_out(arms, size, int(sizes[size]))
    settings[bandit.name] = f"{sizes[size]} nodes"
    found.append(run_rule(held_out, bandit))

    most = training.depth
    plain = marginal_rule(most, is_calibrated=False, name="marginal, as drafted")
    found += [
        run_rule(held_out, plain),
        run_rule(held_out, marginal_rule(most)),
        *more,
        run_greedy_oracle(held_out),
        run_oracle(held_out),
    ]

    return found, settings


def _best_threshold(
    cycles: Cycles, build: Callable[[float], StopFn], thresholds: Sequence[float]
) -> tuple[float, int]:
    """Threshold and size, by number, of most tokens a second; all in one program."""
    num_sizes = len(cycles.sizes)
    sizes = [int(size) for size in np.asarray(cycles.sizes)]

    def depths_of(position, num_kept):
        seen = look(cycles, position)
        rules = [build(threshold) for threshold in thresholds]
        return jnp.stack([drafted_depth(rule, seen, num_kept) for rule in rules])

    best = (0.0, thresholds[0], 0)
    for size in range(num_sizes):
        count = sizes[size]
        of_position = jax.jit(jax.vmap(functools.partial(depths_of, num_kept=count)))(
            jnp.arange(cycles.num_positions)
        )
        seconds = _seconds_by_depths(cycles, of_position.T, jnp.int32(size))
        rates = cycles.num_positions / np.asarray(seconds)
        number = int(np.argmax(rates))
        best = max(best, (float(rates[number]), thresholds[number], size))

    return best[1], best[2]


@jax.jit
def _seconds_by_depths(cycles: Cycles, depths, size) -> Array:
    """Seconds of a trace with depths by rule and position, `[r, n]`."""

    def run(of_position):
        def body(carry):
            position, seconds = carry
            choice = Choice(of_position[position], size)
            result = verify(cycles, position, choice)
            return position + result.num_emitted, seconds + result.seconds

        is_going = lambda carry: carry[0] < cycles.num_positions
        return jax.lax.while_loop(is_going, body, (jnp.int32(0), jnp.float32(0)))[1]

    return jax.vmap(run)(depths)


def markdown_table(scores: Sequence[Score], settings: dict[str, str]) -> str:
    """Scores as a table, with the speed relative to the best fixed choice."""
    fixed_speed = next(s for s in scores if s.name == "best fixed").tokens_per_second
    lines = [
        "| rule | tokens/s | over best fixed | acceptance length "
        "| depth | rows | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        lines.append(
            f"| {score.name} | {score.tokens_per_second:.1f} "
            f"| {score.tokens_per_second / fixed_speed:.3f} "
            f"| {score.acceptance_length:.2f} | {score.depth:.2f} "
            f"| {score.rows:.2f} | {settings.get(score.name, '')} |"
        )

    return "\n".join(lines)
