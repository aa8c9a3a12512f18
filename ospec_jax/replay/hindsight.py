# SPDX-License-Identifier: Apache-2.0
"""Regret: replayed losses against drafts that were trained in hindsight."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.objective import build_objective
from ospec_jax.replay.replayer import Replayer


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
    update = jax.jit(learner.update)
    draft = replayer.draft.draft
    rng = np.random.default_rng(seed)
    store = replayer.store
    found = []

    for first in range(0, len(replayer.order), chunk_size):
        entries = replayer.order[first : first + chunk_size]
        windows = store.windows(entries, window)
        # From the replayed draft each time: chunks must not learn from each other.
        state = learner.init(draft.params)
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
        # The comparator is at least as good as the draft that it started from.
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
    """Summed loss beyond `best_per_chunk_in_hindsight`'s, `[n]`: after each answer.

    Answers weigh alike, whatever their lengths. With a static draft's losses in the
    place of `hindsight` it is the regret against that; learning should make it fall.
    """
    return np.cumsum(np.asarray(losses, float) - np.asarray(hindsight, float))
