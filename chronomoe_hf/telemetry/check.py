"""Faults of a directory of records, each named by file and line. Reads, changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronomoe_hf.telemetry.arrays import ARRAYS, read_frames
from chronomoe_hf.telemetry.events import RECORD_SCHEMA
from chronomoe_hf.telemetry.reader import ATTEMPTS, KINDS, MANIFEST, parse_line, read_history, read_lines
from chronomoe_hf.telemetry.runs import History
from chronomoe_hf.telemetry.schemas import mismatches, schema_of
from chronomoe_hf.telemetry.views import Window, plain_text, whole

MOST_OF_A_RECORD = 3  # departures from the schema that are named of one record
MOST = 50  # faults of one file that are named; the rest is counted


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        file: path.
        line: from 1; None where the fault is not in a line.
        what: in words.
    """

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.what}"


def record_faults(directory: str | Path) -> tuple[list[Fault], int]:
    """Every fault of the record files in `directory` (a ``chronomoe`` directory), and how many records were read.

    Looked for: lines that are no strict JSON object, records without ``schema``, ``run_id``, ``attempt`` or ``step``,
    a schema newer than this version's, an attempt that ``attempts.jsonl`` does not know, steps that go back within an
    attempt, layers whose numbers contradict each other, a manifest that cannot be read, links.
    """
    directory = Path(directory)
    faults: list[Fault] = []
    history = read_history(directory)
    starts = {(run.run_id, attempt) for run in history.runs for attempt in run.attempts}
    count = 0
    for kind in KINDS:
        path = directory / f"{kind}.jsonl"
        if path.is_symlink():
            faults.append(Fault(str(path), None, "is a link; records are written to regular files only"))
        if not path.is_file():
            continue
        found: list[Fault] = []
        steps: dict[tuple[str, Any], int] = {}
        for line, record in read_lines(path):
            count += 1
            found += [Fault(str(path), line, what) for what in _problems(kind, record, starts, steps)]
        faults += found[:MOST]
        if len(found) > MOST:
            faults.append(Fault(str(path), None, f"{len(found) - MOST} more faults"))
    lacking = _missing_kinds(directory, history)
    return [*faults, *lacking, *_array_faults(directory), *_manifest_faults(directory, history)], count


def _missing_kinds(directory: Path, history: History) -> list[Fault]:
    """Files that must be there because of what others hold: a window has events and a snapshot, a run its start."""

    def filled(kind: str) -> bool:
        path = directory / f"{kind}.jsonl"
        return path.is_file() and any(True for _ in read_lines(path))

    faults = []
    pairs = (("routing_events", "snapshots"), ("alerts", "snapshots"), ("snapshots", "routing_events"))
    for has, needs in pairs:
        if filled(has) and not filled(needs) and not _only_evaluations(directory, has):
            what = f"is empty or missing, but {has}.jsonl holds records"
            faults.append(Fault(str(directory / f"{needs}.jsonl"), None, what))
    if not history.runs and not (directory / MANIFEST).is_file():
        faults.append(Fault(str(directory / f"{ATTEMPTS}.jsonl"), None, f"is missing, and so is {MANIFEST}"))
    return list({str(fault): fault for fault in faults}.values())


def _only_evaluations(directory: Path, kind: str) -> bool:
    """Whether a file of events holds nothing but evaluations, which have no snapshot."""
    if kind != "routing_events":
        return False
    records = (record for _, record in read_lines(directory / f"{kind}.jsonl"))
    return all(record is not None and record.get("mode") == "EVAL" for record in records)


def _array_faults(directory: Path) -> list[Fault]:
    """Frames of ``arrays.bin`` that are torn or altered, and events whose frame is not there."""
    path, faults, held = directory / ARRAYS, [], set()
    for offset, frame in read_frames(path) if path.is_file() else ():
        if frame is None:
            faults.append(Fault(str(path), None, f"from byte {offset} on, no whole frame: half written or altered"))
        else:
            held.add((frame.run_id, frame.attempt, frame.step, frame.mode))
    events = directory / "routing_events.jsonl"
    wanted: dict[tuple[Any, ...], int] = {}
    for line, record in read_lines(events) if events.is_file() else ():
        if record is not None and record.get("arrays") is True:
            wanted.setdefault(tuple(record.get(name) for name in ("run_id", "attempt", "step", "mode")), line)
    lost = [
        Fault(str(events), line, f"the per-expert numbers of step {place[2]} are not in {ARRAYS}")
        for place, line in wanted.items()
        if place not in held
    ]
    return [*faults[:MOST], *lost[:MOST]]


def _manifest_faults(directory: Path, history: History) -> list[Fault]:
    path = directory / MANIFEST
    if not path.is_file():
        return [Fault(str(path), None, "is missing")] if history.runs else []
    record = parse_line(path.read_bytes())
    if record is None:
        return [Fault(str(path), None, "is no JSON object")]
    missing = [name for name in ("run_id", "layers", "config", "versions") if name not in record]
    return [Fault(str(path), None, f"has no {name}") for name in missing]


def _problems(
    kind: str, record: dict[str, Any] | None, starts: set[tuple[str, int]], steps: dict[tuple[str, Any], int]
) -> Iterator[str]:
    if record is None:
        yield "no JSON object: half written, garbage, or with NaN"
        return
    schema, step, attempt = record.get("schema"), record.get("step"), record.get("attempt")
    if whole(schema, 1) is None:
        yield f"schema is no whole number from 1: {plain_text(schema, 60)}"
    elif schema > RECORD_SCHEMA:  # type: ignore[operator]
        yield f"schema {schema} is newer than {RECORD_SCHEMA}, the newest that this version reads"
    if not isinstance(record.get("run_id"), str):
        yield "no run_id"
        return
    if whole(step) is None or whole(attempt) is None:
        yield f"step and attempt are whole numbers from 0, got {plain_text(step, 60)} and {plain_text(attempt, 60)}"
        return
    if kind == ATTEMPTS:
        return
    place = record["run_id"], attempt
    if starts and place not in starts:
        yield f"attempt {attempt} of run {plain_text(record['run_id'], 60)} is not in {ATTEMPTS}.jsonl"
    if kind != "alerts" and record.get("mode") != "EVAL":
        if step < steps.get(place, 0):  # type: ignore[operator]
            yield f"step {step} comes after step {steps[place]} of the same attempt"
        steps[place] = int(step)  # type: ignore[arg-type]
    if schema == RECORD_SCHEMA:  # older records come back under today's names only where they differ
        yield from itertools.islice(mismatches(record, schema_of(kind)), MOST_OF_A_RECORD)
    if kind == "routing_events":
        yield from _event_problems(record)
    if kind == "snapshots":
        yield from _snapshot_problems(record)


def _event_problems(record: dict[str, Any]) -> Iterator[str]:
    counts = record.get("expert_token_counts")
    size = whole(record.get("n_experts"), 1)
    if whole(record.get("layer_id")) is None or size is None:
        yield "no layer_id from 0, or no n_experts from 1"
    elif counts is None:
        return  # in the array file
    elif not isinstance(counts, list) or len(counts) != size or any(whole(value) is None for value in counts):
        yield f"counts of layer {record['layer_id']} are not {size} whole numbers from 0"


def _snapshot_problems(record: dict[str, Any]) -> Iterator[str]:
    window = Window.from_record(record)
    if window is None:
        yield "no list of layers"
        return
    for layer in window.layers:
        neff, size, dead = layer.get("n_effective"), layer.num_experts, layer.get("dead_experts")
        if size is None or layer.top_k is None or layer.top_k > size:
            yield f"layer {layer.layer_id}: n_experts and top_k do not describe a router"
        elif neff is not None and not 1.0 - 1e-6 <= neff <= size * (1 + 1e-6):
            yield f"layer {layer.layer_id}: n_effective {neff:g} outside [1, {size}]"
        elif dead is not None and neff is not None and neff > (size - dead) * (1 + 1e-6):
            yield f"layer {layer.layer_id}: n_effective {neff:g} with {dead:g} of {size} experts dead"
