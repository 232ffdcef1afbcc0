"""chronomoe candidates shows the last word of the dry-run lifecycle on every expert, with its evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.made_runs import run_with_roles, train_into
from support.split_proposals import LAYER, train_with_an_idle_expert
from typer.testing import CliRunner

from chronomoe_hf.cli.main import app
from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.telemetry.views import last_cases, last_proposals


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


def test_proposals_of_a_real_run_with_what_was_measured(tmp_path: Path) -> None:
    run_with_roles(tmp_path)
    shown = json.loads(CliRunner().invoke(app, ["candidates", str(tmp_path), "--json"]).output)
    records, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_decisions.jsonl")
    last = {
        (record["layer_id"], record["proposal"], tuple(record["experts"])): record
        for record in records
        if record.get("proposal") in ("merge", "split", "spawn")
    }
    standing = {key: record for key, record in last.items() if record["state"] != "withdrawn"}
    assert standing and len(shown["proposals"]) == len(standing)
    for each in shown["proposals"]:
        key = int(each["layer_id"]), each["proposal"], tuple(int(expert) for expert in each["experts"].split())
        assert (each["state"], each["step"]) == (standing[key]["state"], standing[key]["step"])
        assert each["score"] == standing[key]["evidence"].get("score")
    effects, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_effects.jsonl")
    newest = [record for record in effects if record.get("proposal") == "merge" and record["step"] == 8]
    assert newest, "bad test setup: nothing was measured"
    measured = [each for each in shown["proposals"] if each["measured"]]
    rises = sorted(rise for each in measured for rise in each["measured"].values())
    assert rises == sorted(edit["delta_loss"] for record in newest for edit in record["edits"])
    text = CliRunner().invoke(app, ["candidates", str(tmp_path)]).output
    assert f"{len(standing)} proposals" in text and text.count("confirmed") >= len(measured)
    assert max(map(len, text.splitlines())) <= 80


def test_a_measured_spawn_shows_whose_load_it_shares(tmp_path: Path) -> None:
    train_with_an_idle_expert(tmp_path)
    effects, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_effects.jsonl")
    edit = [record for record in effects if record.get("proposal") == "spawn"][-1]["edits"][0]
    before, after = edit["fair_shares_before"], edit["fair_shares_after"]
    shown = json.loads(CliRunner().invoke(app, ["candidates", str(tmp_path), "--json"]).output)
    spawn = next(each for each in shown["proposals"] if each["proposal"] == "spawn" and each["layer_id"] == str(LAYER))
    name = f"spawn {spawn['experts']}"
    assert spawn["loads"] == {name: [[edit["donor"], edit["target"]], before, after]}
    text = CliRunner().invoke(app, ["candidates", str(tmp_path)]).output
    (line,) = [line for line in text.splitlines() if line.split()[:3] == name.split() and "->" in line]
    load = f"{before[0]:.2f} {before[1]:.2f} -> {after[0]:.2f} {after[1]:.2f}"
    assert line.endswith(f"{edit['delta_loss']:+.5f}  {load}") and max(map(len, text.splitlines())) <= 80


def test_what_a_stranger_says_of_loads_is_checked() -> None:
    good = {"proposal": "split", "layer_id": 0, "experts": [1], "state": "candidate", "step": 1}
    known = {"edit": "split", "experts": [1], "donor": 1, "target": 2, "fair_shares_before": [2.0, 0.0]}
    for after in ([1.0], [1.0, "x"], [1.0, 1.0, 1.0], "11", None):
        (found,) = last_proposals([good], [{**good, "edits": [{**known, "fair_shares_after": after}]}])
        assert found["loads"] == {}
    edits = [{**known, "fair_shares_after": [1.0, 1.0]}, {"edit": "balance", "experts": [1], "reason": "a\x1b"}]
    (found,) = last_proposals([good], [{**good, "edits": edits}])
    assert found["loads"] == {"split 1": ([1, 2], [2.0, 0.0], [1.0, 1.0])}
    assert found["unmeasured"] == {"balance 1": "a\\x1b"}


def test_proposals_of_a_stranger_are_text() -> None:
    good = {"proposal": "merge", "layer_id": 0, "experts": [1, 2], "state": "candidate", "step": 1}
    odd = [
        {"proposal": "melt", "layer_id": 0, "experts": [1]},
        {"proposal": ["merge"], "layer_id": 0},
        {**good, "layer_id": "\x1b[31m", "experts": "12", "evidence": 3, "competing": [1, {"edit": 2}], "state": None},
        {**good, "state": "withdrawn", "step": 2, "evidence": {"score": "nan"}},
    ]
    effects = [{**good, "edits": [{"edit": "merge", "experts": [1, 2], "delta_loss": 0.5}, {"delta_loss": "x"}, 3]}]
    found = last_proposals([good, *odd], effects)
    assert [(each["state"], each["score"]) for each in found] == [("withdrawn", None), ("None", None)]
    assert found[0]["measured"] == {"merge 1 2": 0.5} and found[1]["layer_id"] == "\\x1b[31m"
    assert found[1]["competing"] == ["2"]


def test_a_withdrawn_case_is_left_out_unless_asked_for() -> None:
    base = {"layer_id": 0, "expert": 3, "reason": "low_coherence", "evidence": {"n_experts": 8}}
    (case,) = last_cases([{**base, "state": "candidate", "step": 1}, {**base, "state": "withdrawn", "step": 2}])
    assert case["state"] == "withdrawn" and case["step"] == 2 and case["num_experts"] == 8


def test_order_is_by_number() -> None:
    found = last_cases([{"layer_id": layer, "expert": 0, "reason": "x"} for layer in (10, 9, 100)])
    assert [case["layer_id"] for case in found] == ["9", "10", "100"]
