"""The run that benchmarks/cost/records.py writes is a sound one, and its numbers come back."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from chronomoe_hf.telemetry import read_events
from chronomoe_hf.telemetry.check import record_faults


def test_the_run_it_writes_is_sound(tmp_path: Path) -> None:
    module = import_module("cost.records")
    times = module.write_run(tmp_path, windows=2, layers=9, experts=128, top_k=8)
    assert times.shape == (2, 3, 2) and (times >= 0).all() and (tmp_path / "chronomoe" / "arrays.bin").is_file()
    assert record_faults(tmp_path / "chronomoe") == ([], 1 + 18 + 2 + 1), "attempt, events, snapshots, baseline"
    events = list(read_events(tmp_path / "chronomoe"))
    assert len(events) == 18 and all(len(event["expert_token_counts"]) == 128 for event in events)
