"""Safetensors files as tables of byte ranges: reading headers, and writing files made of parts of other files.

A row of the first axis is one range of bytes, so tensors are cut without knowing their dtype and without holding them:
memory stays at one buffer, whatever the size of the model. Layout of a file: 8 bytes with the length of the header,
the header as JSON (dtype, shape and offsets by name), then the data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from chronomoe_hf.errors import ExportError
from chronomoe_hf.export.slicing import Piece
from chronomoe_hf.jsonfiles import weight_map

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
BUFFER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Args:
        file: that holds it.
        dtype: as the format calls it.
        shape: of the tensor.
        begin, end: its bytes in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def checkpoint_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, in the order of its index.

    Raises:
        ExportError: there is none, or one that the index names is missing.
    """
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(_index(index).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ExportError(
                f"{directory} lacks {len(missing)} of its {len(names)} weight files (first: {missing[0]}); fetch them, "
                "nothing was written"
            )
        return [directory / name for name in names]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    other = sorted(path.name for path in directory.glob("*.bin"))
    hint = f"; {other[0]} is a pickle, load and save the model once to convert it" if other else ""
    raise ExportError(f"{directory} has neither {WEIGHTS} nor {INDEX}{hint}")


def _index(path: Path) -> dict[str, str]:
    try:
        return weight_map(path)
    except ValueError as error:
        raise ExportError(f"{path} is not an index of weight files: {error}") from None


def read_tables(directory: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a checkpoint, and the metadata of its first file.

    Raises:
        ExportError: a file is missing or torn, a name appears twice, or the index and the files differ.
    """
    table: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in checkpoint_files(directory):
        found, meta = read_header(file)
        twice = sorted(found.keys() & table.keys())
        if twice:
            raise ExportError(f"{file} holds {twice[0]}, which another file of {directory} holds too")
        table |= found
        metadata = metadata or meta
    if (directory / INDEX).is_file():
        listed = _index(directory / INDEX)
        wrong = sorted(n for n in listed.keys() | table.keys() if n not in table or listed.get(n) != table[n].file.name)
        if wrong:
            raise ExportError(
                f"{directory / INDEX} and the weight files disagree about {wrong[0]}; nothing was written"
            )
    return table, metadata


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
        ExportError: it is torn, or no safetensors file.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        start = 8 + length
        metadata = header.pop("__metadata__", {})
        table = {
            name: Stored(
                file, entry["dtype"], tuple(entry["shape"]), *(start + int(at) for at in entry["data_offsets"])
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} is not a safetensors file: {error}") from error
    if any(not start <= stored.begin <= stored.end <= size for stored in table.values()):
        raise ExportError(f"{file} is torn: it has {size} bytes, its header speaks of more; fetch it again")
    return table, metadata


def cut_shape(stored: Stored, piece: Piece) -> tuple[int, ...]:
    """Shape of the piece."""
    if piece.axis is None:
        return stored.shape
    return (*stored.shape[: piece.axis], len(piece.ids), *stored.shape[piece.axis + 1 :])


def measure_pieces(source: Mapping[str, Stored], pieces: Mapping[str, Piece]) -> tuple[int, int]:
    """Numbers and bytes of all pieces."""
    numbers = size = 0
    for piece in pieces.values():
        stored = source[piece.source]
        count, whole = math.prod(cut_shape(stored, piece)), math.prod(stored.shape)
        numbers += count
        size += (stored.end - stored.begin) * count // max(whole, 1)
    return numbers, size


def write_checkpoint(
    directory: Path, source: Mapping[str, Stored], pieces: Mapping[str, Piece], metadata: Mapping[str, str]
) -> tuple[int, int]:
    """Write the pieces as weight files, as many as hold what is left of the source's, with an index if there are more.

    Args:
        directory: that gets the files.
        source: tensors of the larger checkpoint.
        pieces: by name in the smaller one.
        metadata: for every file.

    Returns:
        Parameters and bytes written.
    """
    by_file: dict[Path, list[str]] = {}
    for name in sorted(
        pieces, key=lambda name: (str(source[pieces[name].source].file), source[pieces[name].source].begin)
    ):
        by_file.setdefault(source[pieces[name].source].file, []).append(name)
    many = len(by_file) > 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(by_file.values(), start=1):
        file = f"model-{number:05d}-of-{len(by_file):05d}.safetensors" if many else WEIGHTS
        total += _write_file(directory / file, names, source, pieces, metadata)
        weight_map |= dict.fromkeys(names, file)
    parameters = measure_pieces(source, pieces)[0]
    if many:
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return parameters, total


def _write_file(
    path: Path,
    names: Sequence[str],
    source: Mapping[str, Stored],
    pieces: Mapping[str, Piece],
    metadata: Mapping[str, str],
) -> int:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        piece = pieces[name]
        stored = source[piece.source]
        shape = cut_shape(stored, piece)
        size = stored.end - stored.begin
        if piece.axis is not None:
            size = size // stored.shape[piece.axis] * len(piece.ids)
        header[name] = {"dtype": stored.dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        with open(source[pieces[names[0]].source].file, "rb") as file:  # all names of a file come from one file
            for name in names:
                for part in _parts(file, source[pieces[name].source], pieces[name]):
                    out.write(part)
    return at


def _parts(file: IO[bytes], stored: Stored, piece: Piece) -> Iterator[bytes]:
    """The bytes of a piece, a buffer at a time."""
    if piece.axis is None:
        yield from _range(file, stored.begin, stored.end)
        return
    outer = math.prod(stored.shape[: piece.axis])
    row = (stored.end - stored.begin) // max(outer * stored.shape[piece.axis], 1)
    if outer == 1:
        for first, last in _runs(piece.ids):
            yield from _range(file, stored.begin + first * row, stored.begin + (last + 1) * row)
        return
    # The experts lie on an inner axis: a few outer rows at a time, as bytes.
    inner = stored.shape[piece.axis] * row
    step = max(1, BUFFER_BYTES // max(inner, 1))
    for start in range(0, outer, step):
        count = min(step, outer - start)
        file.seek(stored.begin + start * inner)
        block = np.frombuffer(file.read(count * inner), dtype=np.uint8).reshape(count, stored.shape[piece.axis], row)
        yield np.ascontiguousarray(block[:, list(piece.ids)]).tobytes()


def _runs(ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive ids."""
    first = last = None
    for number in ids:
        if first is None or last is None:
            first = last = number
        elif number == last + 1:
            last = number
        else:
            yield first, last
            first = last = number
    if first is not None and last is not None:
        yield first, last


def _range(file: IO[bytes], begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    while begin < end:
        part = file.read(min(BUFFER_BYTES, end - begin))
        if not part:
            raise ExportError(f"{file.name} ended while it was read; is it still being written?")
        begin += len(part)
        yield part
