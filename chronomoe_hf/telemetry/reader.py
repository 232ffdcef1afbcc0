"""Reading telemetry back: broken lines are skipped and counted, overwritten history is left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger("chronomoe_hf")

DIRECTORY = "chronomoe"
MANIFEST = "run_manifest.json"
ATTEMPTS = "attempts"
KINDS = ("routing_events", "snapshots", "control_decisions", "lifecycle_decisions", "alerts", ATTEMPTS)
MAX_LINE_BYTES = 16 * 2**20  # a longer line is garbage; it is skipped without being held in memory


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Every non-empty line of a JSONL file.

    Yields:
        Line number from 1, and the record, or None where the line is no strict-JSON object (half written, garbage,
        NaN, longer than 16 MiB).
    """
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES):
            number += 1
            if not raw.endswith(b"\n") and len(raw) == MAX_LINE_BYTES:
                while (raw := file.readline(MAX_LINE_BYTES)) and not raw.endswith(b"\n"):
                    pass
                yield number, None
                continue
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, _parse(raw)


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return None
    return record if isinstance(record, dict) else None


def read_jsonl(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Records of one file, without what a later attempt has overwritten.

    A resumed run repeats steps: of each step the last attempt is kept. The steps of an earlier attempt past the one
    from which a later attempt resumed (``attempts.jsonl`` beside the file) are left out too.

    Args:
        path: a JSONL file of a TelemetryWriter; a missing file has no records.

    Returns:
        The records in file order, and the number of broken lines (their numbers are logged).
    """
    path = Path(path)
    records, broken = _read_all(path)
    resumes = [] if path.stem == ATTEMPTS else _read_all(path.with_name(f"{ATTEMPTS}.jsonl"))[0]
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        logger.warning("%s: skipped %d broken lines (%s)", path, len(broken), shown)
    if path.stem == ATTEMPTS:
        return records, len(broken)
    last = _last_attempts(records)
    return [record for record in records if _stands(record, last, resumes)], len(broken)


def _read_all(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    records, broken = [], []
    if path.is_file():
        for number, record in read_lines(path):
            if record is None:
                broken.append(number)
            else:
                records.append(record)
    return records, broken


def _place(record: dict[str, Any]) -> tuple[Any, int, int] | None:
    """Run, step and attempt of a record; None for one that does not say (such a record always stands)."""
    step, attempt = record.get("step"), record.get("attempt", 0)
    return (str(record.get("run_id")), step, attempt) if isinstance(step, int) and isinstance(attempt, int) else None


def _last_attempts(records: list[dict[str, Any]]) -> dict[tuple[str, int], int]:
    last: dict[tuple[str, int], int] = {}
    for record in records:
        if (place := _place(record)) is not None:
            run, step, attempt = place
            last[run, step] = max(attempt, last.get((run, step), attempt))
    return last


def _stands(record: dict[str, Any], last: dict[tuple[str, int], int], resumes: list[dict[str, Any]]) -> bool:
    place = _place(record)
    if place is None:
        return True
    run, step, attempt = place
    for resume in resumes:
        later, start = resume.get("attempt"), resume.get("from")
        if isinstance(later, int) and isinstance(start, int) and str(resume.get("run_id")) == run:
            if attempt < later and step > start:
                return False
    return attempt == last[run, step]


def read_manifest(output_dir: str | Path) -> dict[str, Any] | None:
    """The manifest of the run in `output_dir`, None where there is none that can be read."""
    path = Path(output_dir) / DIRECTORY / MANIFEST
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def next_attempt(output_dir: str | Path) -> int:
    """1 + the highest attempt found below ``<output_dir>/chronomoe``; 0 where there is no telemetry yet."""
    directory = Path(output_dir) / DIRECTORY
    found = [-1]
    if (manifest := read_manifest(output_dir)) is not None:
        found.append(manifest.get("attempt", 0))
    for kind in KINDS:
        path = directory / f"{kind}.jsonl"
        if path.is_file():
            found += [record.get("attempt", 0) for _, record in read_lines(path) if record is not None]
    return 1 + max(attempt for attempt in found if isinstance(attempt, int))
