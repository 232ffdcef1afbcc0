"""The split on two ranks: the same bits on both, from the main process's data; engines that shard are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chronomoe_hf.telemetry import read_jsonl

WORKER = Path(__file__).parent / "split_worker.py"


def ranks(tmp_path: Path, engine: str, start_script: Callable[..., tuple[int, str]]) -> list[dict[str, Any]]:
    status, output = start_script(WORKER, [str(tmp_path), engine], 2)
    assert status == 0, output[-4000:]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_rewrite_the_same_experts(tmp_path: Path, start_script: Callable[..., tuple[int, str]]) -> None:
    one, two = ranks(tmp_path, "plain", start_script)
    assert one["begin"] == two["begin"] != one["was"]
    assert one["end"] == two["end"] != one["begin"]
    assert one["beta"] == two["beta"] and any(value != 0.0 for row in one["beta"] for value in row)
    records, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_splits.jsonl")
    assert len(records) == 1 and records[0]["copies"] and records[0]["refits"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_engines_that_shard_are_refused_by_name(
    engine: str, tmp_path: Path, start_script: Callable[..., tuple[int, str]]
) -> None:
    for rank in ranks(tmp_path, engine, start_script):
        name = "deepspeed" if engine == "zero2" else "fsdp"
        assert rank["error"].startswith("ConfigError") and f"under {name}" in rank["error"]
