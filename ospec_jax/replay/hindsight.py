# SPDX-License-Identifier: Apache-2.0
"""Regret of online learning, and the speed that theory makes of it.

The paper is Qian et al., *When Drafts Evolve: Speculative Decoding Meets Online
Learning*, arXiv 2603.12617. It bounds the acceleration of speculative decoding from
below by a function of the draft's dynamic regret. Its constants are not copied here:
the bounds below are reconstructed from their ingredients, each derived where it stands.
They speak of *sampled* verification, whose acceptance probability is 1 - TV(p, q), at
temperature 1: that of a replay, whose answers are greedy, is another one.
"""

from collections.abc import Callable

import jax
import numpy as np
import optax

from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.objective import build_objective
from ospec_jax.replay.replayer import Replayer


def expected_tokens(acceptance_rate, num_steps: int):
    """Tokens of one target pass when each draft token is accepted independently.

    The bonus token included: (1 - a^(K+1)) / (1 - a), written as the sum that it is.
    """
    powers = [np.asarray(acceptance_rate, float) ** i for i in range(num_steps + 1)]
    return np.sum(powers, axis=0)


def acceleration_rate(tokens_per_pass, num_steps: int, cost_ratio: float):
    """The paper's gamma: plain decoding's time over that of speculation.

    Args:
      tokens_per_pass: Mean acceptance length, the bonus token included.
      cost_ratio: Of a draft step to a pass of the target; verification is taken to
        cost as much as a plain pass.
    """
    return np.asarray(tokens_per_pass, float) / (cost_ratio * num_steps + 1)


def acceleration_lower_bound(
    regret, num_rounds: int, num_steps: int, cost_ratio: float, comparator_loss=0.0
):
    """What dynamic regret guarantees of `acceleration_rate`.

    A reconstruction of the paper's first theorem. With f_t(w) = KL(p_t || q_w) the
    summed loss is `regret + comparator_loss`. Pinsker gives TV_t <= sqrt(f_t / 2), and
    Jensen a mean rejection probability of at most d = sqrt((regret +
    comparator_loss) / (2 T)). Tokens by pass are a convex, falling function of that
    probability, so their mean over rounds is at least the function's value at d,
    (1 - (1 - d)^(K+1)) / d, for positions that are accepted independently.

    Args:
      regret: Summed over rounds, in nats.
      comparator_loss: Sum of KL(p_t || q) of the comparators; 0 if they attain p_t.
    """
    total = np.maximum(np.asarray(regret, float) + comparator_loss, 0.0)
    rejection = np.minimum(np.sqrt(total / (2 * num_rounds)), 1.0)
    tokens = expected_tokens(1 - rejection, num_steps)
    return acceleration_rate(tokens, num_steps, cost_ratio)


def best_step_size(num_rounds, path_length, diameter, gradient_bound) -> float:
    """The step size that minimises `gradient_descent_bound`; needs P_T beforehand."""
    spread = diameter**2 + 2 * diameter * path_length
    return float(np.sqrt(spread / (gradient_bound**2 * num_rounds)))


def gradient_descent_bound(
    num_rounds, path_length, diameter, gradient_bound, step_size=None
) -> float:
    """Dynamic regret of projected online gradient descent on convex losses.

    (D^2 + 2 D P_T) / (2 eta) + eta T G^2 / 2, from |w_{t+1} - u_t|^2 <= |w_t - u_t|^2 -
    2 eta g (w_t - u_t) + eta^2 G^2 summed over rounds. Of the order
    sqrt(T (1 + P_T)) at the best step size, the default.

    Args:
      path_length: P_T, the comparators' summed movement.
      diameter: D, of the convex domain.
      gradient_bound: G, of every gradient's norm.
    """
    if step_size is None:
        step_size = best_step_size(num_rounds, path_length, diameter, gradient_bound)
    spread = diameter**2 + 2 * diameter * path_length
    return spread / (2 * step_size) + step_size * num_rounds * gradient_bound**2 / 2


def optimistic_bound(hint_errors, path_length, diameter, step_size=None) -> float:
    """Dynamic regret of optimistic online gradient descent on convex losses.

    (D^2 + 2 D P_T) / (2 eta) + eta / 2 * sum of |g_t - h_t|^2: gradients that were
    foreseen cost nothing. Of the order sqrt((1 + V_T)(1 + P_T)) at the best step size.

    Args:
      hint_errors: |g_t - h_t|^2 of every round.
    """
    spread = diameter**2 + 2 * diameter * path_length
    total = float(np.sum(hint_errors))
    if step_size is None:
        step_size = np.sqrt(spread / max(total, 1e-12))
    return spread / (2 * step_size) + step_size * total / 2


def ensemble_bound(
    num_rounds, path_length, diameter, gradient_bound, num_experts, grid_ratio=2.0
) -> float:
    """Dynamic regret of experts with step sizes on a geometric grid, under Hedge.

    The nearest step size of the grid is off by at most `grid_ratio`, which costs
    (1 + ratio) / 2 times the best one's bound. Hedge over linearised losses, of range
    G D, adds G D sqrt(T ln(N) / 2) at its best rate. Of the order sqrt(T (1 + P_T))
    without knowing P_T, if the grid holds the best step size.

    Args:
      num_experts: N; O(log T) of them span all path lengths.
    """
    best = gradient_descent_bound(num_rounds, path_length, diameter, gradient_bound)
    hedge = np.sqrt(num_rounds * np.log(num_experts) / 2)
    return (1 + grid_ratio) / 2 * best + gradient_bound * diameter * float(hedge)


def path_length(points) -> float:
    """Summed Euclidean movement of successive points `[t, ...]`."""
    moves = np.diff(np.asarray(points, float), axis=0)
    return float(np.sum(np.linalg.norm(moves.reshape(len(moves), -1), axis=1)))


def best_per_chunk_in_hindsight(
    replayer: Replayer,
    chunk_size: int = 40,
    num_epochs: int = 3,
    learning_rate: float = 3e-4,
    batch_size: int = 4,
    window: int = 64,
    num_context: int = 64,
    seed: int = 0,
    on_chunk: Callable[[int], None] = lambda num_answers: None,
) -> list[float]:
    """Losses of drafts that were trained on the very answers they are scored on.

    A proxy for the comparators of dynamic regret, which nobody can compute: for each
    chunk of the stream a draft starts from the replayed one, is trained on the chunk's
    answers for a few epochs of Adam, and is then scored on them. Where that made it
    worse, the draft that it started from counts. It cheats by design, and it is not
    the true minimiser: more epochs would lower its loss, and so raise the regret.

    Args:
      replayer: With `has_losses`.
      on_chunk: Called with the number of answers done.

    Returns:
      The loss of each answer, in the stream's order.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    objective = build_objective(
        replayer.drafter.unroll, num_context, replayer.num_steps, decay=replayer.decay
    )
    learner = gradient(objective, optimizer)
    update, draft = jax.jit(learner.update), replayer.draft.draft
    rng, store, found = np.random.default_rng(seed), replayer.store, []
    for first in range(0, len(replayer.order), chunk_size):
        entries = replayer.order[first : first + chunk_size]
        windows, state = store.windows(entries, window), learner.init(draft.params)
        for _ in range(num_epochs):
            rng.shuffle(windows)
            for i in range(0, len(windows), batch_size):
                batch = windows[i : i + batch_size]
                # Few windows come round again: one shape, one executable.
                batch = [batch[j % len(batch)] for j in range(batch_size)]
                args = num_context, window, replayer.num_steps
                segments = store.segments(batch, *args)
                state, _ = update(state, segments, replayer.shared, draft.token_ids)
        losses = [
            losses_on(replayer, params, entries)
            for params in (draft.params, state.params)
        ]
        found += min(losses, key=sum)
        on_chunk(len(found))
    return found


def losses_on(replayer: Replayer, params, entries) -> list[float]:
    """The loss of fixed draft parameters on each of some answers."""
    served = replayer.serving(params)
    batches = [entries[i : i + 8] for i in range(0, len(entries), 8)]
    scores = [score for batch in batches for score in replayer.score(served, batch)]
    assert all(score.loss is not None for score in scores), "the replayer has losses"
    return [float(score.loss or 0.0) for score in scores]


def dynamic_regret_proxy(losses, hindsight) -> np.ndarray:
    """Summed loss beyond that of `best_per_chunk_in_hindsight`, after each answer.

    Answers weigh alike, whatever their lengths. With a static draft's losses in the
    place of `hindsight` it is the regret against that; learning should make it fall.
    """
    return np.cumsum(np.asarray(losses, float) - np.asarray(hindsight, float))
