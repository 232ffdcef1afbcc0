"""Runs in one directory stay apart; the end of a file is read alone; the next attempt is found without parsing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_runs import train_into

from chronomoe_hf.telemetry import TelemetryWriter, next_attempt, read_jsonl, reader
from chronomoe_hf.telemetry.reader import lines_from_end, read_history, read_last


def write(directory: Path, run_id: str, attempt: int, steps: list[int], resumed_from: int | None = None) -> None:
    with TelemetryWriter(run_id, directory, attempt=attempt) as writer:
        writer.write_manifest({"run_id": run_id}, resumed_from=resumed_from)
        writer.write_many("snapshots", [{"step": step, "layers": []} for step in steps])


def places(records: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(record["run_id"], record["attempt"], record["step"]) for record in records]


def test_a_second_start_of_the_same_id_is_a_second_run(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, [2, 4, 6])
    write(tmp_path, "a", 1, [2, 3])
    directory = tmp_path / "chronomoe"
    records, _ = read_jsonl(directory / "snapshots.jsonl")
    assert places(records) == [("a", 0, 2), ("a", 0, 4), ("a", 0, 6), ("a", 1, 2), ("a", 1, 3)]
    first, second = read_history(directory).runs
    assert (first.name, second.name) == ("a", "a#2")
    assert [r["step"] for r in read_jsonl(directory / "snapshots.jsonl", run=first)[0]] == [2, 4, 6]
    assert [r["step"] for r in read_jsonl(directory / "snapshots.jsonl", run=second)[0]] == [2, 3]


def test_a_resume_overwrites_its_own_run_only(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, [2, 4, 6])
    write(tmp_path, "b", 1, [2, 4, 6])
    write(tmp_path, "a", 2, [4], resumed_from=2)
    records, _ = read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")
    assert places(records) == [("a", 0, 2), ("b", 1, 2), ("b", 1, 4), ("b", 1, 6), ("a", 2, 4)]
    last = read_last(tmp_path / "chronomoe" / "snapshots.jsonl", 10)
    assert last.run is not None and last.run.name == "a"
    assert places(last.records) == [("a", 0, 2), ("a", 2, 4)]
    last = read_last(tmp_path / "chronomoe" / "snapshots.jsonl", 2, name="b")
    assert places(last.records) == [("b", 1, 4), ("b", 1, 6)]
    assert read_last(tmp_path / "chronomoe" / "snapshots.jsonl", 2, name="c").run is None


@pytest.mark.parametrize("value", [True, "3", [3], 10**400, -1, None, 1.5], ids=lambda value: str(value)[:8])
def test_steps_and_attempts_that_are_none_break_nothing(value: Any, tmp_path: Path) -> None:
    write(tmp_path, "a", 0, [2, 4])
    directory = tmp_path / "chronomoe"
    for name, field in (("attempts", "from"), ("attempts", "attempt"), ("snapshots", "step"), ("snapshots", "attempt")):
        line = {"schema": 2, "run_id": "a", "attempt": 0, "step": 9, "from": 2, "layers": [], field: value}
        with (directory / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    steps = [r["step"] for r in read_last(directory / "snapshots.jsonl", 9).records]
    assert steps[:2] == [2, 4] and 9 in steps
    assert all(run.resumes in ([], [(0, 2)]) for run in read_history(directory).runs)
    assert isinstance(next_attempt(tmp_path), int)


def test_a_resumed_training_is_one_run(tmp_path: Path) -> None:
    save = {"save_strategy": "steps", "save_steps": 3}
    train_into(tmp_path, steps=5, arguments=save)
    train_into(tmp_path, steps=8, arguments=save, resume=str(tmp_path / "checkpoint-3"))
    (run,) = read_history(tmp_path / "chronomoe").runs
    assert run.attempts == [0, 1] and run.resumes == [(1, 3)]
    last = read_last(tmp_path / "chronomoe" / "snapshots.jsonl", 100)
    assert [(r["step"], r["attempt"]) for r in last.records] == [(s, int(s > 3)) for s in range(1, 9)]
    assert last.records == read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")[0]


@settings(deadline=None)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=9), block=st.integers(1, 64)
)
def test_lines_from_the_end_are_the_lines(lines: list[bytes], block: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"\n".join(lines))
    expected = [line for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert list(lines_from_end(path, block)) == expected[::-1]


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 100)
    path = tmp_path / "file"
    path.write_bytes(b'{"a":1}\n' + b"x" * 1000 + b'\n{"b":2}\n')
    assert list(lines_from_end(path, 16)) == [b'{"b":2}', b"\0", b'{"a":1}']


def test_the_next_attempt_reads_the_ends_of_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next_attempt(tmp_path) == 0
    write(tmp_path, "a", 0, list(range(500)))
    write(tmp_path, "a", 4, [501], resumed_from=500)
    read: list[bytes] = []
    parse = reader.parse_line
    monkeypatch.setattr(reader, "parse_line", lambda raw: (read.append(raw), parse(raw))[1])
    assert next_attempt(tmp_path) == 5
    assert len(read) <= 4  # manifest, two attempts, the last snapshot
    (tmp_path / "chronomoe" / "attempts.jsonl").unlink()
    with (tmp_path / "chronomoe" / "snapshots.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "attempt": 7})[:-4])  # torn
    assert next_attempt(tmp_path) == 5
