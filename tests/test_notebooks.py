# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom, and is in step with its text form."""

import fnmatch
import glob
import importlib.util
import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
REAL_WEIGHTS = {"01_quickstart", "02_speed", "03_drafters", "07_how_much"}
SMALLER = {
    "01_quickstart": {
        "NUM_PROMPTS, NEW_TOKENS = 20, 64": "NUM_PROMPTS, NEW_TOKENS = 4, 32"
    },
    "02_speed": {
        "NUM_PROMPTS, NEW_TOKENS = 8, 64": "NUM_PROMPTS, NEW_TOKENS = 2, 32",
        # Each is a program of thirty layers.
        "DEPTHS = (0, 1, 3, 5, 7)": "DEPTHS = (0, 3, 7)",
        "rows=(1, 2, 4, 8, 16, 32)": "rows=(1, 4, 16)",
    },
    "03_drafters": {
        "NUM_PROMPTS, NEW_TOKENS = 3, 40": "NUM_PROMPTS, NEW_TOKENS = 2, 24",
        '    "shipped:hydra": CHAIN,\n': "",
    },
    "07_how_much": {
        "NUM_PROMPTS, NEW_TOKENS = 5, 48": "NUM_PROMPTS, NEW_TOKENS = 2, 24"
    },
    "05_regret": {
        # Each is a program.
        "GRID = jnp.asarray([0.0, 0.1, 0.4, 1.6, 6.4])": (
            "GRID = jnp.asarray([0.0, 0.4, 1.6])"
        ),
        "for drift in (0.0, 0.004, 0.02, 0.1):": "for drift in (0.0, 0.02):",
        "for i in range(30)": "for i in range(10)",
        "num_prompts=60": "num_prompts=20",
        "range(0, 60, 10)": "range(0, 20, 10)",
    },
}
"""What is asked here, in place of what the notebook asks."""
QUICK = {"05_regret"}


def marks_of(source):
    """Who needs real weights is slow, and one of them suffices for `make test`.

    What the first one does with real weights is in the README's Python, too, which
    `test_docs.py` runs.
    """
    if source.stem in REAL_WEIGHTS:
        yield pytest.mark.slow
    if source.stem not in QUICK:
        yield pytest.mark.thorough


MARKED = [pytest.param(source, marks=[*marks_of(source)]) for source in SOURCES]


@pytest.mark.parametrize("source", MARKED, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(source):
    text = source.read_text()
    for whole, part in SMALLER.get(source.stem, {}).items():
        assert whole in text
        text = text.replace(whole, part)
    notebook = jupytext.reads(text, fmt="py:percent")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_is_paired(source):
    cells = lambda path: [
        (cell.cell_type, cell.source) for cell in jupytext.read(path).cells
    ]
    assert cells(source) == cells(source.with_suffix(".ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_shows_results_and_nothing_of_whoever_ran_it(source):
    """Readers see it on the web before they run it."""
    cells = nbformat.read(source.with_suffix(".ipynb"), 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any("site-packages" in str(output) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


def first_code_of(source):
    cells = jupytext.read(source).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def test_all_begin_with_the_same_look_at_the_device():
    assert len({first_code_of(source) for source in SOURCES}) == 1


@pytest.mark.parametrize(
    ("place", "package"),
    [
        ("/dev/nvidia0", "ospec-jax[cuda]"),
        ("/dev/accel0", "ospec-jax[tpu]"),
        ("/dev/vfio/0", "ospec-jax[tpu]"),
        ("/dev/tty", "ospec-jax"),
    ],
)
@pytest.mark.parametrize("is_installed", [True, False])
def test_what_fits_the_device_is_installed_where_it_is_missing(
    place, package, is_installed, monkeypatch, capsys
):
    commands = []
    monkeypatch.setattr(glob, "glob", lambda wanted: fnmatch.filter([place], wanted))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: is_installed or None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: commands.append(args))
    exec(first_code_of(SOURCES[0]), {})
    wanted = [sys.executable, "-m", "pip", "install", "-q", package]
    assert commands == ([] if is_installed else [(wanted,)])
    assert capsys.readouterr().out.startswith(f"{package} is for this machine")
