"""Rules of the house that no linter knows: short functions, and a reason for every ignored warning."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fedtune", "server", "client", "proto", "tests", "simulations", "benchmarks")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path.parent.name != "v1"]
MOST_LINES = 40
IGNORE = re.compile(r"# (?:noqa|type: ignore)[^#]*(#.*\S)?")


def body_lines(function):
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_short(folder):
    for path in (path for path in FILES if path.is_relative_to(ROOT / folder)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert body_lines(node) <= MOST_LINES, f"{path}: {node.name} has {body_lines(node)} lines"


@pytest.mark.parametrize("folder", ["fedtune", "server", "client"])
def test_every_ignored_warning_says_why(folder):
    for path in (path for path in FILES if path.is_relative_to(ROOT / folder)):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = IGNORE.search(line)
            assert not found or found[1], f"{path}:{number}: {line.strip()}"
