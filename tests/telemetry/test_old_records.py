"""Records that were written before today's names still read: a run directory of schema 1, and hostile lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.telemetry.reader import upgraded

GOLDEN = Path(__file__).parents[1] / "data" / "records_v1" / "chronomoe"
"""Six steps of a tiny Mixtral, windows of two, written by the version before the names changed."""
OLD = {"counts", "assignments", "dead", "nearly_dead", "tokens_seen"}


def raw(kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / f"{kind}.jsonl").read_text().splitlines()]


def read(kind: str) -> list[dict[str, Any]]:
    records, broken = read_jsonl(GOLDEN / f"{kind}.jsonl")
    assert broken == 0 and len(records) == len(raw(kind)) > 0
    assert all(record["schema"] == 2 for record in records)
    assert all(record["schema"] == 1 for record in raw(kind)), "bad test setup"
    return records


def test_routing_events_have_todays_names_and_the_old_numbers() -> None:
    for old, new in zip(raw("routing_events"), read("routing_events"), strict=True):
        assert new["expert_token_counts"] == old["counts"] and sum(old["counts"]) > 0
        assert new["total_tokens_seen"] == old["tokens_seen"]
        assert (new["dead_experts"], new["nearly_dead_count"]) == (old["dead"], old["nearly_dead"])
        assert not OLD & set(new)
        same = set(old) - OLD - {"schema"}
        assert {name: new[name] for name in same} == {name: old[name] for name in same}


def test_layers_of_snapshots_have_todays_names() -> None:
    for old, new in zip(raw("snapshots"), read("snapshots"), strict=True):
        assert len(new["layers"]) == 2
        for before, after in zip(old["layers"], new["layers"], strict=True):
            assert after["token_count"] == before["assignments"] == 192
            assert after["dead_experts"] == before["dead"]
            assert not OLD & set(after)
        assert new["scalars"] == old["scalars"]


def test_decisions_have_todays_names() -> None:
    for old, new in zip(raw("control_decisions"), read("control_decisions"), strict=True):
        assert new["observed"]["dead_experts"] == old["observed"]["dead"]
        assert "dead" not in new["observed"]
        assert new["debt_parts"] == old["debt_parts"], "a part of the debt is no count of experts"
    for old, new in zip(raw("lifecycle_decisions"), read("lifecycle_decisions"), strict=True):
        assert new["expert_id"] == f"L{old['layer_id']}_E{old['expert_id']}"
        assert (new["layer_id"], new["expert"]) == (old["layer_id"], old["expert_id"])
        assert new["phi_slow"] == old["evidence"]["phi_slow"] == new["evidence"]["phi_slow"]
        assert new["total_tokens_seen"] == old["evidence"]["tokens_seen"] == new["evidence"]["total_tokens_seen"]


@pytest.mark.parametrize(
    "record",
    [
        {"schema": 2, "counts": [1]},
        {"counts": [1]},
        {"schema": "1", "counts": [1]},
        {"schema": 1, "layers": 5, "evidence": [1], "observed": None},
        {"schema": 1, "layers": [None, 3, []], "expert_id": 3},
        {"schema": 1, "evidence": {}, "expert_id": "L0_E1", "layer_id": 0},
    ],
)
def test_what_is_no_record_of_schema_1_stays_as_it_is(record: dict[str, Any]) -> None:
    new = upgraded(record)
    assert {**new, "schema": record.get("schema")} == {"schema": None, **record}


def test_a_name_of_today_is_never_overwritten() -> None:
    assert upgraded({"schema": 1, "counts": [1], "expert_token_counts": [2]})["expert_token_counts"] == [2]
