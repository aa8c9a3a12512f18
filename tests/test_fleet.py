# SPDX-License-Identifier: Apache-2.0
"""The tool that simulates many replicas and one learner."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from ospec_jax.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "fleet.py"))
SETTINGS = TOOL["Settings"](
    curve=Path("none"),
    replicas=(1, 5),
    stale_replicas=(5,),
    rows=1,
    step_seconds=0.01,
    shift_seconds=100.0,
    num_shifts=2,
)
CURVE = TOOL["Curve"](np.arange(50) * 600, 1.2 + 0.8 * (1 - 0.9 ** np.arange(50)))


def fleet(num_replicas=1, bytes_up=0, bytes_down=0, **changes):
    how = dataclasses.replace(SETTINGS, **changes)
    return TOOL["Fleet"](how, CURVE, num_replicas, bytes_up, bytes_down).run()


def answers(lengths, num_drafts=20):
    accepted = [round(num_drafts * (length - 1)) for length in lengths]
    tokens = [num_drafts + count for count in accepted]
    drafts = [num_drafts] * len(tokens)
    return {
        "num_tokens": tokens,
        "num_drafts": drafts,
        "num_accepted_tokens": accepted,
    }


def test_without_staleness_it_is_the_recorded_curve():
    fresh = dict(
        ship_seconds=0.05, draft_seconds=0.05, learner_rate=np.inf, num_shifts=1
    )
    found = fleet(1, **fresh)
    expected = TOOL["fresh_length"](SETTINGS, CURVE, 1)
    np.testing.assert_allclose(found.length, expected, rtol=1e-3)
    # By hand: passes between two points of the curve.
    passes, tokens = 0.0, 0.0
    for length in CURVE.lengths:
        step = min(600 / length, 10_000 - passes)
        passes, tokens = passes + step, tokens + step * length
    np.testing.assert_allclose(expected, tokens / 10_000, rtol=1e-9)


def test_a_recording_s_gain_is_kept_and_never_falls():
    static = answers([1.5] * 60)
    learned = answers(np.linspace(1.5, 2.0, 60) + 0.1 * (np.arange(60) % 2))
    runs = [
        {"learner": "static", "answers": static},
        {"learner": "gradient", "answers": learned},
    ]
    curve = TOOL["read_curve"](runs, "gradient")
    assert np.all(np.diff(curve.lengths) >= 0)
    assert curve.tokens[0] == 0
    np.testing.assert_array_equal(np.diff(curve.tokens), learned["num_tokens"][:-1])
    np.testing.assert_allclose(curve.lengths.mean(), 1.8, atol=0.02)
    with pytest.raises(ValueError, match="but not of head"):
        TOOL["read_curve"](runs, "head")


def test_more_staleness_is_never_better():
    lengths = [
        fleet(5, draft_seconds=seconds).length for seconds in (1, 3, 10, 30, 100, 300)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 1.3
    assert lengths[-1] == pytest.approx(CURVE.lengths[0])
    shipped = [fleet(5, ship_seconds=seconds).length for seconds in (1, 10, 50)]
    assert shipped == sorted(shipped, reverse=True)
    rates = [fleet(5, learner_rate=rate).length for rate in (1e4, 100.0, 10.0)]
    assert rates == sorted(rates, reverse=True)


def test_half_of_the_gain_is_gone_when_drafts_come_once_a_shift():
    """Where learning takes no time: shifts come at any moment between two drafts."""
    quick = TOOL["Curve"](np.asarray([0, 1]), np.asarray([1.0, 2.0]))
    how = dataclasses.replace(SETTINGS, num_shifts=30)
    rows = TOOL["by_staleness"](how, quick)
    for row in rows:
        part = row["seconds"] / how.shift_seconds
        expected = 1 - part / 2 if part < 1 else 1 / (2 * part)
        # A draft has what was shipped before; a quarter of its interval is a shipment.
        assert row["share"] == pytest.approx(expected, abs=0.05 + part / 4)
    assert 60 < TOOL["half_life"](rows, 5) < 110


def test_what_is_sent_is_counted():
    found = fleet(5, bytes_up=100, bytes_down=1000, ship_seconds=1)
    # All was sent but what shifts and the end found unsent, a second's at most.
    assert 0.98 < found.bytes_up / (100 * found.num_tokens) < 1
    assert found.bytes_down == 5 * 1000 * 19
    assert found.num_learned <= found.num_tokens
    # A link that is too thin drops what it cannot carry, and a draft comes late.
    thin = fleet(5, bytes_up=100, bytes_down=10**6, ship_seconds=1, link=1e-4)
    assert thin.bytes_up < 0.5 * 100 * thin.num_tokens
    assert thin.length < found.length


def test_a_learner_saturates():
    found = fleet(5, learner_rate=50.0)
    assert found.num_learned == pytest.approx(50 * 200, rel=0.1)
    assert 0.9 < found.busy_seconds / 200 <= 1.02


def test_bytes_are_those_of_the_shapes():
    model = ARCHITECTURES["llama-3.1-8b"]
    sizes = TOOL["sizes_of"](SETTINGS)
    d, heads = model.hidden_size, 2 * 4096 * (4096 + 2 * 1024)
    assert sizes.up == {
        "features": 4 + 2 * 3 * d + 2 * d + 4,
        "states": 4 + 2 * d + 1,
        "ids": 4,
    }
    matrices = heads + 4096 * d + 3 * d * 14336 + 3 * d * d + 32000 * d
    assert sizes.down["head"] == 2 * 32000 * d
    assert 0 <= sizes.down["draft"] - 2 * matrices < 10**5
    rows = (2 * d + 6144) + (4096 + d) + (d + 2 * 14336) + (14336 + d) + 4 * d
    assert 0 <= sizes.down["low-rank"] - 4 * 16 * (rows + 32000 + d) < 10**5
