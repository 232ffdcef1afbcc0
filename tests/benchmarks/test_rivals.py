"""The comparison of counters: errors of hand-made readings, the recount on a real run, and the committed page."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def rivals() -> ModuleType:
    pytest.importorskip("datasets")
    pytest.importorskip("tokenizers")
    return import_module("rivals.run")


def test_errors_are_their_definitions(rivals: ModuleType) -> None:
    of = rivals.recounting.Reading.of_counts
    truth = of([[6, 2, 0], [4, 4, 0]])
    assert truth.dead == [[2], [2]] and truth.neff[1] == pytest.approx(2)
    assert truth.entropy[0] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rivals.table.errors(truth, truth)["right"] is True
    row = rivals.table.errors(of([[6, 0, 0], [4, 4, 1]]), truth)
    assert row["right"] is False and row["count_error"] == pytest.approx(3 / 16)
    assert (row["dead"], row["dead_found"], row["dead_wrong"]) == (2, 1, 1)
    assert row["neff_error"] == pytest.approx(1 - 1 / truth.neff[0]), "the larger of the two layers"
    shaped = rivals.table.errors(of([[1] * 4, [1] * 4]), truth)
    assert shaped["right"] is False and shaped["shape"] == [4, 4]
    doubled = rivals.table.errors(of([[12, 4, 0], [8, 8, 0]]), truth)
    assert doubled["right"] is False and doubled["count_error"] == 1 and doubled["neff_error"] == 0


@pytest.mark.filterwarnings("ignore")
def test_real_runs_tell_right_from_wrong(rivals: ModuleType) -> None:
    tools = rivals.tools
    padded = {kind.name: rivals.compare("padded", kind) for kind in (tools.Ours, tools.Hooks, tools.CarefulLogits)}
    assert [row["right"] for row in padded.values()] == [True, False, True]
    made = rivals.rows(rivals.SMALL.length, 64, ragged=True)
    real = [int(row["attention_mask"].sum()) for row in made]
    assert 0 < padded["chronomoe_hf"]["tokens"] < padded["forward hooks"]["tokens_counted"]
    assert padded["forward hooks"]["tokens_counted"] == 2 * 2 * 4 * rivals.STEPS * rivals.SMALL.length
    assert min(real) < rivals.SMALL.length, "bad test setup: nothing is padded"
    again = {kind.name: rivals.compare("checkpointed", kind) for kind in (tools.Ours, tools.Hooks)}
    assert again["chronomoe_hf"]["right"] and again["forward hooks"]["count_error"] == 1
    assert again["chronomoe_hf"]["dead"] == again["chronomoe_hf"]["dead_found"] == 2


def test_the_committed_page_is_made_from_the_committed_figures(rivals: ModuleType) -> None:
    results = json.loads((BENCHMARKS / "results" / "rivals.json").read_text("utf-8"))
    assert (BENCHMARKS / "results" / "rivals.md").read_text("utf-8") == rivals.table.markdown(results)
    assert {row["case"] for row in results["rows"]} == set(rivals.CASES), "every case was run"
    ours = [row for row in results["rows"] if row["tool"] == "chronomoe_hf"]
    assert ours and all(row["right"] and row["entropy_error"] < 1e-6 for row in ours)
