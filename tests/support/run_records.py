"""Comparing two runs of the same training: their record files and tensors, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, equal

from chronomoe_hf.telemetry import read_jsonl

KINDS = ("routing_events", "snapshots", "control_decisions", "lifecycle_decisions", "alerts")
# What may differ between two runs of the same training: their names and their clocks.
FREE = ("run_id", "attempt", "time", "timestamp", "overhead_ms", "step_ms")


def later_records(output_dir: str | Path, after: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Records of the steps after `after`, by kind, as a reader gets them, without the FREE fields."""
    out = {}
    for kind in KINDS:
        records, broken = read_jsonl(Path(output_dir) / "chronomoe" / f"{kind}.jsonl")
        assert broken == 0
        out[kind] = [without_free(record) for record in records if record["step"] > after]
    return out


def without_free(value: Any) -> Any:
    """`value` without the FREE fields, at every depth."""
    if isinstance(value, dict):
        return {name: without_free(item) for name, item in value.items() if name not in FREE}
    return [without_free(item) for item in value] if isinstance(value, list) else value


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Two named sets of tensors are equal in names, types and every bit."""
    assert set(left) == set(right) and left
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert equal(value, right[name]), (name, float((value - right[name]).abs().max()))
