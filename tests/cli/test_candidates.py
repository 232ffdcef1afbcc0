"""chronomoe candidates shows the last word of the dry-run lifecycle on every expert, with its evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.made_runs import train_into
from typer.testing import CliRunner

from chronomoe_hf.cli.main import app
from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.telemetry.cases import last_cases


def test_the_cases_of_a_real_run(tmp_path: Path) -> None:
    # Thresholds under which every expert of this short run has a case against it.
    lifecycle = {"min_tokens": 10**6, "after_step": 1, "confirmations": 2, "starvation_threshold": -1.0}
    train_into(tmp_path, steps=5, config={"lifecycle": lifecycle})
    records, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_decisions.jsonl")
    last: dict[tuple[int, int, str], dict[str, Any]] = {}
    for record in records:
        last[record["layer_id"], record["expert"], record["reason"]] = record
    assert last and {record["state"] for record in last.values()} == {"confirmed"}
    shown = json.loads(CliRunner().invoke(app, ["candidates", str(tmp_path), "--json"]).output)
    assert shown["dry_run"] is True and len(shown["candidates"]) == len(last)
    for case in shown["candidates"]:
        record = last[int(case["layer_id"]), int(case["expert"]), case["reason"]]
        assert case["state"] == record["state"] and case["step"] == record["step"]
        assert case["total_tokens_seen"] == record["evidence"]["total_tokens_seen"]
    text = CliRunner().invoke(app, ["candidates", str(tmp_path)]).output
    assert f"{len(last)} experts" in text and text.count("low_observability") == len(last)
    assert max(map(len, text.splitlines())) <= 80


def test_a_withdrawn_case_is_left_out_unless_asked_for() -> None:
    base = {"layer_id": 0, "expert": 3, "reason": "low_coherence", "evidence": {"n_experts": 8}}
    (case,) = last_cases([{**base, "state": "candidate", "step": 1}, {**base, "state": "withdrawn", "step": 2}])
    assert case["state"] == "withdrawn" and case["step"] == 2 and case["num_experts"] == 8


def test_order_is_by_number() -> None:
    found = last_cases([{"layer_id": layer, "expert": 0, "reason": "x"} for layer in (10, 9, 100)])
    assert [case["layer_id"] for case in found] == ["9", "10", "100"]
