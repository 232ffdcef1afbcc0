"""The schemas in the wheel: one for every kind; real records of every preset fit, and altered ones do not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import run_with_roles, train_into

from chronomoe_hf.report import judge_directory
from chronomoe_hf.telemetry.check import record_faults
from chronomoe_hf.telemetry.reader import KINDS
from chronomoe_hf.telemetry.schemas import mismatches, schema_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    run_with_roles(place / "roles")
    train_into(place / "revive", preset="revive", steps=4, interval=2)
    config = {"lifecycle": {"cut_at": 3, "keep": 0.5}}
    train_into(place / "cut", steps=6, interval=1, config=config)
    return [place / "roles", place / "revive", place / "cut"]


@pytest.mark.parametrize("kind", [*KINDS, "verdict"])
def test_every_kind_has_a_schema(kind: str) -> None:
    schema = schema_of(kind)
    assert schema["title"] == kind and schema["description"] and schema["$schema"].endswith("2020-12/schema")


def test_real_records_fit_and_say_all_that_is_required(runs: list[Path]) -> None:
    seen: set[str] = set()
    for run in runs:
        assert record_faults(run / "chronomoe")[0] == []
        for kind in KINDS:
            path = run / "chronomoe" / f"{kind}.jsonl"
            for line in path.read_text().splitlines() if path.is_file() else ():
                seen.add(kind)
                assert list(mismatches(json.loads(line), schema_of(kind))) == [], (kind, line[:300])
        assert list(mismatches(judge_directory(run).to_record(), schema_of("verdict"))) == []
    assert seen >= set(KINDS) - {"alerts", "lifecycle_splits", "replay"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 3}, "layers is 3, not array"),
        ({"mode": "train"}, "none of TRAIN"),
        ({"n_layers": -1}, "below 0"),
        ({"alerts": [{"kind": 1}]}, "alerts[0].kind is 1, not string"),
        ({"loss_tokens": 1.5}, "loss_tokens is 1.5, not integer or null"),
        ({"notes": [True]}, "notes[0] is true, not string"),
    ],
)
def test_what_departs_is_named(change: dict[str, Any], words: str, runs: list[Path]) -> None:
    line = (runs[0] / "chronomoe" / "snapshots.jsonl").read_text().splitlines()[0]
    record = {**copy.deepcopy(json.loads(line)), **change}
    assert any(words in each for each in mismatches(record, schema_of("snapshots")))
    del record["layers"]
    assert "the record has no layers" in list(mismatches(record, schema_of("snapshots")))
