"""The scripts of `benchmarks/` import one another without a circle, and each tells how it is called."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = {
    ".".join(path.relative_to(BENCHMARKS).with_suffix("").parts): path for path in sorted(BENCHMARKS.rglob("*.py"))
}
SCRIPTS = [path for path in FILES.values() if "ArgumentParser(" in path.read_text("utf-8")]


def imported(name: str) -> set[str]:
    """The files of `benchmarks/` that one of them imports, inside functions too; a script's folder is on its path."""
    folder = f"{name.rpartition('.')[0]}."
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in (*found, *(folder + each for each in found)) if module in FILES}


def test_no_import_circle() -> None:
    graph = {name: imported(name) for name in FILES}
    assert graph["gpu.base"] == {"cost.arms"} and "cost.launches" in graph["cost.run"], "the reader is broken"
    list(graphlib.TopologicalSorter(graph).static_order())  # names the circle if there is one


def test_no_file_of_a_study_stands_outside_its_folder() -> None:
    assert {name for name in FILES if "." not in name} == {"bench", "claims", "results_page"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_every_script_says_how_it_is_called(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr[-2000:]
