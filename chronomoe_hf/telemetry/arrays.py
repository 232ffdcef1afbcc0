"""``arrays.bin``: the per-expert numbers of windows that are too large for JSONL, append-only and safe against a crash.

A file is a row of frames, one a window, each in one write:

    magic (4 bytes) | header bytes (u32) | payload bytes (u64) | CRC-32 of header and payload (u32) | header | payload

all little-endian. The header is JSON: run_id, attempt, step, mode, layers (ids), experts (E of each), arrays
(``[name, dtype]``). The payload holds the arrays one after the other, each ``[layers, max E]`` in C order. A frame
that a killed process left half written fails its length or its CRC; the reader then looks for the next magic.

Shape suffixes: L layers of the frame, E experts (the largest layer; NaN or -1 beyond a layer's own).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry.values import finite_list

ARRAYS = "arrays.bin"
MAGIC = b"\x93CMA"
_HEAD = struct.Struct("<4sIQI")
MAX_HEADER = 2**24
MAX_PAYLOAD = 2**32
_DTYPES = ("<f4", "<f8", "<i4", "<i8")
_BLOCK = 1 << 20

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Frame:
    """The per-expert numbers of one window.

    Attributes:
        run_id, attempt, step, mode: as in the routing events of the window.
        layers: layer ids, length L.
        experts: E of each.
        arrays: name -> ``[L, E]``; float32 with NaN, or integers with -1, where there is no evidence.
    """

    run_id: str
    attempt: int
    step: int
    mode: str
    layers: list[int]
    experts: list[int]
    arrays: dict[str, Array]

    def row(self, name: str, layer: int) -> list[float | int | None] | None:
        """One layer's values as plain numbers, None for an expert without; None where nothing was recorded."""
        at = self.layers.index(layer)
        value_LE = self.arrays.get(name)
        if value_LE is None:
            return None
        value_E = value_LE[at, : self.experts[at]]
        if value_E.dtype.kind == "i":
            values = [None if value < 0 else value for value in value_E.tolist()]
        else:
            values = finite_list(value_E.tolist()) or []  # to 7 digits, as the JSONL lines have them
        return values if any(value is not None for value in values) else None


def stack(rows: Sequence[Sequence[float | int | None] | None], experts: Sequence[int], *, integers: bool) -> Array:
    """Rows of one layer each as ``[L, E]``: int32 (int64 where needed) or float32; -1 or NaN where there is none."""
    values_LE = np.full((len(rows), max(experts, default=0)), -1 if integers else math.nan, dtype=np.float64)
    for at, row in enumerate(rows):
        if row is not None:
            values_LE[at, : len(row)] = np.array(row, dtype=np.float64)  # None becomes NaN
    if not integers:
        return values_LE.astype("<f4")
    values_LE = np.where(np.isnan(values_LE), -1, np.rint(values_LE))
    wide = bool((values_LE > np.iinfo(np.int32).max).any())
    return values_LE.astype("<i8" if wide else "<i4")


def pack(
    run_id: str, attempt: int, step: int, mode: str, layers: list[int], experts: list[int], arrays: Mapping[str, Array]
) -> bytes:
    """One frame as bytes."""
    named = [[name, value.dtype.newbyteorder("<").str] for name, value in arrays.items()]
    if any(dtype not in _DTYPES for _, dtype in named):
        raise ConfigError(f"arrays are one of {', '.join(_DTYPES)}, got {named}")
    about = {"run_id": run_id, "attempt": attempt, "step": step, "mode": mode}
    fields = {**about, "layers": layers, "experts": experts, "arrays": named}
    header = json.dumps(fields, allow_nan=False, separators=(",", ":")).encode("ascii")
    payload = b"".join(np.ascontiguousarray(value).tobytes() for value in arrays.values())
    return _HEAD.pack(MAGIC, len(header), len(payload), zlib.crc32(payload, zlib.crc32(header))) + header + payload


def read_frames(path: str | Path) -> Iterator[tuple[int, Frame | None]]:
    """Every frame of a file in order, with its offset in bytes; None once for every stretch that is no whole frame."""
    with open(path, "rb") as file:
        sound = True
        while True:
            start = file.tell()
            frame = _frame(file)
            if frame is not None:
                sound = True
                yield start, frame
                continue
            if file.seek(start) == start and not file.read(1):
                return
            if sound:
                yield start, None
            sound = False
            if not _seek_magic(file, start + 1):
                return


def frame_at(path: str | Path, offset: int) -> Frame | None:
    """The frame at an offset of :func:`read_frames`; None where there is none any more."""
    with open(path, "rb") as file:
        file.seek(offset)
        return _frame(file)


def _frame(file: Any) -> Frame | None:
    """The frame at the file's position; None where there is none (the position is then anywhere)."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, header_size, payload_size, crc = _HEAD.unpack(head)
    if magic != MAGIC or header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
        return None
    header, payload = file.read(header_size), file.read(payload_size)
    if len(header) < header_size or len(payload) < payload_size or zlib.crc32(payload, zlib.crc32(header)) != crc:
        return None
    try:
        return _decode(json.loads(header), payload)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _decode(record: dict[str, Any], payload: bytes) -> Frame:
    layers, experts = [int(i) for i in record["layers"]], [int(e) for e in record["experts"]]
    if len(layers) != len(experts):
        raise ValueError("one number of experts a layer")
    shape, at, arrays = (len(layers), max(experts, default=0)), 0, {}
    for name, dtype in record["arrays"]:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype}")
        value_LE = np.frombuffer(payload, dtype=dtype, count=shape[0] * shape[1], offset=at).reshape(shape)
        arrays[str(name)] = value_LE
        at += value_LE.nbytes
    if at != len(payload):
        raise ValueError("more bytes than arrays")
    numbers = int(record["attempt"]), int(record["step"])
    return Frame(str(record["run_id"]), *numbers, str(record["mode"]), layers, experts, arrays)


def _seek_magic(file: Any, start: int) -> bool:
    """Move to the next magic from `start` on; False where there is none."""
    file.seek(start)
    kept = b""
    while block := file.read(_BLOCK):
        data = kept + block
        found = data.find(MAGIC)
        if found >= 0:
            file.seek(start + found)
            return True
        keep = len(MAGIC) - 1
        start += len(data) - min(keep, len(data))
        kept = data[-keep:]
    return False


class FrameFile:
    """The frames of a file by the window they belong to; the one in use is held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        frames = read_frames(path) if path.is_file() else ()
        self._offsets = {_window(frame): offset for offset, frame in frames if frame is not None}
        self._held: Frame | None = None

    def __contains__(self, record: Mapping[str, Any]) -> bool:
        """Whether there is a frame of the window that a record belongs to."""
        return tuple(record.get(name) for name in _WINDOW) in self._offsets

    def of(self, record: Mapping[str, Any]) -> Frame | None:
        """The frame of the window that a record belongs to; None where it was lost."""
        key = tuple(record.get(name) for name in _WINDOW)
        if key not in self._offsets:
            return None
        if self._held is None or _window(self._held) != key:
            self._held = frame_at(self._path, self._offsets[key])
        return self._held


_WINDOW = ("run_id", "attempt", "step", "mode")


def _window(frame: Frame) -> tuple[Any, ...]:
    return frame.run_id, frame.attempt, frame.step, frame.mode
