"""Large windows: per-expert numbers in arrays.bin read back as JSONL would have had them, torn files included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_runs import random_run

from chronomoe_hf.telemetry import RoutingEvent, TelemetryWriter, read_events, read_windows, writer
from chronomoe_hf.telemetry.arrays import pack, read_frames, stack
from chronomoe_hf.telemetry.check import record_faults


def events_of(directory: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name != "arrays"}
        for record in read_events(directory / "chronomoe")
    ]


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same run kept in JSONL and in arrays."""
    random_run(tmp_path / "lines", layers=3, experts=8, top_k=2, windows=5)
    monkeypatch.setattr(writer, "ARRAYS_FROM", 20)
    random_run(tmp_path / "arrays", layers=3, experts=8, top_k=2, windows=5)
    return tmp_path / "lines", tmp_path / "arrays"


def test_events_are_the_same_wherever_they_are_kept(both: tuple[Path, Path]) -> None:
    lines, arrays = both
    assert (arrays / "chronomoe" / "arrays.bin").is_file() and not (lines / "chronomoe" / "arrays.bin").exists()
    assert "expert_token_counts" not in json.loads(
        (arrays / "chronomoe" / "routing_events.jsonl").read_text().splitlines()[0]
    )
    left, right = events_of(lines), events_of(arrays)
    assert len(left) == len(right) == 15
    for one, other in zip(left, right, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            if isinstance(value, list) and value and isinstance(value[0], float):
                assert other[name] == pytest.approx(value, rel=1e-6), name
            else:
                assert other[name] == value, name
    for one, other in zip(*(list(read_windows(d / "chronomoe")) for d in both), strict=True):
        assert (one.step, one.layers, one.experts) == (other.step, other.layers, other.experts)
        assert np.array_equal(one.arrays["expert_token_counts"], other.arrays["expert_token_counts"])


def test_the_limit_is_that_of_a_window(tmp_path: Path) -> None:
    random_run(tmp_path / "small", layers=8, experts=128, top_k=8, windows=1)
    random_run(tmp_path / "large", layers=9, experts=128, top_k=8, windows=1)
    assert not (tmp_path / "small" / "chronomoe" / "arrays.bin").exists()
    assert (tmp_path / "large" / "chronomoe" / "arrays.bin").exists()
    assert record_faults(tmp_path / "large" / "chronomoe")[0] == []


def test_what_is_missing_and_what_is_large_survives(tmp_path: Path) -> None:
    frame_LE = stack([[1, None, 2**40], None], [3, 2], integers=True)
    float_LE = stack([[0.1, None, float("nan")], [1e-30, 3.0]], [3, 2], integers=False)
    data = pack("run", 0, 5, "TRAIN", [0, 7], [3, 2], {"counts": frame_LE, "beta": float_LE})
    path = tmp_path / "arrays.bin"
    path.write_bytes(data)
    ((offset, frame),) = read_frames(path)
    assert offset == 0 and frame is not None
    assert frame.row("counts", 0) == [1, None, 2**40] and frame.row("counts", 7) is None
    assert frame.row("beta", 0) == [0.1, None, None] and frame.row("beta", 7) == pytest.approx([1e-30, 3.0], rel=1e-6)
    assert frame.row("phi_slow", 0) is None


def test_torn_and_altered_frames_lose_only_themselves(both: tuple[Path, Path]) -> None:
    path = both[1] / "chronomoe" / "arrays.bin"
    data = path.read_bytes()
    size = len(data) // 5
    for cut in (1, 3, 17, 40, size - 1):  # killed while the third was written, then two more by a resumed run
        path.write_bytes(data[: 2 * size + cut] + data[3 * size :])
        assert [frame.step for _, frame in read_frames(path) if frame is not None] == [10, 20, 40, 50]
        assert [record["step"] for record in events_of(both[1])] == [10] * 3 + [20] * 3 + [40] * 3 + [50] * 3
    faults, _ = record_faults(both[1] / "chronomoe")
    assert sorted(Path(fault.file).name for fault in faults) == ["arrays.bin", "routing_events.jsonl"]
    for flipped in range(0, size, 97):
        altered = bytearray(data)
        altered[size + flipped] ^= 0x10
        path.write_bytes(bytes(altered))
        assert [frame.step for _, frame in read_frames(path) if frame is not None] == [10, 30, 40, 50]
    path.write_bytes(b"garbage" * 1000)
    assert list(read_frames(path)) == [(0, None)] and events_of(both[1]) == []


def test_a_frame_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "arrays.bin"
    path.write_bytes(b"\x93CMA" + b"\xff" * 12 + b"\0" * 100)
    assert [frame for _, frame in read_frames(path)] == [None]


@pytest.mark.parametrize("name", ["snapshots.jsonl", "routing_events.jsonl", "arrays.bin"])
def test_nothing_is_appended_through_a_link(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "ARRAYS_FROM", 1 if name == "arrays.bin" else 1024)
    target = tmp_path / "victim"
    target.write_text("mine")
    (tmp_path / "chronomoe").mkdir()
    (tmp_path / "chronomoe" / name).symlink_to(target)
    event = RoutingEvent.from_router_output(
        run_id="run", step=1, mode="TRAIN", layer_id=0, used_capacity=[1, 1], n_experts=2, top_k=1
    )
    with TelemetryWriter("run", tmp_path) as out:
        assert out.write_many("snapshots" if name == "snapshots.jsonl" else "routing_events", [event]) == 0
        assert out.dropped == 1 and not out.enabled
    assert target.read_text() == "mine" and "symbolic link" in caplog.text
