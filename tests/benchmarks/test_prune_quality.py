"""The pruning benchmark: its claims and cells on made-up rows, its free budgets, and a quick real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.plans import evidence, spec

from chronomoe_hf.lifecycle import LayerEvidence

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return import_module("prune.table")


def row(rank: str, rise: float, *, seed: int = 0, cut: float = 0.5, refit: bool = False, **more: Any) -> dict[str, Any]:
    both = {"rise_predicted": rise, "rise_realised": rise, "error_predicted": 0.01, "error_realised": 0.01}
    common = {"shape": "e8", "seed": seed, "cut": cut, "rank": rank, "refit": refit, "dense_loss": 4.0, "error": 0.01}
    return {**common, "rise": rise, **both, **more}


def made(
    table: ModuleType, *, ours: float = 0.1, refitted: float = 0.02, realised: float | None = None
) -> dict[str, bool]:
    rows = []
    for seed in range(3):
        for cut in table.CUTS:
            rows += [row("contribution", ours + 0.001 * seed, seed=seed, cut=cut)]
            rows += [row("reap", 0.1 + 0.002 * seed, seed=seed, cut=cut), row("frequency", 0.3, seed=seed, cut=cut)]
        rows.append(row("contribution", refitted, seed=seed, refit=True))
        rows.append(row("reap", 0.03, seed=seed, refit=True))
    if realised is not None:
        rows[0] |= {"rise_exported": realised, "error_exported": 0.01}
    out: dict[str, bool] = {}
    for claim in table.claims(rows):
        out.setdefault(claim["claim"].split(",")[0], claim["holds"])
    return out


def test_claims_hold_and_fail_as_stated(table: ModuleType) -> None:
    rank, quarter = (
        "contribution is nowhere worse than reap beyond one standard error",
        "half of the experts cut by contribution",
    )
    predicted = "predicted cost is within two standard errors of the realised one"
    good = made(table)
    assert good[rank] and good[quarter] and good[predicted]
    assert not made(table, ours=0.12)[rank]
    assert made(table, refitted=0.025)[quarter] and not made(table, refitted=0.0251)[quarter]
    assert made(table, realised=0.12)[predicted] and not made(table, realised=0.13)[predicted]


def test_cells_show_the_mean_and_every_seed(table: ModuleType) -> None:
    rows = [row("random 0", 0.1), row("random 1", 0.3), row("random 0", 0.4, seed=1), row("reap", 9.0)]
    assert table.cell(table.pick(rows, rank="random")) == "**0.300** (0.200 / 0.400)"
    assert table.cell([]) == "-"


def test_free_budgets_drop_the_lowest_of_the_whole_model_within_limits() -> None:
    pytest.importorskip("tokenizers")
    from prune import cuts

    def layer(layer_id: int, scores: list[float], **fields: int) -> LayerEvidence:
        made_spec = spec(layer_id, num_experts=len(scores), **fields)
        return LayerEvidence(spec=made_spec, counts=(1,) * len(scores), contribution=tuple(scores))

    low, high = [0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0]
    subject: Any = SimpleNamespace(evidence=evidence([layer(0, low), layer(1, high)]))
    assert cuts.free_drops(subject, 0.25) == [[0, 1], []]
    assert cuts.free_drops(subject, 0.5) == [[0, 1], [0, 1]], "every layer keeps k"
    grouped: Any = SimpleNamespace(evidence=evidence([layer(0, [1.0, 2.0, 3.0, 9.0, 8.0, 7.0], groups=2, kept=1)]))
    assert cuts.free_drops(grouped, 0.5) == [[0, 5]], "every group keeps two"


def test_healed_rows_are_compared_with_the_dense_model_at_the_same_step() -> None:
    from prune import heal_table as heal

    def healed(how: str, rise: float, after: int, seed: int, cut: float = 0.5) -> dict[str, Any]:
        common = {"shape": "e8", "seed": seed, "cut": cut, "how": how, "after": after}
        return {**common, "rise": rise, "error": 0.001}

    rows = [healed("dense", -0.05, 100, seed, 0.0) for seed in (0, 1)]
    rows += [healed("at the end", rise, after, seed) for seed in (0, 1) for rise, after in ((0.3, 0), (0.02, 100))]
    rows += [healed("in the middle", rise, after, seed) for seed in (0, 1) for rise, after in ((0.1, 0), (0.05, 100))]
    text = "\n".join(heal.healing_lines(rows))
    assert "move the dense loss by -0.050, -0.050" in text
    assert "| at the end | - | - | **0.300** (0.300 / 0.300) | **0.020** (0.020 / 0.020) |" in text
    holds = {claim["claim"].split(" one ")[1].split(" (")[0]: [] for claim in heal.healing_claims(rows)}
    assert set(holds) == {"at the end"}, "no claim without rows"
    assert [claim["holds"] for claim in heal.healing_claims(rows)] == [True, False]
    balance = [row("contribution", 0.2, cut=cut) | {"dense_loss": 4.1} for cut in (0.125, 0.25, 0.5)]
    lines = heal.balance_lines(balance, [row("contribution", 0.1, cut=0.25), row("contribution", 0.1, seed=9)])
    assert (
        "| e8 | balance | 4.100 | contribution | **0.200** (0.200) | **0.200** (0.200) | **0.200** (0.200) | - | - |"
        in lines
    )
    assert "| e8 | observed | 4.000 | contribution | - | **0.100** (0.100) | - | - | - |" in lines


@pytest.mark.slow
def test_a_quick_run_writes_its_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / "prune" / "run.py"), "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    results = json.loads((tmp_path / "prune_quality.json").read_text())
    assert {row["rank"] for row in results["rows"]} >= {"contribution", "reap", "random 4", "worst", "free budgets"}
    assert sum(row["refit"] for row in results["rows"]) == 2 + 2 + 5
    command[2:3] = ["--heal", "--shapes", "quick", "--seeds", "0"]
    subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    results = json.loads((tmp_path / "prune_quality.json").read_text())
    assert {row["how"] for row in results["healing"]} >= {"dense", "at the end", "in the middle"}
    assert len(results["balance"]) == 8 and sum(row["rank"] == "mean_norm" for row in results["rows"]) == 3
    text = (tmp_path / "prune_quality.md").read_text()
    assert "## quick" in text and (tmp_path / "prune_quality.png").stat().st_size > 5000
