"""The model of a step against its definition, the measured part end to end with two real processes, and the page."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    pytest.importorskip("datasets")
    pytest.importorskip("tokenizers")
    return import_module("throughput.run")


def test_imbalance_is_its_definition(throughput: ModuleType) -> None:
    counts = [[[4, 0, 2, 2], [1, 1, 1, 5]], [[2, 2, 2, 2], [8, 0, 0, 0]]]
    for ranks in (2, 4):
        want = []
        for window in counts:
            for layer in window:
                loads = [sum(layer[r * 4 // ranks : (r + 1) * 4 // ranks]) for r in range(ranks)]
                want.append(max(loads) / (sum(loads) / ranks))
        assert throughput.model.imbalance(torch.tensor(counts), ranks) == pytest.approx(sum(want) / 4)
    assert throughput.model.max_violation(torch.tensor(counts)) == pytest.approx((1 + 1.5 + 0 + 3) / 4)
    assert throughput.model.relative_step(3.0, 0.25) == pytest.approx(1.5)


def test_the_fit_finds_the_share_it_was_given(throughput: ModuleType) -> None:
    rows = [
        {"skew": skew, "busiest_rank": load, "busiest_cpu": unit * (1 + 0.4 * (load - 1))}
        for skew, unit in ((0, 0.7), (1, 1.9))
        for load in (1.9, 1.3, 1.05)
    ]
    assert throughput.fitted_share(rows) == pytest.approx(0.4)


def test_balance_evens_the_load_of_two_real_ranks(throughput: ModuleType) -> None:
    """Under expert parallelism with data parallel batches: every token counted, the same law on both ranks."""
    shape = throughput.QUICK
    found = throughput.run_ranks({"shape": shape, "skews": [2.0], "settle": 40, "pairs": 2})[0]
    assert found["local_experts"] == shape["experts"] // 2, "the experts are not spread over the ranks"
    rows = {row["arm"]: row for row in throughput.summarise(found, 128)}
    for arm in ("none", "balance", "full balance"):
        for step in found["rows"][arm]:
            assigned = 2 * shape["batch"] * shape["length"] * shape["top_k"]
            assert [sum(layer) for layer in step["counts"]] == [assigned] * shape["layers"]
    assert rows["none"]["busiest_rank"] > 1.8, "bad test setup: the load is not skewed"
    assert rows["full balance"]["busiest_rank"] < 1.35 and rows["full balance"]["max_violation"] < 0.6
    # The preset leaves shares from 0.7 to 2 fair ones alone (above 0.3 in the first of the two layers).
    assert rows["full balance"]["busiest_rank"] < rows["balance"]["busiest_rank"] < rows["none"]["busiest_rank"]


def test_the_committed_page_is_made_from_the_committed_figures(throughput: ModuleType) -> None:
    results = json.loads((BENCHMARKS / "results" / "throughput.json").read_text("utf-8"))
    assert (BENCHMARKS / "results" / "throughput.md").read_text("utf-8") == throughput.markdown(results)
    assert results["shape"] == throughput.SHAPE and {row["skew"] for row in results["rows"]} >= set(throughput.SKEWS)
    assert results["modelled"] == throughput.modelled(results["loads"])
    assert results["fitted_share"] == pytest.approx(throughput.fitted_share(results["rows"]), abs=6e-4)
