"""The schemas in the wheel: one for every kind; real records of every preset fit, and altered ones do not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
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
    Draft202012Validator.check_schema(schema)


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


def altered(record: Any) -> Iterator[Any]:
    """`record` with one value in it left out or replaced, one after the other; of a list only its first item."""
    items = (
        record.items() if isinstance(record, dict) else list(enumerate(record[:1])) if isinstance(record, list) else ()
    )
    for key, value in items:
        if isinstance(record, dict):
            yield {name: item for name, item in record.items() if name != key}
        others = [None, "x", -1, 7, 2.5, 3.0, True, [], {}, *altered(value)]
        for other in others:
            out = copy.copy(record)
            out[key] = other
            yield out


def test_the_check_says_what_a_full_validator_says(runs: list[Path]) -> None:
    """Of every kind a real record, and that record with one value left out or replaced, thousands of times."""
    seen = {True: 0, False: 0}
    records = [(kind, run / "chronomoe" / f"{kind}.jsonl") for run in runs for kind in KINDS]
    shown = {kind: json.loads(path.read_text().splitlines()[-1]) for kind, path in records if path.is_file()}
    for kind, record in {**shown, "verdict": judge_directory(runs[0]).to_record()}.items():
        schema = schema_of(kind)
        full = Draft202012Validator(schema)
        assert full.is_valid(record), kind
        for other in altered(record):
            fits = full.is_valid(other)
            assert fits == (not list(mismatches(other, schema))), (kind, other)
            seen[fits] += 1
    assert min(seen.values()) > 1000, seen
