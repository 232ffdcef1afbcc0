"""Every measured number in README and docs is what the committed table says; and the checker that says so can fail."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt

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
    return import_module("claims")


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
        ("<!-- n:time -->1.5 ms, then 1.5 ms", ["1.5 ms"]),
        ("<!-- n:time -->about 1.5 ms", ["1.5 ms"]),
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
    assert "may not begin a line" in claims.faults_of("a\n  <!-- n:overhead_observe -->1", "p.md", {})[0]
    for unread in ("a <!-- n:Over head -->1", "a <!-- results: launches.json x d -->1"):
        assert "cannot be read" in claims.faults_of(unread, "p.md", {})[0]


def named(claims: ModuleType, tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "numbers.toml"
    path.write_text(text, encoding="utf-8")
    found: dict[str, Any] = claims.formulas(path)
    return found


def test_a_line_with_braces_is_a_number_of_each(claims: ModuleType, tmp_path: Path) -> None:
    text = """
    [[numbers]]
    table = "a.json"
    each.arm = { a = "a", wide = "'b, wide'" }
    each.seed = ["0", "1"]
    "{arm}_loss{seed}" = ["rows[arm={arm},seed={seed}].loss", ".2f"]
    "{arm}_count" = ["len(rows[arm={arm}].loss)", "d"]
    alone = ["one", ".1f"]
    """
    found = named(claims, tmp_path, text)
    assert set(found) == {"a_loss0", "a_loss1", "wide_loss0", "wide_loss1", "a_count", "wide_count", "alone"}
    assert (found["wide_loss1"].line, found["wide_loss1"].table) == ("{arm}_loss{seed}", "a.json")
    (tmp_path / "a.json").write_text(json.dumps(DATA), encoding="utf-8")
    values = {name: claims.value_of(found[name], tmp_path) for name in found if name != "wide_loss1"}
    assert values == {
        "a_loss0": "1.50", "a_loss1": "2.50", "wide_loss0": "1.25", "a_count": "2", "wide_count": "1", "alone": "0.5"
    }  # fmt: skip
    with pytest.raises(claims.ClaimError, match="no row"):
        claims.value_of(found["wide_loss1"], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[numbers]]\ntable = "a.json"\nx = ["one", "d"]\n[[numbers]]\ntable = "b.json"\nx = ["one", "d"]', "twice"),
        ('[[numbers]]\nx = ["one", "d"]', "needs a table"),
        ('[[numbers]]\ntable = "a.json"\nx = "one"', "needs a table above it and"),
    ],
)
def test_a_name_has_one_formula_and_a_table(claims: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(claims.ClaimError, match=message):
        named(claims, tmp_path, text)


def test_a_name_that_is_missing_or_unused_is_found(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "numbers.toml has no nonsense" in claims.faults_of("a <!-- n:nonsense -->1", "p.md", {})[0]
    known = claims.formulas()
    monkeypatch.setattr(claims, "formulas", lambda: known | {"extra": claims.Formula("extra", "a.json", "one", "d")})
    assert claims.faults() == ["numbers.toml: no page has extra"]


def test_pages_look_the_same_without_markers(claims: ModuleType) -> None:
    """CommonMark, as GitHub renders it: a comment must stay inside its paragraph or table cell."""
    reader = MarkdownIt("commonmark").enable("table")
    seen = 0
    for path in claims.pages():
        text = path.read_text("utf-8")
        bare, removed = re.subn(r"<!-- n:.*? -->", "", text)
        seen += removed
        assert re.sub(r"<!-- n:.*? -->", "", reader.render(text)) == reader.render(bare), path.name
    assert seen >= 15
