"""Bytes of a state on disk: synced writes, and reads that check what they open. Knows no format."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from chronomoe_hf.checkpoint.manifest import WAY_OUT, short
from chronomoe_hf.errors import StateCorruptError, StateError, StateMissingError


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Create `path` (it must not exist) with `data` and sync it."""
    # Mode 0666 less the umask, like the other files of a checkpoint (mkstemp would make it private).
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("O_BINARY"), 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flag(name: str) -> int:
    return getattr(os, name, 0)  # O_BINARY exists on Windows only, O_NOFOLLOW and O_NONBLOCK elsewhere


def _roots(directory: Path) -> Iterator[Path]:
    """Where a file of `directory` may really lie: there, or in the blobs of the Hub cache it is a snapshot of."""
    yield directory
    for ancestor in directory.parents:
        if ancestor.name == "snapshots":
            yield ancestor.parent / "blobs"


def read_bytes(path: Path, limit: int, size: int | None = None) -> bytes:
    """The content of a regular file, sized before it is read.

    Args:
        path: File in a state's folder; a link may only lead to that folder or to the blobs of a Hub cache.
        limit: Most bytes that are read.
        size: The size it must have, if known.

    Raises:
        StateMissingError, StateCorruptError, StateError: It is not there, not what it should be, or unreadable.
    """
    try:
        real = path.resolve(strict=True)
        if real.parent not in _roots(path.parent.resolve()):
            raise StateCorruptError(f"{path} is a link out of its directory, to {real}; copy the file there instead")
        # O_NONBLOCK: opening a FIFO must not hang.
        handle = os.open(real, os.O_RDONLY | _flag("O_NOFOLLOW") | _flag("O_NONBLOCK") | _flag("O_BINARY"))
    except (FileNotFoundError, NotADirectoryError):
        raise StateMissingError(
            f"{path} does not exist; pass the directory of a checkpoint that was saved with chronomoe_hf"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise StateError(f"{path} cannot be read: {short(error)}; {WAY_OUT}") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise StateCorruptError(f"{path} is not a regular file; {WAY_OUT}")
        if size is not None and status.st_size != size:
            raise StateCorruptError(f"{path} has {status.st_size} bytes, its manifest names {size}; {WAY_OUT}")
        if status.st_size > limit:
            raise StateCorruptError(f"{path} has {status.st_size} bytes, at most {limit} are read; {WAY_OUT}")
        try:
            return file.read(status.st_size)
        except OSError as error:
            raise StateError(f"{path} cannot be read: {short(error)}; {WAY_OUT}") from error
