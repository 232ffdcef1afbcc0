"""Reading telemetry back: broken lines are skipped and counted, overwritten history is left out, runs stay apart.

Records of older schemas come back under today's names.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from chronomoe_hf.metrics import expert_name
from chronomoe_hf.telemetry.arrays import ARRAYS, FrameFile
from chronomoe_hf.telemetry.events import COUNTS, RECORD_SCHEMA, VECTORS
from chronomoe_hf.telemetry.runs import History, Run

# Records of older schemas under today's names. Plain dictionaries in and out; imports no torch.
#
# Schema 1 had other names for five fields (see ``_NAMES_1``); a lifecycle decision named its expert by number, and had
# Phi_slow and tokens among its evidence only.

_NAMES_1 = {
    "counts": "expert_token_counts",
    "assignments": "token_count",
    "dead": "dead_experts",
    "nearly_dead": "nearly_dead_count",
    "tokens_seen": "total_tokens_seen",
}
# Parts of a record in which these names occurred, beside its own fields.
_PARTS_1 = ("observed", "evidence")


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with today's names; one of today, or of no known schema, as it is."""
    return _from_1(record) if record.get("schema") == 1 else record


def schema_number(record: dict[str, Any]) -> int:
    """The schema number of a record; 0 where it has none. Above RECORD_SCHEMA a newer version wrote it."""
    schema = record.get("schema")
    return schema if isinstance(schema, int) else 0


def _from_1(record: dict[str, Any]) -> dict[str, Any]:
    out = {**_renamed(record), "schema": RECORD_SCHEMA}
    if isinstance(layers := out.get("layers"), list):
        out["layers"] = [_renamed(layer) for layer in layers]
    for name in _PARTS_1:
        if name in out:
            out[name] = _renamed(out[name])
    evidence, layer_id, expert = out.get("evidence"), out.get("layer_id"), out.get("expert_id")
    if isinstance(evidence, dict) and isinstance(layer_id, int) and isinstance(expert, int):
        out |= {"expert_id": expert_name(layer_id, expert), "expert": expert}
        out |= {name: evidence.get(name) for name in ("phi_slow", "total_tokens_seen")}
    return out


def _renamed(part: Any) -> Any:
    """A dictionary with today's keys, in its order; anything else as it is. A key of today is never overwritten."""
    if not isinstance(part, dict):
        return part
    return {(new if (new := _NAMES_1.get(key, key)) == key or new not in part else key): part[key] for key in part}


logger = logging.getLogger("chronomoe_hf")
T = TypeVar("T")

DIRECTORY = "chronomoe"
MANIFEST = "run_manifest.json"
ATTEMPTS = "attempts"
EVENTS = "routing_events"
EFFECTS = "lifecycle_effects"
SPLITS = "lifecycle_splits"
CUTS = "lifecycle_cuts"
REPLAY = "replay"
LOGS = "logs"  # losses, as Trainer logged them
BASELINES = "baselines"  # what the run is compared with
ENDS = "ends"  # the last record of an attempt: whether the run came to its end
KINDS = (
    EVENTS,
    "snapshots",
    "control_decisions",
    "lifecycle_decisions",
    EFFECTS,
    SPLITS,
    CUTS,
    REPLAY,
    "alerts",
    BASELINES,
    ENDS,
    LOGS,
    ATTEMPTS,
)
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
                yield number, parse_line(raw)


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """The JSON object in `raw`, None where it holds anything else (strict: no NaN, no infinity)."""
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return None
    return upgraded(record) if isinstance(record, dict) else None


def read_jsonl(path: str | Path, *, run: Run | None = None) -> tuple[list[dict[str, Any]], int]:
    """Records of one file, without what a later attempt of the same run has overwritten.

    A resumed run repeats steps: of each step the last attempt is kept. The steps of an earlier attempt past the one
    from which a later attempt resumed (``attempts.jsonl`` beside the file) are left out too. Runs that share the
    directory do not overwrite each other.

    Args:
        path: a JSONL file of a TelemetryWriter; a missing file has no records.
        run: only the records of this run, one of ``read_history(directory).runs``.

    Returns:
        The records in file order, and the number of broken lines (their numbers are logged). Routing events come with
        their per-expert lists, from ``arrays.bin`` where they are kept there; ``read_events`` does not hold them all.
    """
    path = Path(path)
    kept, broken = read_each(path, lambda record: record, run=run)
    if path.stem == EVENTS and any(record.get("arrays") is True for record in kept):
        frames = FrameFile(path.with_name(ARRAYS))
        kept = [filled for record in kept if (filled := with_arrays(record, frames)) is not None]
    return kept, broken


def read_each(path: str | Path, make: Callable[[dict[str, Any]], T], *, run: Run | None = None) -> tuple[list[T], int]:
    """What `make` makes of every record of :func:`read_jsonl`, one after the other: no more of them is held.

    Args:
        path: a JSONL file of a TelemetryWriter; a missing file has no records.
        make: called with every record, also of one that a later attempt turns out to have overwritten. The per-expert
            lists of routing events are as in the file.
        run: only the records of this run.

    Returns:
        What was made, in file order, without what was overwritten; and the number of broken lines.
    """
    path = Path(path)
    history = History() if path.stem == ATTEMPTS else read_history(path.parent)
    made: list[tuple[dict[str, Any], T]] = []
    broken: list[int] = []
    for number, record in read_lines(path) if path.is_file() else ():
        if record is None:
            broken.append(number)
        else:
            place: dict[str, Any] = {name: record[name] for name in ("run_id", "attempt", "step") if name in record}
            made.append((place, make(record)))
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        logger.warning("%s: skipped %d broken lines (%s)", path, len(broken), shown)
    if path.stem == ATTEMPTS:
        return [each for _, each in made], len(broken)
    stands = standing([place for place, _ in made], history, run, keep=list(range(len(made))))
    return [made[at][1] for at in stands], len(broken)


def with_arrays(record: dict[str, Any], frames: FrameFile) -> dict[str, Any] | None:
    """A routing-event record with its per-expert lists; None where they are lost."""
    if record.get("arrays") is not True:
        return record
    frame, layer = frames.of(record), record.get("layer_id")
    if frame is None or layer not in frame.layers:
        return None
    return {**record, **{name: frame.row(name, layer) for name in (COUNTS, *VECTORS)}}


def standing(records: list[dict[str, Any]], history: History, run: Run | None, keep: list[T]) -> list[T]:
    """Those of `keep` whose records no later attempt has overwritten; with `run`, only those of that run.

    Args:
        records: with their ``run_id``, ``attempt`` and ``step``, in file order.
        history: of the directory.
        run: see above.
        keep: one entry a record.
    """
    last: dict[tuple[str, int], int] = {}
    for record in records:
        if (place := _place(record, history)) is not None:
            key, attempt = place
            last[key] = max(attempt, last.get(key, attempt))
    kept = []
    for record, each in zip(records, keep, strict=True):
        place = _place(record, history)
        if run is not None and history.run_of(record).name != run.name:
            continue
        if place is None or (last[place[0]] == place[1] and not history.overwritten(record)):
            kept.append(each)
    return kept


def _place(record: dict[str, Any], history: History) -> tuple[tuple[str, int], int] | None:
    """((run, step), attempt) of a record; None for one that does not say (such a record always stands)."""
    step, attempt = record.get("step"), record.get("attempt", 0)
    if not isinstance(step, int) or not isinstance(attempt, int):
        return None
    return (history.run_of(record).name, step), attempt


def read_history(directory: str | Path) -> History:
    """The runs of a ``chronomoe`` directory, oldest first, from its ``attempts.jsonl``."""
    return History(_read_all(Path(directory) / f"{ATTEMPTS}.jsonl")[0])


def read_last(path: str | Path, count: int, *, name: str | None = None) -> Last:
    """The newest records of one run, reading no more of the file's end than that takes.

    Args:
        path: a JSONL file of a TelemetryWriter.
        count: records wanted.
        name: the run, by its name or the beginning of it; by default the run of the last record in the file.

    Returns:
        The records, oldest first, what was skipped on the way, and the directory's runs. ``run`` is None where the
        file holds no record of the run.
    """
    path = Path(path)
    history = read_history(path.parent)
    run = None if name is None else history.find(name)
    records: list[dict[str, Any]] = []
    seen: set[int] = set()
    broken = 0
    for raw in lines_from_end(path) if path.is_file() else ():
        record = parse_line(raw)
        if record is None:
            broken += 1
            continue
        own = history.run_of(record)
        if run is None and (name is None or own.name.startswith(name)):
            run = own
        step = record.get("step")
        if own is not run or history.overwritten(record):
            continue
        if isinstance(step, int):
            if step in seen:
                continue
            seen.add(step)
        records.append(record)
        if len(records) == count:
            break
    return Last(records[::-1], broken, run if records else None, history)


@dataclass(frozen=True)
class Last:
    """What :func:`read_last` found.

    Attributes:
        records: oldest first.
        broken: lines among those read that are no record.
        run: the run of the records; None without records.
        history: every run of the directory that is known.
    """

    records: list[dict[str, Any]]
    broken: int
    run: Run | None
    history: History


def lines_from_end(path: str | Path, block: int = 1 << 18) -> Iterator[bytes]:
    """Non-empty lines of a file, the last one first; a line over 16 MiB is given as one NUL byte, which is no JSON."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        rest, too_long = b"", False
        while end > 0:
            size = min(block, end)
            end -= size
            file.seek(end)
            first, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines):
                if too_long:
                    line, too_long = b"\0", False
                if line.strip():
                    yield line
            rest = first
            if len(rest) > MAX_LINE_BYTES:
                rest, too_long = b"", True
        rest = b"\0" if too_long else rest.removeprefix(b"\xef\xbb\xbf")
        if rest.strip():
            yield rest


def _read_all(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    records, broken = [], []
    if path.is_file():
        for number, record in read_lines(path):
            if record is None:
                broken.append(number)
            else:
                records.append(record)
    return records, broken


def read_manifest(output_dir: str | Path) -> dict[str, Any] | None:
    """The manifest of the run in `output_dir`, None where there is none that can be read."""
    path = Path(output_dir) / DIRECTORY / MANIFEST
    try:
        return parse_line(path.read_bytes())
    except OSError:
        return None


def next_attempt(output_dir: str | Path) -> int:
    """1 + the highest attempt found below ``<output_dir>/chronomoe``; 0 where there is no telemetry yet.

    Every attempt has a line in ``attempts.jsonl``; of the other files only the last record is read, in case that
    line was lost.
    """
    directory = Path(output_dir) / DIRECTORY
    found = [-1]
    if (manifest := read_manifest(output_dir)) is not None:
        found.append(manifest.get("attempt", 0))
    found += [record.get("attempt", 0) for record in _read_all(directory / f"{ATTEMPTS}.jsonl")[0]]
    for kind in KINDS:
        path = directory / f"{kind}.jsonl"
        if kind != ATTEMPTS and path.is_file():
            parsed = (parse_line(raw) for raw in lines_from_end(path))
            found += [record.get("attempt", 0) for record in itertools.islice(filter(None, parsed), 1)]
    return 1 + max(attempt for attempt in found if isinstance(attempt, int))
