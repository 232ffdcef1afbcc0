"""Files and functions stay small enough to be read at once. Reads the sources; imports none of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("chronomoe_hf", "patches") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE = 450  # lines, not reached
MAX_FUNCTION = 50  # lines of what it does: without its signature, its docstring and what is above it
EXCEPTIONS: set[str] = set()  # "path" or "path:function", each with a reason beside it


def sizes(source: str) -> dict[str, int]:
    """Lines of every function and method; a function inside another counts for both."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            found[node.name] = max(lines, found.get(node.name, 0))
    return found


def too_long(name: str, source: str) -> list[str]:
    out = [name] if source.count("\n") >= MAX_FILE else []
    out += [f"{name}:{function}" for function, lines in sizes(source).items() if lines > MAX_FUNCTION]
    return [each for each in out if each not in EXCEPTIONS]


def test_no_file_and_no_function_is_too_long() -> None:
    assert len(FILES) > 150
    found = [each for path in FILES for each in too_long(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]
    assert found == [], "split them where a reader would look for the parts"


@pytest.mark.parametrize(("lines", "long"), [(50, []), (51, ["a.py:f"])])
def test_a_signature_and_a_docstring_do_not_count(lines: int, long: list[str]) -> None:
    body = "    x = 1\n" * lines
    source = f'def f(\n    a: int,\n    b: int,\n) -> None:\n    """What it is.\n\n    More.\n    """\n{body}'
    assert too_long("a.py", source) == long


def test_a_file_of_450_lines_is_too_long() -> None:
    assert too_long("a.py", "x = 1\n" * 450) == ["a.py"] and too_long("a.py", "x = 1\n" * 449) == []
