"""Every measured number in README and docs is what the committed table says; and the checker that says so can fail."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt
from support.scripts import load_benchmark

ROOT = Path(__file__).resolve().parents[2]
DATA: dict[str, Any] = {
    "rows": [
        {"arm": "a", "seed": 0, "loss": 1.5, "layers": [5.0, 7.0, 9.0]},
        {"arm": "b, wide", "seed": 0, "loss": 1.25, "layers": [1.0, 2.0, 3.0]},
        {"arm": "a", "seed": 1, "loss": 2.5, "layers": [6.0, 8.0, 4.0]},
    ],
    "runs": {"before it": {"rows": [3]}, "now": {"rows": [4, 5]}},
    "one": 0.5,
}


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    return load_benchmark("claims")


def test_every_number_of_readme_and_docs_is_the_tables(claims: ModuleType) -> None:
    found = claims.faults()
    assert not found, "\n".join(found)
    marked = [list(claims.claims_of(path.read_text("utf-8"), path.name)) for path in claims.pages()]
    assert sum(map(len, marked)) >= 15 and sum(map(bool, marked)) >= 3, "hardly a marker was found"


def test_a_wrong_figure_fails_wherever_it_stands(claims: ModuleType) -> None:
    for path in claims.pages():
        page, text = str(path.relative_to(ROOT)), path.read_text("utf-8")
        for claim in claims.claims_of(text, page):
            wrong = text[: claim.span[0]] + "77" + text[claim.span[1] :]
            assert any(f"{page}:{claim.line}: says 77" in each for each in claims.faults_of(wrong, page, {}))
            assert claims.corrected(wrong, page) == text
            bare = text[: claim.span[0]] + text[claim.span[1] :]
            assert any(f"{page}:{claim.line}: says None" in each for each in claims.faults_of(bare, page, {}))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("one", 0.5),
        ("rows[arm=a,seed=1].loss", 2.5),
        ("rows[arm='b, wide'].layers[2]", 3.0),
        ("mean(rows[arm=a].loss)", 2.0),
        ("mean(rows[arm=a].loss) - mean(rows[arm='b, wide'].loss)", pytest.approx(0.75)),
        ("min(rows[arm=a].layers[1:])", 4.0),
        ("max(rows[seed=0].layers[0], rows[arm=a].loss)", 5.0),
        ("runs['before it'].rows[0]", 3),
        ("runs[-1].rows[1] * 2", 10),
        ("100 * (rows[arm=a,seed=0].loss - 1)", pytest.approx(50)),
        ("floor(rows[1].loss, 1)", 1.2),
        ("len(rows[arm=a].loss)", 2),
    ],
)
def test_an_expression_is_its_definition(claims: ModuleType, expression: str, value: Any) -> None:
    assert claims.evaluate(expression, DATA) == value


@pytest.mark.parametrize(
    "expression",
    ["two", "rows[arm=c].loss", "rows[0].gone", "rows[9].loss", "rows[arm].loss", "exit()", "one.real", "one +"],
)
def test_what_leads_nowhere_is_refused(claims: ModuleType, expression: str) -> None:
    with pytest.raises(claims.ClaimError):
        claims.evaluate(expression, DATA)


def test_several_rows_are_no_number(claims: ModuleType) -> None:
    with pytest.raises(claims.ClaimError, match="no single number"):
        claims.render(claims.evaluate("rows[arm=a].loss", DATA), ".2f")
    with pytest.raises(claims.ClaimError, match="not whole"):
        claims.render(2.5, "d")
    assert (claims.render(4.0, ",d"), claims.render(0.012, "+.1%")) == ("4", "+1.2%")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It took 3 % longer, 0.015 nats more, at 12 launches and 2.5x.", ["3 %", "0.015 nats", "12 launches", "2.5x"]),
        ("Over 300 steps with 8 experts, in release 5.13.1, `0.5` and k = 2.", []),
        ("```\n0.25 ms\n```\n\nand 1,024 bytes", ["1,024 bytes"]),
        ("<!-- results: a.json b.c .1f -->1.5 ms, then 1.5 ms", ["1.5 ms"]),
        ("<!-- results: a.json b.c .1f -->about 1.5 ms", ["1.5 ms"]),
        ("<!-- a note: 3 % -->", []),
    ],
)
def test_numbers_without_a_marker_are_found(claims: ModuleType, text: str, numbers: list[str]) -> None:
    assert [number for _, number in claims.unmarked(text)] == numbers


def test_a_page_of_settings_allows_no_unit(claims: ModuleType) -> None:
    known = {("p.md", "*"): "settings", ("p.md", "3 ms"): "a limit"}
    found = claims.faults_of("a 0.5 and 3 ms and 4 ms", "p.md", known)
    assert len(found) == 1 and "'4 ms' has no marker" in found[0]
    assert len(claims.faults_of("a 0.5", "q.md", known)) == 1


def test_a_marker_that_breaks_the_page_is_found(claims: ModuleType) -> None:
    assert "may not begin a line" in claims.faults_of("a\n  <!-- results: launches.json x d -->1", "p.md", {})[0]
    assert "cannot be read" in claims.faults_of("a <!-- results: launches.json -->1", "p.md", {})[0]


def test_pages_look_the_same_without_markers(claims: ModuleType) -> None:
    """CommonMark, as GitHub renders it: a comment must stay inside its paragraph or table cell."""
    reader = MarkdownIt("commonmark").enable("table")
    seen = 0
    for path in claims.pages():
        text = path.read_text("utf-8")
        bare, removed = re.subn(r"<!-- results: .*? -->", "", text)
        seen += removed
        assert re.sub(r"<!-- results: .*? -->", "", reader.render(text)) == reader.render(bare), path.name
    assert seen >= 15
