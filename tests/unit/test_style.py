# SPDX-License-Identifier: Apache-2.0
"""Style that the linter does not check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("fastkv", "tests", "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)


def loose_strings(code):
    """Lines of string statements that are no docstring: they look like checks and do nothing."""
    tree = ast.parse(code)
    docstrings = {
        id(node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant | ast.JoinedStr)
        and isinstance(getattr(node.value, "value", ""), str)
        and id(node) not in docstrings
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_string_statement_but_docstrings(path):
    assert loose_strings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ('"""doc"""\nx = 1\n"loose"', [3]),
        ('def f():\n    """doc"""\n    "loose"\n    f"loose {f}"', [3, 4]),
        ('class A:\n    """doc"""\n    x = "value"', []),
        ("def f(): ...", []),
        ('def f(x):\n    f"no docstring {x}"', [2]),
        ('if x:\n    "loose"', [2]),
    ],
)
def test_loose_strings_are_found(code, lines):
    assert loose_strings(code) == lines
