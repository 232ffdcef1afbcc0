"""The GPU benchmark without a GPU: it says so, and its whole path runs on the CPU with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "run.py"
PARTS = ("overhead", "syncs", "equal_runs", "launches", "memory", "compiled", "suite", "ranks")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900, env=environment
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path))
    assert done.returncode == 3 and "needs an NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir()), "it must write nothing"
    refused = run("--device", "cpu", "--tiny")
    assert refused.returncode == 2 and "measures nothing" in refused.stderr


@pytest.mark.slow
def test_every_part_runs_and_fills_its_table(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert tuple(results["parts"]) == PARTS
    parts = {name: part["rows"] for name, part in results["parts"].items()}
    assert all(row["losses_equal"] and row["tensors_equal"] for row in parts["equal_runs"])
    assert all(row["first_loss_as_untouched"] for row in parts["equal_runs"])
    counted = {row["arm"]: row for row in parts["launches"]}
    assert 0 < counted["observe"]["per_layer"] < counted["untouched"]["per_layer"]
    assert counted["observe"]["per_layer"] < counted["protect"]["per_layer"], "governance must act where it is counted"
    assert counted["observe"]["step_fixed"] > 0 == counted["untouched"]["step_fixed"]
    assert {(row["tokens"], row["arm"]) for row in parts["overhead"]} >= {(32, "observe"), (64, "balance")}
    assert all(row["recompiled"] == 0 for row in parts["compiled"])
    assert parts["ranks"][-1]["counted"] == parts["ranks"][-1]["expected"] > 0
    assert all("skipped" in row["result"] or "passed" in row["result"] for row in parts["suite"]) and parts["suite"]
    text = (tmp_path / "gpu.md").read_text()
    assert "This ran without a GPU" in text and text.count("\n## ") == len(PARTS) and "Failed" not in text


def test_a_part_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    """The part is named, its error stands in the table, and the status says so."""
    code = (
        "import sys; sys.argv = ['run.py', '--device', 'cpu', '--tiny', '--part', 'syncs', 'memory', '--output', "
        f"{str(tmp_path)!r}]; sys.path.insert(0, {str(SCRIPT.parents[1])!r}); from gpu import run; "
        "broken = lambda bench: 1 / 0; run.PARTS['syncs'] = broken; sys.exit(run.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["syncs"]["error"] == "ZeroDivisionError: division by zero" and len(parts["memory"]["rows"]) == 4
    assert "Failed: `ZeroDivisionError: division by zero`" in (tmp_path / "gpu.md").read_text()
