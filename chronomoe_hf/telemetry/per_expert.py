"""Routing events read back with their per-expert numbers, whether a run keeps them in JSONL or in ``arrays.bin``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chronomoe_hf.telemetry.arrays import ARRAYS, Frame, FrameFile, read_frames, stack
from chronomoe_hf.telemetry.events import COUNTS, INTEGERS
from chronomoe_hf.telemetry.reader import lines_from_end, parse_line, read_history, read_lines, with_arrays
from chronomoe_hf.telemetry.runs import History, Run
from chronomoe_hf.telemetry.views import number, whole

EVENTS = "routing_events.jsonl"
_MOST_EXPERTS = 2**20


def read_events(directory: str | Path, run: Run | None = None, mode: str | None = None) -> Iterator[dict[str, Any]]:
    """Routing-event records with ``counts`` and the other per-expert lists, in file order, one window at a time.

    Args:
        directory: a ``chronomoe`` directory.
        run: only the events of this run, one of ``read_history(directory).runs``.
        mode: only events of this mode; the per-expert lists of others are not read.

    Yields:
        Records as ``RoutingEvent.to_record`` made them; broken lines and events whose arrays are lost are left out,
        and so is what a later attempt overwrote by resuming from before it.
    """
    directory, history = Path(directory), read_history(directory)
    frames = FrameFile(directory / ARRAYS)
    path = directory / EVENTS
    for _, record in read_lines(path) if path.is_file() else ():
        if record is None or history.overwritten(record) or (mode is not None and record.get("mode") != mode):
            continue
        if run is not None and history.run_of(record).name != run.name:
            continue
        if record.get("arrays") is not True:
            yield record
        elif (filled := with_arrays(record, frames)) is not None:
            yield filled


def newest_events(
    directory: str | Path, windows: int, mode: str | None, modes: Sequence[str]
) -> tuple[list[dict[str, Any]], str, set[str]]:
    """The routing events of the newest windows of one mode, in file order, with their per-expert lists.

    In the directory of one run the file is read from its end, no further than that takes. Where several runs share a
    directory, or its attempts are not known, steps may come in any order, and the file is read twice. Either way no
    more than the events that are returned are held.

    Args:
        directory: a ``chronomoe`` directory.
        windows: steps wanted.
        mode: of the events; None = the first of `modes` that was recorded.
        modes: see there.

    Returns:
        The events; the mode that was chosen, the first of `modes` where none was recorded; and the modes that were
        seen, all of them where there are no events.
    """
    directory = Path(directory)
    path, history = directory / EVENTS, read_history(directory)
    in_order = len(history.runs) == 1
    stands = set[tuple[str, int, int]]() if in_order else _standing_places(path, history)
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    raws = lines_from_end(path) if path.is_file() else iter(())
    attempts: dict[int, int] = {}
    frames = FrameFile(directory / ARRAYS)
    for raw in raws:
        record = parse_line(raw)
        if record is None or history.overwritten(record) or (record.get("arrays") is True and record not in frames):
            continue
        step, attempt = record.get("step"), record.get("attempt", 0)
        if not isinstance(step, int) or not isinstance(attempt, int):
            continue
        if in_order:
            if attempt < attempts.setdefault(step, attempt):
                continue
        elif (history.run_of(record).name, step, attempt) not in stands:
            continue
        name = str(record.get("mode"))
        steps = found.setdefault(name, {})
        if step not in steps and len(steps) == windows:
            if in_order and name == (mode or modes[0]):
                break
            if step < min(steps):
                continue
            steps.pop(min(steps))
        steps.setdefault(step, []).append(record)
    chosen = mode or next((name for name in modes if name in found), modes[0])
    kept = [record for step in sorted(found.get(chosen, {})) for record in reversed(found[chosen][step])]
    filled = [with_arrays(record, frames) for record in kept]
    return [record for record in filled if record is not None], chosen, set(found)


def _standing_places(path: Path, history: History) -> set[tuple[str, int, int]]:
    """``(run, step, attempt)`` of the last attempt at every step."""
    last: dict[tuple[str, int], int] = {}
    for _, record in read_lines(path) if path.is_file() else ():
        step, attempt = (None, None) if record is None else (record.get("step"), record.get("attempt", 0))
        if record is not None and isinstance(step, int) and isinstance(attempt, int):
            key = history.run_of(record).name, step
            last[key] = max(attempt, last.get(key, attempt))
    return {(*key, attempt) for key, attempt in last.items()}


def read_windows(directory: str | Path, run: Run | None = None, names: tuple[str, ...] = (COUNTS,)) -> Iterator[Frame]:
    """One :class:`Frame` a window, from ``arrays.bin`` or gathered from the JSONL lines of the window.

    Args:
        directory: a ``chronomoe`` directory.
        run: only the windows of this run.
        names: per-expert fields wanted from JSONL; a frame of ``arrays.bin`` brings all it has.

    Yields:
        Windows in file order, training and evaluation (``mode``); the same step may come twice, the later counts.
    """
    directory, history = Path(directory), read_history(directory)
    path = directory / ARRAYS
    for _, whole_frame in read_frames(path) if path.is_file() else ():
        if whole_frame is not None and _stands(whole_frame, history, run):
            yield whole_frame
    gathered: list[dict[str, Any]] = []
    place: tuple[Any, ...] | None = None
    path = directory / EVENTS
    for _, record in read_lines(path) if path.is_file() else ():
        if record is None or record.get("arrays") is True or not _is_event(record):
            continue
        here = record.get("run_id"), record.get("attempt", 0), record["step"], record.get("mode", "TRAIN")
        if here != place and gathered:
            if _stands(frame := _gather(gathered, names), history, run):
                yield frame
            gathered = []
        place = here
        gathered.append(record)
    if gathered and _stands(frame := _gather(gathered, names), history, run):
        yield frame


def _stands(frame: Frame, history: History, run: Run | None) -> bool:
    record = {"run_id": frame.run_id, "attempt": frame.attempt, "step": frame.step}
    if run is not None and history.run_of(record).name != run.name:
        return False
    return not history.overwritten(record)


def counts_of(record: dict[str, Any]) -> Any:
    """The counts of an event."""
    return record.get(COUNTS)


def _is_event(record: dict[str, Any]) -> bool:
    counts = counts_of(record)
    return (
        whole(record.get("step")) is not None
        and whole(record.get("layer_id")) is not None
        and isinstance(counts, list)
        and 0 < len(counts) <= _MOST_EXPERTS
    )


def _gather(records: list[dict[str, Any]], names: tuple[str, ...]) -> Frame:
    """The events of one window as a frame; of a layer recorded twice the later one counts."""
    by_layer = {int(record["layer_id"]): record for record in records}
    layers = sorted(by_layer)
    experts = [len(counts_of(by_layer[layer])) for layer in layers]
    arrays = {}
    for name in names:
        rows = [_row(by_layer[layer], name, size) for layer, size in zip(layers, experts, strict=True)]
        if any(row is not None for row in rows):
            arrays[name] = stack(rows, experts, integers=name in INTEGERS)
    first = records[0]
    attempt = whole(first.get("attempt")) or 0
    return Frame(
        str(first.get("run_id")), attempt, int(first["step"]), str(first.get("mode", "TRAIN")), layers, experts, arrays
    )


def _row(record: dict[str, Any], name: str, size: int) -> list[float | None] | None:
    values = counts_of(record) if name == COUNTS else record.get(name)
    if not isinstance(values, list) or len(values) != size:
        return None
    return [number(value) for value in values]
