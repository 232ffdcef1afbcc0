"""benchmarks/prune/split_cost.py runs at a small shape and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tiny_shape_runs_and_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/prune/split_cost.py", "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "split_cost.json").read_text())["row"]
    assert row["copies"] >= 1 and row["share_min"][1] >= 0.4 > row["share_min"][0]
    assert row["tokens"] == 1024 and row["peak_gb"] >= row["model_gb"] > 0
    assert f"| {row['copies']} |" in (tmp_path / "split_cost.md").read_text()
