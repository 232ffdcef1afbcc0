"""The page's tables of roles say what the records hold, and are not there where roles were not kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.made_runs import random_run, run_with_roles
from support.split_proposals import train_with_an_idle_expert

from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.page import render, sections
from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.telemetry.views import roles_of

KEYS = ("duplicates", "roles", "proposals")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roles")
    run_with_roles(path)
    return path


def test_the_tables_hold_what_was_recorded(directory: Path) -> None:
    run = load_run(directory)
    found = {figure.key: figure for figure in sections(run) if figure.key in KEYS}
    assert list(found) == list(KEYS)
    last = read_jsonl(directory / "chronomoe" / "snapshots.jsonl")[0][-1]
    pairs = [(str(layer["layer_id"]), pair) for layer in last["layers"] for pair in layer["roles"]["pairs"]]
    pairs.sort(key=lambda each: -each[1]["score"])
    want = [[layer, str(pair["first"]), str(pair["second"]), f"{pair['score']:.2f}"] for layer, pair in pairs]
    assert want and [row[:4] for row in found["duplicates"].rows] == want
    assert f"experts {want[0][1]} and {want[0][2]} of layer {want[0][0]}" in found["duplicates"].sentence
    for row, layer in zip(found["roles"].rows, last["layers"], strict=True):
        energy = layer["roles"]["free_energy"]
        assert row[3:8] == [
            f"{energy[name]:.2f}" for name in ("total", "incoherence", "size", "duplicates", "two_roles")
        ]
        assert row[8] == str(layer["roles"]["history"]["basin"])
    standing = [each for each in run.proposals if each["state"] != "withdrawn"]
    assert len(found["proposals"].rows) == len(standing) > 0
    assert any(("merge" in row[6] and "+0." in row[6]) or "-0." in row[6] for row in found["proposals"].rows)
    html = render(run)
    assert all(figure.title in html for figure in found.values())


def test_a_measured_spawn_is_told_in_words(tmp_path: Path) -> None:
    train_with_an_idle_expert(tmp_path)
    effects, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_effects.jsonl")
    record = [record for record in effects if record.get("proposal") == "spawn"][-1]
    spawn, prune, balance = record["edits"]
    before, after = (" and ".join(f"{v:.2f}" for v in spawn[f"fair_shares_{when}"]) for when in ("before", "after"))
    (figure,) = [figure for figure in sections(load_run(tmp_path)) if figure.key == "proposals"]
    (row,) = [row for row in figure.rows if row[:2] == [str(record["layer_id"]), "spawn"]]
    idle, busy = record["experts"]
    assert row[6] == (
        f"spawn {idle} {busy} {spawn['delta_loss']:+.4f} (expert {idle} becomes a copy of {busy}: load {before} -> "
        f"{after}), prune {idle} {prune['delta_loss']:+.4f}, balance {idle} {balance['delta_loss']:+.4f}"
    )


def test_a_run_without_roles_has_no_such_table(tmp_path: Path) -> None:
    random_run(tmp_path)
    assert not {figure.key for figure in sections(load_run(tmp_path))} & set(KEYS)


@pytest.mark.parametrize(
    "roles",
    [
        3,
        {},
        {"pairs": 3, "two_roles": {}, "free_energy": [], "history": 0},
        {"pairs": [{"first": 0}, {"first": "<b>", "second": 1}, 7], "two_roles": [{"expert": -1}, None]},
        {
            "pairs": [{"first": 0, "second": 1, "score": "x"}],
            "free_energy": {"total": 1e300},
            "history": {"basin": 0.5},
        },
    ],
)
def test_odd_records_are_left_out(roles: Any) -> None:
    for layer in roles_of({"layers": [{"layer_id": 0, "roles": roles}, None, 3]}):
        assert all(pair["score"] is None for pair in layer["pairs"]) and layer["two_roles"] == []
        assert layer["free_energy"]["total"] is None and layer["basin"] is None
    assert roles_of({"layers": 3}) == [] and roles_of({}) == []
