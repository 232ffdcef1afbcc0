"""TelemetryWriter and the reader: what is on disk, and every way in which the disk can fail."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ChronoError, ConfigError, TelemetryError
from chronomoe_hf.telemetry import (
    AlertHistory,
    RoutingEvent,
    SystemSnapshot,
    TelemetryWriter,
    next_attempt,
    read_jsonl,
    read_lines,
    read_manifest,
    run_manifest,
)
from chronomoe_hf.telemetry.reader import KINDS
from chronomoe_hf.window.records import RunRecords


def errors(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_records_are_one_strict_json_line_each(tmp_path):
    writer = TelemetryWriter("my_run", tmp_path, attempt=3)
    hostile = "</script>\n\x1b[31m\u2028\r"
    assert writer.write("snapshots", {"step": 1, "value": math.nan, "rows": [math.inf, 1.5], "name": hostile})
    assert writer.write_many("snapshots", [{"step": 2}, {"step": 3}]) == 2
    raw = writer.path("snapshots").read_bytes()
    assert writer.path("snapshots") == tmp_path / "chronomoe" / "snapshots.jsonl"
    assert raw.count(b"\n") == 3 and raw.isascii() and b"NaN" not in raw and b"\x1b" not in raw
    records, broken = read_jsonl(writer.path("snapshots"))
    assert broken == 0
    want = {"schema": 2, "run_id": "my_run", "attempt": 3, "step": 1}
    assert records[0] == {**want, "value": None, "rows": [None, 1.5], "name": hostile}
    assert (writer.written, writer.dropped) == (3, 0)


def test_an_unknown_kind_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ConfigError, match="routing_events"):
        TelemetryWriter("r", tmp_path).write("events", {})


def test_what_is_no_record_is_dropped_and_said_once(tmp_path, caplog):
    writer = TelemetryWriter("r", tmp_path)
    loop: dict = {}
    loop["self"] = loop
    assert not writer.write("alerts", {"step": 1, "thing": object()})
    assert not writer.write("alerts", 7)
    assert not writer.write("alerts", loop)
    assert writer.write("alerts", {"step": 2})
    assert writer.dropped == 3 and len(errors(caplog)) == 1
    assert [record["step"] for record in read_jsonl(writer.path("alerts"))[0]] == [2]


@pytest.mark.parametrize("place", ["file", "below_file"])
def test_a_path_that_is_a_file_is_refused_at_once(tmp_path, place):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(TelemetryError, match="another output_dir") as caught:
        TelemetryWriter("r", tmp_path / "taken" / ("" if place == "file" else "deeper"))
    assert isinstance(caught.value, ChronoError) and "taken" in str(caught.value)


def in_child(work: Callable[[], Any], *, nobody: bool = False) -> tuple[Any, list[str]]:
    """Result of `work` in a forked process, with its log; limits and rights set there end with it.

    With `nobody`, rights are dropped where the tests run as root, to whom every directory is writable.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child uses none
        child = os.fork()
    if child == 0:
        log: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("chronomoe_hf").addHandler(handler)
        try:
            if nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setegid(65534)
                os.seteuid(65534)
            answer = json.dumps([work(), log])
        except BaseException as error:
            answer = json.dumps([f"failed: {error!r}", log])
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    result, log = json.loads(answer)
    return result, log


def try_writer(path: Path) -> str:
    try:
        TelemetryWriter("r", path)
    except TelemetryError as error:
        return f"refused {error}"
    return "accepted"


@pytest.fixture
def open_dir():
    """A directory that any user can reach (tmp_path is private to its owner)."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def test_a_read_only_directory_is_refused_at_once(open_dir):
    accepted, _ = in_child(lambda: try_writer(open_dir), nobody=True)
    assert accepted == "accepted", "bad test setup: nobody cannot write at all"
    closed = open_dir / "closed"
    closed.mkdir()
    (open_dir / "records" / "chronomoe").mkdir(parents=True)
    for directory in (closed, open_dir / "records" / "chronomoe"):
        directory.chmod(0o555)
    for path in (closed, open_dir / "records"):
        refused, _ = in_child(lambda path=path: try_writer(path), nobody=True)
        assert refused.startswith("refused") and str(path) in refused
    for directory in (closed, open_dir / "records" / "chronomoe"):
        directory.chmod(0o755)


def test_an_unwritable_record_file_switches_the_writer_off(open_dir):
    def work() -> list[Any]:
        writer = TelemetryWriter("r", open_dir)
        writer.path("alerts").touch()
        writer.path("alerts").chmod(0o444)
        done = [writer.write("alerts", {"step": 1}), writer.write("snapshots", {"step": 1})]
        return [*done, writer.dropped, writer.path("snapshots").exists()]

    result, log = in_child(work, nobody=True)
    assert result == [False, False, 2, False]
    assert len(log) == 1 and "training goes on" in log[0]


def test_a_vanished_directory_costs_one_error_and_counts(tmp_path, caplog):
    writer = TelemetryWriter("r", tmp_path / "out")
    assert writer.write("alerts", {"step": 1})
    shutil.rmtree(tmp_path / "out")
    assert not writer.write("alerts", {"step": 2})
    assert writer.write_many("snapshots", [{"step": 2}, {"step": 3}]) == 0
    assert not writer.write_manifest({"layers": []})
    assert not writer.enabled and writer.dropped == 4
    assert len(errors(caplog)) == 1 and "training goes on" in errors(caplog)[0]
    writer.close()
    writer.close()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["telemetry of run r: 4 records were dropped"]


def test_a_full_disk_stops_the_records_not_the_run(tmp_path):
    def work() -> list[Any]:
        writer = TelemetryWriter("r", tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        done = [writer.write("snapshots", {"step": step, "pad": "x" * 100}) for step in range(100)]
        writer.close()
        return [done, writer.written, writer.dropped]

    (done, written, dropped), log = in_child(work)
    kept = sum(done)
    assert done == [True] * kept + [False] * (100 - kept) and (written, dropped) == (kept, 100 - kept)
    assert 10 < kept < 40, "bad test setup: the disk was never full"
    assert len(log) == 2 and "training goes on" in log[0] and f"{dropped} records were dropped" in log[1]
    path = tmp_path / "chronomoe" / "snapshots.jsonl"
    assert path.stat().st_size == 4096, "bad test setup: no half line was left"
    records, broken = read_jsonl(path)
    assert (len(records), broken) == (kept, 1)
    # The next attempt starts on a fresh line, and nothing of it is lost.
    TelemetryWriter("r", tmp_path, attempt=1).write("snapshots", {"step": 500})
    records, broken = read_jsonl(path)
    assert (len(records), broken, records[-1]["step"]) == (kept + 1, 1, 500)


def test_a_full_disk_leaves_no_half_manifest(tmp_path):
    def work() -> list[bool]:
        writer = TelemetryWriter("r", tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return [writer.write_manifest({"pad": "x" * 5000}), writer.enabled]

    assert in_child(work)[0] == [False, False]
    assert list((tmp_path / "chronomoe").iterdir()) == []


@pytest.mark.parametrize(
    "tail", [b'{"step": 2, "la', b"{}", b"\xff\xfe", b"[1, 2]"], ids=["half", "whole", "bytes", "list"]
)
def test_appends_start_on_a_fresh_line_after_a_kill(tmp_path, tail):
    writer = TelemetryWriter("r", tmp_path)
    writer.write("alerts", {"step": 1})
    with open(writer.path("alerts"), "ab") as file:
        file.write(tail)
    writer.write("alerts", {"step": 3})
    writer.write("alerts", {"step": 4})
    lines = writer.path("alerts").read_bytes().split(b"\n")
    assert lines[1] == tail and len(lines) == 5 and lines[-1] == b""
    steps = [record["step"] for record in read_jsonl(writer.path("alerts"))[0] if "step" in record]
    assert steps == [1, 3, 4]


def test_garbage_is_skipped_counted_and_located(tmp_path, caplog):
    path = tmp_path / "alerts.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"step": 1}\r\n'
        b"garbage\n"
        b"\n"
        b'{"step": 2, "value": NaN}\n'
        b'"text"\n'
        b"\xff\xff\n"
        b'{"step": 3}\n' + b"[" * 100_000 + b'\n{"step": 4}\n{"step": 5'
    )
    records, broken = read_jsonl(path)
    assert [record["step"] for record in records] == [1, 3, 4]
    assert broken == 6
    assert "(2, 4, 5, 6, 8, 10)" in caplog.text
    assert read_jsonl(tmp_path / "missing.jsonl") == ([], 0)


def test_an_endless_line_is_skipped_without_being_read_into_memory(tmp_path, monkeypatch):
    from chronomoe_hf.telemetry import reader

    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 64)
    path = tmp_path / "alerts.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b'{"pad": "' + b"x" * 1000 + b'"}\n' + b'{"step": 2}\n' + b"y" * 500)
    assert [(number, record and record["step"]) for number, record in read_lines(path)] == [
        (1, 1),
        (2, None),
        (3, 2),
        (4, None),
    ]


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(data):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "alerts.jsonl"
        path.write_bytes(b'{"step": 1}\n' + data + b'\n{"step": 2}\n')
        records, _ = read_jsonl(path)
        assert {"step": 1} in records and {"step": 2} in records


def test_a_resumed_attempt_replaces_what_it_repeats(tmp_path):
    first = TelemetryWriter("r", tmp_path, attempt=0)
    for step in (100, 200, 300, 400):
        first.write_many("routing_events", [{"step": step, "layer_id": layer} for layer in (0, 1)])
    second = TelemetryWriter("r", tmp_path, attempt=next_attempt(tmp_path))
    assert second.attempt == 1
    second.write_many("routing_events", [{"step": 300, "layer_id": layer} for layer in (0, 1)])
    records, _ = read_jsonl(second.path("routing_events"))
    got = [(record["step"], record["attempt"]) for record in records]
    assert got == [(100, 0)] * 2 + [(200, 0)] * 2 + [(400, 0)] * 2 + [(300, 1)] * 2
    # Once the resume says where it began, the tail that the first attempt never had in the end goes too.
    second.write_manifest({"layers": []}, resumed_from=200)
    records, _ = read_jsonl(second.path("routing_events"))
    assert [(record["step"], record["attempt"]) for record in records] == [(100, 0)] * 2 + [(200, 0)] * 2 + [
        (300, 1)
    ] * 2
    # Another run in the same directory replaces nothing.
    TelemetryWriter("other", tmp_path, attempt=2).write("routing_events", {"step": 100})
    assert len(read_jsonl(second.path("routing_events"))[0]) == 7


def test_the_manifest_is_written_once_and_resumes_are_noted(tmp_path):
    config = ChronoConfig.observe(interval=7)
    layers = [{"layer_id": 0, "name": "model.layers.0.mlp.gate", "router_class": "R", "n_experts": 4, "top_k": 2}]
    made = run_manifest(run_id="r", config=config, layers=layers, model_class="M", model_name="m", world_size=2)
    assert next_attempt(tmp_path) == 0 and read_manifest(tmp_path) is None
    writer = TelemetryWriter("r", tmp_path)
    assert writer.write_manifest(made)
    path = tmp_path / "chronomoe" / "run_manifest.json"
    before = path.read_bytes()
    stored = read_manifest(tmp_path)
    assert stored == json.loads(before) == made
    assert ChronoConfig.from_dict(stored["config"]) == config
    assert (stored["world_size"], stored["model_class"], stored["layers"]) == (2, "M", layers)
    for name in ("chronomoe_hf", "torch", "transformers", "accelerate", "python"):
        assert stored["versions"][name], name
    assert stored["created"].endswith("+00:00")
    for attempt, step in ((1, 50), (2, 80)):
        assert next_attempt(tmp_path) == attempt
        again = TelemetryWriter("r", tmp_path, attempt=attempt)
        assert not again.write_manifest({**made, "world_size": 4}, resumed_from=step)
    assert path.read_bytes() == before
    starts, broken = read_jsonl(tmp_path / "chronomoe" / "attempts.jsonl")
    assert broken == 0
    assert [(item["event"], item["from"], item["attempt"], item["manifest"]["world_size"]) for item in starts] == [
        ("start", None, 0, 2),
        ("resume", 50, 1, 4),
        ("resume", 80, 2, 4),
    ]


def test_a_broken_manifest_is_no_manifest(tmp_path):
    writer = TelemetryWriter("r", tmp_path, attempt=5)
    writer.write("alerts", {"step": 1})
    (tmp_path / "chronomoe" / "run_manifest.json").write_text('{"run_id": ')
    assert read_manifest(tmp_path) is None
    assert next_attempt(tmp_path) == 6
    assert set(KINDS) == {
        "routing_events",
        "snapshots",
        "control_decisions",
        "lifecycle_decisions",
        "lifecycle_effects",
        "lifecycle_splits",
        "lifecycle_cuts",
        "alerts",
        "baselines",
        "ends",
        "logs",
        "replay",
        "attempts",
    }


def test_records_are_thinned_at_their_limit_and_never_torn(tmp_path):
    records = RunRecords()
    config = ChronoConfig.observe(telemetry__max_mb=1)
    records.open(tmp_path, run_id="r", config=config, layers=[], model_class="M")
    records.limit = 40_000.0
    history = AlertHistory()
    for step in range(1, 2001):
        event = RoutingEvent.from_router_output(
            run_id="r", step=step, mode="TRAIN", layer_id=0, used_capacity=[100] * 4, n_experts=4, top_k=1
        )
        snapshot = SystemSnapshot.from_events(
            events=[event], step=step, run_id="r", model_name="m", n_layers=1, alert_history=history
        )
        records.window([event], snapshot)
    records.close(2000)
    size = sum(path.stat().st_size for path in (tmp_path / "chronomoe").iterdir())
    assert 30_000 < size < 42_000, "a window more than the limit at most"
    steps = [record["step"] for record in read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")[0]]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps[0] == 1 and gaps == sorted(gaps) and gaps[-1] > 4, "thinner and thinner"
    assert steps == [r["step"] for r in read_jsonl(tmp_path / "chronomoe" / "routing_events.jsonl")[0]]


WRITE_300 = """
import sys
from chronomoe_hf.telemetry import TelemetryWriter
name, directory = sys.argv[1:]
writer = TelemetryWriter(name, directory)
print(all([writer.write("alerts", {"step": step, "pad": name * 500}) for step in range(300)]))
"""


def test_two_processes_never_mix_inside_a_line(tmp_path):
    command = [sys.executable, "-c", WRITE_300]
    started = [subprocess.Popen([*command, name, str(tmp_path)], stdout=subprocess.PIPE, text=True) for name in "ab"]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["True", "True"]
    records, broken = read_jsonl(tmp_path / "chronomoe" / "alerts.jsonl")
    assert (len(records), broken) == (600, 0)
    assert all(set(record["pad"]) == {record["run_id"]} for record in records)
