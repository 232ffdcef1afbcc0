"""The page of results holds every table once, in order, with its notes and plots."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def results_page() -> ModuleType:
    return import_module("results_page")


def test_a_page_is_its_tables_in_order(results_page: ModuleType, tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    (results / "zebra.md").write_text("# Zebra\n\n```bash\n# a comment\n```\n")
    (results / "launches.md").write_text("# Launches\n\n## Part\n\n1\n\n# Old notes\n")
    (results / "launches_notes.md").write_text("# Old notes\n")
    (results / "balance.md").write_text("# Balance\n")
    (results / "balance_notes.md").write_text("# Why\n")
    for name in ("balance", "balance_front", "zebra"):
        (results / f"{name}.png").write_bytes(name.encode())
    results_page.write(results, docs)
    text = (docs / "results.md").read_text()
    assert re.findall(r"^#.*|^!\[.*", text, flags=re.M) == [
        "# Results",
        "## Launches",
        "### Part",
        "## Old notes",
        "## Balance",
        "## Why",
        "![Balance](images/results/balance.png)",
        "![Balance front](images/results/balance_front.png)",
        "## Zebra",
        "# a comment",
        "![Zebra](images/results/zebra.png)",
    ]
    assert (docs / "images" / "results" / "balance_front.png").read_bytes() == b"balance_front"


def test_the_committed_tables_are_all_on_the_page(results_page: ModuleType) -> None:
    page = results_page.page(BENCHMARKS / "results", "plots")
    for table in (BENCHMARKS / "results").glob("*.md"):
        title = table.read_text("utf-8").strip().splitlines()[0].lstrip("# ")
        assert page.count(f"## {title}\n") == 1, f"{table.name} is not there once"
    for plot in (BENCHMARKS / "results").glob("*.png"):
        assert page.count(f"](plots/{plot.name})") == 1
