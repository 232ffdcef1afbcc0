"""Formulas of the cost table against counts of real processes and real state; the paper table against its inputs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    return import_module("cost.run")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCHMARKS / "results" / "cost.json").read_text("utf-8"))
    return found


def test_bytes_of_two_real_processes_are_the_formulas(cost: ModuleType, committed: dict[str, Any]) -> None:
    rows = cost.collectives()
    assert [(row["layers"], row["experts"], row["hidden"], row["preset"]) for row in rows] == cost.CASES
    for row in rows:
        layers, experts, hidden = row["layers"], row["experts"], row["hidden"]
        step = 8 * (layers * (10 * experts + 11) + 3)
        lens = 8 * layers * (2 * hidden + 4) if row["preset"] == "protect" else 0
        assert row["between"] == row["formula_between"] == [step]
        assert row["window"] == row["formula_window"] == [step + lens, 64, 8 * (2 * layers + 1)]
    assert rows == committed["collectives"], "run benchmarks/cost/run.py again"


def test_state_grows_as_the_fit_says(cost: ModuleType, committed: dict[str, Any]) -> None:
    assert committed["state"] == cost.state(), "the state has changed: run benchmarks/cost/run.py again"
    for preset, fit in committed["state"].items():
        assert fit["said"] == pytest.approx(fit["checked"], rel=1e-9), preset
        assert fit["checked"] > 10_000 and fit["per_expert"] > 0
        assert (fit["per_width"] > 0) == (preset == "protect"), "only a lens has vectors of the width"


@pytest.mark.slow
def test_the_script_runs_end_to_end(tmp_path: Path) -> None:
    """In a process of its own: the pretend device must be there before the first backward."""
    command = [sys.executable, str(BENCHMARKS / "cost" / "run.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "cost.json").read_text())
    counts = results["growth"][0]["counts"]
    layers = results["growth"][0]["layers"]
    assert counts["chronomoe_hf observe"]["reads"] == 0 < counts["chronomoe_hf observe"]["launches"]
    for recipe in ("router logits every step", "hooks with .item()"):
        assert counts[recipe]["reads"] == 3 * layers, "three numbers of every layer are read"
    assert "On paper".lower() in (tmp_path / "cost.md").read_text().lower()


def test_the_paper_table_follows_from_the_counts(cost: ModuleType, committed: dict[str, Any]) -> None:
    """Written again from the assumptions and units that the JSON names, by hand."""
    counted = json.loads((BENCHMARKS / "results" / "launches.json").read_text("utf-8"))["runs"]
    run = counted[committed["launches_run"]]
    shapes = json.loads((BENCHMARKS / "results" / "shapes.json").read_text("utf-8"))["rows"]
    table = cost.scale.table(shapes, run, committed["state"])
    assert committed["scale"] == table, "run benchmarks/cost/run.py --render"
    assumed = committed["scale"]["assumed"]
    qwen = next(m for m in committed["scale"]["models"] if m["name"].startswith("Qwen3"))
    unit = next(row for part in run.values() for row in part["rows"] if row["case"] == "observe")
    row = next(r for r in committed["scale"]["rows"] if r["model"] == qwen["name"] and r["preset"] == "observe")
    wide = {each["model"]: each for each in shapes if each["case"] == "observe"}["Qwen3-235B-A22B, T 8192"]
    launches = wide["launches"] + 94 * unit["step_per_layer"] + unit["step_fixed"]
    assert row["launches"]["8192"] == round(launches) and row["launches"]["1024"] != row["launches"]["8192"]
    size = 8 * (94 * (10 * 128 + 11) + 3)
    reduce = assumed["hop_us"] * 1e-6 * math.log2(512) + 2 * 511 / 512 * size / (assumed["bandwidth_gb_s"] * 1e9)
    assert row["reduce_ms"]["512"] == pytest.approx(1000 * reduce, abs=1e-3)
    step = 6 * qwen["active"] * 8192 / (assumed["utilisation"] * assumed["peak_tflops"] * 1e12)
    share = (launches * assumed["launch_us"] * 1e-6 + reduce) / step
    assert row["share"]["8192"]["512"] == pytest.approx(share, abs=2e-6)
    assert row["state_mb"] == pytest.approx((16 + 94 * (476 + 432 * 128)) / 1e6, abs=0.5), "state of that order"


def test_the_committed_page_is_made_from_the_committed_figures(cost: ModuleType, committed: dict[str, Any]) -> None:
    assert (BENCHMARKS / "results" / "cost.md").read_text("utf-8") == cost.markdown(committed)
    values = {(row["grows"], row["value"]) for row in committed["growth"]}
    assert values >= {(what, value) for what, points in cost.GROWTH.items() for value in points[1:]}
    for row in committed["growth"]:
        assert row["counts"]["chronomoe_hf observe"]["reads"] == 0
