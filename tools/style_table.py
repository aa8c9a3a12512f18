# SPDX-License-Identifier: Apache-2.0
"""Prints figures of how dense and how well explained Python code is.

    python tools/style_table.py [FOLDER ...]

Each folder is a column; the default is this package. `__init__.py` files are left out.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ospec_jax"

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class File:
    """One source file, parsed once.

    Attributes:
      lines: Without their ends.
      comments: Numbers of the lines that hold nothing but a comment.
      docstrings: Numbers of the lines of docstrings.
      functions: All of them, nested ones and methods included.
    """

    def __init__(self, path: Path):
        text = path.read_text("utf-8")
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.comments = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
            and self.lines[token.start[0] - 1].lstrip().startswith("#")
        }
        self.docstrings = set()
        for node in ast.walk(self.tree):
            if isinstance(node, _DEFINITIONS) and ast.get_docstring(node) is not None:
                self.docstrings |= _lines_of(node.body[0])
        self.functions = [n for n in ast.walk(self.tree) if isinstance(n, _FUNCTIONS)]

    @property
    def num_filled(self) -> int:
        """Lines that are not blank."""
        return sum(bool(line.strip()) for line in self.lines)

    def bodies(self) -> Iterator[tuple[list[ast.stmt], set[int]]]:
        """Statements and lines of each outermost function, its docstring left out."""
        nested = {
            id(inner)
            for function in self.functions
            for inner in ast.walk(function)
            if inner is not function and isinstance(inner, _FUNCTIONS)
        }
        for function in self.functions:
            if id(function) in nested:
                continue
            has_docstring = ast.get_docstring(function) is not None
            statements = function.body[1:] if has_docstring else function.body
            if statements:
                first = statements[0].lineno
                last = statements[-1].end_lineno or first
                yield statements, set(range(first, last + 1)) - self.docstrings


def _lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _is_parallel(node: ast.AST) -> bool:
    """Whether a node is `a, b = x, y`."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def _is_public(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return not function.name.startswith("_")


def figures(folder: Path) -> dict[str, str]:
    """What the table says of the files of a folder, ready to print."""
    paths = sorted(p for p in folder.rglob("*.py") if p.name != "__init__.py")
    files = [File(path) for path in paths]
    num_nodes = 0
    num_code = 0
    num_blank = 0
    num_body = 0
    lengths = []
    for file in files:
        for statements, lines in file.bodies():
            num_nodes += sum(1 for s in statements for _ in ast.walk(s))
            blank = {i for i in lines if not file.lines[i - 1].strip()}
            num_code += len(lines - blank - file.comments)
            num_blank += len(blank)
            num_body += len(lines)
            lengths.append(len(lines - blank - file.comments))

    nodes = [node for file in files for node in ast.walk(file.tree)]
    functions = [f for file in files for f in file.functions]
    public = [
        node
        for file in files
        for scope in ast.walk(file.tree)
        if isinstance(scope, ast.Module | ast.ClassDef)
        for node in scope.body
        if isinstance(node, _FUNCTIONS) and _is_public(node)
    ]
    num_lines = sum(len(file.lines) for file in files)
    num_filled = sum(file.num_filled for file in files)
    num_comments = sum(len(file.comments) for file in files)
    num_docstring = sum(len(file.docstrings) for file in files)
    num_skips = sum("fmt: skip" in line for file in files for line in file.lines)
    documented = sum(ast.get_docstring(f) is not None for f in public)

    # Of code: docstrings and comments assign nothing.
    thousands = (num_filled - num_comments - num_docstring) / 1000
    per_thousand = lambda kind: sum(isinstance(n, kind) for n in nodes) / thousands
    parallel = sum(map(_is_parallel, nodes)) / thousands
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    return {
        "files / lines": f"{len(files)} / {num_lines}",
        "file length, median / max": _spread([len(file.lines) for file in files]),
        "function body, median / max": _spread(lengths),
        "functions": str(len(functions)),
        "syntax nodes on a code line of a body": f"{num_nodes / num_code:.1f}",
        "blank lines in bodies": f"{num_blank / num_body:.1%}",
        "comment lines, share of non-blank": f"{num_comments / num_filled:.1%}",
        "docstring lines, share of non-blank": f"{num_docstring / num_filled:.1%}",
        "public functions with a docstring": f"{documented / len(public):.0%}",
        "parallel assignments in 1,000 code lines": f"{parallel:.1f}",
        "conditional expressions in 1,000 code lines": f"{per_thousand(ast.IfExp):.1f}",
        "lambdas in 1,000 code lines": f"{per_thousand(ast.Lambda):.1f}",
        "mean length of a name in use": f"{statistics.mean(map(len, names)):.1f}",
        "fmt: skip": str(num_skips),
    }


def _spread(values: list[int]) -> str:
    return f"{statistics.median(values):.0f} / {max(values)}"


def main(folders: list[str]) -> None:
    """Prints a table in Markdown."""
    columns = {name: figures(Path(name)) for name in folders or [str(PACKAGE)]}
    headings = [Path(name).name for name in columns]
    print(f"| | {' | '.join(headings)} |")
    print(f"|---|{'---|' * len(headings)}")
    for row in next(iter(columns.values())):
        cells = [column[row] for column in columns.values()]
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
