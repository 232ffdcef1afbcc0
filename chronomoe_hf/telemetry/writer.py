"""TelemetryWriter: append-only records below ``<output_dir>/chronomoe``; write errors are logged and never raised.

Routing events of a window with more than :data:`ARRAYS_FROM` experts (layers x experts) keep their per-expert numbers
in ``arrays.bin`` (see ``telemetry.arrays``), everything else in JSONL; ``read_events`` puts the two together again.

Nothing is buffered: every call ends in one ``write`` on a descriptor opened for appending, so a killed process
leaves at most one half line, and two writers never mix inside a line.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ConfigError, TelemetryError
from chronomoe_hf.jsonfiles import write_json
from chronomoe_hf.telemetry.arrays import ARRAYS, pack, stack
from chronomoe_hf.telemetry.events import COUNTS, INTEGERS, RECORD_SCHEMA, VECTORS, RoutingEvent
from chronomoe_hf.telemetry.reader import ATTEMPTS, DIRECTORY, KINDS, MANIFEST, next_attempt, read_jsonl, read_manifest

__all__ = ["KINDS", "TelemetryWriter", "next_attempt", "read_jsonl", "read_manifest"]

logger = logging.getLogger("chronomoe_hf")

ARRAYS_FROM = 1024  # experts of a window, over all layers; above, JSON takes more than 50 ms a window to write


class TelemetryWriter:
    """Writes records of one attempt of one run.

    After construction no failure reaches the caller: a full disk, a vanished directory or an unwritable file is
    reported once as an error, the writer switches itself off, and :attr:`dropped` counts what was lost.

    Attributes:
        written, dropped: records.
        bytes: that the directory holds, as far as this writer knows.

    Args:
        run_id: put into every record.
        output_dir: records go to ``<output_dir>/chronomoe``, created if missing.
        attempt: 0 for the first start of a run; see :func:`next_attempt` for a resume.

    Raises:
        TelemetryError: the directory cannot be created or written.
    """

    def __init__(self, run_id: str, output_dir: str | os.PathLike[str], attempt: int = 0) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self.directory = Path(output_dir) / DIRECTORY
        self.written = 0
        self.dropped = 0
        self.bytes = 0
        self.enabled = True
        self._closed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
            self.bytes = sum(path.stat().st_size for path in self.directory.iterdir() if path.is_file())
        except OSError as error:
            raise TelemetryError(
                f"telemetry cannot be written to {self.directory}: {error}; "
                "choose another output_dir, or set telemetry.jsonl to False"
            ) from error

    def path(self, kind: str) -> Path:
        """File of one kind of record (one of :data:`KINDS`)."""
        if kind not in KINDS:
            raise ConfigError(f"no record kind {kind!r}; known: {', '.join(KINDS)}")
        return self.directory / f"{kind}.jsonl"

    def write(self, kind: str, record: Mapping[str, Any] | Any) -> bool:
        """Append one record; see :meth:`write_many`."""
        return self.write_many(kind, [record]) == 1

    def write_many(self, kind: str, records: Iterable[Mapping[str, Any] | Any]) -> int:
        """Append records in one go.

        Args:
            kind: one of :data:`KINDS`.
            records: dictionaries, or objects with ``to_record()``. ``schema``, ``run_id`` and ``attempt`` are set
                here; NaN and infinities become null.

        Returns:
            How many were written.
        """
        path = self.path(kind)
        records = list(records)
        large = _large_window(records) if kind == "routing_events" else []
        if large:
            if not self.enabled or not self._write_arrays(large):
                self.dropped += len(large)
                return 0
            records = [event.to_record(vectors=False) for event in large]
        lines = [line for record in records if (line := self._line(kind, record)) is not None]
        if not lines:
            return 0
        if not self.enabled:
            self.dropped += len(lines)
            return 0
        try:
            data = "".join(lines).encode("ascii")
            _append(path, data)
            self.bytes += len(data)
        except OSError as error:
            self._switch_off(f"{path}: {error}", len(lines))
            return 0
        self.written += len(lines)
        return len(lines)

    def _write_arrays(self, events: list[RoutingEvent]) -> bool:
        """Append one frame with the per-expert numbers of a window; whether that went well."""
        experts = [event.n_experts for event in events]
        arrays = {
            name: stack([getattr(event, name) for event in events], experts, integers=name in INTEGERS)
            for name in (COUNTS, *VECTORS)
            if any(getattr(event, name) is not None for event in events)
        }
        layers = [event.layer_id for event in events]
        path = self.directory / ARRAYS
        try:
            data = pack(self.run_id, self.attempt, events[0].step, events[0].mode, layers, experts, arrays)
            _append(path, data, b"")
            self.bytes += len(data)
        except OSError as error:
            self._switch_off(f"{path}: {error}", 0)
            return False
        return True

    def write_manifest(self, manifest: Mapping[str, Any], *, resumed_from: int | None = None) -> bool:
        """Write ``run_manifest.json`` if there is none of this run, and note the start of this attempt.

        Every attempt appends ``{"event": "start" | "resume", "from": step, "manifest": {...}}`` to
        ``attempts.jsonl``. ``run_manifest.json`` is that of the newest run in the directory; the first attempt's
        manifest of a run is never overwritten by a later attempt, and those of earlier runs stay in
        ``attempts.jsonl``.

        Args:
            manifest: from :func:`chronomoe_hf.telemetry.run_manifest`.
            resumed_from: optimizer step of the checkpoint this attempt continues, None for a fresh start.

        Returns:
            Whether this call wrote ``run_manifest.json``.
        """
        clean = {**strict(manifest), "run_id": self.run_id, "attempt": self.attempt}
        path = self.directory / MANIFEST
        wrote = False
        if self.enabled and (read_manifest(self.directory.parent) or {}).get("run_id") != self.run_id:
            try:
                write_json(path, clean, indent=2, sort_keys=True)
                self.bytes += path.stat().st_size
                wrote = True
            except OSError as error:
                self._switch_off(f"{path}: {error}", 1)
        event = "start" if resumed_from is None else "resume"
        self.write(ATTEMPTS, {"event": event, "from": resumed_from, "step": resumed_from or 0, "manifest": clean})
        return wrote

    def close(self) -> None:
        """Say what was lost, if anything. Nothing is buffered, so nothing needs flushing."""
        if self.dropped and not self._closed:
            logger.warning("telemetry of run %s: %d records were dropped", self.run_id, self.dropped)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, kind: str, record: Any) -> str | None:
        """One line of strict JSON, or None (counted as dropped) for something that is no record."""
        try:
            data = record if isinstance(record, Mapping) else record.to_record()
            data = {"schema": RECORD_SCHEMA, **data, "run_id": self.run_id, "attempt": self.attempt}
            try:
                return json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"
            except ValueError:  # NaN or infinity somewhere
                return json.dumps(strict(data), allow_nan=False, separators=(",", ":")) + "\n"
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            if not self.dropped:
                logger.error("telemetry: a %s record cannot be written as JSON: %s", kind, error)
            self.dropped += 1
            return None

    def _switch_off(self, reason: str, lost: int) -> None:
        self.enabled = False
        self.dropped += lost
        logger.error("telemetry is off for the rest of this run, training goes on; %s", reason)


def _large_window(records: list[Any]) -> list[RoutingEvent]:
    """The records, if they are the events of one window with more than ARRAYS_FROM experts; else none."""
    events = [record for record in records if isinstance(record, RoutingEvent)]
    windows = {(event.step, event.mode) for event in events}
    large = len(events) == len(records) and len(windows) == 1 and sum(e.n_experts for e in events) > ARRAYS_FROM
    return events if large else []


def strict(value: Any) -> Any:
    """Copy of plain data in which NaN and infinities are None and tuples are lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def _append(path: Path, data: bytes, end: bytes = b"\n") -> None:
    """Append bytes after `end`: a half line left by a killed or full-disk process is closed first.

    Raises:
        OSError: among others where the file is a link: whatever it points to is not ours to append to.
    """
    with open(path, "ab+", buffering=0, opener=_open_no_link) as file:
        if end and file.seek(0, os.SEEK_END):
            file.seek(-len(end), os.SEEK_END)
            if file.read(len(end)) != end:
                data = end + data
        view = memoryview(data)
        while view:  # a nearly full disk takes a part first, and refuses the rest on the next try
            view = view[file.write(view) or 0 :]


def _open_no_link(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "is a symbolic link; records are written to regular files only") from None
        raise


# The run manifest: what a reader needs to know about a run before its records.

PACKAGES = ("chronomoe_hf", "torch", "transformers", "accelerate")


def versions() -> dict[str, str | None]:
    """Installed version of every package that shapes the numbers, None where absent, and Python's."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def run_manifest(
    *,
    run_id: str,
    config: ChronoConfig | Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    model_class: str,
    model_name: str = "",
    world_size: int = 1,
    attempt: int = 0,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe a run.

    Args:
        run_id: the run.
        config: the settings in force.
        layers: one mapping per MoE layer, by layer_id: ``layer_id``, ``name``, ``router_class``, ``num_experts``,
            ``top_k`` and whatever else helps a reader.
        model_class: class name of the model.
        model_name: name or path of the model, for people.
        world_size: processes that train together.
        attempt: 0 for the first start.
        notes: remarks in plain words.

    Returns:
        A JSON-ready dictionary; ``created`` is the time in UTC, ISO 8601.
    """
    return {
        "schema": RECORD_SCHEMA,
        "run_id": run_id,
        "attempt": attempt,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "config": config.to_dict() if isinstance(config, ChronoConfig) else dict(config),
        "model_class": model_class,
        "model_name": model_name,
        "world_size": world_size,
        "layers": [dict(layer) for layer in layers],
        "notes": list(notes),
    }
