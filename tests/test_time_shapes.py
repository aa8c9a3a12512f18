# SPDX-License-Identifier: Apache-2.0
"""The tool that times steps of models whose weights are not there."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "time_shapes.py"))


def test_steps_of_a_shape_are_timed():
    settings = TOOL["Settings"](
        target="smollm2-135m",
        draft_vocab_size=64,
        depths=(0, 1),
        batch_sizes=(2,),
        capacity=256,
        num_layers=1,
        num_rounds=1,
    )
    said = []
    rows = TOOL["measure"](settings, say_row=said.append)
    assert rows == said
    assert [row["depth"] for row in rows] == [0, 1]
    assert rows[0]["plain_steps"] == 1
    assert all(row["milliseconds"] > 0 for row in rows)
    # One layer, the embedding table that is the head, and norms, in two bytes each but
    # for the norms' four.
    width, inner, vocab = 576, 1536, 49152
    attention = width * (width + 2 * 192) + width * width
    weights = attention + 3 * width * inner + vocab * width
    assert rows[0]["target_bytes"] == 2 * weights + 4 * 3 * width
    # A step has the target, the draft and the caches for arguments.
    assert rows[0]["argument_bytes"] > rows[0]["target_bytes"]
