# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks from top to bottom, and keeps what they show in their `.ipynb`.

python tools/run_notebooks.py [NAME ...]
"""

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent.parent / "notebooks"
_NO_RESULT = ("ipywidgets", "site-packages")
"""What warnings of the machine that runs them have in them."""


def run(source: Path) -> None:
    """Runs a notebook's text form; its cells keep their ids where they have some."""
    paired = source.with_suffix(".ipynb")
    before = nbformat.read(paired, 4) if paired.exists() else nbformat.v4.new_notebook()
    notebook = jupytext.read(source)
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()

    for number, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem[:2]}-{number:02d}"
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if _is_result(output)]

    notebook.metadata = before.metadata
    nbformat.write(notebook, paired, version=4)


def _is_result(output) -> bool:
    return not any(part in str(output) for part in _NO_RESULT)


if __name__ == "__main__":
    names = sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.py"))]
    for name in names:
        print(name, flush=True)
        run(FOLDER / f"{name}.py")
