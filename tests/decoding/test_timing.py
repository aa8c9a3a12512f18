# SPDX-License-Identifier: Apache-2.0
"""Steps are timed as a device takes them, by a device and a clock that are made up."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from ospec_jax.decoding import timing


@dataclasses.dataclass(frozen=True)
class Rows:
    """What of a state is put back behind each round."""

    lengths: Any
    num_remaining: Any
    is_finished: Any

    def replace(self, **values):
        return dataclasses.replace(self, **values)


class Device:
    """Runs one step after the other; sending one takes the host a little time, too."""

    def __init__(self, seconds: float):
        self.now = 0.0
        self.end = 0.0
        self.num_steps = 0
        self._seconds = seconds

    def step(self, state):
        self.now += 0.001
        self.end = max(self.now, self.end) + self._seconds
        self.num_steps += 1
        return state.replace(lengths=state.lengths + 1), self.end

    def fetch(self, end: float):
        """Waits for a step's end."""
        self.now = max(self.now, end)


@pytest.fixture(name="rows")
def _rows():
    return Rows(np.array([7]), np.array([9]), np.array([False]))


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_a_step_takes_what_the_device_takes(monkeypatch, rows, num_steps):
    device = Device(0.25)
    monkeypatch.setattr(timing, "fetch", device.fetch)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.now)
    seconds, after = timing.time_steps(device.step, rows, num_steps)
    assert seconds == pytest.approx(0.25)
    assert device.now == device.end  # nothing is under way when it returns
    assert after.lengths == rows.lengths


def test_kinds_of_steps_take_turns_and_the_least_time_counts(monkeypatch, rows):
    slow, fast = Device(0.5), Device(0.25)
    clock = lambda: slow.now + fast.now
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    devices = {0.5: slow, 0.25: fast}

    def fetch(ended):
        device, end = ended
        devices[device].fetch(end)

    def step_of(seconds):
        device = devices[seconds]

        def step(state):
            state, end = device.step(state)
            return state, (seconds, end)

        return step

    monkeypatch.setattr(timing, "fetch", fetch)
    steps = {name: step_of(name) for name in devices}
    least, _ = timing.seconds_of_steps(steps, rows, 2)
    assert least == pytest.approx({0.5: 0.5, 0.25: 0.25})
    assert slow.num_steps == fast.num_steps
