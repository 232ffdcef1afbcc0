"""The smallest of the tools as slow tests, and the page of all of them; `make test-tools` runs the rest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_was_run() -> None:
    page = script("page")
    rows = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(rows), "python tests/tools/page.py writes it"
    assert {row["tool"] for row in rows} <= set(page.NAMES)
    failed = [(row["tool"], line["case"]) for row in rows for line in row["cases"] if line["result"] == "FAILED"]
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnb", "st"])
def test_a_small_tool(name: str) -> None:
    run = script("run")
    tool = next(each for each in run.TOOLS if each.name == name)
    missing = run.build(tool, run.TOOLS)
    if missing is not None:
        pytest.skip(f"{name} cannot be installed here: {missing}")
    lines = run.run_tool(tool)
    assert lines and [line for line in lines if line["result"] not in ("ok", "native fails")] == []
    assert any(line["result"] == "ok" for line in lines)
