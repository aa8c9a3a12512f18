# SPDX-License-Identifier: Apache-2.0
"""Tables on narrow terminals: nothing is cut off."""

import pytest
from rich.console import Console

from ospec_jax.distill.evaluate import describe_score, history_table
from ospec_jax.reports.tables import records_table

LABELS = ["mode", "tokens/s", "over the fastest plain", "never known"]
RECORDS = [[f"mode-{i}", f"{i}1.5", "[red]1.00[/k]", "-"] for i in range(9)]


def printed(table, width):
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_what_does_not_fit_beside_stands_below(width):
    text = printed(records_table(LABELS, RECORDS, "Modes", width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    for name, speed, *_ in RECORDS:
        assert name in text
        assert speed in text
    assert text.count("[red]1.00[/k]") == len(RECORDS)
    # One header a block; a line that is empty in all records is left out.
    assert (text.count("tokens/s") == 1) == (width == 200)
    assert "never known" not in text


def test_training_is_told_in_words_and_as_a_table():
    row = {
        "step": 100,
        "train_loss": 1.25,
        "held_out_loss": None,
        "mean_acceptance_length": {"math": 2.2, "": 2.0},
    }
    assert describe_score(row) == (
        "update 100: loss 1.250, held out -; acceptance length math 2.20, all 2.00"
    )
    text = printed(history_table([row, row | {"step": 200}], 80), 80)
    assert "acceptance length, math" in text
    assert "200" in text
