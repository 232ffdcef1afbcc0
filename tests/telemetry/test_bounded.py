"""Long runs are read without holding them: the same answers as from all records at once, in a bound that is counted."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import random_run, train_into

from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.lifecycle import Evidence, plan_prune
from chronomoe_hf.report import write_report
from chronomoe_hf.report.data import load_run
from chronomoe_hf.telemetry import per_expert, read_jsonl
from chronomoe_hf.telemetry.packed import PackedWindows
from chronomoe_hf.telemetry.per_expert import newest_events
from chronomoe_hf.telemetry.views import Window

MODES = ("TRAIN", "INFER", "EVAL")


def by_definition(directory: Path, windows: int, mode: str | None) -> tuple[list[dict[str, Any]], str]:
    """All records at once, then those of the newest steps of the mode."""
    records, _ = read_jsonl(directory / "routing_events.jsonl")
    seen = {str(record["mode"]) for record in records}
    chosen = mode or next((name for name in MODES if name in seen), "TRAIN")
    events = [record for record in records if record["mode"] == chosen]
    steps = sorted({record["step"] for record in events})[-windows:]
    return sorted((r for r in events if r["step"] in steps), key=lambda r: r["step"]), chosen


def edited(directory: Path, change: Any) -> None:
    """Every routing event through `change`, which returns the records that stand in its place."""
    path = directory / "routing_events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(new) + "\n" for at, line in enumerate(lines) for new in change(at, line)))


def attempts(directory: Path, *records: dict[str, Any]) -> None:
    (directory / "attempts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("windows", [1, 3, 100])
@pytest.mark.parametrize("mode", [None, "TRAIN", "EVAL", "INFER"])
@pytest.mark.parametrize("case", ["plain", "resumed", "two runs", "nobody knows", "evaluated", "wide", "torn"])
def test_the_newest_events_are_those_of_all_records(case: str, mode: str | None, windows: int, tmp_path: Path) -> None:
    random_run(tmp_path, windows=9, experts=600 if case == "wide" else 4)
    directory = tmp_path / "chronomoe"
    wide = json.loads((directory / "routing_events.jsonl").read_text().splitlines()[0]).get("arrays") is True
    assert wide == (case == "wide"), "bad test setup"
    if case == "resumed":  # the second attempt went on from step 40, and repeated 50 and 60
        edited(directory, lambda at, record: [{**record, "attempt": int(record["step"] > 60)}])
        lines = (directory / "routing_events.jsonl").read_text().splitlines()
        again = [
            {**json.loads(line), "attempt": 1, "tokens": 7} for line in lines if json.loads(line)["step"] in (50, 60)
        ]
        at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] > 60)
        lines[at:at] = [json.dumps(record) for record in again]
        (directory / "routing_events.jsonl").write_text("\n".join(lines) + "\n")
        attempts(directory, {"run_id": "run", "attempt": 0, "from": None}, {"run_id": "run", "attempt": 1, "from": 40})
    elif case == "two runs":
        edited(directory, lambda at, record: [{**record, "run_id": "ab"[at % 2], "attempt": at % 2}])
        attempts(directory, *({"run_id": name, "attempt": at, "from": None} for at, name in enumerate("ab")))
    elif case == "nobody knows":
        (directory / "attempts.jsonl").unlink(missing_ok=True)
    elif case == "evaluated":
        edited(directory, lambda at, record: [record, {**record, "mode": "EVAL"}])
    elif case == "torn":
        with open(directory / "routing_events.jsonl", "a") as file:
            file.write('{"step": 100, "mode": "TR')
    if case not in ("nobody knows", "resumed", "two runs"):
        attempts(directory, {"run_id": "run", "attempt": 0, "from": None})
    events, chosen, modes = newest_events(directory, windows, mode, MODES)
    wanted, by_name = by_definition(directory, windows, mode)
    assert (events, chosen) == (wanted, by_name)
    assert "TRAIN" in modes
    assert bool(events) == (mode in (None, "TRAIN") or (case == "evaluated" and mode == "EVAL"))
    if case == "resumed" and windows == 100 and mode is None:
        assert [event["tokens"] for event in events if event["step"] == 50] == [7, 7]


def test_a_plan_reads_the_end_of_the_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_run(tmp_path, windows=60, layers=2)
    attempts(tmp_path / "chronomoe", {"run_id": "run", "attempt": 0, "from": None})
    manifest = json.loads((tmp_path / "chronomoe" / "run_manifest.json").read_text())
    for row in manifest["layers"]:
        row |= {"family": "random", "router_class": "R", "num_groups": 1, "groups_kept": 1}
    (tmp_path / "chronomoe" / "run_manifest.json").write_text(json.dumps(manifest))
    parsed = []
    native = per_expert.parse_line
    monkeypatch.setattr(per_expert, "parse_line", lambda raw: parsed.append(raw) or native(raw))
    known = Evidence.from_directory(tmp_path, windows=5)
    assert len(parsed) == 5 * 2 + 1, "five windows of two layers, and the line that shows that a sixth begins"
    assert (known.source.first_step, known.source.last_step) == (551, 600)
    assert plan_prune(known, keep=2, rank="frequency").num_kept == 2


def test_windows_are_packed_and_the_page_gets_the_same_ones(tmp_path: Path) -> None:
    random_run(tmp_path, windows=300)
    records, _ = read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")
    run = load_run(tmp_path)
    wanted = [Window.from_record(record) for record in records]
    assert list(run.windows) == wanted and len(run.windows) == 300
    assert run.windows[-1] == wanted[-1] and run.windows[5:7] == wanted[5:7] and run.windows.index(wanted[3]) == 3
    assert list(reversed(run.windows)) == wanted[::-1]
    assert run.windows[-1] is run.windows[299]
    with pytest.raises(IndexError, match="window 300 of 300"):
        run.windows[300]
    assert [window.step for window in run.picked][:2] == [10, 40] and len(run.picked) == 100


def test_a_report_of_more_windows_holds_little_more(tmp_path: Path) -> None:
    """What is held grows by less than half of what the windows take as objects."""
    peaks = {}
    for windows in (100, 500):
        random_run(tmp_path / str(windows), windows=windows, layers=4, dying=False)
        tracemalloc.start()
        run = load_run(tmp_path / str(windows))
        peaks[windows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(run.windows) == windows
    tracemalloc.start()
    views = [Window.from_record(r) for r in read_jsonl(tmp_path / "500" / "chronomoe" / "snapshots.jsonl")[0]]
    objects = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert isinstance(run.windows, PackedWindows) and len(views) == 500
    assert peaks[500] - peaks[100] < 0.5 * 0.8 * objects, (peaks, objects)


def test_routing_events_of_every_third_window_alone(tmp_path: Path) -> None:
    train_into(tmp_path, steps=7, config={"telemetry": {"events_every": 3}})
    directory = tmp_path / "chronomoe"
    events, _ = read_jsonl(directory / "routing_events.jsonl")
    snapshots, _ = read_jsonl(directory / "snapshots.jsonl")
    assert sorted({event["step"] for event in events}) == [3, 6]
    assert [snapshot["step"] for snapshot in snapshots] == [1, 2, 3, 4, 5, 6, 7]
    assert Evidence.from_directory(tmp_path).source.last_step == 6
    assert write_report(tmp_path).is_file()


def test_a_window_of_several_steps_is_written_when_it_holds_the_step(tmp_path: Path) -> None:
    train_into(tmp_path, steps=8, interval=2, config={"telemetry": {"events_every": 2}})
    events, _ = read_jsonl(tmp_path / "chronomoe" / "routing_events.jsonl")
    assert sorted({event["step"] for event in events}) == [4, 8]
    with pytest.raises(ConfigError, match="telemetry.events_every"):
        ChronoConfig.observe(telemetry__events_every=0)
