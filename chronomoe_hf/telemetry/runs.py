"""Runs that share one directory, told apart by ``attempts.jsonl``: a start begins a run, a resume continues one."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]


@dataclass
class Run:
    """One run of a directory: everything from one start on, resumes included.

    Attributes:
        name: the run id; ``<run id>#2`` for its second start, where one id was started more than once.
        run_id: as in the records.
        attempts: start and resumes, in the order in which they were written.
        resumes: ``(attempt, step)`` of every resume: what earlier attempts wrote past that step is overwritten.
        manifest: as written at the first of these attempts; empty where it is not known.
    """

    name: str
    run_id: str
    attempts: list[int] = field(default_factory=list)
    resumes: list[tuple[int, int]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)


def _count(value: Any) -> int | None:
    """A step or an attempt; None for anything that cannot be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


class History:
    """Which run a record belongs to, and which records a later attempt has overwritten.

    Args:
        attempts: records of ``attempts.jsonl`` in file order; none for a directory without that file.
    """

    def __init__(self, attempts: Iterable[Record] = ()) -> None:
        self.runs: list[Run] = []
        self._of: dict[tuple[str, int], Run] = {}
        for record in attempts:
            self._add(record)

    def _add(self, record: Record) -> None:
        run_id, attempt, start = str(record.get("run_id")), _count(record.get("attempt")), _count(record.get("from"))
        if attempt is None:
            return
        same = [run for run in self.runs if run.run_id == run_id]
        if start is None or not same:
            manifest = record.get("manifest")
            name = run_id if not same else f"{run_id}#{len(same) + 1}"
            same.append(Run(name, run_id, manifest=dict(manifest) if isinstance(manifest, Mapping) else {}))
            self.runs.append(same[-1])
        run = same[-1]
        run.attempts.append(attempt)
        if start is not None:
            run.resumes.append((attempt, start))
        self._of[run_id, attempt] = run

    def run_of(self, record: Record) -> Run:
        """The run of a record; an id that ``attempts.jsonl`` does not know is a run of its own from here on."""
        run_id, attempt = str(record.get("run_id")), record.get("attempt", 0)
        known = self._of.get((run_id, attempt)) if isinstance(attempt, int) else None
        if known is None:
            known = next((run for run in reversed(self.runs) if run.run_id == run_id), None)
        if known is None:
            known = Run(run_id, run_id)
            self.runs.append(known)
        return known

    def overwritten(self, record: Record) -> bool:
        """Whether a later attempt resumed from a step before this record's."""
        step, attempt = record.get("step"), record.get("attempt", 0)
        if not isinstance(step, int) or not isinstance(attempt, int):
            return False
        return any(attempt < later and step > start for later, start in self.run_of(record).resumes)

    def find(self, name: str) -> Run | None:
        """The newest run whose name or id begins with `name`; an exact name wins."""
        exact = [run for run in self.runs if run.name == name]
        close = [run for run in self.runs if run.name.startswith(name)]
        return (exact or close)[-1] if exact or close else None


def this_process() -> dict[str, Any]:
    """What a reader on this machine needs to see whether the run is alive: the process id and a digest of the host."""
    return {"pid": os.getpid(), "host": _host()}


def is_gone(process: Any) -> bool:
    """Whether :func:`this_process` of a run names a process of this machine that does not exist any more."""
    if not isinstance(process, Mapping) or process.get("host") != _host():
        return False
    pid = _count(process.get("pid"))
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False  # it is someone else's
    return False


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]
