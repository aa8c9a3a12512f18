# SPDX-License-Identifier: Apache-2.0
"""What is measured is what a clock needs; times themselves are not tested."""

from ospec_jax.config import TreeConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.replay import clocking
from ospec_jax.replay.clocking import kinds_of, measure_clock
from ospec_jax.replay.trees import TraceShape
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target


def test_all_depths_at_one_size_and_all_sizes_at_one_depth():
    kinds = kinds_of(TraceShape(4, 3, 16), (2, 4, 8, 16))
    assert kinds == [(1, 4), (2, 4), (3, 2), (3, 4), (3, 8), (3, 16)]
    assert kinds_of(TraceShape(1, 3, 3), (1, 2, 3)) == [
        (1, 1), (2, 1), (3, 1), (3, 2), (3, 3)
    ]  # fmt: skip


def test_a_clock_of_steps_that_take_what_they_are_made_to_take(monkeypatch):
    target = tiny_target()
    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    meta = Meta.create(target, config, "eagle3")
    loaded = LoadedDraft(tiny_draft(drafter, config), meta)
    shape = TraceShape(topk=2, depth=2, num_nodes=4)
    rounds = []

    def time_steps(step, state, num_steps):
        """Noise in all rounds but one, on top of a known time."""
        filling = int(state.lengths[0])
        tree = step.args[0].tree
        noise = 0.0 if len(rounds) == 2 else 5.0
        state, _ = step(state)
        seconds = 1.0 + 0.5 * tree.num_steps + 0.1 * max(tree.num_nodes, 3)
        own = state.replace(lengths=state.lengths * 0 + filling)
        return seconds + 0.01 * filling + noise, own

    monkeypatch.setattr(clocking, "time_steps", time_steps)
    clock = measure_clock(
        target, loaded, shape, (2, 4), contexts=(20, 60), num_rounds=3,
        statistic="least", on_round=lambda done, total: rounds.append(done),
    )  # fmt: skip
    assert rounds == [0, 1, 2, 3]
    assert clock.error < 1e-6
    assert clock.rows == (1, 3, 5)
    assert abs(clock.drafting[2] - 1.0) < 1e-6
    assert abs(clock.per_context - 0.01) < 1e-6
    assert abs(float(clock.seconds(2, 5, 60)) - (1 + 1 + 0.5 + 0.6)) < 1e-5
    assert "least of 3" in clock.method
