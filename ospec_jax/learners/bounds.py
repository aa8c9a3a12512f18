# SPDX-License-Identifier: Apache-2.0
"""Bounds of regret, and the speed that theory makes of it.

The paper is Qian et al., *When Drafts Evolve: Speculative Decoding Meets Online
Learning*, arXiv 2603.12617. It bounds the acceleration of speculative decoding from
below by a function of the draft's dynamic regret. Its constants are not copied here:
the bounds below are reconstructed from their ingredients, each derived where it stands.
They speak of *sampled* verification, whose acceptance probability is 1 - TV(p, q).
"""

import numpy as np


def expected_tokens(acceptance_rate, num_steps: int):
    """Tokens of one target pass when each draft token is accepted independently.

    The bonus token included: (1 - a^(K+1)) / (1 - a), written as the sum that it is.
    """
    powers = [np.asarray(acceptance_rate, float) ** i for i in range(num_steps + 1)]
    # The sum has no division by zero at a rate of 1.
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
    # Measured regret may be negative; the bound then is that of none.
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
